"""Minimisers of (UFM) in closed form: cross entropy and MSE, without a bias.

For orthonormal directions u_k and h_k = |h_k| u_k the problem splits by class. The penalties of a margin M of class k
are least if they are shared equally between head and feature, where they sum to a constant times M (inequality of the
arithmetic and geometric means); what is left is a convex problem in M. All ratios are computed via logarithms,
so that lambdas of 1e-300 and counts of 1e9 neither overflow nor underflow.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from numpy.typing import ArrayLike

from nc_theory.problem import UFM, Optimum, validate_counts

BISECTIONS = 60  # of an interval in [0, 1], down to the rounding of float64


def closed_form(problem: UFM) -> Optimum | None:
    """Return the Optimum of a UFM in closed form, or None if it has none.

    Cross entropy with ReLU and no bias (arXiv 2401.02058, theorem 4.1, with the penalties of (UFM)):

        M_k      = max(0, log((K-1) (sqrt(n_k) / (N sqrt(lambda_W lambda_H (K-1)/K)) - 1)))
        |h_k|^2  = M_k sqrt((K-1) lambda_W / (K lambda_H n_k)),   h_k . h_l = 0
        W H      = (I - 11^T/K) diag(M)
        W W^T    = (I - 11^T/K) diag(a^2) (I - 11^T/K),   a_k^2 = M_k sqrt(K lambda_H n_k / ((K-1) lambda_W))
        h_k = 0  iff  n_k <= N^2 lambda_W lambda_H K/(K-1)

    The variants of the cross entropy that treat all wrong classes alike (class weights w_k, margins
    c_k = C (n_min/n_k)^(1/4), label smoothing s) differ from this in M_k alone:

        M_k      = max(0, c_k + log((K-1) (1/r_k - 1)))
        r_k      = N sqrt(lambda_W lambda_H (K-1)/K) / (w_k sqrt(n_k)) + s (K-1)/K

    MSE without a bias: with W H = diag(s), (n_k/2N) (1 - s_k)^2 + s_k sqrt(lambda_W lambda_H n_k) is least at

        s_k      = max(0, 1 - N sqrt(lambda_W lambda_H / n_k)),   the margins of the Optimum
        |h_k|^2  = s_k sqrt(lambda_W / (lambda_H n_k)),   h_k . h_l = 0
        W W^T    = diag(s_k sqrt(lambda_H n_k / lambda_W))
        h_k = 0  iff  n_k <= N^2 lambda_W lambda_H

    With a head of L linear layers (depth_linear; Dang et al., ICML 2023, arXiv 2301.00437), s_k is the least of

        n_k/(2N) (1 - s)^2 + ((L+1)/2) (lambda_W^L lambda_H n_k)^(1/(L+1)) s^(2/(L+1))

    over s >= 0. For L >= 2 this is either zero or at least (L-1)/L, so that a class collapses by a jump:
    h_k = 0  iff  N (lambda_W^L lambda_H)^(1/(L+1)) n_k^(-L/(L+1)) >= (1/L) ((L-1)/L)^((L-1)/(L+1)).

    For MSE the constraint H >= 0 does not bind, so that the closed form holds with and without ReLU.

    Example:
        >>> from nc_theory import UFM, closed_form
        >>> optimum = closed_form(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> optimum.margins
        tensor([4.3776, 4.7315, 4.9375], dtype=torch.float64)
        >>> optimum.mean_norms_sq
        tensor([3.5743, 2.7318, 2.3276], dtype=torch.float64)
    """
    if not has_closed_form(problem):
        return None
    if problem.loss == "MSE":
        return mse_optimum(problem)
    return cross_entropy_geometry(problem, cross_entropy_margins(problem, problem.counts), "closed form")


def has_closed_form(problem: UFM) -> bool:
    """Return True for the problems of `closed_form`."""
    if problem.bias or problem.labels is not None:
        return False
    return problem.loss == "MSE" or (problem.relu and problem.variant.is_symmetric)


def released_formula(problem: UFM) -> Optimum:
    """Return what the paper's released code compares with: the geometry of the closed form with other margins.

        M_k = log((K-1) (2 sqrt(n_k) / (N lambda_W sqrt((K-1)/K)) - 1))

    They do not depend on lambda_H and are not the minimiser of any (UFM). `loss` is the value of (UFM) at this
    geometry, `lower_bound` the minimum where it is known. Raises ValueError unless `has_released_formula`.

    Example:
        >>> from nc_theory import UFM, closed_form, released_formula
        >>> problem = UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5)
        >>> f"{released_formula(problem).loss:.3f} {closed_form(problem).loss:.3f}"
        '0.140 0.097'
    """
    if not has_released_formula(problem):
        raise ValueError("the released formula is for the cross entropy with ReLU features only")
    optimum = cross_entropy_geometry(problem, released_margins(problem, problem.counts), "released formula")
    minimum = closed_form(problem)
    return replace(optimum, lower_bound=-math.inf if minimum is None else minimum.loss)


def has_released_formula(problem: UFM) -> bool:
    """Return True for the cross entropy itself with ReLU features, for which the released formula was written.

    Example:
        >>> from nc_theory import UFM, has_released_formula
        >>> problems = UFM([100, 200], 5e-3, 5e-5), UFM([100, 200], 5e-3, 5e-5, loss="MSE")
        >>> [has_released_formula(problem) for problem in problems]
        [True, False]
    """
    return problem.loss == "CrossEntropy" and problem.variant.is_plain and problem.relu and problem.labels is None


def class_curve(
    problem: UFM, sizes: ArrayLike, formula: Literal["exact", "released"] = "exact"
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the margins and squared norms (P,) of classes of `sizes` (P,) samples, for the K and N of a UFM.

    formula: "exact" is the closed form, "released" the released formula. None where the UFM has no closed form.

    Example:
        >>> from nc_theory import UFM, class_curve
        >>> margins, norms_sq = class_curve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5), sizes=[1, 10, 100])
        >>> margins
        tensor([1.8189, 3.1705, 4.3776], dtype=torch.float64)
    """
    sizes = torch.as_tensor(sizes, dtype=torch.float64)
    if formula == "released":
        margins = released_margins(problem, sizes)
    elif not has_closed_form(problem):
        return None
    elif problem.loss == "MSE":
        scale = mse_scales(problem, sizes)
        return scale, mse_norms_sq(problem, sizes, scale)
    else:
        margins = cross_entropy_margins(problem, sizes)
    return margins, cross_entropy_norms_sq(problem, sizes, margins)


