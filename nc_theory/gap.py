"""How far a network is from the optimum of (UFM), as an exact sum of neural-collapse properties, and what that proves.

Let F be the value of (UFM) at a network's features h_i (>= 0 with ReLU) and head (W, b), mu_k its class means, and F*
the optimum's lower bound. The bound comes with q_k and g_k = w_k D (q_k - t_k) for each class; at the minimum these are
the optimal probabilities and the gradients of the loss (`nc_theory.lower_bound`). With lam^2 = lambda_W lambda_H, the
K x K matrix G of columns G_k = -(sqrt(n_k)/N) g_k, and What = (1/lambda_W) sum_k sqrt(n_k) G_k mu_k^T,

    F - F* = (1/N) sum_i w_{y_i} KL(q_{y_i} || p_i)                                     margins
           + (lambda_W/2) |W - What|^2  [+ (bias_decay/2) |b - bhat|^2]                 self-duality
           + (lambda_H/2) sum_i |h_i - mu_{y_i}|^2                                      spread within classes
           + (1/(2 lambda_W)) sum_kl sqrt(n_k n_l) (lam^2 I - G^T G)_kl mu_k.mu_l       class means

for any features and head, in any dimension; for MSE, |z_i - q_{y_i}|^2 / 2 replaces w KL. It follows from Fenchel's
equality l_k(z) = g_k.z - l_k*(g_k) + w_k KL(q_k || p) and from completing the square in W. No share is negative: the
last one because polar(G) <= lam, which is what the certificate proves.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import xlog1py

from nc_theory.certificate import certify
from nc_theory.closed_form import closed_form, mse_residuals
from nc_theory.problem import Certificate, Optimum, class_margins

SHARES = {  # of F - F*: a label, and in words what is not as at the optimum
    "margins": ("margins", "margins away from the optimal ones"),
    "duality": ("self-duality", "a head that is not the dual of the class means"),
    "within": ("within classes", "features that differ within a class"),
    "means": ("class means", "class means that are not arranged as at the optimum"),
}
GAP_COLUMNS = ("optimality_gap", *(f"gap_{share}" for share in SHARES))  # of `GapShares.columns`
ROUNDING = 1e-12  # times lam^2: an entry of lam^2 I - G^T G down to -ROUNDING is zero up to rounding
LARGEST = 700.0  # exp of minus this is positive in float64
HALVINGS = 100  # of the interval in which the end of a margin's interval is sought


@dataclass(frozen=True, eq=False)
class GapShares:
    """F - F* of a network as a sum of four shares, in the units of the loss; see `gap_shares`.

    Example:
        >>> import torch
        >>> from nc_theory import UFM, gap_shares, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> weight, means = optimum.head(8), optimum.features(8)
        >>> losses = torch.nn.functional.cross_entropy(means @ weight.T, torch.arange(3), reduction="none")
        >>> gap = gap_shares(optimum, weight, means, losses, within_sums=[0, 100, 300])
        >>> f"{gap.total:.4f}", gap.within
        ('0.0100', tensor([0.0000, 0.0025, 0.0075], dtype=torch.float64))
    """

    lower_bound: float  # F*
    margins: torch.Tensor  # (K,) of the samples of each class
    duality: torch.Tensor  # (K,) of each row of W, and its entry of the bias
    within: torch.Tensor  # (K,) of the samples of each class
    means: torch.Tensor  # (K, K) of each pair of class means; where features share directions, entries may be negative
    irreducible_loss: float = 0.0  # the entropy of smoothed labels, which no network can change

    @property
    def total(self) -> float:
        """F - F*, the sum of all shares."""
        return float(sum(getattr(self, share).sum() for share in SHARES))

    def columns(self) -> dict[str, float]:
        """Return {column: float}: (F - F*) / (F* - irreducible_loss), and the four shares of F - F*.

        The first is NaN unless F* exceeds the irreducible loss.
        """
        least = self.lower_bound - self.irreducible_loss
        relative = self.total / least if least > 0 else math.nan
        shares = [float(getattr(self, share).sum()) for share in SHARES]
        return dict(zip(GAP_COLUMNS, [relative, *shares], strict=True))


def gap_shares(
    optimum: Optimum,
    weight: ArrayLike,
    means: ArrayLike,
    class_losses: ArrayLike,
    within_sums: ArrayLike,
    bias: ArrayLike | None = None,
) -> GapShares:
    """Return how far a network's last layer is from the optimum, as the four shares of F - F*, class by class.

    optimum: the `Optimum` of the problem to compare with; F* is its lower bound. weight: W (K, d). means: class means
    (K, d). class_losses: the mean loss of the samples of each class (K,). within_sums: sum_i |h_i - mu_k|^2 over the
    samples of each class (K,). bias: b (K,), for a problem with a bias. Take the sums in float64: F is compared with F*
    to about its rounding error.

    All shares are NaN if the optimum has no lower bound. Raises ValueError for other shapes, and for a bias in a
    problem without one.

    Example:
        >>> import math
        >>> import torch
        >>> from nc_theory import UFM, gap_shares, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> zeros = torch.zeros(3, 8)  # a network that outputs zeros
        >>> gap = gap_shares(optimum, weight=zeros, means=zeros, class_losses=[math.log(3)] * 3, within_sums=[0, 0, 0])
        >>> f"{gap.total:.4f} {math.log(3) - optimum.loss:.4f} {gap.columns()['optimality_gap']:.3f}"
        '1.0014 1.0014 10.305'
    """
    problem = optimum.problem
    counts = problem.counts.numpy()
    weight, means, losses, spreads = (array_of(part) for part in (weight, means, class_losses, within_sums))
    for name, matrix in (("weight", weight), ("means", means)):
        if matrix.shape != (len(counts), means.shape[-1]):
            raise ValueError(f"{name} has shape {matrix.shape}, wanted (K, d) with K = {len(counts)}")
    if bias is not None and not problem.bias:
        raise ValueError("the problem of this optimum has no bias: leave out the bias, from class_losses too")
    offset = np.zeros(len(counts)) if bias is None else array_of(bias)
    for name, vector in (("class_losses", losses), ("within_sums", spreads), ("bias", offset)):
        if vector.shape != counts.shape:
            raise ValueError(f"{name} has shape {vector.shape}, wanted {counts.shape}, one number for each class")
    proof, curvature = certified_point(optimum)
    logits = means @ weight.T + offset
    margins = counts / counts.sum() * losses - (proof.gradients * logits).sum(1) + proof.conjugates
    duality = 0.5 * problem.lambda_w * np.square(weight + proof.gradients.T @ means / problem.lambda_w).sum(1)
    if problem.bias and problem.bias_decay:
        duality += 0.5 * problem.bias_decay * np.square(offset + proof.gradients.sum(0) / problem.bias_decay)
    scaled = np.sqrt(counts)[:, None] * means
    within = 0.5 * problem.lambda_h * spreads if math.isfinite(proof.bound) else np.full(len(counts), math.nan)
    return GapShares(
        optimum.lower_bound,
        margins=torch.from_numpy(margins),
        duality=torch.from_numpy(duality),
        within=torch.from_numpy(within),
        means=torch.from_numpy(curvature * (scaled @ scaled.T)),
        irreducible_loss=problem.irreducible_loss,
    )


def array_of(values: ArrayLike) -> np.ndarray:
    """Return values, as a tensor on any device or otherwise, as a float64 array."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)


