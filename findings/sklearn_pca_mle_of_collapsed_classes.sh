#!/usr/bin/env bash
# scikit-learn 1.9.1: PCA(n_components="mle") takes rounding for dimensions, the more so the larger the features are.
# Guess: of ten collapsed classes in 50 dimensions it finds 9 components, the rank of the centred samples.
# Seen: 17 to 21 with six random sets of means, 26 to 29 if these are 5 times larger, 28 to 30 if 50 times; NumPy's
# matrix_rank is 9. The eigenvalues of rounding, of 1e-30, differ among themselves, and the likelihood looks at ratios.
source "$(dirname "$0")/pinned.sh"
pinned scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from sklearn.decomposition import PCA

labels = np.repeat(np.arange(10), [1000, 500, 300, 200, 100, 50, 40, 30, 20, 10])
for seed in range(6):
    samples = np.random.default_rng(seed).normal(size=(10, 50))[labels]
    found = [int(PCA("mle").fit(scale * samples).n_components_) for scale in (1, 5, 50)]
    print(found)
    assert np.linalg.matrix_rank(samples - samples.mean(0)) == 9 and min(found) > 12 and found[0] < found[2]
CODE
