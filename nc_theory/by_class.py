"""Solve (UFM) class by class, with orthogonal features: fast for any number of classes."""

import math

import numpy as np
import torch

from nc_theory.certificate import certify
from nc_theory.losses import LossParameters
from nc_theory.problem import UFM, Optimum, class_margins

STEPS, HALVINGS = 200, 60  # of Newton's method, and of the length of a step
FIRST_STEP = 32.0  # length of the step from zero
COLLAPSED = 1e-12  # relative distance below its largest length at which the residual is that of a class at zero
CLOSE = 1e-9  # Newton's method converges quadratically where it predicts a decrease below this


def solve_by_class(problem: UFM) -> Optimum:
    """Return the best solution of a UFM with orthogonal features: MSE, or the cross entropy without a bias, with ReLU.

    With h_k = |h_k| u_k for orthonormal u_k, the penalties of the logits z_k of class k are least if head and feature
    share them equally, and sum to sqrt(lambda_W lambda_H n_k) |z_k|. What is left is a convex problem for each class,

        min over z of (n_k/N) l_k(z) + sqrt(lambda_W lambda_H n_k) |z|,

    which is solved for all classes at once. For MSE the residual z + b - e_k is then min(1, t_k / |e_k - b|) (b - e_k),
    t_k = N sqrt(lambda_W lambda_H / n_k), and b minimises the sum, see `best_mse_bias`.

    It is the minimum of (UFM) if no two gradients at the z_k have a positive inner product; the optimum's `gap` says
    so. For the cross entropy it is also large if rounding dominates because of tiny lambdas.
    """
    counts = problem.counts.numpy()
    root_w, root_h = math.sqrt(problem.lambda_w), math.sqrt(problem.lambda_h)
    strengths = np.sqrt(counts) / (counts.sum() * root_w * root_h)  # n_k/N over the factor of |z|
    bias = np.zeros(problem.num_classes)
    if problem.loss == "MSE":
        bias = best_mse_bias(problem, strengths) if problem.bias else bias
        gradients = residuals = clipped(bias - problem.targets, strengths)
        logits = problem.targets - bias + residuals
        logits[np.linalg.norm(residuals, axis=1) * strengths < 1 - COLLAPSED] = 0.0
        losses, own = 0.5 * np.square(residuals).sum(1), problem.targets.argmax(1)
    else:
        parameters, residuals = problem.loss_parameters, None
        with np.errstate(all="ignore"):
            logits = shrunken_minima(parameters, strengths)
        losses, differences = parameters.losses_and_residuals(logits, np.arange(len(counts)))
        gradients, own = parameters.gradients(differences, np.arange(len(counts))), parameters.own
    norms = np.linalg.norm(logits, axis=1)
    norms_sq = norms * root_w / (root_h * np.sqrt(counts))
    directions = logits / np.where(norms > 0, norms, 1)[:, None]
    rows = directions * np.sqrt(norms * root_h / root_w * np.sqrt(counts))[:, None]
    slack = np.where(norms > 0, np.abs(strengths[:, None] * gradients + directions).max(1), 0)
    columns = torch.from_numpy(logits.T.copy())
    certificate = certify(problem, columns, relax=False, residuals=residuals)
    value = counts / counts.sum() @ losses + root_w * root_h * np.sqrt(counts) @ norms
    return Optimum(
        problem=problem,
        margins=class_margins(columns, own),
        mean_norms_sq=torch.from_numpy(norms_sq),
        HTH=torch.from_numpy(norms_sq).diag(),
        WWT=torch.from_numpy(rows.T @ rows),
        WH=columns,
        bias=torch.from_numpy(bias),
        other_duality=torch.from_numpy(-(gradients * counts[:, None]).T / counts.sum() / problem.lambda_w),
        loss=float(value + 0.5 * problem.bias_decay * bias @ bias),
        method="class by class",
        projected_gradient=float(slack.max()),
        lower_bound=certificate.bound,
        certificate=certificate,
    )


