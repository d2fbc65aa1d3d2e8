#!/usr/bin/env bash
# SciPy 1.17.1: scipy.linalg.interpolative.estimate_rank is seven above the rank.
# Guess: a product of 200 x r and r x 120 Gaussian matrices has estimated rank r.
# Seen: 8, 10, 16, 27, 57 for r = 1, 3, 9, 20, 50; interp_decomp of the same module, at the same precision, finds r.
source "$(dirname "$0")/pinned.sh"
pinned scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from scipy.linalg.interpolative import estimate_rank, interp_decomp

for r in (1, 3, 9, 20, 50):
    matrix = np.random.default_rng(r).normal(size=(200, r)) @ np.random.default_rng(2).normal(size=(r, 120))
    estimated = estimate_rank(matrix, 1e-8, rng=np.random.default_rng(0))
    decomposed = interp_decomp(matrix, 1e-8, rng=np.random.default_rng(0))[0]
    print(r, estimated, decomposed)
    assert estimated == r + 7 and decomposed == r
CODE
