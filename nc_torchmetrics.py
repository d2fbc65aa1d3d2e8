"""Neural collapse as a torchmetrics Metric: one pass over batches, in any training loop, on any number of processes.

    metric = NeuralCollapse(num_classes=10, feature_dim=512)
    for features, target in batches: metric.update(features, target)
    metric.compute()                                                 # {"NC1": ..., "CDNV": ..., ...}

`pip install ".[torchmetrics]"` installs what it needs. The two passes of `nc_layers` give the same results and
need memory for K d numbers; this single pass needs it for K d + d^2.
"""

import math
import warnings

import torch
from torchmetrics import Metric

from nc_metrics import ClassStatistics, between_class_basis, nc_metrics

COLUMNS = ("NC1", "CDNV", "GNC2", "ETF_HTH", "SELI_HTH", "cv_mean_norms")
OPTIMUM_COLUMNS = ("NC2_H", "norm_rel_err")
REFERENCE_COLUMNS = ("NC4", "NCM_acc1")


class NeuralCollapse(Metric):
    """Computes the columns of `nc_metrics` that need no head, {column: scalar tensor}, in a single pass.

    num_classes, feature_dim: K and d. between: as in `nc_metrics.ClassStatistics`.
    optimum: a `nc_theory.Optimum` to compare with, for NC2_H and norm_rel_err, which are absent without it. Then call
        `update`, not `forward`, which would compare the class counts of a batch with the optimum's.
    reference_means: class means (K, d) that are known beforehand, such as those of the training set or of the previous
        epoch, for NC4 and NCM_acc1, which are absent without them: a single pass does not know which class mean is
        nearest. No other column depends on them.

    The state `moments` is a float64 matrix (K + d, d + 2), whatever `set_dtype` says: NC1 of collapsed features is less
    than float32 can resolve. Its first K rows hold the mean of each class, its sum of |h - mu_k|^2 and its count; the
    first d columns of the other rows hold the sum over all samples of (h - mu_y)(h - mu_y)^T.

    Raises ValueError for reference means of another shape than (K, d), and in `compute` for an optimum of other class
    counts than the samples'.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self, num_classes, feature_dim, *, between="classes", optimum=None, reference_means=None, **metric_options
    ):
        super().__init__(**metric_options)
        self.validate_batch = ClassStatistics(num_classes, between).validate_batch
        self.num_classes, self.feature_dim, self.between, self.optimum = num_classes, feature_dim, between, optimum
        if reference_means is not None:
            reference_means = torch.as_tensor(reference_means).detach().double()
            if reference_means.shape != (num_classes, feature_dim):
                raise ValueError(
                    f"reference_means have shape {tuple(reference_means.shape)}, wanted {(num_classes, feature_dim)}"
                )
        self.register_buffer("reference_means", reference_means, persistent=False)
        moments = torch.zeros(num_classes + feature_dim, feature_dim + 2, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx=merge_moments)
        for name in ("negatives", "hits", "disagreements"):  # as in ClassStatistics
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features, target, predictions=None):
        """Add a batch: features (B, d), integer labels (B,) and, for NC4, the classes (B,) that the head predicts.

        Raises ValueError for other shapes, labels out of range, and features that are not finite.
        """
        features, target = self.validate_batch(features, target)
        if features.shape[1] != self.feature_dim or not features.isfinite().all():
            raise ValueError(f"features have shape {tuple(features.shape)}, wanted finite (B, {self.feature_dim})")
        features = features.double()
        batch = batch_moments(features, target, self.num_classes)
        self.moments = merge_moments(torch.stack([self.moments, batch]))
        self.negatives += (features < 0).sum()
        if self.reference_means is not None:
            means = self.reference_means.double()
            nearest = (features @ means.T - 0.5 * means.square().sum(1)).argmax(1)
            self.hits += (nearest == target).sum()
            self.disagreements += math.nan if predictions is None else (nearest != predictions).sum()

    def compute(self):
        """Return {column: float64 scalar}; all are NaN, with a warning, as long as a class has no samples."""
        statistics, columns = self.class_statistics(), list(COLUMNS)
        columns += OPTIMUM_COLUMNS if self.optimum is not None else ()
        columns += REFERENCE_COLUMNS if self.reference_means is not None else ()
        if empty := (statistics.counts == 0).sum().item():
            warnings.warn(f"{empty} of {self.num_classes} classes have no samples: all columns are NaN", stacklevel=2)
            row = dict.fromkeys(columns, math.nan)
        else:
            row = nc_metrics(statistics, optimum=self.optimum)
        return {name: self.moments.new_tensor(row[name]) for name in columns}

    def class_statistics(self):
        """Return the `nc_metrics.ClassStatistics` of the samples seen so far, as after both passes."""
        num_classes, dim = self.num_classes, self.feature_dim
        means, scatter = self.moments[:num_classes, :dim], self.moments[num_classes:, :dim]
        statistics = ClassStatistics(num_classes, self.between)
        statistics.within_sums, statistics.counts = self.moments[:num_classes, dim:].T
        statistics.within_counts, statistics.sums = statistics.counts, means * statistics.counts[:, None]
        statistics.negatives, statistics.hits, statistics.disagreements = self.negatives, self.hits, self.disagreements
        statistics.basis = between_class_basis(means, statistics.counts, self.between)
        statistics.projected_sum = (statistics.basis * (scatter @ statistics.basis)).sum()
        return statistics

    def set_dtype(self, dst_type):
        """Keep the state in float64."""
        return self


def batch_moments(features, labels, num_classes):
    """Return the moments (K + d, d + 2) of float64 features (B, d) and labels (B,), as in `NeuralCollapse`."""
    dim = features.shape[1]
    moments = features.new_zeros(num_classes + dim, dim + 2)
    counts, means = moments[:, dim + 1], moments[:, :dim]
    counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    means.index_add_(0, labels, features / counts[labels, None])
    centred = features - means[labels]
    moments[:, dim].index_add_(0, labels, centred.square().sum(1))
    moments[num_classes:, :dim] = centred.T @ centred
    return moments


def merge_moments(parts):
    """Return the moments (K + d, d + 2) of the union of P sets of samples from those of each set, (P, K + d, d + 2).

    The scatter around the mean of a part is moved to the common mean by adding count |difference of means|^2. Only sums
    of squares are added, so that nothing cancels (Chan, Golub, LeVeque, 1983).
    """
    dim = parts.shape[2] - 2
    num_classes = parts.shape[1] - dim
    means, counts = parts[:, :num_classes, :dim], parts[:, :num_classes, dim + 1, None]
    merged = parts.sum(0)
    merged[:num_classes, :dim] = means[0] + (counts * (means - means[0])).sum(0) / counts.sum(0).clamp(min=1)
    shared = (counts > 0).sum(0).flatten() > 1  # the means of other classes have not moved
    shifts = counts[:, shared].sqrt() * (means[:, shared] - merged[:num_classes, :dim][shared])
    merged[:num_classes, dim][shared] += shifts.square().sum((0, 2))
    shifts = shifts.flatten(0, 1)
    merged[num_classes:, :dim] += shifts.T @ shifts
    return merged
