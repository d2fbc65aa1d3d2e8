"""Neural-collapse metrics of last-layer features and a linear head, as pure functions of tensors.

Class statistics are gathered from batches of features (B, d) and labels (B,). The measures then need only the K class
means and the head's matrix W (K, d). No d x d matrix is formed anywhere. All results are float64.

    statistics = ClassStatistics(num_classes)
    for features, labels in batches: statistics.update(features, labels)            # first pass: class means
    for features, labels in batches: statistics.update_within(features, labels)     # second pass: NC1, CDNV, NC4
    row = nc_metrics(statistics, weight, optimum)

One pass is enough for all columns but NC1, CDNV and NC4, which are NaN without the second. Throughout, mu_k is the mean
of class k, mu_G the mean of all samples, H = [mu_1 ... mu_K] (d, K), and the distance of two matrices is
dist(A, B) = |A/|A| - B/|B|| in Frobenius norms.
"""

import math
import warnings

import torch

from nc_theory import class_margins, self_duality, seli

THEORY_COLUMNS = ["NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"]  # NaN where there is no optimum


class ClassStatistics:
    """Counts, means and within-class scatter of features, class by class, on the device of the features.

    Features may be tensors of any float type, on any device, or NumPy arrays. No autograd graph is kept.
    """

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.counts = None  # (K,) samples of each class
        self.sums = None  # (K, d) sums of their features
        self.negatives = None  # () entries of the features that are below zero
        self.within_sums = None  # (K,) sums of |h_i - mu_k|^2
        self.projected_sum = 0.0  # sum of (h_i - mu_{y_i})^T pinv(Sigma_B) (h_i - mu_{y_i})
        self.disagreements = 0.0  # samples whose nearest class mean is not the predicted class
        self.basis = None  # (d, r) B with pinv(Sigma_B) = B B^T

    def update(self, features, labels):
        """Add a batch to the first pass: features (B, d) of any float type, integer labels (B,) in 0..K-1.

        Raises ValueError for other shapes and for labels out of range.
        """
        features, labels = self.validate_batch(features, labels)
        if self.sums is None:
            self.sums = features.new_zeros(self.num_classes, features.shape[1], dtype=torch.float64)
            self.counts = features.new_zeros(self.num_classes, dtype=torch.float64)
            self.negatives = features.new_zeros((), dtype=torch.float64)
        self.sums.index_add_(0, labels, features.double())
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.negatives += (features < 0).sum()

    def update_within(self, features, labels, predictions=None):
        """Add a batch to the second pass, over the same samples as the first.

        predictions: the classes (B,) that the head predicts, needed for NC4. Raises ValueError as `update`, and for
        a class without samples in the first pass.
        """
        features, labels = self.validate_batch(features, labels)
        if self.basis is None:
            self.centres = self.means  # those of the whole first pass, divided once
            self.basis = between_class_basis(self.centres, self.counts)
            self.within_sums = torch.zeros_like(self.counts)
            self.half_norms_sq = 0.5 * self.centres.square().sum(1)
        features = features.double()
        centred = features - self.centres[labels]
        self.within_sums.index_add_(0, labels, centred.square().sum(1))
        self.projected_sum += (centred @ self.basis).square().sum()
        if predictions is not None:
            predictions = torch.as_tensor(predictions, device=features.device)
            if predictions.shape != labels.shape:
                raise ValueError(f"predictions have shape {tuple(predictions.shape)}, wanted {tuple(labels.shape)}")
            nearest = (features @ self.centres.T - self.half_norms_sq).argmax(1)
            self.disagreements += (nearest != predictions).sum()
        else:
            self.disagreements = math.nan

    def merge(self, sum_over_processes):
        """Sum what a pass has gathered over processes that have each seen a part of the samples; call it after a pass.

        sum_over_processes(tensor): returns the sum of a tensor over the processes, such as an all_reduce. Each of them
        must have seen a batch, which may be empty.
        """
        first_pass = self.basis is None
        names = ("counts", "sums", "negatives") if first_pass else ("within_sums", "projected_sum", "disagreements")
        for name in names:
            setattr(self, name, sum_over_processes(torch.as_tensor(getattr(self, name))))

    def validate_batch(self, features, labels):
        """Return a batch as detached tensors on the features' device; ValueError if it does not fit."""
        features = torch.as_tensor(features).detach()
        labels = torch.as_tensor(labels, device=features.device).detach()
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features are {features.dtype} of shape {tuple(features.shape)}, wanted floats of shape (B, d)"
            )
        if self.sums is not None and features.shape[1] != self.sums.shape[1]:
            raise ValueError(
                f"features have shape {tuple(features.shape)}, wanted (B, {self.sums.shape[1]}) as in the first batch"
            )
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}, wanted integers of shape "
                f"({len(features)},), one for each row of the features"
            )
        if len(labels):
            low, high = torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels go from {low} to {high}, wanted 0 to {self.num_classes - 1} for {self.num_classes} classes"
                )
        return features, labels.long()

    @property
    def means(self):
        """Class means (K, d); ValueError if a class has no samples."""
        empty = range(self.num_classes) if self.counts is None else (self.counts == 0).nonzero().flatten().tolist()
        if len(empty):
            raise ValueError(
                f"every class needs a sample before its mean is known, found none of class {', '.join(map(str, empty))}"
            )
        return self.sums / self.counts[:, None]

    @property
    def negative_share(self):
        """Share of the features' entries that are below zero, NaN before the first batch."""
        return math.nan if self.sums is None else float(self.negatives / (self.counts.sum() * self.sums.shape[1]))


