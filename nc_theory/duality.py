"""Lower bounds of (UFM) for any loss, from its values and gradients or from its conjugate; the focal loss.

    F* = min over W and H  of  sum_k (n_k/N) l_k(W h_k) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_k n_k |h_k|^2

Let G have the columns -(sqrt(n_k)/N) g_k, for any vectors g_k, and s = min(1, sqrt(lambda_W lambda_H) / polar(G)). The
penalties of logits Z are at least sqrt(lambda_W lambda_H) times a gauge of Z diag(sqrt(n)), of which `polar` is the
polar (see `nc_theory.copositive`), hence at least -sum_k (n_k/N) s <g_k, z_k>. So

    F* >= - sum_k (n_k/N) l*_k(s g_k),      l*_k(u) = sup over z of <u, z> - l_k(z)

for any loss, convex or not. If g_k is a gradient at z_k, l_k >= 0, and l_k lies above its tangent plane at z_k, then
l*_k(s g_k) <= s (<g_k, z_k> - l_k(z_k)), which needs no conjugate. With s = 1 both are the same.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import xlogy

from nc_theory.copositive import polar
from nc_theory.problem import validate_counts

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows (S, K) and labels (S,) -> (S,)


def dual_bound(
    class_counts: ArrayLike,
    lambda_w: float,
    lambda_h: float,
    loss: Function,
    logits: ArrayLike,
    conjugate: Function | None = None,
    relu: bool = True,
) -> float:
    """Return a lower bound of the minimum of (UFM) without bias for any loss, from logits W H (K, K), a column a class.

    The bound is tight at a global minimiser at whose logits the loss lies above its tangent planes. A convex loss does
    so everywhere.

    class_counts: n_k (K,). lambda_w, lambda_h: the penalties, > 0. loss: differentiable, logits (S, K) and labels (S,)
    -> losses (S,) >= 0, as for --loss. conjugate: gradients u (S, K) and labels (S,) -> sup over z of <u, z> - loss
    (S,), or an upper bound of it. Without one the loss must be convex, which is not checked, and the bound is looser
    at logits that are not optimal. relu: H >= 0.

    Raises ValueError for other shapes of logits or losses, and for negative losses.

    Example:
        >>> import torch
        >>> from nc_theory import UFM, dual_bound, lower_bound, solve
        >>> def hinge(logits, labels):  # smooth and convex
        ...     own = logits.gather(1, labels[:, None])
        ...     return torch.nn.functional.relu(1 + logits - own).square().sum(1) - 1
        >>> f"{dual_bound([10, 20, 30], 1e-2, 1e-3, hinge, torch.zeros(3, 3)):.4f}"
        '0.0141'
        >>> problem = UFM([10, 20, 30], 1e-2, 1e-3)
        >>> logits = solve(problem).WH
        >>> bound = dual_bound([10, 20, 30], 1e-2, 1e-3, torch.nn.CrossEntropyLoss(reduction="none"), logits)
        >>> f"{bound / lower_bound(problem, logits):.12f}"
        '1.000000000000'
    """
    counts = validate_counts(class_counts).numpy()
    rows = torch.as_tensor(logits).detach().double().cpu().T.clone().requires_grad_()
    if rows.shape != (len(counts), len(counts)):
        raise ValueError(f"logits have shape {tuple(rows.shape[::-1])}, wanted (K, K) = {(len(counts), len(counts))}")
    labels = torch.arange(len(counts))
    with torch.enable_grad():
        losses = loss(rows, labels)
        if losses.shape != labels.shape:
            raise ValueError(f"the loss returns shape {tuple(losses.shape)}, wanted (S,) = {tuple(labels.shape)}")
        (gradients,) = torch.autograd.grad(losses.sum(), rows)
    if (losses < 0).any():
        raise ValueError("the loss is negative; add a constant to it")
    shares = counts / counts.sum()
    columns = (shares / np.sqrt(counts))[:, None] * gradients.numpy()
    if not (np.isfinite(columns).all() and losses.isfinite().all()):
        return -math.inf
    largest = polar(-columns.T, relu)
    scale = min(1.0, math.sqrt(lambda_w) * math.sqrt(lambda_h) / largest) if largest > 0 else 1.0
    if conjugate is None:
        conjugates = scale * ((gradients * rows).sum(1) - losses)
    else:
        conjugates = conjugate(scale * gradients, labels)
    return float(-shares @ conjugates.detach().double().numpy())


class FocalLoss(torch.nn.Module):
    """The focal loss -(1 - p)^gamma log p, p the softmax at the label (Lin et al. 2017, arXiv 1708.02002).

    It is a function f(m) of m = z_k - logsumexp of the other logits, with p = sigmoid(m). It is convex for gamma = 0
    only, the cross entropy: where m is very negative, f'' has the sign of 1 + gamma (m + 2). But -f' rises from 1 to a
    peak and then falls to 0, so that f lies above its tangent exactly where -f'(m) <= 1, as it is for samples that are
    not far on the wrong side. There `dual_bound` is as tight as for a convex loss, with this `conjugate`.

    gamma: >= 0 and finite, else ValueError. Called with logits (S, K) and labels (S,), it returns losses (S,).

    Example:
        >>> import torch
        >>> from nc_theory import FocalLoss
        >>> FocalLoss(2.0)(torch.zeros(1, 4), torch.tensor([0]))
        tensor([0.7798])
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be >= 0 and finite, got {gamma}")
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
        margin = logits.gather(1, labels[:, None])[:, 0] - others
        return torch.nn.functional.softplus(-margin) * torch.exp(-self.gamma * torch.nn.functional.softplus(margin))

    def conjugate(self, gradients: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return sup over z of <u, z> - loss(z) (S,) for gradients u (S, K); infinite where there is no supremum.

        With a = -u_k and u_j >= 0, sum_j u_j = a for the other classes j, it is sum_j u_j log(u_j / a) + f*(-a).

        Example:
            >>> import torch
            >>> from nc_theory import FocalLoss
            >>> loss, labels = FocalLoss(2.0), torch.tensor([0])
            >>> logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
            >>> value = loss(logits, labels).sum()
            >>> (gradient,) = torch.autograd.grad(value, logits)
            >>> torch.isclose(loss.conjugate(gradient, labels), (gradient * logits).sum() - value)
            tensor([True])
        """
        others = gradients.detach().double().cpu().numpy().copy()
        rows = np.arange(len(others))
        pulls = -others[rows, labels.cpu().numpy()]
        others[rows, labels.cpu().numpy()] = 0.0
        tolerance = 1e-9 * np.abs(pulls)
        valid = (others.min(1) >= -tolerance) & (np.abs(others.sum(1) - pulls) <= tolerance)
        others = np.maximum(others, 0.0)
        entropies = xlogy(others, others).sum(1) - xlogy(others.sum(1), others.sum(1))
        of_margins = [self._conjugate_of_margin(pull) if pull <= 1 else math.inf for pull in pulls]
        return torch.from_numpy(np.where(valid, entropies + np.array(of_margins), math.inf))

    def _conjugate_of_margin(self, pull: float) -> float:
        """Return f*(-a) = sup over m of -a m - f(m) for a = `pull` <= 1; -f' - a changes its sign once."""
        if pull <= 0:
            return 0.0

        def excess(margin: float) -> float:  # -f'(m) - a
            log_p, log_q = -np.logaddexp(0.0, -margin), -np.logaddexp(0.0, margin)
            return float(np.exp(self.gamma * log_q) * (np.exp(log_q) - self.gamma * np.exp(log_p) * log_p) - pull)

        low, high = -30.0, 700.0
        margin = low if excess(low) <= 0 else high if excess(high) >= 0 else brentq(excess, low, high, xtol=1e-13)
        value = np.logaddexp(0.0, -margin) * np.exp(-self.gamma * np.logaddexp(0.0, margin))
        return float(-pull * margin - value)
