"""Neural-collapse metrics of last-layer features and a linear head, as pure functions of tensors.

Class statistics stream over batches of features (B, d) and labels (B,); the measures then need the K class means
and the head's matrix W (K, d) only. No d x d matrix is formed anywhere. All results are float64.

    statistics = ClassStatistics(num_classes)
    for features, labels in batches: statistics.update(features, labels)            # first pass: class means
    for features, labels in batches: statistics.update_within(features, labels)     # second pass: NC1, CDNV, NC4
    row = nc_metrics(statistics, weight, optimum)

One pass is enough for all but NC1, CDNV and NC4, which are NaN without the second. mu_k is the mean of class k, mu_G
the mean of all samples, H = [mu_1 ... mu_K] (d, K), and the distance of two matrices is
dist(A, B) = |A/|A| - B/|B|| in Frobenius norms.
"""

import math

import torch

from theory import class_margins, self_duality, seli

THEORY_COLUMNS = ["NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"]  # empty where there is no optimum


class ClassStatistics:
    """Counts, means and within-class scatter of features, class by class, on the device of the features."""

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.counts = None  # (K,) samples of each class
        self.sums = None  # (K, d) sums of their features
        self.within_sums = None  # (K,) sums of |h_i - mu_k|^2
        self.projected_sum = 0.0  # sum of (h_i - mu_{y_i})^T pinv(Sigma_B) (h_i - mu_{y_i})
        self.disagreements = 0.0  # samples whose nearest class mean is not the predicted class
        self.basis = None  # (d, r) B with pinv(Sigma_B) = B B^T

    def update(self, features, labels):
        """First pass: adds a batch, features (B, d) of any float type, labels (B,) int64 in 0..K-1."""
        check_batch(features, labels)
        if self.sums is None:
            self.sums = features.new_zeros(self.num_classes, features.shape[1], dtype=torch.float64)
            self.counts = features.new_zeros(self.num_classes, dtype=torch.float64)
        self.sums.index_add_(0, labels, features.double())
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def update_within(self, features, labels, predictions=None):
        """Second pass, over the same samples: adds a batch; `predictions` (B,) int64, the head's, are for NC4."""
        check_batch(features, labels)
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
            nearest = (features @ self.centres.T - self.half_norms_sq).argmax(1)
            self.disagreements += (nearest != predictions).sum()
        else:
            self.disagreements = math.nan

    @property
    def means(self):
        """Class means (K, d); ValueError where a class has no sample."""
        if self.counts is None or not (self.counts > 0).all():
            raise ValueError("every class needs a sample before its mean is known")
        return self.sums / self.counts[:, None]


def check_batch(features, labels):
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"wanted features (B, d) and labels (B,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )


def between_class_basis(means, counts):
    """B (d, r) with pinv(Sigma_B) = B B^T, Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)^T, of rank r < K.

    From the singular vectors of the centred means (K, d), cut where SciPy's pinv of Sigma_B (d, d) cuts: at
    d eps times the largest eigenvalue.
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
    """dist(A, B) = |A/|A| - B/|B|| in Frobenius norms, between 0 and 2; NaN where one of them is zero."""
    return (a / a.norm() - b / b.norm()).norm().item()


def geometry(means, weight):
    """HTH, WWT, WH (K, K), margins and mean_norms_sq (K,) of class means (K, d) and a head W (K, d), on the CPU."""
    weight = weight.detach().double().to(means.device)
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


def largest_relative_error(measured, expected):
    """max_k |measured_k / expected_k - 1| over the classes with expected_k > 0; NaN where there is none."""
    there = expected > 0
    return (measured[there] / expected[there] - 1).abs().max().item() if there.any() else math.nan


def nc_metrics(statistics, weight, optimum=None):
    """A row of metrics, {column: float}, of ClassStatistics after both passes and a head W (K, d).

    optimum: `theory.Optimum` to compare with; None leaves the columns NaN that need one. The paper is
    arXiv 2401.02058; margins and norms are of the classes that the optimum does not collapse.

    NC1             trace(Sigma_W pinv(Sigma_B)) / K
    NC2_H           dist(H^T H, the optimum's)
    NC2_WWT         dist(W W^T, the optimum's)
    NC2_W           dist(W, D H^T), D the optimum's `duality`; without one the paper's, `theory.self_duality`
    NC3_WH          dist(W H, the optimum's)
    margin_rel_err  max_k |measured margin / M_k - 1|
    norm_rel_err    max_k ||mu_k|^2 / |h_k|^2 - 1|

    and those of `other_geometries` and `classical_metrics`.
    """
    means = statistics.means
    weight = weight.detach().double().to(means.device)
    parts = geometry(means, weight)
    duality = self_duality(statistics.counts.cpu()) if optimum is None else optimum.duality
    row = {"NC1": nc1(statistics), **dict.fromkeys(THEORY_COLUMNS, math.nan)}
    row = {name: row.get(name) for name in ("NC1", "NC2_H", "NC2_WWT", "NC2_W", "NC3_WH")} | row
    row["NC2_W"] = distance(weight, duality.to(means.device) @ means)
    if optimum is not None:
        row["NC2_H"] = distance(parts["HTH"], optimum.HTH)
        row["NC2_WWT"] = distance(parts["WWT"], optimum.WWT)
        row["NC3_WH"] = distance(parts["WH"], optimum.WH)
        row["margin_rel_err"] = largest_relative_error(parts["margins"], optimum.margins)
        row["norm_rel_err"] = largest_relative_error(parts["mean_norms_sq"], optimum.mean_norms_sq)
    return row | other_geometries(means, weight, statistics.counts) | classical_metrics(statistics, weight)


def nc1(statistics):
    """trace(Sigma_W pinv(Sigma_B)) / K, Sigma_W = (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})^T.

    Papyan, Han and Donoho (2020), section 2; exact in the span of the centred class means, never negative.
    """
    if statistics.basis is None:
        return math.nan
    return float(statistics.projected_sum / statistics.counts.sum() / statistics.num_classes)


# ---------------------------------------------------------------------------------------------------------
# Other geometries, and the measures of balanced neural collapse
# ---------------------------------------------------------------------------------------------------------


def other_geometries(means, weight, counts):
    """How far H^T H and W W^T are from the simplex ETF and from SELI, {column: float}.

    ETF_HTH, ETF_WWT    dist to I - 11^T/K, the geometry of balanced classes (Papyan, Han, Donoho, 2020)
    SELI_HTH, SELI_WWT  dist to `theory.seli`, that of imbalanced classes without ReLU (Thrampoulidis et al., 2022)

    In both geometries the class means sum to zero; H is centred at the mean of the class means for them, which
    non-negative features can do no other way.
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
    """The usual measures of neural collapse, {column: float}; mu_G is the mean of all samples.

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
    """|mu_k - mu_l|^2 (K, K), from the centred Gram matrix."""
    centred = means - means.mean(0)
    gram = centred @ centred.T
    norms_sq = gram.diag()
    return (norms_sq[:, None] + norms_sq - 2 * gram).clamp(min=0)


def coefficient_of_variation(values):
    return (values.std(correction=0) / values.mean()).item()
