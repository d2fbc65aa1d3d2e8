#!/usr/bin/env bash
# SymPy 1.14.0: Matrix.pinv of the between-class covariance of three classes is wrong in its first digit.
# Guess: pinv of a 4 x 4 matrix of floats of rank 2 agrees with NumPy's to 1e-8.
# Seen: the largest element of NumPy's is 0.51; SymPy's differs from it by 1.02, and with method="ED" by 3.0; its rank()
# is 4. It decides by comparison with zero, and rounding makes the two null directions nonzero.
source "$(dirname "$0")/pinned.sh"
pinned sympy==1.14.0 numpy==2.4.6
check <<'CODE'
import numpy as np
import sympy

means = np.random.default_rng(3).normal(size=(3, 4))
means -= means.mean(0)
between = means.T @ means / 3
matrix, right = sympy.Matrix(between.tolist()), np.linalg.pinv(between)
errors = [np.abs(np.array(matrix.pinv(method=m).tolist(), complex) - right).max() for m in ("RD", "ED")]
print(errors, np.abs(right).max(), matrix.rank(), np.linalg.matrix_rank(between))
assert min(errors) > 0.1 * np.abs(right).max() and np.abs(between @ right @ between - between).max() < 1e-12
CODE