def collapse_threshold(class_counts: ArrayLike, loss: str = "CrossEntropy") -> float:
    """Return the lambda_W lambda_H from which on the smallest class collapses, h_k = 0: cross entropy or MSE.

    Example:
        >>> from nc_theory import collapse_threshold
        >>> f"{collapse_threshold([100, 200, 300]):.3e}"
        '1.852e-04'
    """
    return min(collapse_products(UFM(validate_counts(class_counts).tolist(), 1, 1, loss=loss)).tolist())


def collapse_products(problem: UFM) -> torch.Tensor:
    """Return, for each class (K,), the lambda_W lambda_H from which on it collapses, h_k = 0, at the same class counts.

    The square of the root at which the closed form's M_k, or s_k of MSE, reaches zero. Cross entropy and the variants
    that treat all wrong classes alike, with r_k, w_k, c_k and s as in `closed_form`:

        sqrt(lambda_W lambda_H) = w_k sqrt(n_k) / (N sqrt((K-1)/K)) max(0, (K-1)/(K-1+exp(-c_k)) - s (K-1)/K)

    so that classes with weights n_k^-E, E > 1/2, collapse from the largest to the smallest. MSE: sqrt(n_k) / N.

    Raises ValueError where no threshold is known in closed form: with a bias, logit adjustment or scaling, soft labels,
    and several linear layers; and for the cross entropy without ReLU, where classes merge instead.

    Example:
        >>> from nc_theory import UFM, collapse_products
        >>> [f"{product:.3e}" for product in collapse_products(UFM([100, 200, 300], 1e-3, 1e-3)).tolist()]
        ['1.852e-04', '3.704e-04', '5.556e-04']
    """
    if not has_closed_form(problem) or problem.depth_linear > 1:
        raise ValueError(
            "no threshold of collapse is known in closed form with a bias, logit adjustment or scaling, soft labels or "
            "several linear layers, nor for the cross entropy without ReLU"
        )
    counts, num_classes, total = problem.counts, problem.num_classes, problem.counts.sum()
    if problem.loss == "MSE":
        return counts / total.square()
    others, share = num_classes - 1, (num_classes - 1) / num_classes
    inner = others / (others + (-added_margins(problem, counts)).exp()) - problem.variant.label_smoothing * share
    weights = torch.from_numpy(problem.loss_parameters.weights)
    return (weights * inner.clamp(min=0)).square() * counts / (total.square() * share)


