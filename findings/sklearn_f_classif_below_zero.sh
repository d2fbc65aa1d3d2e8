#!/usr/bin/env bash
# scikit-learn 1.9.1: the F statistic of collapsed features can be negative, and its p value NaN.
# Guess: f_classif gives inf and p = 0 for every feature that is constant within the classes.
# Seen: four of eight features are about -1e17 with p = NaN, the others about 1e17 or inf with p = 0: the sum of
# squares within is a difference of two rounded sums. SelectKBest ranks such features, which separate the classes
# perfectly, last.
source "$(dirname "$0")/pinned.sh"
pinned scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from sklearn.feature_selection import f_classif

means = np.random.default_rng(2).normal(size=(5, 8))
statistic, p = f_classif(np.repeat(means, 40, axis=0), np.repeat(np.arange(5), 40))
print(statistic, p)
assert (statistic < 0).any() and np.isnan(p[statistic < 0]).all() and (statistic > 1e15).any()
CODE
