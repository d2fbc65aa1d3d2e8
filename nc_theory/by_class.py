"""Solve (UFM) class by class for variants of the cross entropy: fast for any number of classes."""

import math

import numpy as np
import torch

from nc_theory.certificate import lower_bound
from nc_theory.losses import LossParameters
from nc_theory.problem import UFM, Optimum, class_margins

STEPS, HALVINGS = 200, 60  # of Newton's method, and of the length of a step
FIRST_STEP = 32.0  # length of the step from zero
CLOSE = 1e-9  # Newton's method converges quadratically where it predicts a decrease below this


def solve_by_class(problem: UFM) -> Optimum:
    """Return the best solution of a UFM with orthogonal features, for the cross entropy with ReLU and no bias.

    With h_k = |h_k| u_k for orthonormal u_k, the penalties of the logits z_k of class k are least if head and feature
    share them equally, and sum to sqrt(lambda_W lambda_H n_k) |z_k|. What is left is a convex problem for each class,

        min over z of (n_k/N) l_k(z) + sqrt(lambda_W lambda_H n_k) |z|,

    which is solved for all classes at once. It is the minimum of (UFM) if no two gradients at the z_k have a positive
    inner product; the optimum's `gap` says so. It is also large if rounding dominates because of tiny lambdas.
    """
    counts, parameters = problem.counts.numpy(), problem.loss_parameters
    root_w, root_h = math.sqrt(problem.lambda_w), math.sqrt(problem.lambda_h)
    strengths = np.sqrt(counts) / (counts.sum() * root_w * root_h)  # n_k/N over the factor of |z|
    with np.errstate(all="ignore"):
        logits = shrunken_minima(parameters, strengths)
    losses, residuals = parameters.losses_and_residuals(logits, np.arange(len(counts)))
    gradients = parameters.gradients(residuals, np.arange(len(counts)))
    norms = np.linalg.norm(logits, axis=1)
    norms_sq = norms * root_w / (root_h * np.sqrt(counts))
    directions = logits / np.where(norms > 0, norms, 1)[:, None]
    rows = directions * np.sqrt(norms * root_h / root_w * np.sqrt(counts))[:, None]
    slack = np.where(norms > 0, np.abs(strengths[:, None] * gradients + directions).max(1), 0)
    columns = torch.from_numpy(logits.T.copy())
    return Optimum(
        problem=problem,
        margins=class_margins(columns, parameters.own),
        mean_norms_sq=torch.from_numpy(norms_sq),
        HTH=torch.from_numpy(norms_sq).diag(),
        WWT=torch.from_numpy(rows.T @ rows),
        WH=columns,
        bias=torch.zeros(problem.num_classes, dtype=torch.float64),
        duality=torch.from_numpy(-(gradients * counts[:, None]).T / counts.sum() / problem.lambda_w),
        loss=float(counts / counts.sum() @ losses + root_w * root_h * np.sqrt(counts) @ norms),
        method="class by class",
        projected_gradient=float(slack.max()),
        lower_bound=lower_bound(problem, columns, relax=False),
    )


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