@lru_cache(maxsize=4)
def certified_point(optimum: Optimum) -> tuple[Certificate, np.ndarray]:
    """Return the `Certificate` of an optimum's lower bound, and (lam^2 I - G^T G) / (2 lambda_W), a matrix (K, K)."""
    problem = optimum.problem
    known = closed_form(problem) if optimum.method == "released formula" else optimum
    if known is None:
        proof = certify(problem, optimum.WH * math.nan)
    elif known.certificate is None:
        residuals = None
        if problem.loss == "MSE" and problem.depth_linear == 1:
            residuals = -mse_residuals(problem, problem.counts).diag().numpy()
        proof = certify(problem, known.WH, residuals=residuals)
    else:
        proof = known.certificate
    columns = proof.gradients / np.sqrt(problem.counts.numpy())[:, None]
    product = problem.lambda_w * problem.lambda_h * np.eye(len(columns))
    return proof, (product - columns @ columns.T) / (2 * problem.lambda_w)


# ---------------------------------------------------------------------------------------------------------
# What a gap proves
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GapBounds:
    """What F - F* <= E proves about a network; see `gap_bounds`.

    Example:
        >>> from nc_theory import UFM, gap_bounds, solve
        >>> bounds = gap_bounds(solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5)), gap=1e-6)
        >>> f"{bounds.within_sum:.2f} {bounds.head_distance:.2f}"
        '0.04 0.02'
    """

    margins: torch.Tensor  # (K, 2) the least and the largest possible margin of the class means' logits
    optimal_margins: torch.Tensor  # (K,) the same margins at the optimum
    inner_products: torch.Tensor  # (K, K) upper bounds of mu_k.mu_l; infinite where nothing is proved
    within_sum: float  # upper bound of sum_i |h_i - mu_{y_i}|^2
    head_distance: float  # upper bound of |W - What|


