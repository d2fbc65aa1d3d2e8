#!/usr/bin/env bash
# SciPy 1.17.1: the square root of a covariance matrix of low rank is complex.
# Guess: sqrtm of a real symmetric positive semidefinite matrix (50 x 50, rank 9, as of ten collapsed classes) is real.
# Seen: complex128, with a trace of 56.592824 + 1.4e-07j; the eigen-decomposition gives a real root with trace 56.592825.
source "$(dirname "$0")/pinned.sh"
pinned scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from scipy.linalg import sqrtm

factor = np.random.default_rng(1).normal(size=(50, 9))
covariance = factor @ factor.T
root = sqrtm(covariance)
trace = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0)).sum()
print(root.dtype, np.trace(root), trace)
assert np.iscomplexobj(root) and np.trace(root).imag != 0 and abs(np.trace(root) - trace) < 1e-4
CODE