def between_class_basis(means, counts):
    """Return B (d, r) with pinv(Sigma_B) = B B^T, Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T of rank r < K.

    B is made from the singular vectors of the centred means (K, d). Eigenvalues of Sigma_B below d eps times the
    largest are taken as zero, as by SciPy's pinv of the d x d matrix.
    """
    centred = means - counts @ means / counts.sum()
    _, singular, vectors = torch.linalg.svd(centred / math.sqrt(len(means)), full_matrices=False)
    eigenvalues = singular.square()
    kept = eigenvalues > eigenvalues[0] * means.shape[1] * torch.finfo(torch.float64).eps
    return (vectors[kept] / singular[kept, None]).T


# ---------------------------------------------------------------------------------------------------------
# The geometry of the class means and the head
# ---------------------------------------------------------------------------------------------------------


def distance(a, b):
    """Return dist(A, B) = |A/|A| - B/|B|| in Frobenius norms, between 0 and 2; NaN if one of them is zero."""
    return (a / a.norm() - b / b.norm()).norm().item()


def geometry(means, weight):
    """Return HTH, WWT, WH (K, K), margins and mean_norms_sq (K,) of class means (K, d) and a head W (K, d), on the CPU.

    Raises ValueError for W of another shape than the means.
    """
    weight = validate_weight(weight, means)
    logits = weight @ means.T
    gram = means @ means.T
    parts = {
        "HTH": gram,
        "WWT": weight @ weight.T,
        "WH": logits,
        "margins": class_margins(logits),
        "mean_norms_sq": gram.diag(),
    }
    return {name: value.cpu() for name, value in parts.items()}


def validate_weight(weight, means):
    """Return a head's matrix in float64 on the device of the class means (K, d); ValueError if not of their shape."""
    weight = torch.as_tensor(weight).detach().double().to(means.device)
    if weight.shape != means.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted (K, d) = {tuple(means.shape)}")
    return weight


def largest_relative_error(measured, expected):
    """Return max_k |measured_k / expected_k - 1| over the classes with expected_k > 0; NaN if there are none."""
    nonzero = expected > 0
    return (measured[nonzero] / expected[nonzero] - 1).abs().max().item() if nonzero.any() else math.nan


def nc_metrics(statistics, weight, optimum=None):
    """Return a row of metrics, {column: float}, of ClassStatistics after both passes and a head W (K, d).

    optimum: a `nc_theory.Optimum` to compare with; without one, the columns that need it are NaN. The paper is Dang,
    Tran, Nguyen, Ho (ICML 2024, arXiv 2401.02058). The columns below are zero in perfect collapse to the optimum of the
    cross entropy. Margins and norms are compared for the classes that the optimum does not collapse.

    NC1             trace(Sigma_W pinv(Sigma_B)) / K, see `nc1`
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

    Raises ValueError for a class without samples, for W of another shape than (K, d), and for an optimum of other
    class counts. Warns if the optimum is of a problem with ReLU and some features are negative.
    """
    means = statistics.means
    weight = validate_weight(weight, means)
    parts = geometry(means, weight)
    if optimum is None:
        duality = self_duality(statistics.counts.cpu())
    else:
        validate_optimum(optimum, statistics)
        duality = optimum.duality
    row = {"NC1": nc1(statistics), "NC0": (weight.sum(0).norm() / weight.norm()).item()}
    row |= dict.fromkeys(("NC2_H", "NC2_WWT", "NC2_W", "NC3_WH", "margin_rel_err", "norm_rel_err"), math.nan)
    row["NC2_W"] = distance(weight, duality.to(means.device) @ means)
    if optimum is not None:
        row["NC2_H"] = distance(parts["HTH"], optimum.HTH)
        row["NC2_WWT"] = distance(parts["WWT"], optimum.WWT)
        row["NC3_WH"] = distance(parts["WH"], optimum.WH)
        row["margin_rel_err"] = largest_relative_error(parts["margins"], optimum.margins)
        row["norm_rel_err"] = largest_relative_error(parts["mean_norms_sq"], optimum.mean_norms_sq)
    return row | other_geometries(means, weight, statistics.counts) | classical_metrics(statistics, weight)


