"""The optimum of the unconstrained ReLU features problem (UFM), for any class counts and penalties.

    min_{W, H >= 0}  (1/N) sum_i loss(W h_i, y_i) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_i |h_i|^2     (UFM)

K classes, n_k samples of class k, N = sum n_k, W (K, d), features h_i in R^d, d >= K; loss is the cross entropy,
or |W h - e_y|^2 / 2 for MSE (Dang, Tran, Nguyen, Ho, ICML 2024, arXiv 2401.02058, section 3). At the optimum the
features have collapsed to their class means, h_i = h_{y_i}, and everything that is left is the K x K geometry in
`Optimum`. Its tensors are float64 on the CPU.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, minimize


@dataclass(frozen=True)
class Optimum:
    """The geometry of a minimiser of (UFM). H = [h_1 ... h_K] (d, K) holds the class means, W (K, d) the head.

    The logits of class k are WH[:, k] + bias; `duality` is the matrix D of W ~ D H^T.
    """

    class_counts: torch.Tensor  # (K,)
    margins: torch.Tensor  # (K,) logit of the class less the mean of the others', without bias
    mean_norms_sq: torch.Tensor  # (K,) |h_k|^2
    HTH: torch.Tensor  # (K, K)
    WWT: torch.Tensor  # (K, K)
    WH: torch.Tensor  # (K, K)
    bias: torch.Tensor  # (K,) zero in a problem without one
    duality: torch.Tensor  # (K, K)
    loss: float  # value of (UFM) at the minimiser

    @property
    def collapsed(self):
        """(K,) bool: minority collapse, h_k = 0."""
        return self.mean_norms_sq == 0


def cross_entropy_optimum(class_counts, lambda_w, lambda_h):
    """Closed form of (UFM) with the cross entropy (arXiv 2401.02058, theorem 4.1, for the penalties of (UFM)).

        M_k      = max(0, log((K-1) (sqrt(n_k) / (N sqrt(lambda_W lambda_H (K-1)/K)) - 1)))
        |h_k|^2  = M_k sqrt((K-1) lambda_W / (K lambda_H n_k)),   h_k . h_l = 0
        W H      = (I - 11^T/K) diag(M)
        W W^T    = (I - 11^T/K) diag(a^2) (I - 11^T/K),   a_k^2 = M_k sqrt(K lambda_H n_k / ((K-1) lambda_W))
        h_k = 0  iff  n_k <= N^2 lambda_W lambda_H K/(K-1)

    class_counts: n_k (K,), numbers >= 1. Raises ValueError for K < 2, n_k < 1 or a lambda that is not > 0.
    """
    counts = check(class_counts, lambda_w, lambda_h)
    log_counts, log_w, log_h, log_shrink = logs(counts, lambda_w, lambda_h)
    # log of sqrt(n_k) / (N sqrt(lambda_W lambda_H (K-1)/K)): above log(K/(K-1)) where class k does not collapse
    log_ratio = 0.5 * (log_counts - log_w - log_h - log_shrink) - counts.sum().log()
    return cross_entropy_geometry(counts, lambda_w, lambda_h, margins_of_ratio(log_ratio, len(counts)))


def released_formula(class_counts, lambda_w, lambda_h):
    """What the paper's released code compares with: the closed form with another margin, that of no (UFM).

    M_k = log((K-1) (2 sqrt(n_k) / (N lambda_W sqrt((K-1)/K)) - 1)), in which lambda_H does not occur. `loss` is
    the value of (UFM) at this geometry. Arguments and errors as `cross_entropy_optimum`.
    """
    counts = check(class_counts, lambda_w, lambda_h)
    log_counts, log_w, _, log_shrink = logs(counts, lambda_w, lambda_h)
    log_ratio = 0.5 * (log_counts - log_shrink) - log_w - (counts.sum() / 2).log()
    return cross_entropy_geometry(counts, lambda_w, lambda_h, margins_of_ratio(log_ratio, len(counts)))


def mse_optimum(class_counts, lambda_w, lambda_h):
    """Closed form of (UFM) with MSE, (1/2N) sum_i |W h_i - e_{y_i}|^2.

    For h_k = |h_k| u_k with orthonormal u_k and W = sum_k a_k e_k u_k^T the problem splits by class: with
    s_k = a_k |h_k|, the penalties are least at lambda_W a_k^2 = lambda_H n_k |h_k|^2, where they sum to
    s_k sqrt(lambda_W lambda_H n_k), and (n_k/2N) (1 - s)^2 + s sqrt(lambda_W lambda_H n_k) is least at

        W H = diag(s),  s_k = max(0, 1 - N sqrt(lambda_W lambda_H / n_k))
        |h_k|^2 = s_k sqrt(lambda_W / (lambda_H n_k)),  h_k . h_l = 0,  W W^T = diag(s_k sqrt(lambda_H n_k / lambda_W))
        h_k = 0  iff  n_k <= N^2 lambda_W lambda_H

    The constraint H >= 0 does not bind: axis vectors are a minimiser of the problem without it as well. Arguments
    and errors as `cross_entropy_optimum`; `margins` are s_k.
    """
    counts = check(class_counts, lambda_w, lambda_h)
    log_counts, log_w, log_h, _ = logs(counts, lambda_w, lambda_h)
    log_loss_of_scale = counts.sum().log() + 0.5 * (log_w + log_h - log_counts)
    scale = (-torch.expm1(log_loss_of_scale)).clamp(min=0)
    norms_sq = scale * (0.5 * (log_w - log_h - log_counts)).exp()
    rows_sq = scale * (0.5 * (log_h + log_counts - log_w)).exp()
    penalty = scale * (0.5 * (log_w + log_h + log_counts)).exp()
    value = (counts / counts.sum() * 0.5 * (1 - scale).square() + penalty).sum()
    return Optimum(
        class_counts=counts,
        margins=scale,
        mean_norms_sq=norms_sq,
        HTH=norms_sq.diag(),
        WWT=rows_sq.diag(),
        WH=scale.diag(),
        bias=torch.zeros_like(counts),
        duality=counts.sqrt().diag(),
        loss=value.item(),
    )


CLOSED_FORMS = {"CrossEntropy": cross_entropy_optimum, "MSE": mse_optimum}  # of each loss, without a bias


def collapse_threshold(class_counts, loss="CrossEntropy"):
    """lambda_W lambda_H from which on the smallest class collapses, h_k = 0: the closed forms' conditions on n_k."""
    counts = check(class_counts, 1.0, 1.0)
    shrink = len(counts) / (len(counts) - 1) if loss == "CrossEntropy" else 1.0
    return (counts.min() / (counts.sum().square() * shrink)).item()


