"""Cross-entropy losses for imbalanced classes, as one family: for training in PyTorch, and for the solver in NumPy.

At logits z in R^K, a sample of class k costs

    l_k(z) = w_k [ logsumexp_j(D_j z_j + i_kj) - sum_j t_kj (D_j z_j + i_kj) ],   t_k = (1-eps) e_k + eps/K

with weights w_k, scales D_j and shifts i_kj made from the class counts. Predictions are the argmax of z.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import entr
from torch.nn import functional as F

if TYPE_CHECKING:
    from nc_theory.problem import UFM

LARGEST_EXPONENT = 700.0  # exp of more is infinite in float64


@dataclass(frozen=True)
class LossVariant:
    """A variant of the cross entropy, by five numbers >= 0 that can be combined. All zero is the cross entropy itself.

    class_weights E     w_k = N n_k^-E / sum_j n_j^(1-E), so that the mean weight of a sample is 1. E = 1 is inverse
                        frequency.
    logit_adjustment T  adds T log(n_j / N) to i_kj (Menon et al. 2021, arXiv 2007.07314).
    logit_scaling G     D_j = (n_j / n_max)^G (CDT: Ye et al. 2020, arXiv 2001.01385). Together with
                        logit_adjustment this is the VS loss (Kini et al. 2021, arXiv 2103.01550).
    ldam_margin C       subtracts C (n_min / n_k)^(1/4) from i_kk (LDAM: Cao et al. 2019, arXiv 1906.07413). Its authors
                        also normalise features and head, and multiply the logits by 30; neither is done here.
    label_smoothing s   t_k = (1-s) e_k + s/K, 0 <= s < 1 (Szegedy et al. 2016, arXiv 1512.00567).

    Raises ValueError for a number that is negative or not finite, and for label_smoothing >= 1.

    Example:
        >>> from nc_theory import UFM, LossVariant, solve
        >>> variant = LossVariant(logit_adjustment=1.0)
        >>> variant.is_plain, variant.is_symmetric
        (False, False)
        >>> solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5, variant=variant)).certified
        True
    """

    class_weights: float = 0.0
    logit_adjustment: float = 0.0
    logit_scaling: float = 0.0
    ldam_margin: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = float(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be >= 0 and finite, got {value}")
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing}")

    @property
    def is_plain(self) -> bool:
        """True for the cross entropy itself."""
        return not any(dataclasses.astuple(self))

    @property
    def is_symmetric(self) -> bool:
        """True if all wrong classes count alike for a sample of class k."""
        return self.logit_adjustment == self.logit_scaling == 0

    def log_weights(self, sizes: ArrayLike, class_counts: ArrayLike) -> np.ndarray:
        """Return log w (P,) of classes of `sizes` (P,) samples, for class counts (K,); all NumPy arrays."""
        log_counts = np.log(class_counts)
        log_mean = np.logaddexp.reduce((1 - self.class_weights) * log_counts) - np.log(np.sum(class_counts))
        return -self.class_weights * np.log(sizes) - log_mean

    def margins(self, sizes: ArrayLike, class_counts: ArrayLike) -> np.ndarray:
        """Return the margins C (n_min / n)^(1/4) (P,) of classes of `sizes` (P,) samples; all NumPy arrays."""
        return self.ldam_margin * (np.min(class_counts) / np.asarray(sizes)) ** 0.25

    def weights(self, class_counts: ArrayLike) -> np.ndarray:
        """Return the weights w (K,) of the classes."""
        counts = np.asarray(class_counts, dtype=np.float64)
        return np.exp(self.log_weights(counts, counts)) if self.class_weights else np.ones(len(counts))

    def parameters(self, class_counts: ArrayLike) -> LossParameters:
        """Return the `LossParameters` for class counts (K,)."""
        counts = np.asarray(class_counts, dtype=np.float64)
        return LossParameters(
            weights=self.weights(counts),
            scales=(counts / counts.max()) ** self.logit_scaling,
            offsets=self.logit_adjustment * np.log(counts / counts.sum()),
            margins=self.margins(counts, counts),
            targets=(1 - self.label_smoothing) * np.eye(len(counts)) + self.label_smoothing / len(counts),
        )


@dataclass(frozen=True, eq=False)
class LossParameters:
    """The losses of C labels, in NumPy float64: i_kj = offsets_j - margins_k (j = own_k), for a label k in 0..C-1.

    For a `LossVariant` the labels are the classes, C = K and own_k = k; for soft labels, own_k is the likeliest class.
    """

    weights: np.ndarray  # (C,) w
    scales: np.ndarray  # (K,) D
    offsets: np.ndarray  # (K,)
    margins: np.ndarray  # (C,)
    targets: np.ndarray  # (C, K) t

    @cached_property
    def own(self) -> np.ndarray:
        """The likeliest class (C,) of each label."""
        return self.targets.argmax(1)

    @cached_property
    def hard(self) -> bool:
        """True if each t_k is a single class."""
        return bool((self.targets.max(1) == 1).all())

    @cached_property
    def entropies(self) -> np.ndarray:
        """The least loss (C,) of each label, over all logits: w_k times the entropy of t_k."""
        return self.weights * entr(self.targets).sum(1)

    def losses_and_residuals(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the losses (S,) of logits (S, K) with labels (S,), and p - t (S, K), p the softmax of D z + i.

        All is computed relative to the score of the sample's own class, so that tiny losses are accurate.
        """
        rows, own = np.arange(len(logits)), self.own[labels]
        scores = logits * self.scales + self.offsets
        scores[rows, own] -= self.margins[labels]
        ahead = scores - scores[rows, own][:, None]
        excess = np.maximum(ahead.max(1) - LARGEST_EXPONENT, 0.0)
        others = np.exp(ahead - excess[:, None])
        others[rows, own] = 0.0
        total = others.sum(1)
        residuals = others / (1 + total)[:, None]
        residuals[rows, own] = -residuals.sum(1)
        losses = np.log1p(total) + excess
        if not self.hard:
            targets = self.targets[labels]
            losses -= (targets * ahead).sum(1)
            residuals -= targets
            residuals[rows, own] += 1
        return self.weights[labels] * losses, residuals

    def gradients(self, residuals: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the gradients (S, K) of the losses with respect to the logits, w D (p - t), from p - t (S, K)."""
        return residuals * self.scales * self.weights[labels][:, None]


class VariantLoss(torch.nn.Module):
    """The loss of a `LossVariant` for training: logits (B, K) and labels (B,) int64 -> losses of the samples (B,).

    It holds its tables as buffers, loops over no classes and never waits for the device, so that CUDA graphs can
    capture it. The loss of a batch is the mean of the result, for which w_k is already normalised.

    class_counts: (K,) of the training set. dtype: of the tables; use float64 for float64 logits.

    Example:
        >>> import torch
        >>> from nc_theory import LossVariant, VariantLoss
        >>> criterion = VariantLoss(LossVariant(class_weights=1.0), class_counts=[10, 20, 30])
        >>> criterion(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
        tensor([2.1972, 1.0986, 0.7324])
    """

    weights: torch.Tensor  # (K,) as in `LossParameters`, like the others
    scales: torch.Tensor
    offsets: torch.Tensor
    margins: torch.Tensor

    def __init__(self, variant: LossVariant, class_counts: ArrayLike, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.variant = variant
        parameters = variant.parameters(class_counts)
        for name in ("weights", "scales", "offsets", "margins"):
            table = torch.tensor(getattr(parameters, name), dtype=dtype)
            self.register_buffer(name, table, persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        variant = self.variant
        if variant.logit_scaling:
            logits = logits * self.scales
        if variant.logit_adjustment:
            logits = logits + self.offsets
        if variant.ldam_margin:
            margins = self.margins[labels].unsqueeze(1).to(logits.dtype)
            logits = logits.scatter_add(1, labels.unsqueeze(1), -margins)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=variant.label_smoothing)
        return losses * self.weights[labels] if variant.class_weights else losses


def losses_and_gradients(problem: UFM, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses (S,) of logits (S, K) with labels (S,) in a UFM, and their gradients (S, K), in NumPy."""
    if problem.loss == "MSE":
        residuals = logits - problem.targets[labels]
        return 0.5 * np.square(residuals).sum(1), residuals
    parameters = problem.loss_parameters
    losses, residuals = parameters.losses_and_residuals(logits, labels)
    return losses, parameters.gradients(residuals, labels)