def validate_optimum(optimum, statistics):
    """Raise ValueError for an optimum of other class counts; warn if its ReLU contradicts the features."""
    counts = statistics.counts.cpu()
    if not torch.equal(optimum.class_counts, counts):
        raise ValueError(
            f"the optimum is of class counts {optimum.problem.class_counts}, the features are of class counts "
            f"{tuple(counts.int().tolist())}"
        )
    if optimum.problem.relu and statistics.negative_share > 0:
        warnings.warn(
            f"{statistics.negative_share:.2%} of the features' entries are negative, but the optimum is that of "
            "non-negative features (ReLU)",
            stacklevel=3,
        )


def nc1(statistics):
    """Return trace(Sigma_W pinv(Sigma_B)) / K, with Sigma_W = (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})^T.

    Papyan, Han and Donoho (2020), section 2. It is computed in the span of the centred class means from centred
    features, and so exact and never negative. NaN without the second pass.
    """
    if statistics.basis is None:
        return math.nan
    return float(statistics.projected_sum / statistics.counts.sum() / statistics.num_classes)


# ---------------------------------------------------------------------------------------------------------
# Other geometries, and the measures of balanced neural collapse
# ---------------------------------------------------------------------------------------------------------


def other_geometries(means, weight, counts):
    """Return how far H^T H and W W^T are from the simplex ETF and from SELI, {column: float}.

    ETF_HTH, ETF_WWT    dist to I - 11^T/K, the geometry of balanced classes (Papyan, Han, Donoho, 2020)
    SELI_HTH, SELI_WWT  dist to `nc_theory.seli`, that of imbalanced classes without ReLU (Thrampoulidis et al., 2022)

    The class means of both geometries sum to zero, which those of non-negative features cannot. H is therefore
    centred at the mean of the class means first.
    """
    centred = means - means.mean(0)
    gram, weights = (centred @ centred.T).cpu(), (weight @ weight.T).cpu()
    etf = torch.eye(len(means), dtype=torch.float64) - 1 / len(means)
    seli_gram, seli_weights = seli(counts)
    return {
        "ETF_HTH": distance(gram, etf),
        "ETF_WWT": distance(weights, etf),
        "SELI_HTH": distance(gram, seli_gram),
        "SELI_WWT": distance(weights, seli_weights),
    }


def classical_metrics(statistics, weight):
    """Return the usual measures of neural collapse, {column: float}.

    cv_mean_norms        std / mean over classes of |mu_k - mu_G| (Papyan, Han, Donoho, 2020, figure 2)
    cv_classifier_norms  std / mean over classes of |w_k| (ibid.)
    self_duality         |W/|W| - M/|M||, rows of M: mu_k - mu_G (ibid., NC3)
    NC4                  share of samples whose nearest class mean is not the predicted class (ibid., NC4)
    CDNV                 mean over pairs k != l of (v_k + v_l) / (2 |mu_k - mu_l|^2), v_k the mean of |h - mu_k|^2
                         (Galanti, Gyoergy, Hutter, 2022, definition 1)
    """
    means, counts = statistics.means, statistics.counts
    centred = means - counts @ means / counts.sum()
    second_pass = statistics.basis is not None
    variances = statistics.within_sums / counts if second_pass else torch.full_like(counts, math.nan)
    pairs = torch.triu_indices(len(means), len(means), offset=1, device=means.device)
    separations = squared_distances(means)[pairs[0], pairs[1]]
    return {
        "cv_mean_norms": coefficient_of_variation(centred.norm(dim=1)),
        "cv_classifier_norms": coefficient_of_variation(weight.norm(dim=1)),
        "self_duality": distance(weight, centred),
        "NC4": float(statistics.disagreements / counts.sum()) if second_pass else math.nan,
        "CDNV": ((variances[pairs[0]] + variances[pairs[1]]) / (2 * separations)).mean().item(),
    }


def squared_distances(means):
    """Return |mu_k - mu_l|^2 (K, K), from the Gram matrix of the centred means."""
    centred = means - means.mean(0)
    gram = centred @ centred.T
    norms_sq = gram.diag()
    return (norms_sq[:, None] + norms_sq - 2 * gram).clamp(min=0)


def coefficient_of_variation(values):
    """Return the standard deviation of `values`, without Bessel's correction, over their mean."""
    return (values.std(correction=0) / values.mean()).item()