def self_duality(class_counts):
    """D (K, K) of the paper's self-duality W ~ D H^T: rows K sqrt(n_k) h_k - sum_m sqrt(n_m) h_m."""
    roots = torch.as_tensor(class_counts, dtype=torch.float64).sqrt()
    return len(roots) * roots.diag() - roots


# ---------------------------------------------------------------------------------------------------------
# Parts of the closed forms. Ratios go by their logarithms: lambdas of 1e-300 and counts of 1e9 are fine.
# ---------------------------------------------------------------------------------------------------------


def check(class_counts, lambda_w, lambda_h):
    """The class counts as a float64 tensor (K,); ValueError where (UFM) is not defined."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.ndim != 1 or len(counts) < 2:
        raise ValueError(f"the theory needs two classes or more, got class counts of shape {tuple(counts.shape)}")
    if not (counts.isfinite().all() and (counts >= 1).all()):
        raise ValueError(f"every class needs one sample or more, got class counts {counts.tolist()}")
    for name, value in (("lambda_W", lambda_w), ("lambda_H", lambda_h)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be > 0 for a minimiser to exist, got {value}")
    return counts


def logs(counts, lambda_w, lambda_h):
    """log n_k (K,), log lambda_W, log lambda_H, log((K-1)/K)."""
    log_w, log_h = torch.tensor([lambda_w, lambda_h], dtype=torch.float64).log()
    return counts.log(), log_w, log_h, torch.tensor(-1 / len(counts), dtype=torch.float64).log1p()


def margins_of_ratio(log_ratio, num_classes):
    """max(0, log((K-1) (r - 1))) for r given by its logarithm, 0 for r <= 1."""
    above = log_ratio.clamp(min=0)
    margins = above + torch.log1p(-(-above).exp()) + torch.tensor(num_classes - 1.0, dtype=torch.float64).log()
    return margins.clamp(min=0)


def cross_entropy_geometry(counts, lambda_w, lambda_h, margins):
    """The Optimum with given margins (K,), each split between head and feature at the least cost."""
    num_classes = len(counts)
    log_counts, log_w, log_h, log_shrink = logs(counts, lambda_w, lambda_h)
    norms_sq = margins * (0.5 * (log_shrink + log_w - log_h - log_counts)).exp()
    columns_sq = margins * (0.5 * (log_h + log_counts - log_shrink - log_w)).exp()
    penalty = margins * (0.5 * (log_w + log_h + log_counts + log_shrink)).exp()
    cross_entropy = torch.log1p((num_classes - 1) * (-margins).exp())
    centring = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    return Optimum(
        class_counts=counts,
        margins=margins,
        mean_norms_sq=norms_sq,
        HTH=norms_sq.diag(),
        WWT=centring * columns_sq @ centring,
        WH=centring * margins,
        bias=torch.zeros_like(counts),
        duality=self_duality(counts),
        loss=(counts / counts.sum() * cross_entropy + penalty).sum().item(),
    )


# ---------------------------------------------------------------------------------------------------------
# Other geometries
# ---------------------------------------------------------------------------------------------------------


def seli(class_counts):
    """SELI, the geometry of imbalanced classes without ReLU: H^T H of the class means and W W^T, both (K, K).

    Thrampoulidis, Kini, Vakilian, Behnia (2022), definition 2: with the simplex-encoding label matrix
    Z = (I - 11^T/K) Y (K, N), Y one-hot, and its SVD Z = V S U^T, the features have Gram matrix U S U^T and
    W W^T = V S V^T, each up to a factor. Here by eigenvectors of K x K matrices: with D = diag(n), the class
    means have D^(-1/2) (D^(1/2) (I - 11^T/K) D^(1/2))^(1/2) D^(-1/2), and W W^T = ((I - 11^T/K) D (I - 11^T/K))^(1/2).
    """
    roots = torch.as_tensor(class_counts, dtype=torch.float64).cpu().sqrt()
    centring = torch.eye(len(roots), dtype=torch.float64) - 1 / len(roots)
    gram = square_root(roots[:, None] * centring * roots) / roots[:, None] / roots
    return gram, square_root(centring * roots.square() @ centring)


def square_root(matrix):
    """Return the square root (K, K) of a symmetric positive semidefinite matrix (K, K), which may be singular.

    An eigenvalue of zero comes out of LAPACK as some K eps times the largest, of either sign, and its root would be
    an error of sqrt(eps): eigenvalues that small are taken as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    zero = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * torch.where(values > zero, values, 0).sqrt() @ vectors.T


