"""The unconstrained features model (UFM) as a value, and the geometry of its minimiser.

    min_{W, H >= 0}  (1/N) sum_i loss(W h_i + b, y_i) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_i |h_i|^2     (UFM)

There are K classes with n_k samples of class k, N = sum n_k, W (K, d), and features h_i in R^d, for d large enough. The
loss is the cross entropy or a variant of it, or |W h + b - e_y|^2 / 2 for MSE (Dang, Tran, Nguyen, Ho, ICML 2024, arXiv
2401.02058, section 3). W may be the product of several linear layers, and the labels may be soft, see `UFM`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from nc_theory.losses import LossParameters, LossVariant

LOSSES = ("CrossEntropy", "MSE")
CERTIFIED = 1e-6  # largest relative gap to the lower bound at which a solution counts as certified


@dataclass(frozen=True)
class UFM:
    """One problem (UFM): class counts, penalties, loss, and which constraints hold.

    class_counts: n_k (K,), numbers >= 1, stored as a tuple. lambda_w, lambda_h: the penalties, > 0. loss: CrossEntropy
    or MSE. relu: H >= 0. bias: the head has a bias b (K,), penalised by (bias_decay/2) |b|^2. variant: weights, margins
    and so on of the cross entropy, see `LossVariant`. depth_linear: the number L of linear layers whose product is W;
    the head's penalty is then (lambda_W/2) sum_l |W_l|^2. L > 1 is for MSE without a bias.

    labels: soft labels (C, K), one row for each of C contexts, stored as tuples. Features then belong to contexts
    instead of classes, and wherever a shape says K for the classes of features, it is C: class_counts (C,), H (d, C),
    W H (K, C). For the cross entropy, a row counts how often each class follows its context; class_counts are the sums
    of the rows and can be left out (next-token prediction). For MSE, the rows are the targets (regression).

    `dataclasses.asdict(problem)` can be written as JSON, and `UFM(**loaded)` builds the same problem from it.

    Raises ValueError for fewer than two classes, n_k < 1, a lambda that is not positive and finite, an unknown loss, a
    negative bias_decay, a variant of MSE or of soft labels, labels that do not fit, and a depth_linear that is below 1,
    or above 1 where no optimum is known.

    Example:
        >>> from nc_theory import UFM
        >>> problem = UFM(class_counts=[100, 200, 300], lambda_w=5e-3, lambda_h=5e-5)
        >>> problem.num_classes, problem.class_counts, problem.loss
        (3, (100, 200, 300), 'CrossEntropy')
        >>> UFM(labels=[[3, 1], [0, 5]], lambda_w=5e-3, lambda_h=5e-5).class_counts
        (4, 5)
    """

    class_counts: Sequence[float] = ()
    lambda_w: float = math.nan
    lambda_h: float = math.nan
    loss: str = "CrossEntropy"
    relu: bool = True
    bias: bool = False
    bias_decay: float = 0.0
    variant: LossVariant = field(default_factory=LossVariant)
    depth_linear: int = 1
    labels: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss}")
        counts = self.class_counts
        if self.labels is not None:
            labels = validate_labels(self.labels, self.loss)
            object.__setattr__(self, "labels", tuple(map(tuple, labels.tolist())))
            counts = counts if len(counts) or self.loss == "MSE" else labels.sum(1).tolist()
        if not len(counts):
            raise ValueError("class_counts can be left out only with the labels of a cross entropy")
        numbers = validate_counts(counts).tolist()
        object.__setattr__(self, "class_counts", tuple(int(n) if n == int(n) else n for n in numbers))
        for name in ("lambda_w", "lambda_h", "bias_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.variant, LossVariant):
            object.__setattr__(self, "variant", LossVariant(**self.variant))
        for name, value in (("lambda_W", self.lambda_w), ("lambda_H", self.lambda_h)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite for a minimiser to exist, got {value}")
        if not 0 <= self.bias_decay < math.inf:
            raise ValueError(f"bias_decay must be >= 0 and finite, got {self.bias_decay}")
        if self.loss == "MSE" and not self.variant.is_plain:
            raise ValueError("class weights, logit adjustment and the like are for the cross entropy, not for MSE")
        if self.depth_linear < 1:
            raise ValueError(f"depth_linear must be 1 or more, got {self.depth_linear}")
        if self.depth_linear > 1 and (self.loss != "MSE" or self.bias or self.labels is not None):
            raise ValueError("with depth_linear > 1 an optimum is known only for MSE without a bias and soft labels")
        if self.labels is not None:
            self._validate_soft()

    def _validate_soft(self) -> None:
        """Raise ValueError if the labels do not fit the other fields."""
        labels, counts = np.array(self.labels), self.counts.numpy()
        if not self.variant.is_plain:
            raise ValueError("class weights, logit adjustment and the like are for one label a sample, not for labels")
        if len(labels) != len(counts):
            raise ValueError(f"labels have {len(labels)} rows, and there are {len(counts)} class_counts")
        if self.loss == "CrossEntropy" and not np.allclose(labels.sum(1), counts):
            raise ValueError("class_counts must be the sums of the rows of labels; leave them out")

    @property
    def num_classes(self) -> int:
        """The number K of classes, or of columns of the labels."""
        return len(self.class_counts if self.labels is None else self.labels[0])

    @property
    def counts(self) -> torch.Tensor:
        """The class counts as a float64 tensor (K,) on the CPU."""
        return torch.tensor(self.class_counts, dtype=torch.float64)

    @property
    def unique(self) -> bool:
        """False where minimisers form a line: two classes of equal counts with ReLU and a bias without a penalty.

        The bias then moves logits between the two features at no cost. Unique are the loss and W H + b.

        Example:
            >>> from nc_theory import UFM
            >>> UFM([10, 10], 1e-3, 1e-3, bias=True).unique, UFM([10, 20], 1e-3, 1e-3, bias=True).unique
            (False, True)
        """
        alike = len(self.class_counts) == self.num_classes == 2 and len(set(self.class_counts)) == 1
        return not (alike and self.relu and self.bias and not self.bias_decay)

    @cached_property
    def loss_parameters(self) -> LossParameters:
        """The `LossParameters` of the variant for the class counts, or of the soft labels."""
        if self.labels is None:
            return self.variant.parameters(self.class_counts)
        labels = np.array(self.labels)
        contexts, classes = np.zeros(len(labels)), np.zeros(labels.shape[1])
        targets = labels / labels.sum(1, keepdims=True)
        return LossParameters(contexts + 1, classes + 1, offsets=classes, margins=contexts, targets=targets)

    @cached_property
    def targets(self) -> np.ndarray:
        """The target (K, K) of each class, one per row, in NumPy: t_k of the cross entropy, e_k of MSE."""
        if self.loss == "MSE":
            return np.eye(self.num_classes) if self.labels is None else np.array(self.labels)
        return self.loss_parameters.targets

    @cached_property
    def irreducible_loss(self) -> float:
        """The least mean loss over all logits: the entropy of smoothed or soft labels, and zero otherwise.

        Example:
            >>> from nc_theory import UFM, LossVariant
            >>> f"{UFM([10, 20, 30], 5e-3, 5e-5, variant=LossVariant(label_smoothing=0.99)).irreducible_loss:.4f}"
            '1.0985'
        """
        if self.loss == "MSE":
            return 0.0
        counts = self.counts.numpy()
        return float(counts / counts.sum() @ self.loss_parameters.entropies)


class Certificate(NamedTuple):
    """A lower bound of the minimum of a UFM, and the feasible point of the dual problem that proves it."""

    bound: float  # -sum_k conjugates_k, less the conjugate of the bias' penalty
    gradients: np.ndarray  # (K, K) the rows (n_k/N) g_k, with g_k = w_k D (q_k - t_k)
    conjugates: np.ndarray  # (K,) (n_k/N) l_k*(g_k), so that (n_k/N) l_k(z) >= gradients_k . z - conjugates_k for any z
    targets: np.ndarray  # (K, K) the rows q_k; for MSE, the logits e_k + g_k


@dataclass(frozen=True, eq=False)
class Optimum:
    """The geometry of a minimiser of (UFM), in float64 on the CPU.

    At a minimiser the features have collapsed to their class means, h_i = h_{y_i}. H = [h_1 ... h_K] (d, K) holds
    these, and W (K, d) is the head. The logits of class k are WH[:, k] + bias.

    Example:
        >>> from nc_theory import UFM, solve
        >>> optimum = solve(UFM([1, 200, 300], lambda_w=5e-3, lambda_h=5e-3))
        >>> optimum.collapsed
        tensor([ True, False, False])
        >>> optimum.HTH
        tensor([[0.0000, 0.0000, 0.0000],
                [0.0000, 0.1426, 0.0000],
                [0.0000, 0.0000, 0.1275]], dtype=torch.float64)
    """

    problem: UFM
    margins: torch.Tensor  # (K,) logit of the class minus the mean of the others', without bias
    mean_norms_sq: torch.Tensor  # (K,) |h_k|^2
    HTH: torch.Tensor  # (K, K)
    WWT: torch.Tensor  # (K, K)
    WH: torch.Tensor  # (K, K)
    bias: torch.Tensor  # (K,) zero in a problem without one
    loss: float  # value of (UFM) at the minimiser
    method: str  # "closed form", "class by class", "numerical" or "released formula"
    projected_gradient: float = 0.0  # largest entry of the projected gradient, in scaled variables
    lower_bound: float = -math.inf  # the minimum of (UFM) is proved to be no smaller
    factors: tuple[torch.Tensor, torch.Tensor] | None = None  # W and H^T (K, r) in r directions, if features share some
    certificate: Certificate | None = None  # of the lower bound; None in closed form, which needs none
    other_duality: torch.Tensor | None = None  # (K, K) `duality`, where it is not the paper's

    @property
    def class_counts(self) -> torch.Tensor:
        """The class counts as a float64 tensor (K,)."""
        return self.problem.counts

    @property
    def collapsed(self) -> torch.Tensor:
        """(K,) bool: True for the classes in minority collapse, h_k = 0."""
        return self.mean_norms_sq == 0

    @property
    def duality(self) -> torch.Tensor:
        """The matrix D (K, K) of the self-duality W ~ D H^T, up to a factor."""
        return self_duality(self.class_counts) if self.other_duality is None else self.other_duality

    @property
    def gap(self) -> float:
        """Relative gap loss / lower_bound - 1: no other W and H have a loss smaller by more than that.

        Both are taken less the problem's `irreducible_loss`, which no W and H can change.
        """
        least = self.problem.irreducible_loss
        return (self.loss - least) / (self.lower_bound - least) - 1 if self.lower_bound > least else math.inf

    @property
    def directions(self) -> int:
        """The number of directions that the features use: the least d at which a network can reach this optimum.

        For free features it is the rank of W H. With ReLU, where features share directions, it is that of the
        solution found, and another one may need fewer.

        Example:
            >>> from nc_theory import UFM, solve
            >>> solve(UFM([1, 200, 300], lambda_w=5e-3, lambda_h=5e-3)).directions
            2
        """
        return int((self.mean_norms_sq > 0).sum()) if self.factors is None else self.factors[0].shape[1]

    def head(self, dim: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return a W (K, d) of this minimiser for features in R^d, d = `dim`, in float64.

        Minimisers differ by the orthonormal frame (d, r) of their directions, see `random_frame`. It is drawn from a
        copy of the `generator` (default: one with seed 0), so that `head` and `features` of one generator fit together.
        Raises ValueError if d is less than the number r of directions that the optimum uses.

        Example:
            >>> import torch
            >>> from nc_theory import UFM, solve
            >>> optimum = solve(UFM([10, 20, 30], lambda_w=1e-2, lambda_h=1e-3))
            >>> head, layer = optimum.head(8), torch.nn.Linear(8, 3, bias=False)
            >>> with torch.no_grad():
            ...     _ = layer.weight.copy_(head)
            >>> torch.allclose(head @ optimum.features(8).T, optimum.WH)
            True
        """
        return self._in_frame(0, dim, generator)

    def features(self, dim: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return the class means h_k of this minimiser as rows (K, d), as `head` does.

        With ReLU they are non-negative.
        """
        return self._in_frame(1, dim, generator)

    def _in_frame(self, part: int, dim: int, generator: torch.Generator | None) -> torch.Tensor:
        factor = (self.factors or self._orthogonal_factors())[part]
        if dim < factor.shape[1]:
            raise ValueError(f"the optimum has features in {factor.shape[1]} directions, which {dim} cannot hold")
        return factor @ random_frame(dim, factor.shape[1], self.problem.relu, generator).T

    def _orthogonal_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W and H^T (K, K) of orthogonal features, each of which has a direction of its own."""
        alive = self.mean_norms_sq > 0
        norms = self.mean_norms_sq.sqrt()
        return self.WH[:, alive] / norms[alive], norms.diag()[:, alive]

    @property
    def certified(self) -> bool:
        """True if the gap proves that this is the minimum, up to a relative error of CERTIFIED."""
        return abs(self.gap) <= CERTIFIED


def self_duality(class_counts: ArrayLike) -> torch.Tensor:
    """Return the D (K, K) of the paper's self-duality W ~ D H^T: rows K sqrt(n_k) h_k - sum_m sqrt(n_m) h_m.

    Example:
        >>> from nc_theory import self_duality
        >>> self_duality([1, 4, 9])
        tensor([[ 2., -2., -3.],
                [-1.,  4., -3.],
                [-1., -2.,  6.]], dtype=torch.float64)
    """
    roots = validate_counts(class_counts).sqrt()
    return (len(roots) * roots).diag().sub_(roots)


def random_frame(
    dim: int, directions: int, non_negative: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return a random frame U (d, r) of r = `directions` orthonormal columns in R^d, d = `dim`, in float64.

    non_negative: all entries are >= 0, as for features after a ReLU. The columns then have disjoint supports, which
    share the d coordinates as evenly as possible, with equal entries. generator: a copy of it is used; default:
    one with seed 0. Raises ValueError for r > d.

    Example:
        >>> import torch
        >>> from nc_theory import random_frame
        >>> frame = random_frame(6, 3)
        >>> bool((frame >= 0).all()), torch.allclose(frame.T @ frame, torch.eye(3, dtype=torch.float64))
        (True, True)
    """
    if directions > dim:
        raise ValueError(f"there are no {directions} orthonormal directions in {dim} dimensions")
    generator = generator.clone_state() if generator else torch.Generator().manual_seed(0)
    if not non_negative:
        return torch.linalg.qr(torch.randn(dim, directions, dtype=torch.float64, generator=generator))[0]
    owners = torch.arange(dim * bool(directions)) % max(directions, 1)  # the column in which each entry is not zero
    frame = torch.zeros(dim, directions, dtype=torch.float64)
    frame[torch.randperm(len(owners), generator=generator), owners] = 1.0
    return frame / frame.norm(dim=0)


def validate_labels(labels: ArrayLike, loss: str) -> np.ndarray:
    """Return soft labels (C, K) as a float64 array.

    Raises ValueError for another shape than (C, K) with K >= 2, and for entries that are not finite or, for the cross
    entropy, negative, or a row of which is zero.
    """
    array = np.asarray(labels, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(f"labels have shape {array.shape}, wanted (contexts, K) with K >= 2")
    if not np.isfinite(array).all():
        raise ValueError("labels must be finite")
    if loss == "CrossEntropy" and (array.min() < 0 or array.sum(1).min() < 1):
        raise ValueError("labels are counts of each class: every one must be >= 0, and every row needs one or more")
    return array


def validate_counts(class_counts: ArrayLike) -> torch.Tensor:
    """Return class counts (K,) as a float64 tensor on the CPU.

    Raises ValueError for fewer than two classes and for counts that are not finite and >= 1.

    Example:
        >>> from nc_theory import validate_counts
        >>> validate_counts([100, 200])
        tensor([100., 200.], dtype=torch.float64)
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.ndim != 1 or len(counts) < 2:
        raise ValueError(f"the theory needs two classes or more, got class counts of shape {tuple(counts.shape)}")
    if not (counts.isfinite().all() and (counts >= 1).all()):
        raise ValueError(f"every class needs one sample or more, got class counts {counts.tolist()}")
    return counts


def class_margins(logits: ArrayLike, own: ArrayLike | None = None) -> torch.Tensor:
    """Return the margins (C,) of logits W H (K, C), one column per class: its logit minus the mean of the others.

    own: the class (C,) of each column; default: 0..K-1. Raises ValueError without it for logits that are not (K, K).

    Example:
        >>> from nc_theory import class_margins
        >>> class_margins([[5.0, 0.0, 1.0], [1.0, 6.0, 1.0], [1.0, 0.0, 4.0]])
        tensor([4., 6., 3.])
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or (own is None and len(logits) != logits.shape[1]):
        raise ValueError(f"logits have shape {tuple(logits.shape)}, wanted (K, K), one column per class")
    logit = logits.diag() if own is None else logits[torch.as_tensor(own), torch.arange(logits.shape[1])]
    return logit - (logits.sum(0) - logit) / (len(logits) - 1)
