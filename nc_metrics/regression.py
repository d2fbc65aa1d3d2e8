"""Neural collapse in regression, for n targets instead of K classes."""

import torch
from numpy.typing import ArrayLike


def regression_collapse(features: ArrayLike, targets: ArrayLike, weight: ArrayLike) -> dict[str, float]:
    """Return NRC1, NRC2, NRC3 of features (N, d), targets (N, n) and a head W (n, d), {column: float}; n < d, n < N.

    Andriopoulos, Dong, Guo, Zhao, Ross (2024, arXiv 2409.04180), section 3. All are zero in collapse. With the features
    centred at their mean and divided by their norms,

    NRC1  mean squared distance of a feature from the span of the first n principal components of the centred features
    NRC2  mean squared distance of a feature from the span of W's rows
    NRC3  |A/|A| - B/|B||^2, A = W W^T, B = Sigma^(1/2) - c I, Sigma the covariance of the targets, with the c from 0 to
          the root of its smallest eigenvalue for which this is least

    Features that equal their mean have no direction and are left out; NaN if all do. Raises ValueError for other shapes
    and for numbers that are not finite.

    Example:
        >>> import torch
        >>> from nc_metrics import regression_collapse
        >>> targets = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> weight = torch.eye(2, 5).double()
        >>> row = regression_collapse(targets @ weight, targets, weight)  # features in the span of W
        >>> f"{row['NRC1']:.3f} {row['NRC2']:.3f}"
        '0.000 0.000'
    """
    h, y, w = (torch.as_tensor(part).detach().cpu().double() for part in (features, targets, weight))
    shapes = tuple(tuple(part.shape) for part in (h, y, w))
    if h.ndim != 2 or shapes[1:] != ((len(h), w.shape[0]), (w.shape[0], h.shape[1])) or w.shape[0] >= min(h.shape):
        raise ValueError(
            f"features, targets and weight have shapes {shapes}, wanted (N, d), (N, n), (n, d), n < d, n < N"
        )
    if not all(part.isfinite().all() for part in (h, y, w)):
        raise ValueError("the features, targets or weight are not finite")
    centred = h - h.mean(0)
    norms = centred.norm(dim=1)
    rounding = torch.finfo(h.dtype).eps * len(h) * h.norm(dim=1).max()
    directions = centred[norms > rounding] / norms[norms > rounding, None]
    principal = torch.linalg.svd(centred, full_matrices=False).Vh[: len(w)]
    own = torch.linalg.svd(w, full_matrices=False)
    rows = own.Vh[own.S[0] * max(w.shape) * torch.finfo(h.dtype).eps < own.S]
    residuals = [directions - directions @ basis.T @ basis for basis in (principal, rows)]
    nrc1, nrc2 = (residual.square().sum(1).mean().item() for residual in residuals)
    return {"NRC1": nrc1, "NRC2": nrc2, "NRC3": nrc3(w @ w.T, y)}


def nrc3(gram: torch.Tensor, targets: torch.Tensor) -> float:
    """Return NRC3 of W W^T (n, n) and targets (N, n), with the best c in closed form.

    The cosine of A and S - c I, S = Sigma^(1/2), has one stationary point in c; the best c is there or at an end.
    """
    values, vectors = torch.linalg.eigh(torch.cov(targets.T, correction=0).reshape(gram.shape))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    eye = torch.eye(len(root), dtype=root.dtype)
    product, trace = (gram * root).sum(), gram.trace()
    stationary = (trace * root.square().sum() - product * root.trace()) / (trace * root.trace() - len(root) * product)
    most = values[0].clamp(min=0).sqrt()
    candidates = [root - c * eye for c in (0.0, most, stationary.nan_to_num(0.0).clamp(0.0, most))]
    normalised = gram / gram.norm()
    return min(((normalised - b / b.norm()).square().sum().item() for b in candidates if b.any()), default=float("nan"))