# ---------------------------------------------------------------------------------------------------------
# Direct minimisation, where no closed form exists and to check those that do
# ---------------------------------------------------------------------------------------------------------


RERUNS = 10  # of L-BFGS-B from where it ended
KICK, DEAD = 1e-2, 1e-4  # size of a step off zero, and of a feature that is at zero, in scaled variables


@dataclass(frozen=True)
class Minimum:
    """What `minimise` found, and how far it can be trusted."""

    optimum: Optimum
    losses: list  # value of (UFM) at the end of each start, the best first
    projected_gradient: float  # largest entry of the projected gradient at the best, in scaled variables
    within_class_spread: float  # max_i |h_i - h_{y_i}| / max_i |h_i|: 0 by construction at level "class"


def minimise(
    class_counts,
    lambda_w,
    lambda_h,
    *,
    loss="CrossEntropy",
    bias=False,
    bias_decay=0.0,
    relu=True,
    dim=None,
    level="class",
    starts=4,
    seed=0,
):
    """Minimises (UFM) itself in float64 with L-BFGS-B, from random starts.

    Every other start gives each class a feature of its own; from the others a class may stay at zero for good.

    loss: CrossEntropy or MSE. bias: a bias b (K,) in the head, penalised by (bias_decay/2) |b|^2. relu: H >= 0.
    dim: d, default K. level: "class" has one feature a class, weighted n_k/N, for features collapse at a minimum;
    "sample" leaves all N features free. Returns a `Minimum`. Raises ValueError as `cross_entropy_optimum`, and for
    d < K, a negative bias_decay, or counts that are not whole at level "sample".

    With W = sqrt(c / lambda_W) V and h_j = sqrt(c / (lambda_H m_j)) u_j for a feature of multiplicity m_j, both
    penalties are (c/2) |.|^2: the problem is divided by c and well scaled for any lambdas.
    """
    counts = check(class_counts, lambda_w, lambda_h)
    num_classes = len(counts)
    dim = num_classes if dim is None else dim
    if dim < num_classes:
        raise ValueError(f"the theory needs as many features as classes: d = {dim} < K = {num_classes}")
    if bias_decay < 0:
        raise ValueError(f"bias_decay must be >= 0, got {bias_decay}")
    if level == "class":
        labels, multiplicity = np.arange(num_classes), counts.numpy()
    elif (counts == counts.round()).all():
        labels = np.repeat(np.arange(num_classes), counts.long().numpy())
        multiplicity = np.ones(len(labels))
    else:
        raise ValueError("level sample needs whole class counts")
    problem = ScaledProblem(labels, multiplicity, counts.numpy(), lambda_w, lambda_h, loss, bias, bias_decay, dim)
    random = np.random.default_rng(seed)
    ends = sorted(
        (problem.solve(random, relu, apart=start % 2 == 0) for start in range(starts)), key=lambda end: end.fun
    )
    head, features, offset = problem.split(ends[0].x)
    head, features = head * problem.head_scale, features * problem.feature_scale[:, None]

    means = np.zeros((num_classes, dim))
    np.add.at(means, labels, features * (multiplicity / counts.numpy()[labels])[:, None])
    largest = np.linalg.norm(features, axis=1).max()
    spread = np.linalg.norm(features - means[labels], axis=1).max() / largest if largest > 0 else 0.0
    means, head, offset = (torch.from_numpy(np.array(part)) for part in (means, head, offset))
    gram, logits = means @ means.T, head @ means.T
    optimum = Optimum(
        class_counts=counts,
        margins=class_margins(logits),
        mean_norms_sq=gram.diag(),
        HTH=gram,
        WWT=head @ head.T,
        WH=logits,
        bias=offset,
        duality=logits @ torch.linalg.pinv(gram, hermitian=True),
        loss=ends[0].fun * problem.cost,
    )
    return Minimum(optimum, [end.fun * problem.cost for end in ends], ends[0].projected_gradient, float(spread))