def clipped(rows: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Return rows (K, K), each shortened to a norm of at most 1 / strength_k."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1) * strengths, 1)[:, None]


def best_mse_bias(problem: UFM, strengths: np.ndarray) -> np.ndarray:
    """Return the bias (K,) of the best orthogonal features for MSE, by Newton's method.

    With the best z_k for a given b, class k costs (n_k/N) times Huber's function of |e_k - b|, quadratic up to t_k and
    then linear. The sum is convex in b, with the gradient sum_k (n_k/N) min(1, t_k / |e_k - b|) (b - e_k).
    """
    counts, targets, decay = problem.counts.numpy(), problem.targets, problem.bias_decay
    shares = counts / counts.sum()
    scale = float(shares @ (1 / strengths))  # of the value; t_k = 1 / strength_k

    def value_at(bias: np.ndarray) -> float:
        scaled = np.linalg.norm(bias - targets, axis=1) * strengths
        huber = np.where(scaled > 1, scaled - 0.5, 0.5 * scaled**2) / strengths**2
        return float(shares @ huber + 0.5 * decay * bias @ bias) / scale

    bias, last = shares @ targets, math.inf
    value = value_at(bias)
    for _ in range(STEPS):
        rows = bias - targets
        lengths = np.linalg.norm(rows, axis=1)
        factors = shares / np.maximum(lengths * strengths, 1) / scale
        gradient = factors @ rows + decay / scale * bias
        units = rows / np.where(lengths * strengths > 1, lengths, math.inf)[:, None]
        hessian = (factors.sum() + decay / scale) * np.eye(len(bias)) - (units * factors[:, None]).T @ units
        step = np.linalg.lstsq(hessian, -gradient, rcond=len(bias) * np.finfo(float).eps)[0]
        decrease = -gradient @ step
        if decrease < CLOSE and not decrease < last / 2:  # down to rounding
            break
        for length in 0.5 ** np.arange(HALVINGS):
            moved = bias + length * step
            if decrease < CLOSE or value_at(moved) <= value - 0.1 * length * decrease:
                break
        bias, value, last = moved, value_at(moved), decrease
    return bias


def shrunken_minima(parameters: LossParameters, strengths: np.ndarray) -> np.ndarray:
    """Return the minima z_k (K, K), one row per class, of strength_k l_k(z) + |z|, by Newton's method on all rows.

    A row is zero if and only if |strength_k grad l_k(0)| <= 1.
    """
    logits = np.zeros(parameters.targets.shape)
    every = np.arange(len(strengths))
    fall = -parameters.gradients(parameters.losses_and_residuals(logits, every)[1], every) * strengths[:, None]
    labels = np.flatnonzero(np.linalg.norm(fall, axis=1) > 1)  # the classes that do not collapse
    strengths, z = strengths[labels], logits[labels]

    def values_at(z: np.ndarray) -> np.ndarray:
        return strengths * parameters.losses_and_residuals(z, labels)[0] + np.linalg.norm(z, axis=1)

    values, decrease = values_at(z), np.linalg.norm(fall[labels], axis=1) - 1
    step = FIRST_STEP * fall[labels] / (decrease + 1)[:, None]
    decrease *= FIRST_STEP
    for _ in range(STEPS):
        length, precise = np.ones(len(labels)), decrease < CLOSE
        for _ in range(HALVINGS):
            new_values = values_at(z + length[:, None] * step)
            short = (new_values <= values - 0.1 * length * decrease) | precise
            if short.all():
                break
            length[~short] /= 2
        z, values = z + length[:, None] * step, new_values
        if precise.all():
            break
        step, decrease = newton_steps(parameters, strengths, z, labels)
    logits[labels] = z
    return logits


def newton_steps(
    parameters: LossParameters, strengths: np.ndarray, z: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return Newton's steps (P, K) at logits z (P, K) of classes (P,), and their rates of descent (P,).

    The second derivative of a row is diag(a) - u u^T - v v^T, so that a step takes O(K) operations (Woodbury).
    """
    residuals = parameters.losses_and_residuals(z, labels)[1]
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    gradients = strengths[:, None] * parameters.gradients(residuals, labels) + z / norms
    probabilities = residuals + parameters.targets[labels]
    curvatures = (strengths * parameters.weights[labels])[:, None]
    diagonal = curvatures * np.square(parameters.scales) * probabilities + 1 / norms
    low_rank = np.stack([np.sqrt(curvatures) * parameters.scales * probabilities, z / norms**1.5], axis=2)
    scaled = low_rank / diagonal[:, :, None]
    inner = np.eye(2) - np.einsum("pki,pkj->pij", low_rank, scaled)
    step = -gradients / diagonal
    along = np.einsum("pki,pk->pi", low_rank, step)
    determinant = inner[:, 0, 0] * inner[:, 1, 1] - inner[:, 0, 1] ** 2
    adjugate = inner[:, ::-1, ::-1] * [[1, -1], [-1, 1]]
    step += np.einsum("pki,pij,pj->pk", scaled, adjugate, along) / determinant[:, None]
    decrease = -(gradients * step).sum(1)
    lost = ~((decrease > 0) & np.isfinite(decrease))  # by rounding: follow the gradient
    step[lost], decrease[lost] = -gradients[lost], np.square(gradients[lost]).sum(1)
    return step, decrease
