#!/usr/bin/env bash
# scikit-learn 1.9.1: MiniBatchKMeans does not find ten classes that have collapsed, if some are rare.
# Guess: with ten clusters for ten different points (1000 to 10 samples) the inertia is 0, as that of KMeans.
# Seen: KMeans 2e-22; MiniBatchKMeans 41832, with n_init=10 44431 (three seeds: to 48527), without a warning; with
# reassignment_ratio=0 9e-26. By default, clusters with fewer samples than 1 % of the largest's are moved to random
# samples, and the clusters of rare classes are such.
source "$(dirname "$0")/pinned.sh"
pinned scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

samples = 50 * np.eye(10)[np.repeat(np.arange(10), [1000, 500, 300, 200, 100, 50, 40, 30, 20, 10])]
options = ({}, {"n_init": 10}, {"reassignment_ratio": 0})
exact = KMeans(10, random_state=0).fit(samples).inertia_
found = [MiniBatchKMeans(10, random_state=0, **option).fit(samples).inertia_ for option in options]
print(exact, found)
assert exact < 1e-9 and min(found[:2]) > 1e4 and found[2] < 1e-9
CODE