def class_margins(logits):
    """(K,): the logit of the class less the mean of the others', of logits W H (K, K), a column a class."""
    own = logits.diag()
    return own - (logits.sum(0) - own) / (len(logits) - 1)


class ScaledProblem:
    """(UFM) in the variables (V, U, b) of `minimise`, divided by c, with its gradient, for SciPy."""

    def __init__(self, labels, multiplicity, counts, lambda_w, lambda_h, loss, bias, bias_decay, dim):
        self.labels, self.loss, self.bias, self.bias_decay = labels, loss, bias, bias_decay
        self.shapes = (len(counts), dim), (len(labels), dim)
        root_w, root_h = math.sqrt(lambda_w), math.sqrt(lambda_h)
        self.cost = root_w * root_h * math.exp(0.5 * np.log(counts).mean())  # c
        self.head_scale = math.sqrt(self.cost) / root_w
        self.feature_scale = math.sqrt(self.cost) / (root_h * np.sqrt(multiplicity))
        self.logit_scale = self.head_scale * self.feature_scale
        self.weight = multiplicity / counts.sum() / self.cost
        self.one_hot = np.eye(len(counts))[labels]

    def split(self, x):
        """V (K, d), U (S, d) and b (K,) of a flat vector."""
        (num_classes, dim), (samples, _) = self.shapes
        head, features, bias = np.split(x, [num_classes * dim, (num_classes + samples) * dim])
        return (
            head.reshape(num_classes, dim),
            features.reshape(samples, dim),
            bias if self.bias else np.zeros(num_classes),
        )

    def losses_and_residuals(self, logits):
        """Losses (S,) of logits (S, K), and their gradients (S, K)."""
        if self.loss == "MSE":
            residuals = logits - self.one_hot
            return 0.5 * np.square(residuals).sum(1), residuals
        # log(1 + sum of others), others relative to the own logit: exact also where the loss is tiny
        rows = np.arange(len(logits))
        others = np.exp(np.minimum(logits - logits[rows, self.labels][:, None], 700.0)) - self.one_hot
        residuals = others / (1 + others.sum(1, keepdims=True))
        residuals[rows, self.labels] = -residuals.sum(1)
        return np.log1p(others.sum(1)), residuals

    def value_and_gradient(self, x):
        head, features, bias = self.split(x)
        losses, residuals = self.losses_and_residuals(features @ head.T * self.logit_scale[:, None] + bias)
        value = self.weight @ losses + 0.5 * np.square(head).sum() + 0.5 * np.square(features).sum()
        value += 0.5 * self.bias_decay / self.cost * np.square(bias).sum()
        pull = residuals * self.weight[:, None]
        scaled = pull * self.logit_scale[:, None]
        parts = [(scaled.T @ features + head).ravel(), (scaled @ head + features).ravel()]
        if self.bias:
            parts.append(pull.sum(0) + self.bias_decay / self.cost * bias)
        return value, np.concatenate(parts)

    def solve(self, random, relu, apart):
        """Runs L-BFGS-B from a random start, with `apart` one where each class has a feature of its own.

        It is run again while that gains something: with its memory cleared, for a line search that fails on
        rounding ends it early; and with the features that are zero kicked off it, for zero is a critical point,
        whether a class belongs there or not. The result also has its projected gradient.
        """
        head, features = (random.standard_normal(shape) for shape in self.shapes)
        if relu:
            features = np.abs(features)
        if apart:
            features = 0.1 * features + 2 * np.eye(features.shape[1])[self.labels]
        x = np.concatenate([head.ravel(), features.ravel(), np.zeros(len(head) if self.bias else 0)])
        low = np.full(len(x), -np.inf)
        if relu:
            low[head.size : head.size + features.size] = 0.0
        options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 30, "ftol": 0.0, "gtol": 1e-11}
        best, bounds = None, Bounds(low, np.inf)
        for _ in range(RERUNS):
            end = minimize(self.value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            if best is not None and not end.fun < best.fun * (1 - 1e-15):
                break
            best = end
            x = self.kick(best.x, relu)
        x = best.x
        gradient = self.value_and_gradient(x)[1]
        best.projected_gradient = float(np.abs(x - np.maximum(x - gradient, low)).max())
        return best

    def kick(self, x, relu):
        """x with the classes that are at zero moved off it, each in a direction that no other class uses.

        With ReLU there may be none, for orthogonal features that share no axis can still use up all axes. So each
        class is first turned onto an axis of its own, which at the optimum changes neither W H nor any norm.
        """
        x = x.copy()
        head, features, bias = self.split(x)  # views of x
        norms = np.linalg.norm(features, axis=1)
        dead = norms < DEAD
        if relu:
            units = np.array([features[self.labels == label].sum(0) for label in range(len(head))])
            units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), np.finfo(float).tiny)
            columns = head @ units.T
            head[:], features[:] = 0, 0
            head[:, : len(head)] = columns
            features[np.arange(len(features)), self.labels] = norms
            directions = np.eye(*head.shape)
        else:
            directions = np.linalg.svd(features)[2][::-1]  # those of the least, or no, singular value first
        residuals = self.losses_and_residuals(np.tile(bias, (len(features), 1)))[1]
        for number, label in enumerate(np.unique(self.labels[dead])):
            own, direction = dead & (self.labels == label), directions[label if relu else number]
            features[own] = KICK * direction
            fall = -residuals[own][0]  # where the loss falls fastest from zero
            head += KICK * np.outer(fall / np.linalg.norm(fall), direction)
        return x