def collapse_count(problem: UFM) -> float | None:
    """Return the n_k up to which a class collapses, h_k = 0: cross entropy or MSE in closed form; else None.

    Example:
        >>> from nc_theory import UFM, collapse_count
        >>> problem = UFM([100, 200, 300], lambda_w=5e-2, lambda_h=5e-3)
        >>> f"{collapse_count(problem):.1f}"
        '135.0'
    """
    if not has_closed_form(problem) or not problem.variant.is_plain:
        return None
    total = float(sum(problem.class_counts))
    if problem.depth_linear > 1:
        depth, (_, log_w, log_h, _) = problem.depth_linear, logarithms(problem, problem.counts)
        log_root = (depth * log_w + log_h).item() / (depth + 1)
        return math.exp((depth + 1) / depth * (math.log(total) + log_root - math.log(collapse_ratio(depth))))
    return total**2 * problem.lambda_w * problem.lambda_h * shrink_factor(problem.num_classes, problem.loss)


def suggest_lambdas(class_counts: ArrayLike, margin: float = 5.0, ratio: float = 100.0) -> tuple[float, float]:
    """Return (lambda_W, lambda_H) at which the largest margin of the cross entropy's closed form is `margin`.

    ratio: lambda_W / lambda_H. Raises ValueError if it is not positive and finite, if the margin is above 500, and if
    the smallest class would collapse, h_k = 0, which happens for margins up to log(K sqrt(n_max / n_min) - (K-1)).

    Example:
        >>> from nc_theory import UFM, solve, suggest_lambdas
        >>> lambda_w, lambda_h = suggest_lambdas([100, 200, 300], margin=5.0)
        >>> solve(UFM([100, 200, 300], lambda_w, lambda_h)).margins
        tensor([4.4408, 4.7942, 5.0000], dtype=torch.float64)
    """
    counts = validate_counts(class_counts)
    num_classes, smallest, largest = len(counts), counts.min().item(), counts.max().item()
    least = math.log(num_classes * math.sqrt(largest / smallest) - (num_classes - 1))
    if not least < margin < math.inf:
        raise ValueError(
            f"the largest margin must be above {least:.3g}, or the smallest class (n = {smallest:g}) collapses; "
            f"got {margin:g}"
        )
    if margin > 500:
        raise ValueError(f"the largest margin must be at most 500, or the penalties underflow; got {margin:g}")
    if not 0 < ratio < math.inf:
        raise ValueError(f"the ratio lambda_W / lambda_H must be > 0 and finite, got {ratio}")
    shrink = math.sqrt((num_classes - 1) / num_classes)
    root = math.sqrt(largest) / (counts.sum().item() * shrink * (1 + math.exp(margin) / (num_classes - 1)))
    return root * math.sqrt(ratio), root / math.sqrt(ratio)


def suggest_collapse(problem: UFM, classes: int, ratio: float = 100.0) -> tuple[float, float]:
    """Return (lambda_W, lambda_H) at which exactly the `classes` smallest classes collapse, h_k = 0.

    Their product is the geometric mean of the two thresholds of `collapse_products` that it lies between. problem: its
    lambdas do not matter. ratio: lambda_W / lambda_H. Raises ValueError if there are no such lambdas.

    Example:
        >>> from nc_theory import UFM, solve, suggest_collapse
        >>> lambda_w, lambda_h = suggest_collapse(UFM([100, 200, 300], 1, 1), classes=2)
        >>> solve(UFM([100, 200, 300], lambda_w, lambda_h)).collapsed
        tensor([ True,  True, False])
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"the ratio lambda_W / lambda_H must be > 0 and finite, got {ratio}")
    if not 1 <= classes < problem.num_classes:
        raise ValueError(
            f"of {problem.num_classes} classes, 1 to {problem.num_classes - 1} can collapse, not {classes}"
        )
    counts, products = problem.counts, collapse_products(problem)
    order = counts.argsort(stable=True)
    last, first = counts[order[classes - 1]].item(), counts[order[classes]].item()
    if last == first:
        sizes = [int((counts < last).sum()), int((counts <= last).sum())]
        possible = [str(size) for size in sizes if 0 < size < problem.num_classes]
        raise ValueError(
            f"the {int((counts == last).sum())} classes of {last:g} samples collapse together: exactly "
            f"{' or '.join(possible) or 'none'} can, not {classes}"
        )
    low, high = products[order[:classes]].max().item(), products[order[classes:]].min().item()
    if not 0 < low < high:
        raise ValueError("with this loss, the smallest classes are not the first to collapse")
    root = (low * high) ** 0.25
    return root * math.sqrt(ratio), root / math.sqrt(ratio)


# ---------------------------------------------------------------------------------------------------------
# Cross entropy
# ---------------------------------------------------------------------------------------------------------


def cross_entropy_margins(problem: UFM, sizes: torch.Tensor) -> torch.Tensor:
    """Return the closed form's margins (P,) of classes of `sizes` (P,) samples."""
    log_sizes, log_w, log_h, log_shrink = logarithms(problem, sizes)
    # log of sqrt(n_k) / (N sqrt(lambda_W lambda_H (K-1)/K)): above log(K/(K-1)) where class k does not collapse
    log_ratio = 0.5 * (log_sizes - log_w - log_h - log_shrink) - problem.counts.sum().log()
    variant = problem.variant
    if variant.class_weights:
        log_ratio = log_ratio + torch.from_numpy(variant.log_weights(sizes.numpy(), problem.class_counts))
    if variant.label_smoothing:
        log_ratio = -((-log_ratio).exp() + variant.label_smoothing * log_shrink.exp()).log()
    return margins_of_ratio(log_ratio, problem.num_classes, shifts=added_margins(problem, sizes))


