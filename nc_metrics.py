"""Neural-collapse metrics of last-layer features and a linear head, as pure functions of tensors.

Class statistics are gathered from batches of features (B, d) and labels (B,). The measures then need only the K class
means and the head's matrix W (K, d), if there is one. No d x d matrix is formed anywhere. All results are float64.

    statistics = ClassStatistics(num_classes)
    for features, labels in batches: statistics.update(features, labels)            # first pass: class means
    for features, labels in batches: statistics.update_within(features, labels)     # second pass: NC1 and others
    row = nc_metrics(statistics, weight, optimum)

One pass is enough for all columns but NC1, CDNV, NC4 and NCM_acc1, which are NaN without the second. Throughout, mu_k
is the mean of class k, mu_G the mean of all samples, H = [mu_1 ... mu_K] (d, K), and the distance of two matrices is
dist(A, B) = |A/|A| - B/|B|| in Frobenius norms. `nc_layers` gathers the statistics of the layers of a model.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from numpy.typing import ArrayLike

from nc_theory import Optimum, class_margins, self_duality, seli

__all__ = [
    "BETWEEN",
    "THEORY_COLUMNS",
    "ClassStatistics",
    "NearestMean",
    "between_class_basis",
    "class_alignment",
    "classical_metrics",
    "distance",
    "geometry",
    "nc1",
    "nc1_corrected",
    "nc1_trace",
    "nc5",
    "nc_metrics",
    "noise_share",
    "other_geometries",
    "regression_collapse",
    "untrained_classes",
]

THEORY_COLUMNS = ["NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"]  # NaN where there is no optimum
BETWEEN = ("classes", "means", "samples")
TILE = 2**22  # entries of a K x K matrix that are processed at a time
CLOSE = 1e-4  # |p - q|^2 / (|p|^2 + |q|^2) of two points, below which their distance is taken from their difference
FIRST_PASS = ("counts", "sums", "negatives")  # the sums that each pass of ClassStatistics gathers
SECOND_PASS = ("within_counts", "within_sums", "projected_sum", "gram", "hits", "disagreements", "shifts")
DIRECTIONS = 16  # random directions in which sums of h - mu are compared with zero
PROBES = 32  # random directions in which the scatter outside the span of the class means is known
BIAS = 0.1  # relative difference of NC1_corrected and NC1, from which on a warning is given
PARALLEL, SHORT = 0.85, 0.6  # cosine and relative norm of the rows of classes that look untrained
NO_SIGNAL = 0.5  # share of noise from which on NC1 cannot be corrected


class ClassStatistics:
    """Counts, means and within-class scatter of features, class by class, on the device of the features.

    Features may be tensors of any float type, on any device, or NumPy arrays. Those on Apple's MPS, which has no
    float64, are moved to the CPU. No autograd graph is kept.

    between: the between-class covariance Sigma_B that NC1 divides by, see `between_class_basis`. device: that of the
    features, which only a process without a batch must know, for `merge`. classes: the classes to measure, of the
    num_classes of the head; by default all. Labels and predictions are numbers of the head's classes, and labels must
    be among these. The results are in their order. Raises ValueError for a name that is not in BETWEEN, and for
    classes that are not different numbers from 0 to num_classes - 1.

    Example:
        >>> from nc_metrics import ClassStatistics
        >>> batch = [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1, 1]
        >>> statistics = ClassStatistics(num_classes=2)
        >>> statistics.update(*batch)
        >>> statistics.update_within(*batch)
        >>> statistics.means
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
        >>> statistics.within_sums
        tensor([2., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        between: str = "classes",
        device: torch.device | str | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        if between not in BETWEEN:
            raise ValueError(f"between is {between!r}, wanted one of {', '.join(BETWEEN)}")
        self.head_classes, self.between = num_classes, between
        self.classes = None if classes is None else validate_classes(classes, num_classes)
        self.num_classes = num_classes = num_classes if self.classes is None else len(self.classes)

        @torch.inference_mode(False)  # otherwise they could not be changed outside inference mode
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.counts = zeros(num_classes)  # (K,) samples of each class
        self.sums = zeros(num_classes, 0)  # (K, d) sums of their features; d = 0 before the first batch
        self.negatives = zeros()  # () entries of the features that are below zero
        self.within_counts = zeros(num_classes)  # (K,) samples of each class in the second pass
        self.within_sums = zeros(num_classes)  # (K,) sums of |h_i - mu_k|^2
        self.projected_sum = zeros()  # () sum of (h_i - mu_{y_i})^T pinv(Sigma_B) (h_i - mu_{y_i})
        self.gram = zeros(0, 0)  # (r + p, r + p) sum of z z^T, z = [B, probes]^T (h_i - mu_{y_i})
        self.hits = zeros()  # () samples whose nearest class mean is that of their own class
        self.disagreements = zeros()  # () samples whose nearest class mean is not the predicted class
        self.shifts = zeros(num_classes, DIRECTIONS)  # (K, DIRECTIONS) sums of h_i - mu_k in random directions
        self.own_samples = True  # the second pass is over the samples of the first
        self.eps = torch.finfo(torch.float32).eps  # of the type of the features in the second pass
        self.drift_warned = False
        self.at_head = False  # the features are the input of a head (`nc_layers`)
        self.basis: torch.Tensor | None = None  # (d, r) B with pinv(Sigma_B) = B B^T; None before the second pass

    @classmethod
    def from_moments(
        cls,
        *,
        counts: torch.Tensor,
        means: torch.Tensor,
        within_sums: torch.Tensor,
        scatter: torch.Tensor,
        negatives: torch.Tensor | float = math.nan,
        hits: torch.Tensor | float = math.nan,
        disagreements: torch.Tensor | float = math.nan,
        between: str = "classes",
        num_classes: int | None = None,
        classes: Sequence[int] | None = None,
    ) -> "ClassStatistics":
        """Return the statistics, as after both passes, of samples whose moments are known.

        counts: samples of each class (K,). means: class means (K, d). within_sums: the sum of |h_i - mu_k|^2 over the
        samples of each class (K,). scatter: the sum of (h_i - mu_{y_i})(h_i - mu_{y_i})^T over all samples (d, d). All
        are float64 tensors on one device. negatives: entries of the features that are below zero. hits, disagreements:
        samples whose nearest class mean is that of their own class, and is not the predicted class. What depends on
        one of these three is NaN without it. between: as in the constructor, and so are num_classes, by default K, and
        classes, K of them.

        Raises ValueError for other shapes, and for a class without samples.

        Example:
            >>> import torch
            >>> from nc_metrics import ClassStatistics, nc1
            >>> eye, twos = torch.eye(2).double(), torch.full((2,), 2.0).double()
            >>> statistics = ClassStatistics.from_moments(counts=twos, means=2 * eye, within_sums=twos, scatter=2 * eye)
            >>> f"{nc1(statistics):.3f}"
            '0.125'
        """
        count, dim = means.shape
        shapes = tuple(tuple(moment.shape) for moment in (counts, within_sums, scatter))
        if shapes != ((count,), (count,), (dim, dim)):
            raise ValueError(
                f"counts, within_sums and scatter have shapes {', '.join(map(str, shapes))}, wanted (K,), (K,) and "
                f"(d, d) for means of shape (K, d) = {(count, dim)}"
            )
        statistics = cls(num_classes or count, between, classes=classes)
        if statistics.num_classes != count:
            raise ValueError(f"there are means of {count} classes, wanted {statistics.num_classes}")
        statistics.counts, statistics.sums = counts, means * counts[:, None]
        statistics.require_samples()
        basis = statistics.set_centres(means)
        statistics.within_counts, statistics.within_sums = counts.clone(), within_sums.clone()
        axes = statistics.axes[:, :-DIRECTIONS]
        statistics.gram = axes.T @ scatter @ axes
        statistics.projected_sum = statistics.gram.diagonal()[: basis.shape[1]].sum()
        scalars = [counts.new_zeros(()) + number for number in (negatives, hits, disagreements)]
        statistics.negatives, statistics.hits, statistics.disagreements = scalars
        return statistics

    @torch.inference_mode(False)
    def update(self, features: ArrayLike, labels: ArrayLike) -> None:
        """Add a batch to the first pass: features (B, d) of any float type, integer labels (B,) in 0..K-1.

        Raises ValueError for other shapes and types, and for labels out of range. Features that are not finite are an
        error once the class means are needed.
        """
        h, y, _ = self.validate_batch(features, labels)
        if not self.sums.shape[1]:
            self.sums = h.new_zeros(self.num_classes, h.shape[1], dtype=torch.float64)
            self.counts, self.negatives = self.counts.to(h.device), self.negatives.to(h.device)
        self.sums.index_add_(0, y, h.double())
        self.counts.index_add_(0, y, torch.ones_like(y, dtype=torch.float64))
        self.negatives += (h < 0).sum()

    @torch.inference_mode(False)
    def update_within(self, features: ArrayLike, labels: ArrayLike, predictions: ArrayLike | None = None) -> None:
        """Add a batch to the second pass, over the same samples as the first (or see `for_other_samples`).

        predictions: the classes (B,) that the head predicts, integers, needed for NC4. Raises ValueError as `update`,
        and for class means that are unknown or not finite after the first pass.
        """
        h, y, predicted = self.validate_batch(features, labels, predictions)
        basis = self.set_centres(self.means) if self.basis is None else self.basis
        self.eps = torch.finfo(h.dtype).eps
        shifted = h.to(torch.float64, copy=True).sub_(self.nearest_mean.centre)  # in place: new memory takes longer
        centred = self.nearest_mean.shifted.index_select(0, y)
        torch.sub(shifted, centred, out=centred)
        self.within_counts.index_add_(0, y, torch.ones_like(y, dtype=torch.float64))
        self.within_sums.index_add_(0, y, torch.linalg.vector_norm(centred, dim=1).square())
        rank = basis.shape[1]
        if self.own_samples:  # else there is neither a drift nor a bias of NC1 to know
            along = centred @ self.axes
            self.shifts.index_add_(0, y, along[:, -DIRECTIONS:])
            z = along[:, :-DIRECTIONS]
            self.gram.addmm_(z.T, z)
        else:
            z = centred @ basis
        self.projected_sum += z[:, :rank].square().sum()
        nearest = self.nearest_mean.of_shifted(shifted)
        self.hits += (nearest == y).sum()
        self.disagreements += math.nan if predicted is None else (nearest != predicted).sum()

    def set_centres(self, centres: torch.Tensor) -> torch.Tensor:
        """Begin the second pass around class means (K, d), and return the basis for them."""
        self.centres, self.nearest_mean = centres, NearestMean(centres)
        for name in SECOND_PASS:
            setattr(self, name, getattr(self, name).to(centres.device))
        self.basis = between_class_basis(centres, self.counts, self.between)
        generator = torch.Generator().manual_seed(0)  # the same in all processes
        directions = torch.randn(centres.shape[1], DIRECTIONS, generator=generator).to(centres)
        probes = probes_outside(self.basis) if self.basis.shape[1] == self.num_classes - 1 else self.basis[:, :0]
        self.axes = torch.cat([self.basis, probes, directions], 1)
        self.gram = self.basis.new_zeros(2 * [self.axes.shape[1] - DIRECTIONS])
        return self.basis

    def for_other_samples(self) -> "ClassStatistics":
        """Return statistics with these class means, for a second pass over other samples, such as a test set."""
        other = ClassStatistics(self.head_classes, self.between, classes=self.classes)
        other.counts, other.sums, other.negatives = self.counts, self.sums, self.negatives
        other.own_samples = False
        return other

    def merge(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sum the results of a pass over processes that have each seen a part of the samples; call it after each pass.

        sum_over_processes(tensor): returns the sum of a tensor over the processes, such as an all_reduce. A process may
        have seen no batch, if it knows the others' `device`. Raises ValueError if processes differ in d.
        """
        dim = self.sums.shape[1]
        facts = [dim, dim * dim, dim > 0, self.basis is not None]
        facts = sum_over_processes(torch.tensor(facts, dtype=torch.float64, device=self.counts.device)).tolist()
        dims, squares, processes, second_pass = facts
        if squares * processes != dims * dims:
            raise ValueError(f"the processes have features of different dimensions d, here {dim}")
        if second_pass and self.basis is None:
            self.set_centres(self.means)
        elif not dim and processes:
            self.sums = self.sums.new_zeros(self.num_classes, int(dims / processes))
        for name in SECOND_PASS if second_pass else FIRST_PASS:
            setattr(self, name, sum_over_processes(getattr(self, name)))

    def validate_batch(
        self, features: ArrayLike, labels: ArrayLike, predictions: ArrayLike | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return a batch as detached tensors on one device: features, int64 labels, and predictions if given.

        Raises ValueError if it is wrong.
        """
        h = as_tensor("features", features)
        if h.ndim != 2 or not h.is_floating_point():
            raise ValueError(f"features are {h.dtype} of shape {tuple(h.shape)}, wanted floats of shape (B, d)")
        if self.sums.shape[1] not in (0, h.shape[1]):
            raise ValueError(
                f"features have shape {tuple(h.shape)}, wanted (B, {self.sums.shape[1]}) as in the first batch"
            )
        y = as_tensor("labels", labels, h.device)
        if y.shape != h.shape[:1] or y.is_floating_point() or y.is_complex():
            soft = "; soft or mixed labels (mixup) are no classes" if y.ndim == 2 else ""
            raise ValueError(
                f"labels are {y.dtype} of shape {tuple(y.shape)}, wanted integers of shape ({len(h)},), one for each "
                f"row of the features{soft}"
            )
        y = y.long()
        if len(y):
            low, high = torch.stack(y.aminmax()).tolist()
            if low < 0 or high >= self.head_classes:
                raise ValueError(
                    f"labels go from {low} to {high}, wanted 0 to {self.head_classes - 1} for {self.head_classes} "
                    "classes"
                )
            if (other := (position := self.positions(y)) < 0).any():
                raise ValueError(f"there are labels of class {y[other][0]}, which is not in `classes`")
            y = position
        if predictions is None:
            return h, y, None
        predicted = as_tensor("predictions", predictions, h.device)
        if predicted.shape != y.shape or predicted.is_floating_point() or predicted.is_complex():
            raise ValueError(
                f"predictions are {predicted.dtype} of shape {tuple(predicted.shape)}, wanted integers of shape "
                f"{tuple(y.shape)}, such as logits.argmax(1)"
            )
        return h, y, self.positions(predicted.long())

    def positions(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the positions in `classes` of the head's classes (B,); -1 for those that are not in it."""
        if self.classes is None:
            return labels
        position = torch.full((self.head_classes,), -1, device=labels.device)
        position[list(self.classes)] = torch.arange(self.num_classes, device=labels.device)
        return position[labels.clamp(0, self.head_classes - 1)]

    def require_samples(self) -> None:
        """Raise ValueError if a class has no samples."""
        if (empty := self.counts == 0).any():
            raise ValueError(
                f"every class needs a sample before its mean is known, found none of {self.listed(empty)}; to measure "
                "the others alone, give `classes`"
            )

    def listed(self, marked: torch.Tensor) -> str:
        """Return the classes that a bool tensor (K,) marks as text, by their numbers in the head."""
        if self.classes is None:
            return listed(marked)
        of_head = torch.zeros(self.head_classes, dtype=torch.bool)
        of_head[torch.tensor(self.classes)[marked.cpu()]] = True
        return listed(of_head)

    @property
    def means(self) -> torch.Tensor:
        """Class means (K, d); ValueError if a class has no samples, or features that are not finite."""
        self.require_samples()
        if (wrong := ~self.sums.isfinite().all(1)).any():
            raise ValueError(f"there are features that are not finite, of {self.listed(wrong)}")
        return self.sums / self.counts[:, None]

    @property
    def degeneracy(self) -> str | None:
        """Why the class means have no geometry, as text: they are equal up to rounding. None if they differ.

        The sum of n numbers has a relative error of up to n eps, which is what means may differ by.
        """
        means, within_sum = self.means, self.within_sums.sum()
        size = (self.counts / self.counts.sum() @ means.square().sum(1) + within_sum / self.counts.sum()).sqrt()
        rounding = torch.finfo(means.dtype).eps * (1 + self.counts) * size
        if ((means - means.mean(0)).norm(dim=1) > rounding).any():
            return None
        if not means.any() and (self.negatives == 0 or (self.basis is not None and within_sum == 0)):
            return "all features are zero (dead ReLUs)"
        known = self.basis is not None and within_sum.sqrt() <= rounding.max() * self.counts.sum().sqrt()
        return "all features are equal" if known else "the class means are equal"

    @property
    def drift(self) -> float:
        """How far the features of the second pass are from the class means of the first; 0 if that is rounding.

        sum_k |sum_i (h_i - mu_k)|^2 / n_k, over the scatter within classes. The inner sums, over the samples of class
        k, vanish if both passes had the same features.
        """
        if self.basis is None or not self.own_samples:
            return 0.0
        within, counts = self.within_sums.sum(), self.within_counts.clamp(min=1)
        moved = (self.shifts.square().mean(1) / counts).sum()
        size = (counts * self.centres.square().sum(1)).sum() + within
        return float(moved / within) if moved > 1e-4 * within and moved > (64 * self.eps) ** 2 * size else 0.0

    def warn_of_drift(self, name: str, reason: str, stacklevel: int = 2) -> None:
        """Warn, once, if the two passes had different features. name, reason: of whose, and why, for the text."""
        if not self.drift_warned and (drift := self.drift):
            self.drift_warned = True
            warnings.warn(
                f"{name}the two passes had different features, {reason}: the class means moved by {drift:.2g} of the "
                "scatter within classes, and NC1 is wrong",
                stacklevel=stacklevel + 1,
            )

    @property
    def negative_share(self) -> float:
        """Share of the features' entries that are below zero, NaN before the first batch."""
        return float(self.negatives / (self.counts.sum() * self.sums.shape[1]))


class NearestMean:
    """The classifier of features (B, d) that takes the class (B,) whose mean is nearest, for class means (K, d).

    Mensink et al. (2013). Both are float64 tensors on one device; ties go to the first class.

    Example:
        >>> import torch
        >>> from nc_metrics import NearestMean
        >>> NearestMean(torch.tensor([[0.0, 1.0], [4.0, 0.0]]))(torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
        tensor([0, 1])
    """

    def __init__(self, means: torch.Tensor) -> None:
        self.centre = means.mean(0)  # without it, |h|^2 - 2 h . mu + |mu|^2 would cancel far from the origin
        self.shifted = means - self.centre
        self.half_norms_sq = 0.5 * self.shifted.square().sum(1)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return self.of_shifted(h - self.centre)

    def of_shifted(self, shifted: torch.Tensor) -> torch.Tensor:
        """Return the classes of features less `centre`, which a caller may need, too."""
        return (shifted @ self.shifted.T - self.half_norms_sq).argmax(1)


def as_tensor(name: str, values: ArrayLike, device: torch.device | None = None) -> torch.Tensor:
    """Return numbers as a detached tensor, on the CPU instead of MPS; raise ValueError if they are no such thing."""
    try:
        tensor = torch.as_tensor(values, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} are a {type(values).__name__} that makes no tensor of numbers: {error}") from None
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def validate_classes(classes: Sequence[int], num_classes: int) -> tuple[int, ...]:
    """Return some of a head's classes as ints; raise ValueError if they are not different numbers of such classes."""
    numbers = as_tensor("classes", classes)
    if numbers.ndim != 1 or len(numbers) < 2 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"classes are {classes!r}, wanted two or more whole numbers")
    if len(set(found := numbers.tolist())) < len(found) or min(found) < 0 or max(found) >= num_classes:
        raise ValueError(f"classes are {found}, wanted different numbers from 0 to {num_classes - 1}")
    return tuple(found)


def listed(classes: torch.Tensor) -> str:
    """Return the classes that a bool tensor (K,) marks as text: the first ten, and how many more there are."""
    marked = classes.nonzero().flatten().tolist()
    return f"class {', '.join(map(str, marked[:10]))}" + (f" and {len(marked) - 10:,} more" if len(marked) > 10 else "")


def between_class_root(means: torch.Tensor, counts: torch.Tensor, between: str) -> torch.Tensor:
    """Return R (K, d) with Sigma_B = R^T R, the centred and weighted class means; see `between_class_basis`."""
    weights, shares = between_class_weights(counts, between)
    return weights.sqrt()[:, None] * (means - shares @ means)


def between_class_weights(counts: torch.Tensor, between: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights (K,) of the class means in Sigma_B, and those in its centre; see `between_class_basis`."""
    shares, uniform = counts / counts.sum(), torch.full_like(counts, 1 / len(counts))
    return shares if between == "samples" else uniform, uniform if between == "means" else shares


def between_class_basis(means: torch.Tensor, counts: torch.Tensor, between: str = "classes") -> torch.Tensor:
    """Return B (d, r) with pinv(Sigma_B) = B B^T, Sigma_B the covariance of class means (K, d), of rank r < K.

    between: how the classes are weighted, and what they are centred at; all three agree for balanced classes.
        classes  (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T, as in tding1/Neural-Collapse and Dang et al. (2024)
        means    the same with the mean of the class means for mu_G, as in rhubarbwu/neural-collapse
        samples  sum_k (n_k/N) (mu_k - mu_G)(mu_k - mu_G)^T, the part of the total covariance between classes

    B is made from the singular vectors of the centred means (K, d). Eigenvalues of Sigma_B below d eps times the
    largest are taken as zero, as by SciPy's pinv of the d x d matrix.

    Example:
        >>> import torch
        >>> from nc_metrics import between_class_basis
        >>> means, counts = torch.eye(3, 8).double(), torch.tensor([5, 10, 20]).double()
        >>> between_class_basis(means, counts).shape
        torch.Size([8, 2])
    """
    _, singular, vectors = torch.linalg.svd(between_class_root(means, counts, between), full_matrices=False)
    eigenvalues = singular.square()
    kept = eigenvalues > eigenvalues[0] * means.shape[1] * torch.finfo(torch.float64).eps
    return (vectors[kept] / singular[kept, None]).T


def probes_outside(basis: torch.Tensor) -> torch.Tensor:
    """Return directions P (d, p) orthogonal to B (d, r), with P P^T equal to I - B pinv(B), in expectation for large d.

    They are the columns of I for d <= PROBES, and else the same random ones for every d x r matrix.
    """
    dim = len(basis)
    if dim <= PROBES:
        probes = torch.eye(dim, dtype=basis.dtype, device=basis.device)
    else:
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(dim, PROBES, generator=generator, dtype=torch.float64).to(basis) / PROBES**0.5
    span = basis / basis.norm(dim=0)  # the columns of B are orthogonal
    return probes - span @ (span.T @ probes)


# ---------------------------------------------------------------------------------------------------------
# The geometry of the class means and the head
# ---------------------------------------------------------------------------------------------------------


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return dist(A, B) = |A/|A| - B/|B|| in Frobenius norms, between 0 and 2; NaN if one of them is zero.

    Example:
        >>> import torch
        >>> from nc_metrics import distance
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> f"{distance(eye, 3 * eye):.3f} {distance(eye, -eye):.3f}"
        '0.000 2.000'
    """
    norms, rows = (a.norm(), b.norm()), max(1, TILE // a.shape[1])
    tiles = zip(a.split(rows), b.split(rows), strict=True)
    return torch.stack([(x / norms[0] - y / norms[1]).norm() for x, y in tiles]).norm().item()


def geometry(means: ArrayLike, weight: ArrayLike) -> dict[str, torch.Tensor]:
    """Return HTH, WWT, WH (K, K), margins and mean_norms_sq (K,) of class means (K, d) and a head W (K, d), on the CPU.

    Raises ValueError for W of another shape than the means.

    Example:
        >>> from nc_metrics import geometry
        >>> parts = geometry(means=[[2.0, 0.0], [0.0, 1.0]], weight=[[1.0, -1.0], [-1.0, 1.0]])
        >>> parts["margins"]
        tensor([4., 2.], dtype=torch.float64)
        >>> parts["WH"]
        tensor([[ 2., -1.],
                [-2.,  1.]], dtype=torch.float64)
    """
    mu = as_tensor("means", means).double()
    w = validate_weight(weight, mu)
    logits = w @ mu.T
    gram = mu @ mu.T
    parts = {
        "HTH": gram,
        "WWT": w @ w.T,
        "WH": logits,
        "margins": class_margins(logits),
        "mean_norms_sq": gram.diag(),
    }
    return {name: value.cpu() for name, value in parts.items()}


def validate_weight(weight: ArrayLike, means: torch.Tensor) -> torch.Tensor:
    """Return a head's matrix in float64 on the device of the class means (K, d); raise ValueError for another shape."""
    w = as_tensor("the weight", weight).to(means.device).double()
    if w.shape != means.shape:
        raise ValueError(f"weight has shape {tuple(w.shape)}, wanted (K, d) = {tuple(means.shape)}")
    return w


def largest_relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max_k |measured_k / expected_k - 1| over the classes with expected_k > 0; NaN if there are none."""
    nonzero = expected > 0
    return (measured[nonzero] / expected[nonzero] - 1).abs().max().item() if nonzero.any() else math.nan


def nc_metrics(
    statistics: ClassStatistics, weight: ArrayLike | None = None, optimum: Optimum | None = None
) -> dict[str, float]:
    """Return a row of metrics, {column: float}, of ClassStatistics after both passes and a head W (K, d), if any.

    weight: W; without one, the columns that need it are absent. If the statistics have `classes`, W may be that of the
    whole head: the rows of these classes are compared, and NC0 is that of all rows. optimum: a `nc_theory.Optimum` to
    compare with; without one, the columns that need it are NaN. The paper is Dang, Tran, Nguyen, Ho (ICML 2024, arXiv
    2401.02058). The columns below are zero in perfect collapse to the optimum of the cross entropy. Margins and norms
    are compared for the classes that the optimum does not collapse.

    NC1             trace(Sigma_W pinv(Sigma_B)) / K, see `nc1`
    NC1_corrected   NC1 less its bias from the noise of the class means, see `nc1_corrected`
    NC1_trace       trace(Sigma_W) / trace(Sigma_B), see `nc1_trace`
    NC0             |sum_k w_k| / |W|, w_k the rows of W: zero at a stationary point of the cross entropy with weight
                    decay on W, because the gradient of the cross entropy sums to zero over the rows. This does not
                    hold for MSE, nor for a cross entropy whose logits are scaled class by class.
    NC2_H           dist(H^T H, the optimum's)
    NC2_WWT         dist(W W^T, the optimum's)
    NC2_W           dist(W, D H^T), D the optimum's `duality`; without an optimum the paper's, `nc_theory.self_duality`
    NC3_WH          dist(W H, the optimum's)
    margin_rel_err  max_k |measured margin / M_k - 1|
    norm_rel_err    max_k ||mu_k|^2 / |h_k|^2 - 1|

    Further columns are those of `other_geometries` and `classical_metrics`.

    In Sigma_B of NC1 every class mean has weight 1/K and is centred at mu_G, the mean of all samples, in which it has
    weight n_k/N. `ClassStatistics(num_classes, between="samples")` weights the classes by n_k/N in Sigma_B as
    well, and between="means" centres them at the mean of the class means. Only the columns NC1,
    NC1_corrected and NC1_trace depend on this.

    Raises ValueError for a class without samples, for features that are not finite, for W of another shape than (K, d),
    and for an optimum of other class counts. Warns if the optimum is of a problem with ReLU and some features are
    negative, if it needs more features than d, and if the two passes had different features. If all class means are
    equal, such as those of features that are all zero, it warns, and what compares them is NaN. It also warns if
    NC1 depends on the number of samples: NC1_corrected differs from it by more than 10 %, or cannot be found.

    Example:
        >>> from nc_metrics import ClassStatistics, nc_metrics
        >>> batch = [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1, 1]
        >>> statistics = ClassStatistics(num_classes=2)
        >>> statistics.update(*batch)
        >>> statistics.update_within(*batch)
        >>> row = nc_metrics(statistics, weight=[[1.0, -1.0], [-1.0, 1.0]])
        >>> {name: f"{row[name]:.3f}" for name in ("NC1", "NC0", "CDNV", "NCM_acc1")}
        {'NC1': '0.125', 'NC0': '0.000', 'CDNV': '0.125', 'NCM_acc1': '100.000'}
    """
    means, counts = statistics.means, statistics.counts
    if (wrong := ~statistics.within_sums.isfinite()).any():
        raise ValueError(f"there are features in the second pass that are not finite, of {statistics.listed(wrong)}")
    statistics.warn_of_drift("", "or other samples, or `update` was called after `update_within`")
    if optimum is not None:
        validate_optimum(optimum, statistics)
    if reason := statistics.degeneracy:
        warnings.warn(f"{reason}: what compares class means is NaN", stacklevel=2)
    row = {"NC1": nc1(statistics), "NC1_corrected": math.nan, "NC1_trace": nc1_trace(statistics)}
    share, bias = noise_of_means(statistics)
    row["NC1_corrected"] = corrected(statistics, share, bias)
    if text := dependence_on_samples(row["NC1"], row["NC1_corrected"], share):
        warnings.warn(f"NC1 depends on the number of samples: {text}", stacklevel=2)
    w = None
    if weight is not None:
        all_rows = w = as_tensor("the weight", weight).double()
        if statistics.classes is not None and len(w) == statistics.head_classes:
            w = w[list(statistics.classes)]
        w = validate_weight(w, means)
        row["NC0"] = (all_rows.sum(0).norm() / all_rows.norm()).item()
    row |= distances_to_optimum(means, w, counts, optimum)
    differing = torch.zeros_like(means) if reason else means  # equal up to rounding, which is no geometry
    return row | other_geometries(differing, w, counts) | classical_metrics(statistics, w)


def distances_to_optimum(
    means: torch.Tensor, weight: torch.Tensor | None, counts: torch.Tensor, optimum: Optimum | None
) -> dict[str, float]:
    """Return the columns NC2_H to norm_rel_err of `nc_metrics`, {column: float}, without those that need a head."""
    row = dict.fromkeys(("NC2_H", "NC2_WWT", "NC2_W", "NC3_WH", "margin_rel_err", "norm_rel_err"), math.nan)
    if optimum is not None:
        row["NC2_H"] = distance((means @ means.T).cpu(), optimum.HTH)
        row["norm_rel_err"] = largest_relative_error(means.square().sum(1).cpu(), optimum.mean_norms_sq)
    if weight is None:
        return {name: row[name] for name in ("NC2_H", "norm_rel_err")}
    duality = self_duality(counts.cpu()) if optimum is None else optimum.duality
    row["NC2_W"] = distance(weight, duality.to(means.device) @ means)
    if optimum is not None:
        row["NC2_WWT"] = distance((weight @ weight.T).cpu(), optimum.WWT)
        logits = (weight @ means.T).cpu()
        row["NC3_WH"] = distance(logits, optimum.WH)
        row["margin_rel_err"] = largest_relative_error(class_margins(logits), optimum.margins)
    return row


def validate_optimum(optimum: Optimum, statistics: ClassStatistics) -> None:
    """Raise ValueError for an optimum of other class counts; warn if these features cannot reach it."""
    counts = statistics.counts.cpu()
    if not torch.equal(optimum.class_counts, counts):
        raise ValueError(
            f"the optimum is of class counts {optimum.problem.class_counts}, the features are of class counts "
            f"{tuple(counts.int().tolist())}"
        )
    dim, needed = statistics.sums.shape[1], int((~optimum.collapsed).sum())
    if optimum.factors is not None:  # features that share directions
        needed = int(torch.linalg.matrix_rank(optimum.factors[1]))
    if dim < needed:
        warnings.warn(
            f"the optimum needs {needed} directions, and the features have {dim}: no network with d = {dim} reaches it",
            stacklevel=3,
        )
    if optimum.problem.relu and statistics.negative_share > 0:
        warnings.warn(
            f"{statistics.negative_share:.2%} of the features' entries are negative, but the optimum is that of "
            "non-negative features (ReLU)",
            stacklevel=3,
        )


def nc1(statistics: ClassStatistics) -> float:
    """Return trace(Sigma_W pinv(Sigma_B)) / K, with Sigma_W = (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})^T.

    Papyan, Han and Donoho (2020), section 2; `between_class_basis` defines Sigma_B. It is computed from centred
    features in the span of the centred class means, accurate and never negative. NaN without the second pass, and for
    class means that are all equal.

    Example:
        >>> from nc_metrics import ClassStatistics, nc1
        >>> batch = [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1, 1]
        >>> statistics = ClassStatistics(num_classes=2)
        >>> statistics.update(*batch)
        >>> statistics.update_within(*batch)
        >>> f"{nc1(statistics):.3f}"
        '0.125'
    """
    if statistics.basis is None or statistics.degeneracy:
        return math.nan
    return float(statistics.projected_sum / statistics.within_counts.sum() / statistics.num_classes)


def nc1_trace(statistics: ClassStatistics) -> float:
    """Return trace(Sigma_W) / trace(Sigma_B), with the covariances of `nc1`; NaN where that is NaN.

    Tirer and Bruna (2022, arXiv 2202.08087). Unlike `nc1`, it does not divide by the smallest directions of Sigma_B,
    and so does not jump when classes merge.

    Example:
        >>> from nc_metrics import ClassStatistics, nc1_trace
        >>> batch = [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1, 1]
        >>> statistics = ClassStatistics(num_classes=2)
        >>> statistics.update(*batch)
        >>> statistics.update_within(*batch)
        >>> f"{nc1_trace(statistics):.3f}"
        '0.500'
    """
    if statistics.basis is None or statistics.degeneracy:
        return math.nan
    between = between_class_root(statistics.means, statistics.counts, statistics.between).square().sum()
    return float(statistics.within_sums.sum() / statistics.within_counts.sum() / between)


def nc1_corrected(statistics: ClassStatistics) -> float:
    """Return NC1 of the distribution of which the samples are drawn, without the bias that the noise of means brings.

    The mean of n_k samples has a noise of covariance S_k / n_k, which Sigma_B takes for distance between classes. The
    fewer samples there are, the more NC1 is too small; but it is too large where most of the scatter is orthogonal to
    the class means, since the noise turns them towards it. To second order in the noise, its expected effect on
    trace(Sigma_W pinv(Sigma_B)) is a sum of traces of Sigma_W, the class means and the counts (`noise_of_means`), which
    is subtracted. Sigma_W is divided by N - K instead of N. In normal samples, what is left is of order 1 / n_k^2.
    With more than 32 features, some of these traces are estimated in 32 random directions, the same at each call.

    The class covariances S_k may differ in size, but are taken to have the shape of Sigma_W; a class of one sample is
    given its size, too. Where NC1 is near zero, the result can be negative. NaN without the second pass, for class
    means of other samples (`for_other_samples`), without samples to spare (N < K + 2), and where `noise_share` is
    above 0.5.

    Example:
        >>> import torch
        >>> from nc_metrics import ClassStatistics, nc1, nc1_corrected
        >>> labels = torch.arange(3).repeat_interleave(10)
        >>> h = 3 * torch.eye(3, 8)[labels] + torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
        >>> statistics = ClassStatistics(num_classes=3)
        >>> statistics.update(h, labels)
        >>> statistics.update_within(h, labels)
        >>> f"{nc1(statistics):.2f} {nc1_corrected(statistics):.2f}, of the distribution {2 / 9:.2f}"
        '0.19 0.21, of the distribution 0.22'
    """
    return corrected(statistics, *noise_of_means(statistics))


def noise_share(statistics: ClassStatistics) -> float:
    """Return the share of noise in the direction of the class means that has most of it; NaN as `nc1_corrected`.

    The noise of a class mean, of variance trace(S_k) / n_k, against the variance of the class means in their smallest
    direction; with more classes than directions of the features, Sigma_W / n_k against Sigma_B.

    Example:
        >>> import torch
        >>> from nc_metrics import ClassStatistics, noise_share
        >>> labels = torch.arange(3).repeat_interleave(10)
        >>> h = 3 * torch.eye(3, 8)[labels] + torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
        >>> statistics = ClassStatistics(num_classes=3)
        >>> statistics.update(h, labels)
        >>> statistics.update_within(h, labels)
        >>> f"{noise_share(statistics):.2f}"
        '0.12'
    """
    return noise_of_means(statistics)[0]


def corrected(statistics: ClassStatistics, share: float, bias: float) -> float:
    """Return NC1 with Sigma_W divided by N - K, less its bias; NaN where too much is noise."""
    if not share <= NO_SIGNAL:
        return math.nan
    spare = statistics.counts.sum() - statistics.num_classes
    return float(statistics.projected_sum / spare / statistics.num_classes) - bias


def dependence_on_samples(value: float, value_corrected: float, share: float) -> str:
    """Return as text how NC1 depends on the number of samples, and what to do; empty if it hardly does."""
    if share > NO_SIGNAL:
        return (
            f"{min(share, 1):.0%} of the class means' variance in their smallest direction is noise, Sigma_W / n_k; "
            "measure more samples, or compare NC1_trace"
        )
    change = value_corrected / value - 1 if value else 0.0
    if not abs(change) > BIAS:
        return ""
    side = "larger" if change > 0 else "smaller"
    return f"without the noise of the class means it would be about {abs(change):.0%} {side}; compare NC1_corrected"


def noise_of_means(statistics: ClassStatistics) -> tuple[float, float]:
    """Return the `noise_share`, and the bias of NC1 from the noise of the class means, to second order; NaN if unknown.

    With S the covariance within classes, R (K, d) of `between_class_root` and its noise E, whose rows have the
    covariances E[E_ia E_jb] = C_ij S_ab, the bias is the mean of the second-order term of trace(S pinv((R+E)^T (R+E))),
    divided by K. It is written with X = pinv(R), G = R R^T, F = X^T S X, and Q the projection off the span of R's rows:

        r = K - 1  tr F tr FC + 2 tr FCF - 4 tr X^T SQSX C G^-1 - 2 tr X^T SQSX tr G^-1 C - 2 tr F C G^-1 tr QS
                   + tr G^-1 C G^-1 tr QSQS
        r < K - 1  tr F tr FC + 2 tr FFC - tr FF (tr C - tr C U U^T), U the left singular vectors of R

    S^2 is estimated without the bias that the square of a sample covariance has in normal samples.
    """
    counts, num_classes = statistics.counts, statistics.num_classes
    spare = counts.sum() - num_classes
    if statistics.basis is None or not statistics.own_samples or spare < 2 or statistics.degeneracy:
        return math.nan, math.nan
    within = statistics.within_sums.sum() / spare  # trace of S
    if not within:
        return 0.0, 0.0
    variances = torch.where(counts > 1, statistics.within_sums / (counts - 1).clamp(min=1), within)
    sizes = variances / within / counts  # (K,) the noise of the mean of class k has the covariance sizes_k S
    weights, shares = between_class_weights(counts, statistics.between)
    basis, rank, scales = statistics.basis, statistics.basis.shape[1], statistics.basis.norm(dim=0)
    gram = statistics.gram / spare  # [B, P]^T S [B, P], B = V / singular values, P the probes
    f = gram[:rank, :rank]
    left = weights.sqrt()[:, None] * (between_class_root(statistics.means, counts, statistics.between) @ basis)
    left = left - shares[:, None] * left.sum(0)
    c = left.T * sizes @ left  # (r, r) C in the coordinates of R's singular vectors
    if rank < num_classes - 1:
        total = (sizes * (weights * (1 - 2 * shares) + shares.square())).sum()  # trace of C
        squared = unbiased_square(f @ f, f, f.trace(), spare)
        bias = f.trace() * (f * c).sum() + 2 * (squared * c).sum() - squared.trace() * (total - c.trace())
        share = total * torch.linalg.eigvalsh(f)[-1]
    else:
        inverse, across, outer = scales.square(), gram[rank:, :rank], gram[rank:, rank:]  # G^-1 = diag(inverse)
        outside = within - (f.diag() / inverse).sum()  # trace of QS
        random = len(basis) > PROBES
        if random and outer.trace() > 0:  # scaled to know the trace of QS, the probes are exact for S of rank 1
            scale = outside.clamp(min=0) / outer.trace()
            across, outer = across * scale.sqrt(), outer * scale
        w = unbiased_square(across.T @ across, f, outside, spare)
        q = outer.square().sum()
        for degrees in (PROBES, spare) if random else (spare,):
            q = (q - outside.square() / degrees) / (1 + 1 / degrees - 2 / degrees**2)
        q = q.clamp(min=0)  # an estimate of tr QSQS
        bias = f.trace() * (f * c).sum() + 2 * (f @ f * c).sum() + (c.diag() * inverse.square()).sum() * q
        bias -= (4 * w + 2 * outside * f).mul(c * inverse).sum() + 2 * w.trace() * (c.diag() * inverse).sum()
        share = within * torch.linalg.eigvalsh(scales[:, None] * c * scales)[-1]
    return float(share), float(bias) / num_classes


def unbiased_square(
    product: torch.Tensor, part: torch.Tensor, trace: torch.Tensor, spare: torch.Tensor
) -> torch.Tensor:
    """Return S M S less its bias, from `product`, `part` S, and trace(S M); S has `spare` degrees of freedom."""
    return (product - part * trace / spare) / (1 + 1 / spare)


# ---------------------------------------------------------------------------------------------------------
# Other geometries, and the measures of balanced neural collapse
# ---------------------------------------------------------------------------------------------------------


def other_geometries(means: torch.Tensor, weight: torch.Tensor | None, counts: torch.Tensor) -> dict[str, float]:
    """Return how far H^T H and, with a head, W W^T are from the simplex ETF and from SELI, {column: float}.

    ETF_HTH, ETF_WWT    dist to I - 11^T/K, the geometry of balanced classes (Papyan, Han, Donoho, 2020)
    SELI_HTH, SELI_WWT  dist to `nc_theory.seli`, that of imbalanced classes without ReLU (Thrampoulidis et al., 2022)

    The class means of both geometries sum to zero, which those of non-negative features cannot. H is therefore
    centred at the mean of the class means first.

    Example:
        >>> import torch
        >>> from nc_metrics import other_geometries
        >>> row = other_geometries(torch.eye(3).double(), weight=None, counts=torch.tensor([5.0, 5.0, 5.0]))
        >>> f"{row['ETF_HTH']:.3f} {row['SELI_HTH']:.3f}"
        '0.000 0.000'
    """
    rows = {"HTH": means - means.mean(0)} | ({} if weight is None else {"WWT": weight})
    row = {f"ETF_{name}": distance_to_etf(a) for name, a in rows.items()}
    return row | {f"SELI_{name}": distance_to_seli(a, counts, name) for name, a in rows.items()}


def distance_to_etf(rows: torch.Tensor) -> float:
    """Return the distance of the Gram matrix of rows (K, d) to I - 11^T/K, with no second K x K matrix in memory."""
    gram, num_classes = rows @ rows.T, len(rows)
    norm = math.sqrt(num_classes - 1)  # of I - 11^T/K
    gram.div_(gram.norm()).add_(1 / (num_classes * norm)).diagonal().sub_(1 / norm)
    return gram.norm().item()


def distance_to_seli(rows: torch.Tensor, counts: torch.Tensor, name: str) -> float:
    """Return the distance of the Gram matrix of rows (K, d) to HTH or WWT of SELI, whichever is named."""
    (target,) = seli(counts, [name])
    return distance((rows @ rows.T).cpu(), target)


def classical_metrics(statistics: ClassStatistics, weight: torch.Tensor | None) -> dict[str, float]:
    """Return the usual measures of neural collapse, {column: float}. If all class means are equal, most are NaN.

    cv_mean_norms        std / mean over classes of |mu_k - mu_G| (Papyan, Han, Donoho, 2020, figure 2)
    cv_classifier_norms  std / mean over classes of |w_k| (ibid.)
    equiangularity_means       std over pairs k != l of cos(mu_k - mu_G, mu_l - mu_G) (ibid., figure 3). Their mean
                         says nothing: at equal norms it is -1/(K-1), because the vectors sum to zero
    equiangularity_classifier  std over pairs k != l of cos(w_k, w_l) (ibid.)
    self_duality         |W/|W| - M/|M||, rows of M: mu_k - mu_G (ibid., NC3)
    UNC3                 std / mean over classes of cos(w_k, mu_k - mu_G), `class_alignment`: uniform duality
                         (Wu and Papyan, 2024, arXiv 2405.17767, whose code writes the mean and the standard deviation,
                         with K - 1 for K, of the same cosines)
    NC4                  share of samples whose nearest class mean is not the predicted class (ibid., NC4); NaN if no
                         predictions were given
    CDNV                 mean over pairs k != l of (v_k + v_l) / (2 |mu_k - mu_l|^2), v_k the mean of |h - mu_k|^2
                         (Galanti, Gyoergy, Hutter, 2022, definition 1)
    GNC2                 mean over pairs k != l of log(1 / |u_k - u_l|^2), u_k the direction of mu_k from the mean of
                         the class means: the smaller, the more evenly the directions are spread over the sphere. It is
                         defined for K > d + 1 too, where there is no simplex ETF. For K <= d + 1 the ETF has the least
                         value, -log(2K / (K - 1)) (Liu, Yu, Weller, Schoelkopf, 2023, arXiv 2303.06484; twice the
                         value of Wu and Papyan, 2024, arXiv 2405.17767, who do not square the distance)
    NCM_acc1             accuracy in percent of the classifier that takes the nearest class mean (Mensink et al., 2013;
                         of a hidden layer: Galanti, Gyoergy, Hutter, 2022)

    Example:
        >>> from nc_metrics import ClassStatistics, classical_metrics
        >>> batch = [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1, 1]
        >>> statistics = ClassStatistics(num_classes=2)
        >>> statistics.update(*batch)
        >>> statistics.update_within(*batch)
        >>> row = classical_metrics(statistics, weight=None)
        >>> f"{row['CDNV']:.3f} {row['NCM_acc1']:.1f}"
        '0.125 100.0'
    """
    means, counts = statistics.means, statistics.counts
    row = {"cv_mean_norms": math.nan, "equiangularity_means": math.nan}
    if weight is not None:
        row["cv_classifier_norms"] = coefficient_of_variation(weight.norm(dim=1))
        row["equiangularity_classifier"] = equiangularity(weight)
        row |= dict.fromkeys(("self_duality", "UNC3"), math.nan)
    row |= dict.fromkeys(("NC4", "CDNV", "GNC2", "NCM_acc1"), math.nan)
    if statistics.degeneracy:
        return row
    centred = means - counts @ means / counts.sum()
    from_centre = means - means.mean(0)
    row["cv_mean_norms"] = coefficient_of_variation(centred.norm(dim=1))
    row["equiangularity_means"] = equiangularity(centred)
    if weight is not None:
        row["self_duality"] = distance(weight, centred)
        row["UNC3"] = coefficient_of_variation(class_alignment(means, weight, counts))
    directions = from_centre / from_centre.norm(dim=1, keepdim=True)
    row["GNC2"] = mean_over_pairs(directions, lambda distances_sq, rows: -distances_sq.log())
    if statistics.basis is not None:
        total, variances = statistics.within_counts.sum(), statistics.within_sums / statistics.within_counts
        row["NC4"] = float(statistics.disagreements / total)
        row["NCM_acc1"] = float(100 * statistics.hits / total)
        row["CDNV"] = mean_over_pairs(
            from_centre, lambda distances_sq, rows: (variances[rows, None] + variances) / (2 * distances_sq)
        )
    return row


def class_alignment(means: ArrayLike, weight: ArrayLike, counts: ArrayLike) -> torch.Tensor:
    """Return cos(w_k, mu_k - mu_G) of each class (K,), of class means (K, d), a head W (K, d) and class counts (K,).

    One in perfect self-duality (Papyan, Han, Donoho, 2020, NC3). With imbalanced classes it tells which of them are not
    aligned. Raises ValueError for W of another shape than the means.

    Example:
        >>> from nc_metrics import class_alignment
        >>> class_alignment(means=[[3.0, 0.0], [1.0, 0.0]], weight=[[2.0, 0.0], [-1.0, 1.0]], counts=[5, 5])
        tensor([1.0000, 0.7071], dtype=torch.float64)
    """
    mu = as_tensor("means", means).double()
    n = as_tensor("counts", counts, mu.device).double()
    return torch.cosine_similarity(validate_weight(weight, mu), mu - n @ mu / n.sum(), eps=0)


def untrained_classes(weight: ArrayLike) -> list[int]:
    """Return the classes of a head W (K, d) that look untrained: their rows are nearly parallel, and short.

    The cross entropy pulls the rows of all classes without samples in one direction, that of -sum_i p_ik h_i, and
    weight decay removes what else they had. So they end nearly equal (cosines of 0.88 to 0.96 in trained heads), and
    short, because their probabilities p_ik are small. At the optimum, rows of two classes have a cosine below zero, and
    those of classes that collapse (minority collapse) are equal: these are listed as well. Rows that training has not
    changed at all are as different as they were at the start, and are not.

    A row is listed if its norm is at most 0.6 of the median norm of the rows that have no cosine above 0.85 with
    another, and if it has such a cosine with another row as short, or is zero.

    Example:
        >>> from nc_metrics import untrained_classes
        >>> untrained_classes([[2.0, -1.0, 0.0], [-1.0, 2.0, 0.0], [-0.5, -0.5, 0.1], [-0.5, -0.5, -0.1]])
        [2, 3]
    """
    w = as_tensor("the weight", weight).double()
    norms = w.norm(dim=1)
    distinct = nearest_cosines(w) <= PARALLEL
    if not distinct.any():
        return []
    short = norms <= SHORT * norms[distinct].median()
    rows = short.nonzero().flatten()
    return rows[(nearest_cosines(w[short]) > PARALLEL) | (norms[short] == 0)].tolist()


def nearest_cosines(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest cosine of each of the rows (K, d) with another one (K,); -1 if there is none."""
    directions, step = torch.nn.functional.normalize(rows, eps=1e-300), max(1, TILE // max(1, len(rows)))
    largest = [rows.new_full((0,), -1.0)]
    for start in range(0, len(rows), step):
        cosines = directions[start : start + step] @ directions.T
        cosines[:, start : start + step].fill_diagonal_(-1)
        largest.append(cosines.amax(1))
    return torch.cat(largest)


def nc5(means: ArrayLike, ood_features: ArrayLike) -> float:
    """Return the mean over classes of |cos(mu_k, m)|, m the mean of out-of-distribution features (B, d).

    (1/K) sum_k |mu_k . m| / (|mu_k| |m|), zero where m is orthogonal to all class means (K, d), in the spirit of NC5 of
    Ammar, Belkhir, Popescu, Manzanera, Franchi (2024, arXiv 2310.06823). Nothing is centred. Raises ValueError for
    features of another dimension.

    Example:
        >>> from nc_metrics import nc5
        >>> f"{nc5(means=[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], ood_features=[[3.0, 0.0, 4.0]]):.3f}"
        '0.300'
    """
    mu = as_tensor("means", means).double()
    h = as_tensor("ood_features", ood_features, mu.device).double()
    if h.ndim != 2 or h.shape[1] != mu.shape[1]:
        raise ValueError(f"ood_features have shape {tuple(h.shape)}, wanted (B, {mu.shape[1]}) as the class means")
    return torch.cosine_similarity(mu, h.mean(0, keepdim=True), eps=0).abs().mean().item()


def equiangularity(rows: torch.Tensor) -> float:
    """Return the standard deviation over pairs k != l of the cosines between rows (K, d)."""
    directions, count = rows / rows.norm(dim=1, keepdim=True), len(rows)
    mean = (directions.sum(0).square().sum() - count) / (count * (count - 1))
    squares = mean_over_pairs(directions, lambda distances_sq, _: (1 - distances_sq / 2 - mean).square())
    return math.sqrt(squares)


def mean_over_pairs(points: torch.Tensor, measure: Callable[[torch.Tensor, slice], torch.Tensor]) -> float:
    """Return the mean over pairs k != l of measure(|p_k - p_l|^2, rows), of points (K, d) around the origin.

    measure: a function of the squared distances (T, K) of a tile, and of the slice of the K classes that are its rows.
    """
    norms_sq, total, step = points.square().sum(1), points.new_zeros(()), max(1, TILE // len(points))
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        sums = norms_sq[rows, None] + norms_sq
        distances_sq = sums - 2 * (points[rows] @ points.T)
        close = (distances_sq < CLOSE * sums).nonzero()  # where the sums cancel
        for p, q in (pairs.T for pairs in close.split(max(1, TILE // points.shape[1]))):
            distances_sq[p, q] = (points[start + p] - points[q]).square().sum(1)
        values = measure(distances_sq, rows)
        values[:, rows].fill_diagonal_(0)  # k = l
        total += values.sum()
    return float(total / (len(points) * (len(points) - 1)))


def coefficient_of_variation(values: torch.Tensor) -> float:
    """Return the standard deviation of `values`, without Bessel's correction, over their mean."""
    return (values.std(correction=0) / values.mean()).item()


def regression_collapse(features: ArrayLike, targets: ArrayLike, weight: ArrayLike) -> dict[str, float]:
    """Return NRC1, NRC2, NRC3 of features (N, d), targets (N, n) and a head W (n, d), {column: float}; n < d, n < N.

    In the spirit of Andriopoulos, Dong, Guo, Zhao, Ross (2024, arXiv 2409.04180). All are zero in collapse. With the
    features centred at their mean and divided by their norms,

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
    named = {"features": features, "targets": targets, "the weight": weight}
    h, y, w = (as_tensor(name, part).cpu().double() for name, part in named.items())
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
