"""Lower bounds of (UFM), which prove that a solution is the global minimum.

(UFM) is not convex in W and H, but it is in the logits Z = W H (K, K), one column per class. The least penalty of Z is
sqrt(lambda_W lambda_H) times a gauge of Z diag(sqrt(n)): the gauge whose unit ball is the convex hull of c v^T with
|c| <= 1, |v| <= 1 and, with ReLU, v >= 0 (without ReLU it is the nuclear norm). By convex duality any logits give a
lower bound of the minimum, and those of a global minimiser give the minimum itself.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlog1py, xlogy

from nc_theory.copositive import polar
from nc_theory.losses import losses_and_gradients
from nc_theory.problem import UFM, Certificate

TINY = 1e-14  # a probability down to -TINY is zero up to rounding
BIAS_STEPS = 20  # of Newton's method


def lower_bound(
    problem: UFM,
    logits: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    relax: bool = True,
    gram: ArrayLike | None = None,
) -> float:
    """Return a lower bound of the minimum of a UFM, from logits W H (K, K), one column per class, and a bias (K,).

    With p_k the softmax of D (z_k + b) + i_k, g_k = w_k D (p_k - t_k) the gradient of the loss, and G the matrix of
    columns -(sqrt(n_k)/N) g_k, the bound of the cross entropy and its variants is

        - sum_k (n_k/N) w_k [ sum_j q_kj log q_kj - sum_j (q_kj - t_kj) i_kj ]
        with s = min(1, sqrt(lambda_W lambda_H) / polar(G)),   q_k = t_k + s (p_k - t_k)

    and for MSE, with g_k = z_k + b - e_k, it is - sum_k (n_k/N) (s^2 |g_k|^2 / 2 + s g_kk). The bound holds for any
    logits and is tight at a global minimiser.

    With a bias the bound needs r = sum_k (n_k/N) g_k = 0 if the bias has no penalty, and is smaller by
    s^2 |r|^2 / (2 bias_decay) if it has one. The bias is therefore first replaced by the best one for the given W H.
    The result is -inf if that fails, for logits that are not finite, and for depth_linear > 1.

    relax: see `polar`. gram: H^T H (K, K) of class means with these logits, which helps the relaxation of `polar` to
    a tight bound for more than 12 classes that share directions. Raises ValueError for other shapes of logits.

    Example:
        >>> import torch
        >>> from nc_theory import UFM, lower_bound, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> bounds = [lower_bound(optimum.problem, logits) for logits in (optimum.WH, torch.eye(3))]
        >>> f"minimum {optimum.loss:.4f}, bounds {bounds[0]:.4f} and {bounds[1]:.4f}"
        'minimum 0.0972, bounds 0.0972 and 0.0841'
    """
    return certify(problem, logits, bias, relax=relax, gram=gram).bound


def certify(
    problem: UFM,
    logits: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    relax: bool = True,
    gram: ArrayLike | None = None,
    residuals: np.ndarray | None = None,
) -> Certificate:
    """Return the Certificate that logits and a bias give; see `lower_bound`.

    residuals: z_k + b - e_k (K, K) of MSE, one row per class, instead of the logits: where penalties are tiny, the
    difference has lost its digits.
    """
    counts, labels = problem.counts.numpy(), np.arange(len(problem.class_counts))
    shares = counts / counts.sum()
    rows = np.asarray(logits, dtype=np.float64).T  # one for each class
    if rows.shape != problem.targets.shape:
        raise ValueError(f"logits have shape {rows.shape[::-1]}, wanted (K, K) = {problem.targets.shape[::-1]}")
    nothing = Certificate(-math.inf, *(np.full(shape, math.nan) for shape in (rows.shape, len(rows), rows.shape)))
    if problem.depth_linear > 1 or not np.isfinite(rows).all():
        return nothing
    if problem.bias and residuals is None:
        rows = rows + best_bias(problem, rows, np.zeros(rows.shape[1]) if bias is None else np.asarray(bias))
    if problem.loss == "MSE":
        residuals = rows - problem.targets if residuals is None else residuals
        slopes = np.ones_like(residuals)
    else:
        parameters = problem.loss_parameters
        residuals = parameters.losses_and_residuals(rows, labels)[1]
        slopes = parameters.gradients(np.ones_like(residuals), labels)
    if not np.isfinite(residuals).all():
        return nothing
    slopes = shares[:, None] * slopes
    rest = (slopes * residuals).sum(0)
    if problem.bias and not problem.bias_decay:
        residuals = residuals - rest / slopes.sum(0)  # makes r zero exactly, not only up to rounding
    start = None if gram is None else np.sqrt(np.outer(counts, counts)) * np.asarray(gram)
    largest = polar((slopes * residuals / np.sqrt(counts)[:, None]).T, problem.relu, relax=relax, start=start)
    target = math.sqrt(problem.lambda_w) * math.sqrt(problem.lambda_h)
    scale = min(1.0, target / largest) if largest > 0 else 1.0
    penalty = 0.0
    if problem.bias and problem.bias_decay:
        penalty = scale**2 * np.square(rest).sum() / (2 * problem.bias_decay)
    moved = scale * residuals
    if problem.loss == "MSE":
        conjugates = shares * (0.5 * np.square(moved).sum(1) + (moved * problem.targets).sum(1))
        return Certificate(float(-conjugates.sum() - penalty), slopes * moved, conjugates, problem.targets + moved)
    others, own = moved + parameters.targets, parameters.own  # q_kj of the wrong classes j
    others[labels, own] = 0.0
    if others.min() < -TINY:
        return nothing
    others = np.maximum(others, 0.0)
    wrong = np.minimum(others.sum(1), 1.0)  # 1 - q_kk, with all its digits where it is tiny
    entropies = xlogy(others, others).sum(1) + xlog1py(1 - wrong, -wrong)
    shifts = moved @ parameters.offsets - moved[labels, own] * parameters.margins
    conjugates = shares * parameters.weights * (entropies - shifts)
    targets = others.copy()
    targets[labels, own] = 1 - wrong
    return Certificate(float(-conjugates.sum() - penalty), slopes * moved, conjugates, targets)


def best_bias(problem: UFM, logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the best bias (K,) for W H, logits (K, K) with one row per class, by Newton's method."""
    counts, labels = problem.counts.numpy(), np.arange(len(problem.class_counts))
    shares = counts / counts.sum()

    def slope_at(bias: np.ndarray) -> np.ndarray:
        gradients = losses_and_gradients(problem, logits + bias, labels)[1]
        return shares @ gradients + problem.bias_decay * bias

    slope = slope_at(bias)
    for _ in range(BIAS_STEPS):
        hessian = bias_hessian(problem, logits + bias, shares) + problem.bias_decay * np.eye(len(bias))
        # Without decay the Hessian is singular, with an eigenvalue of zero up to K eps times the largest
        step = np.linalg.lstsq(hessian, -slope, rcond=len(bias) * np.finfo(float).eps)[0]
        trials = (bias + length * step for length in 0.5 ** np.arange(10))
        better = next((trial for trial in trials if np.linalg.norm(slope_at(trial)) < np.linalg.norm(slope)), None)
        if better is None:
            break
        bias, slope = better, slope_at(better)
    return bias


def bias_hessian(problem: UFM, logits: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the Hessian (K, K) of the mean loss with respect to the bias, at logits (K, K), one row per class."""
    if problem.loss == "MSE":
        return np.eye(logits.shape[1])
    parameters, labels = problem.loss_parameters, np.arange(len(shares))
    residuals = parameters.losses_and_residuals(logits, labels)[1]
    probabilities = residuals + parameters.targets
    weighted = (shares * parameters.weights)[:, None] * probabilities
    hessian = np.diag(weighted.sum(0)) - probabilities.T @ weighted
    return parameters.scales[:, None] * hessian * parameters.scales