def added_margins(problem: UFM, sizes: torch.Tensor) -> torch.Tensor:
    """Return the margins c_k (P,) that the loss itself adds (LDAM), of classes of `sizes` (P,) samples."""
    return torch.from_numpy(problem.variant.margins(sizes.numpy(), problem.class_counts))


def released_margins(problem: UFM, sizes: torch.Tensor) -> torch.Tensor:
    """Return the released formula's margins (P,) of classes of `sizes` (P,) samples."""
    log_sizes, log_w, _, log_shrink = logarithms(problem, sizes)
    log_ratio = 0.5 * (log_sizes - log_shrink) - log_w - (problem.counts.sum() / 2).log()
    return margins_of_ratio(log_ratio, problem.num_classes)


def margins_of_ratio(log_ratio: torch.Tensor, num_classes: int, shifts: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return max(0, c + log((K-1) (r - 1))) for ratios r given by their logarithms, and 0 for r <= 1."""
    above = log_ratio.clamp(min=0)
    margins = above + torch.log1p(-(-above).exp()) + torch.tensor(num_classes - 1.0, dtype=torch.float64).log()
    return (margins + shifts).clamp(min=0)


def cross_entropy_norms_sq(problem: UFM, sizes: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Return the |h_k|^2 (P,) that reach given margins (P,) at the least penalty."""
    log_sizes, log_w, log_h, log_shrink = logarithms(problem, sizes)
    return margins * (0.5 * (log_shrink + log_w - log_h - log_sizes)).exp()


def cross_entropy_geometry(problem: UFM, margins: torch.Tensor, method: str) -> Optimum:
    """Return the Optimum with given margins (K,), each shared between head and feature at the least penalty."""
    counts, num_classes = problem.counts, problem.num_classes
    log_counts, log_w, log_h, log_shrink = logarithms(problem, counts)
    norms_sq = cross_entropy_norms_sq(problem, counts, margins)
    columns_sq = margins * (0.5 * (log_h + log_counts - log_shrink - log_w)).exp()
    penalty = margins * (0.5 * (log_w + log_h + log_counts + log_shrink)).exp()
    inner = margins - added_margins(problem, counts)  # the margin in the scores that the softmax sees
    cross_entropy = torch.log1p((num_classes - 1) * (-inner).exp())
    cross_entropy = cross_entropy + problem.variant.label_smoothing * log_shrink.exp() * inner
    cross_entropy = cross_entropy * torch.from_numpy(problem.variant.weights(problem.class_counts))
    loss = (counts / counts.sum() * cross_entropy + penalty).sum().item()
    rows_gram = columns_sq.diag()  # in place, because of 10,000 classes a matrix takes 0.8 GB
    rows_gram.sub_((columns_sq[:, None] + columns_sq).div_(num_classes)).add_(columns_sq.sum() / num_classes**2)
    return Optimum(
        problem=problem,
        margins=margins,
        mean_norms_sq=norms_sq,
        HTH=norms_sq.diag(),
        WWT=rows_gram,
        WH=torch.eye(num_classes, dtype=torch.float64).sub_(1 / num_classes).mul_(margins),
        bias=torch.zeros_like(counts),
        loss=loss,
        method=method,
        lower_bound=loss,
    )


# ---------------------------------------------------------------------------------------------------------
# MSE
# ---------------------------------------------------------------------------------------------------------


def collapse_ratio(depth: int) -> float:
    """Return the N (lambda_W^L lambda_H)^(1/(L+1)) n_k^(-L/(L+1)) at and above which a class collapses, L = `depth`."""
    return ((depth - 1) / depth) ** ((depth - 1) / (depth + 1)) / depth


def mse_scales(problem: UFM, sizes: torch.Tensor) -> torch.Tensor:
    """Return s_k (P,), the logits of their own class, of classes of `sizes` (P,) samples."""
    log_sizes, log_w, log_h, _ = logarithms(problem, sizes)
    depth = problem.depth_linear
    if depth == 1:
        return (-torch.expm1(problem.counts.sum().log() + 0.5 * (log_w + log_h - log_sizes))).clamp(min=0)
    log_ratio = problem.counts.sum().log() + (depth * (log_w - log_sizes) + log_h) / (depth + 1)
    ratio, power = log_ratio.exp(), (depth - 1) / (depth + 1)
    # The root of (1 - s) s^power = ratio in the interval [(L-1)/L, 1], where the left side falls
    low, high = torch.full_like(ratio, (depth - 1) / depth), torch.ones_like(ratio)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (1 - middle) * middle**power > ratio
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(ratio < collapse_ratio(depth), high, 0.0)


def mse_residuals(problem: UFM, sizes: torch.Tensor) -> torch.Tensor:
    """Return 1 - s_k (P,) for depth_linear = 1, with all its digits where it is tiny."""
    log_sizes, log_w, log_h, _ = logarithms(problem, sizes)
    return (problem.counts.sum().log() + 0.5 * (log_w + log_h - log_sizes)).exp().clamp(max=1)


def mse_norms_sq(problem: UFM, sizes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the |h_k|^2 (P,) that reach given s_k (P,) at the least penalty."""
    log_sizes, log_w, log_h, _ = logarithms(problem, sizes)
    depth = problem.depth_linear
    return scales ** (2 / (depth + 1)) * (depth * (log_w - log_h - log_sizes) / (depth + 1)).exp()


def mse_optimum(problem: UFM) -> Optimum:
    """Return the Optimum of MSE without a bias."""
    counts, depth = problem.counts, problem.depth_linear
    log_counts, log_w, log_h, _ = logarithms(problem, counts)
    scales = mse_scales(problem, counts)
    norms_sq = mse_norms_sq(problem, counts, scales)
    # w_k^(2L) with w_k^2 = s_k^(2/(L+1)) (lambda_H n_k / lambda_W)^(1/(L+1)) of each layer
    rows_sq = scales ** (2 * depth / (depth + 1)) * (depth * (log_h + log_counts - log_w) / (depth + 1)).exp()
    penalty = (depth + 1) / 2 * scales ** (2 / (depth + 1)) * ((depth * log_w + log_h + log_counts) / (depth + 1)).exp()
    loss = (counts / counts.sum() * 0.5 * (1 - scales).square() + penalty).sum().item()
    return Optimum(
        problem=problem,
        margins=scales,
        mean_norms_sq=norms_sq,
        HTH=norms_sq.diag(),
        WWT=rows_sq.diag(),
        WH=scales.diag(),
        bias=torch.zeros_like(counts),
        other_duality=(counts.sqrt() * (scales**2 * counts) ** ((depth - 1) / (2 * depth + 2))).diag(),
        loss=loss,
        method="closed form",
        lower_bound=loss,
    )


# ---------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------


def logarithms(problem: UFM, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log n (P,) of `sizes` (P,), log lambda_W, log lambda_H and log((K-1)/K)."""
    log_w, log_h = torch.tensor([problem.lambda_w, problem.lambda_h], dtype=torch.float64).log()
    return sizes.log(), log_w, log_h, torch.tensor(-1 / problem.num_classes, dtype=torch.float64).log1p()


def shrink_factor(num_classes: int, loss: str) -> float:
    """Return the factor of N^2 lambda_W lambda_H in the condition of minority collapse."""
    return num_classes / (num_classes - 1) if loss == "CrossEntropy" else 1.0