def gap_bounds(optimum: Optimum, gap: float) -> GapBounds:
    """Return what F - F* <= `gap`, a number in the units of the loss, proves about a network, rigorously.

    Since no share is negative, each is at most E = `gap`.

    margins: w_k KL(q_k || p_k) <= E N / n_k at the logits W mu_k + b, which confines the margin of D (W mu_k + b), the
    own logit less the mean of the others, to an interval. (D is 1 unless the loss has logit_scaling.)
    inner_products: mu_k.mu_l <= lambda_W E / ((lam^2 I - G^T G)_kl sqrt(n_k n_l)) for k != l, and |mu_k|^2 <= 2
    lambda_W E / ((lam^2 I - G^T G)_kk n_k), where features are non-negative and no two G_k have a positive inner
    product. For the cross entropy that is mu_k.mu_l <= (K-1) E / (lambda_H sqrt(n_k n_l)).
    within_sum: 2 E / lambda_H. head_distance: sqrt(2 E / lambda_W).

    Everything is infinite if the optimum has no lower bound.

    Example:
        >>> from nc_theory import UFM, gap_bounds, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> bounds = gap_bounds(optimum, gap=1e-6)
        >>> [f"{low:.3f} to {high:.3f}" for low, high in bounds.margins.tolist()]
        ['4.355 to 4.400', '4.713 to 4.750', '4.921 to 4.954']
        >>> f"{bounds.inner_products[0, 1]:.1e}"
        '2.8e-04'
    """
    problem, gap = optimum.problem, max(float(gap), 0.0)
    counts = problem.counts.numpy()
    proof, curvature = certified_point(optimum)
    logits = array_of(optimum.WH + optimum.bias[:, None]).T
    if not np.isfinite(proof.bound):
        nothing = torch.full((len(counts), 2), math.inf) * torch.tensor([-1, 1])
        unknown = torch.full((len(counts), len(counts)), math.inf, dtype=torch.float64)
        return GapBounds(nothing.double(), scaled_margins(optimum, logits), unknown, math.inf, math.inf)
    budgets = gap * counts.sum() / counts
    if problem.loss == "MSE":
        centres = scaled_margins(optimum, proof.targets).numpy()
        width = np.sqrt(2 * budgets * len(counts) / (len(counts) - 1))
        ends = np.column_stack([centres - width, centres + width])
    else:
        parameters = problem.loss_parameters
        shifts = parameters.offsets - np.diag(parameters.margins)
        scores = class_margins(shifts.T).numpy()
        ends = np.column_stack([margin_end(proof.targets, budgets / parameters.weights, sign) for sign in (-1, 1)])
        ends -= scores[:, None]
    products = np.full(curvature.shape, math.inf)
    lam_sq = problem.lambda_w * problem.lambda_h
    entries = 2 * problem.lambda_w * curvature
    if problem.relu and entries.min() >= -ROUNDING * lam_sq:
        factors = 1 + np.eye(len(counts))  # off the diagonal, an entry is counted twice
        positive = entries > ROUNDING * lam_sq
        bounds = factors * problem.lambda_w * gap / np.sqrt(np.outer(counts, counts))
        products[positive] = (bounds / np.where(positive, entries, 1))[positive]
    return GapBounds(
        margins=torch.from_numpy(ends),
        optimal_margins=scaled_margins(optimum, logits),
        inner_products=torch.from_numpy(products),
        within_sum=2 * gap / problem.lambda_h,
        head_distance=math.sqrt(2 * gap / problem.lambda_w),
    )


def scaled_margins(optimum: Optimum, rows: np.ndarray) -> torch.Tensor:
    """Return the margins (K,) of D z_k for logits z (K, K), one row per class; D = 1 unless there is logit_scaling."""
    scales = 1.0 if optimum.problem.loss == "MSE" else optimum.problem.loss_parameters.scales
    return class_margins((rows * scales).T)


def margin_end(targets: np.ndarray, budgets: np.ndarray, sign: int) -> np.ndarray:
    """Return the largest (sign 1) or least (-1) margins (K,) of log p_k over the p_k with KL(q_k || p_k) <= budget_k.

    targets: q (K, K), one row per class. budgets: (K,) >= 0. By Lagrange's condition the extreme p_k is q_k + t a_k,
    with a_k = 1 for the own class, -1/(K-1) for the others; t is found by bisection.
    """
    count = len(targets)
    direction = (count * np.eye(count) - 1) / (count - 1)
    own = targets.diagonal()
    least = (targets + np.where(np.eye(count) > 0, math.inf, 0)).min(1)
    room = own if sign < 0 else (count - 1) * least  # of |t|, at which a probability is zero

    def moved(logarithm: np.ndarray) -> np.ndarray:
        return sign * (-np.expm1(-np.exp(logarithm)) * room)[:, None] * direction

    with np.errstate(all="ignore"):
        low, high = np.full(count, math.log(1e-30)), np.full(count, math.log(LARGEST))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            steps = moved(middle)
            ratios = np.where(targets > 0, steps / targets, 0)
            inside = (steps - xlog1py(targets, ratios)).sum(1) <= budgets
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        ends = class_margins(np.log(targets + moved(high)).T).numpy()
    return np.where((high < math.log(LARGEST) - 1e-9) & np.isfinite(ends), ends, sign * math.inf)
