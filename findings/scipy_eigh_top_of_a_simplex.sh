#!/usr/bin/env bash
# SciPy 1.17.1: the largest eigenvalues of a simplex's Gram matrix are no eigenvalues at all.
# Guess: eigh(I - 11^T/K, subset_by_index=(K-3, K-1)) returns 1, 1, 1 at every K.
# Seen: K = 100 gives [1. 1. 1.]; K = 200, 300, 500 give an empty array and (K, 0) eigenvectors, without an error or a
# warning. subset_by_value=(0.5, 1.5) gives all K - 1 of them at every K.
source "$(dirname "$0")/pinned.sh"
pinned scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from scipy.linalg import eigh

for K in (100, 200, 300, 500):
    gram = np.eye(K) - 1 / K
    top, vectors = eigh(gram, subset_by_index=(K - 3, K - 1))
    by_value = eigh(gram, subset_by_value=(0.5, 1.5))[0]
    print(K, top, vectors.shape, len(by_value))
    assert len(top) == (3 if K == 100 else 0) and len(by_value) == K - 1
CODE
