"""The largest |G v| over non-negative unit vectors v: local maxima, the exact maximum, and upper bounds of it.

Whether t I - G^T G is copositive is NP-hard to decide in general. Below it is decided exactly for a few classes, and by
semidefinite relaxation for more: for any N >= 0 (entrywise), v^T G^T G v <= v^T (G^T G + N) v <= lambda_max(G^T G + N).
"""

import itertools
import math

import numpy as np

ALL_SUPPORTS = 12  # columns up to which the polar is exact at any G: 2^C eigenvalue problems
RELAXED = 200  # columns up to which the relaxation is solved: each step takes an eigenvalue problem of that size
ROUNDING = 1e-8  # an eigenvector with no entry below -ROUNDING may be non-negative
POWER_STEPS = 500  # of the power iteration
SETTLED = 1e-9  # largest change of an entry at which the power iteration stops
RELAXATION_STEPS = 2000
CHECK_EVERY = 20  # steps of the relaxation
STALLED = 200  # steps without a fall of the bound by a hundredth of its distance from the maximum found
TIGHT = 1e-10  # relative distance of a bound from the maximum found at which no better one is sought


def polar(matrix: np.ndarray, relu: bool = True, *, relax: bool = True, start: np.ndarray | None = None) -> float:
    """Return the largest |G v| over |v| = 1 and, with ReLU, v >= 0, of G (K, C): the polar of the gauge.

    Without ReLU it is the largest singular value. With ReLU and up to ALL_SUPPORTS columns, all supports S of v are
    tried: it is the root of the largest eigenvalue of (G^T G)_SS with a non-negative eigenvector. For more columns the
    result is an upper bound sqrt(lambda_max(G^T G + N)), N >= 0, whose N `best_relaxation` finds.

    relax: with False, N is the one for which G^T G + N = max(G^T G, 0). This takes a single eigenvalue problem, and is
    exact if no two columns of G have a positive inner product. start: a positive semidefinite X >= 0 (C, C) at which
    the relaxation starts, best a sum of v v^T over maximisers v; default: that over the local maxima found.

    Example:
        >>> import numpy as np
        >>> from nc_theory import polar
        >>> matrix = np.array([[1.0, 0.0], [1.0, -2.0]])
        >>> f"{polar(matrix):.3f} {polar(matrix, relu=False):.3f}"
        '2.000 2.288'
    """
    gram = matrix.T @ matrix
    if not relu:
        return math.sqrt(np.linalg.eigvalsh(gram)[-1])
    bound = np.linalg.eigvalsh(np.maximum(gram, 0))[-1]
    if not relax or bound <= gram.diagonal().max() * (1 + TIGHT):
        return math.sqrt(bound)
    if len(gram) <= ALL_SUPPORTS:
        return math.sqrt(largest_of_all_supports(gram))
    if len(gram) <= RELAXED:
        bound = min(bound, best_relaxation(gram, start))
    return math.sqrt(bound)


def largest_of_all_supports(gram: np.ndarray) -> float:
    """Return max v^T A v over |v| = 1, v >= 0, of a Gram matrix A (C, C)."""
    largest = gram.diagonal().max()
    for size in range(2, len(gram) + 1):
        supports = np.array(list(itertools.combinations(range(len(gram)), size)))
        values, vectors = np.linalg.eigh(gram[supports[:, :, None], supports[:, None, :]])
        signed = vectors * np.where(vectors.sum(1, keepdims=True) < 0, -1, 1)
        largest = max(largest, values[signed.min(1) >= -ROUNDING].max(initial=0.0))
    return float(largest)


def local_maxima(gram: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return local maxima of v^T A v over |v| = 1, v >= 0, for a Gram matrix A (C, C): values (P,), vectors (C, P).

    Projected power iterations, along which the value never falls, from the C axes and as many random vectors.
    """
    starts = np.random.default_rng(seed).random(gram.shape)
    vectors = np.hstack([np.eye(len(gram)), starts / np.linalg.norm(starts, axis=0)])
    for _ in range(POWER_STEPS):
        moved = np.maximum(gram @ vectors, 0)
        norms = np.linalg.norm(moved, axis=0)
        moved = np.where(norms > 0, moved / np.where(norms > 0, norms, 1), vectors)
        change, vectors = np.abs(moved - vectors).max(), moved
        if change < SETTLED:
            break
    return (vectors * (gram @ vectors)).sum(0), vectors


def best_relaxation(gram: np.ndarray, start: np.ndarray | None = None) -> float:
    """Return the least lambda_max(A + N) found over N >= 0, for a Gram matrix A (C, C).

    This is the dual of the doubly non-negative relaxation, max <A, X> over X >= 0, X positive semidefinite, tr X = 1,
    solved by the alternating direction method of multipliers (Wen, Goldfarb, Yin 2010, arXiv 0907.4098) with
    t I - A - N = S, S positive semidefinite. It begins at the X of `polar`. The bound of any step is valid.
    """
    values, vectors = local_maxima(gram)
    found = values.max()
    scaled, eye = gram / found, np.eye(len(gram))
    near = vectors[:, values > 0.99 * found]
    multiplier = near @ near.T if start is None or not np.trace(start) > 0 else start
    multiplier = multiplier / np.trace(multiplier)
    weight, best, last_fall, worth = 1.0, math.inf, 0, math.inf
    more = np.maximum(-scaled, 0)
    slack = np.linalg.eigvalsh(scaled + more)[-1] * eye - scaled - more
    for step in range(RELAXATION_STEPS):
        if step % CHECK_EVERY == 0:
            best = min(best, np.linalg.eigvalsh(scaled + more)[-1])
            if best - 1 < 0.99 * worth:
                last_fall, worth = step, best - 1
            if best <= 1 + TIGHT or step - last_fall >= STALLED:
                break
        top = (np.trace(scaled + more + slack) + (np.trace(multiplier) - 1) / weight) / len(gram)
        more = np.maximum(top * eye - scaled - slack - multiplier / weight, 0)
        eigenvalues, basis = np.linalg.eigh(top * eye - scaled - more - multiplier / weight)
        slack = basis * np.maximum(eigenvalues, 0) @ basis.T
        moved = basis * (-weight * np.minimum(eigenvalues, 0)) @ basis.T
        infeasible = np.linalg.norm(scaled + more + slack - top * eye)
        negative = np.linalg.norm(np.minimum(moved, 0)) + abs(np.trace(moved) - 1)
        multiplier = moved
        if step % CHECK_EVERY == 0 and max(infeasible, negative) > 5 * min(infeasible, negative):
            weight *= 1.5 if infeasible > negative else 1 / 1.5
    return float(best * found)
