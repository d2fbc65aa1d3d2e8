"""Neural collapse as a torchmetrics Metric: one pass over batches, in any training loop, on any number of processes.

    metric = NeuralCollapse(num_classes=10, feature_dim=512)
    for features, target in batches: metric.update(features, target)
    metric.compute()                                                 # {"NC1": ..., "CDNV": ..., ...}

`pip install ".[torchmetrics]"` installs what it needs. The two passes of `nc_layers` give the same results and
need memory for K d numbers; this single pass needs it for K d + d^2.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torchmetrics import Metric

from nc_metrics import ClassStatistics, NearestMean, nc_metrics
from nc_theory import Optimum

__all__ = ["COLUMNS", "OPTIMUM_COLUMNS", "REFERENCE_COLUMNS", "NeuralCollapse"]

COLUMNS = (
    *("NC1", "NC1_corrected", "NC1_trace", "CDNV", "GNC2"),
    *("ETF_HTH", "SELI_HTH", "cv_mean_norms", "equiangularity_means"),
)
OPTIMUM_COLUMNS = ("NC2_H", "norm_rel_err")
REFERENCE_COLUMNS = ("NC4", "NCM_acc1")


class NeuralCollapse(Metric):
    """Computes the columns of `nc_metrics` that need no head, {column: scalar tensor}, in a single pass.

    num_classes, feature_dim: K and d. between, classes: as in `nc_metrics.ClassStatistics`; with `classes`, K is their
        number in all shapes below. A prediction that is none of them agrees with no class mean.
    optimum: a `nc_theory.Optimum` to compare with, for NC2_H and norm_rel_err, which are absent without it. Then call
        `update`, not `forward`, which would compare the class counts of a batch with the optimum's.
    reference_means: class means (K, d) that are known beforehand, such as those of the training set or of the previous
        epoch, for NC4 and NCM_acc1, which are absent without them: a single pass does not know which class mean is
        nearest. No other column depends on them.

    The state `moments` is a float64 matrix (K + d, d + 2), whatever `set_dtype` says: NC1 of collapsed features is less
    than float32 can resolve. `Moments` names its parts. They are one state, and not one each, because torchmetrics
    reduces every state by itself, while the scatter around the means of two sets of samples can be merged only together
    with their means and counts; sums around the origin, as in torchmetrics' FID, would add up but cancel in NC1.

    Raises ValueError for reference means of another shape than (K, d), and in `compute` for an optimum of other class
    counts than the samples'.

    Example:
        >>> import torch
        >>> from nc_torchmetrics import NeuralCollapse
        >>> metric = NeuralCollapse(num_classes=2, feature_dim=2)
        >>> metric.update(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([1, 1]))
        >>> f"{metric.compute()['NC1']:.3f}"
        '0.125'
    """

    full_state_update = False
    is_differentiable = False

    moments: torch.Tensor
    negatives: torch.Tensor
    hits: torch.Tensor
    disagreements: torch.Tensor
    reference_means: torch.Tensor | None

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        between: str = "classes",
        classes: Sequence[int] | None = None,
        optimum: Optimum | None = None,
        reference_means: ArrayLike | None = None,
        **metric_options: Any,
    ) -> None:
        super().__init__(**metric_options)
        self.template = ClassStatistics(num_classes, between, classes=classes)
        num_classes = self.template.num_classes
        self.num_classes, self.feature_dim, self.between, self.optimum = num_classes, feature_dim, between, optimum
        means = None if reference_means is None else torch.as_tensor(reference_means).detach().double()
        if means is not None and means.shape != (num_classes, feature_dim):
            raise ValueError(f"reference_means have shape {tuple(means.shape)}, wanted {(num_classes, feature_dim)}")
        self.register_buffer("reference_means", means, persistent=False)
        moments = torch.zeros(num_classes + feature_dim, feature_dim + 2, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx=merge_moments)
        for name in ("negatives", "hits", "disagreements"):  # as in ClassStatistics
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: ArrayLike, target: ArrayLike, predictions: ArrayLike | None = None) -> None:
        """Add a batch: features (B, d), integer labels (B,) and, for NC4, the classes (B,) that the head predicts.

        Raises ValueError for other shapes and types, labels out of range, and features that are not finite.
        """
        h, y, predicted = self.template.validate_batch(features, target, predictions)
        if h.shape[1] != self.feature_dim or not h.isfinite().all():
            raise ValueError(f"features have shape {tuple(h.shape)}, wanted finite (B, {self.feature_dim})")
        h = h.double()
        self.moments = merge_moments(torch.stack([self.moments, batch_moments(h, y, self.num_classes)]))
        self.negatives = self.negatives + (h < 0).sum()
        if self.reference_means is not None:
            nearest = NearestMean(self.reference_means.double())(h)
            self.hits = self.hits + (nearest == y).sum()
            self.disagreements = self.disagreements + (math.nan if predicted is None else (nearest != predicted).sum())

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the state of another metric, and have `compute` compute again, which torchmetrics 1.9 does not."""
        super().merge_state(incoming_state)
        self._computed = None

    def compute(self) -> dict[str, torch.Tensor]:
        """Return {column: float64 scalar}; all are NaN, with a warning, as long as a class has no samples."""
        columns = list(COLUMNS)
        columns += OPTIMUM_COLUMNS if self.optimum is not None else ()
        columns += REFERENCE_COLUMNS if self.reference_means is not None else ()
        if empty := (named(self.moments).counts == 0).sum().item():
            warnings.warn(f"{empty} of {self.num_classes} classes have no samples: all columns are NaN", stacklevel=2)
            row = dict.fromkeys(columns, math.nan)
        else:
            row = nc_metrics(self.class_statistics(), optimum=self.optimum)
        return {name: self.moments.new_tensor(row[name]) for name in columns}

    def class_statistics(self) -> ClassStatistics:
        """Return the `nc_metrics.ClassStatistics` of the samples seen so far, as after both passes.

        Raises ValueError as long as a class has no samples.
        """
        moments = named(self.moments)
        return ClassStatistics.from_moments(
            counts=moments.counts,
            means=moments.means,
            within_sums=moments.within_sums,
            scatter=moments.scatter,
            negatives=self.negatives,
            hits=self.hits,
            disagreements=self.disagreements,
            between=self.between,
            num_classes=self.template.head_classes,
            classes=self.template.classes,
        )

    def set_dtype(self, dst_type: str | torch.dtype) -> "NeuralCollapse":
        """Keep the state in float64."""
        return self


