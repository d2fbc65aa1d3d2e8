"""The unconstrained features model (UFM) as a value, and the geometry of its minimiser.

    min_{W, H >= 0}  (1/N) sum_i loss(W h_i + b, y_i) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_i |h_i|^2     (UFM)

There are K classes with n_k samples of class k, N = sum n_k, W (K, d), features h_i in R^d, and d >= K. The loss is
the cross entropy or a variant of it, or |W h + b - e_y|^2 / 2 for MSE (Dang, Tran, Nguyen, Ho, ICML 2024, arXiv
2401.02058, section 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    and so on of the cross entropy, see `LossVariant`.

    `dataclasses.asdict(problem)` can be written as JSON, and `UFM(**loaded)` builds the same problem from it.

    Raises ValueError for fewer than two classes, n_k < 1, a lambda that is not positive and finite, an unknown loss, a
    negative bias_decay, and a variant of MSE.

    Example:
        >>> from nc_theory import UFM
        >>> problem = UFM(class_counts=[100, 200, 300], lambda_w=5e-3, lambda_h=5e-5)
        >>> problem.num_classes, problem.class_counts, problem.loss
        (3, (100, 200, 300), 'CrossEntropy')
    """

    class_counts: Sequence[float]
    lambda_w: float
    lambda_h: float
    loss: str = "CrossEntropy"
    relu: bool = True
    bias: bool = False
    bias_decay: float = 0.0
    variant: LossVariant = field(default_factory=LossVariant)

    def __post_init__(self) -> None:
        counts = tuple(int(n) if n == int(n) else n for n in validate_counts(self.class_counts).tolist())
        object.__setattr__(self, "class_counts", counts)
        for name in ("lambda_w", "lambda_h", "bias_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.variant, LossVariant):
            object.__setattr__(self, "variant", LossVariant(**self.variant))
        for name, value in (("lambda_W", self.lambda_w), ("lambda_H", self.lambda_h)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite for a minimiser to exist, got {value}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss}")
        if not 0 <= self.bias_decay < math.inf:
            raise ValueError(f"bias_decay must be >= 0 and finite, got {self.bias_decay}")
        if self.loss == "MSE" and not self.variant.is_plain:
            raise ValueError("class weights, logit adjustment and the like are for the cross entropy, not for MSE")

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)

    @property
    def counts(self) -> torch.Tensor:
        """The class counts as a float64 tensor (K,) on the CPU."""
        return torch.tensor(self.class_counts, dtype=torch.float64)

    @cached_property
    def loss_parameters(self) -> LossParameters:
        """The `LossParameters` of the variant for the class counts."""
        return self.variant.parameters(self.class_counts)


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
    duality: torch.Tensor  # (K, K) the matrix D of W ~ D H^T
    loss: float  # value of (UFM) at the minimiser
    method: str  # "closed form", "class by class", "numerical" or "released formula"
    projected_gradient: float = 0.0  # largest entry of the projected gradient, in scaled variables
    lower_bound: float = -math.inf  # the minimum of (UFM) is proved to be no smaller
    factors: tuple[torch.Tensor, torch.Tensor] | None = None  # W and H^T (K, r) in r directions, if features share some

    @property
    def class_counts(self) -> torch.Tensor:
        """The class counts as a float64 tensor (K,)."""
        return self.problem.counts

    @property
    def collapsed(self) -> torch.Tensor:
        """(K,) bool: True for the classes in minority collapse, h_k = 0."""
        return self.mean_norms_sq == 0

    @property
    def gap(self) -> float:
        """Relative gap loss / lower_bound - 1: no other W and H have a loss smaller by more than that."""
        return self.loss / self.lower_bound - 1 if self.lower_bound > 0 else math.inf

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
        norms = self.mean_norms_sq.sqrt()
        return self.WH / torch.where(norms > 0, norms, 1), norms.diag()

    @property
    def certified(self) -> bool:
        """True if the gap proves that this is the minimum, up to a relative error of CERTIFIED."""
        return abs(self.gap) <= CERTIFIED


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
    owners = torch.arange(dim) % directions  # the column in which each coordinate is not zero
    frame = torch.zeros(dim, directions, dtype=torch.float64)
    frame[torch.randperm(dim, generator=generator), owners] = 1.0
    return frame / frame.norm(dim=0)


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


def class_margins(logits: ArrayLike) -> torch.Tensor:
    """Return the margins (K,) of logits W H (K, K), one column per class: its logit minus the mean of the others.

    Example:
        >>> from nc_theory import class_margins
        >>> class_margins([[5.0, 0.0, 1.0], [1.0, 6.0, 1.0], [1.0, 0.0, 4.0]])
        tensor([4., 6., 3.])
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or len(logits) != logits.shape[1]:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, wanted (K, K), one column per class")
    own = logits.diag()
    return own - (logits.sum(0) - own) / (len(logits) - 1)