class Moments(NamedTuple):
    """Views of the parts of a matrix of moments (K + d, d + 2), or of P of them (P, K + d, d + 2)."""

    means: torch.Tensor  # (K, d), the first columns of the first K rows
    within_sums: torch.Tensor  # (K,) sums of |h - mu_k|^2, in the next column
    counts: torch.Tensor  # (K,) samples of each class, in the last column
    scatter: torch.Tensor  # (d, d) the sum over all samples of (h - mu_y)(h - mu_y)^T, below the means


def named(moments: torch.Tensor) -> Moments:
    """Return the parts of a matrix of moments, as views."""
    dim = moments.shape[-1] - 2
    classes, scatter = moments[..., :-dim, :], moments[..., -dim:, :dim]
    return Moments(classes[..., :dim], classes[..., dim], classes[..., dim + 1], scatter)


def batch_moments(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the moments (K + d, d + 2) of float64 features (B, d) and labels (B,)."""
    dim = features.shape[1]
    moments = features.new_zeros(num_classes + dim, dim + 2)
    means, within_sums, counts, scatter = named(moments)
    counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    means.index_add_(0, labels, features / counts[labels, None])
    centred = features - means[labels]
    within_sums.index_add_(0, labels, centred.square().sum(1))
    scatter.copy_(centred.T @ centred)
    return moments


def merge_moments(parts: torch.Tensor) -> torch.Tensor:
    """Return the moments (K + d, d + 2) of the union of P sets of samples from those of each set, (P, K + d, d + 2).

    The scatter around the mean of a part is moved to the common mean by adding count |difference of means|^2. Only sums
    of squares are added, so that nothing cancels (Chan, Golub, LeVeque, 1983).
    """
    means, _, counts, _ = named(parts)
    counts = counts[:, :, None]
    merged = parts.sum(0)
    total = named(merged)
    total.means.copy_(means[0] + (counts * (means - means[0])).sum(0) / counts.sum(0).clamp(min=1))
    shared = (counts > 0).sum(0).flatten() > 1  # the means of other classes have not moved
    shifts = counts[:, shared].sqrt() * (means[:, shared] - total.means[shared])
    total.within_sums[shared] += shifts.square().sum((0, 2))
    shifts = shifts.flatten(0, 1)
    total.scatter.add_(shifts.T @ shifts)
    return merged
