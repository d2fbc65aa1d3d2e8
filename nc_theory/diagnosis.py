"""Why a network is not at the optimum of (UFM), and whether it will get there, from what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nc_theory.closed_form import collapse_count
from nc_theory.gap import SHARES, GapShares, array_of
from nc_theory.problem import Optimum

DEAD = 1e-4  # a class mean whose squared norm is at most this much of the optimum's is at zero
REACHED = 1e-6  # relative gap from which no cause is sought
RECENT = 0.2  # share of the measurements, the last ones, that tell whether the gap still falls
NEAR = 1e-2  # a gap that is larger has a second forecast, when it reaches this
FLAT = 0.05  # decades by which a gap that stays the same may change
MOST_NAMED = 3  # classes that died and are described one by one
ZERO_LR = 0.01  # of the largest learning rate, from which on it counts as zero
LOW_LR = 0.2  # of the largest learning rate, below which it stops the gap from falling
UNBALANCED = 0.05  # an NC0 above this is not that of a stationary point


@dataclass(frozen=True)
class Convergence:
    """The course of a gap at its last measurements; see `convergence`.

    Example:
        >>> from nc_theory import convergence
        >>> course = convergence([10, 20, 30, 40], [1.0, 0.1, 0.1, 0.1], learning_rates=[1.0, 0.05, 0.01, 0.0])
        >>> course.flat_since, course.lr_at_zero, course.stopped_by_lr
        (20, True, True)
    """

    flat_since: int | None  # epoch, or None while the gap falls or rises
    epochs_per_decade: float  # in which the gap falls by 10; negative if it rises
    last_epoch: int
    last_gap: float
    stopped_by_lr: bool  # the gap fell until the learning rate was low
    relative_lr: float = math.nan  # the last learning rate over the largest; NaN if unknown

    @property
    def lr_at_zero(self) -> bool:
        """True if the learning rate counts as zero."""
        return self.relative_lr < ZERO_LR

    @property
    def target(self) -> float:
        """The next power of ten below the last gap."""
        return float(10.0 ** (math.ceil(math.log10(self.last_gap) - 1e-9) - 1))

    def text(self) -> str:
        """Return the course in words."""
        at_zero = ", with the learning rate at zero" if self.lr_at_zero else ""
        if self.flat_since is not None:
            return f"flat since epoch {self.flat_since}{at_zero}"
        if self.epochs_per_decade < 0:
            return f"rising by 10 every {-self.epochs_per_decade:.0f} epochs{at_zero}"
        text = f"falling by 10 every {max(self.epochs_per_decade, 1):.0f} epochs"
        if self.lr_at_zero:
            return f"{text} until the learning rate was at zero"
        targets = [self.target, *([NEAR] if self.target > 1.1 * NEAR else [])]
        left = {target: self.epochs_per_decade * math.log10(self.last_gap / target) for target in targets}
        times = (f"{target:.0e} at about epoch {self.last_epoch + more:.0f}" for target, more in left.items())
        return f"{text}: {', '.join(times)}"


def convergence(epochs: ArrayLike, gaps: ArrayLike, learning_rates: ArrayLike | None = None) -> Convergence | None:
    """Return the `Convergence` of a gap: falling, flat or rising; None with fewer than three positive gaps.

    epochs: of the measurements (E,), increasing. gaps: any measure that goes to zero (E,), such as optimality_gap.
    learning_rates: of the same epochs (E,).

    A line is fitted to the logarithms of the last fifth of the gaps, of at least three. The gap is flat if the line
    changes by less than 0.05 decades; it then is flat from the epoch on from which all gaps are that close to the last.

    Example:
        >>> from nc_theory import convergence
        >>> convergence([10, 50, 90, 130], [1.0, 0.1, 0.01, 0.001]).text()
        'falling by 10 every 40 epochs: 1e-04 at about epoch 170'
    """
    values = array_of(gaps)
    kept = (values > 0) & np.isfinite(values)
    if kept.sum() < 3:
        return None
    times, logs = array_of(epochs)[kept], np.log10(values[kept])
    rates = np.full(len(times), math.nan) if learning_rates is None else array_of(learning_rates)[kept]
    recent = max(3, math.ceil(RECENT * len(logs)))
    slope = float(np.polyfit(times[-recent:] - times[-1], logs[-recent:], 1)[0])
    flat = abs(slope) * (times[-1] - times[-recent]) < FLAT
    first = len(logs) - 1
    while first and abs(logs[first - 1] - logs[-1]) < FLAT:
        first -= 1
    relative = rates / np.nanmax(rates) if np.isfinite(rates).any() else rates
    return Convergence(
        flat_since=int(times[first]) if flat else None,
        epochs_per_decade=math.inf if slope == 0 else -1 / slope,
        last_epoch=int(times[-1]),
        last_gap=float(values[kept][-1]),
        stopped_by_lr=bool(relative[-1] < ZERO_LR and (relative[first] < LOW_LR or not flat)),
        relative_lr=float(relative[-1]),
    )


@dataclass(frozen=True)
class Diagnosis:
    """Why a network is not at the optimum; see `diagnose`.

    Example:
        >>> from nc_theory import UFM, diagnose, gap_shares, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> gap = gap_shares(optimum, optimum.head(8), optimum.features(8), [0.1, 0.1, 0.1], within_sums=[1, 2, 3])
        >>> diagnose(optimum, gap, optimum.mean_norms_sq, accuracies=[100, 99, 100]).cause.split(":")[0]
        '2 training images are misclassified, most in class 1'
    """

    optimum: Optimum
    gap: GapShares
    zero: tuple[int, ...]  # classes at zero
    died: tuple[int, ...]  # those of them that are not at zero at the optimum
    share: str  # the largest share of the gap: margins, duality, within or means
    classes: tuple[int, ...]  # the class, or the pair of classes, with the largest part of it
    cause: str | None  # None if there is none, or none that the measurements can tell
    convergence: Convergence | None

    def lines(self) -> list[str]:
        """Return the diagnosis as sentences."""
        counts, collapsed = self.optimum.problem.class_counts, self.optimum.collapsed.nonzero().flatten().tolist()
        lines = []
        if collapsed or self.zero:
            lines.append(f"at zero at the optimum: {named(collapsed)}; in the network: {named(self.zero)}")
        threshold = collapse_count(self.optimum.problem)
        limit = "" if threshold is None else f", and only up to n_k = {threshold:.3g} collapse"
        if len(self.died) > MOST_NAMED:
            lines.append(f"{named(self.died)} died, though the optimum keeps them{limit}")
        for label in self.died if len(self.died) <= MOST_NAMED else ():
            norm = self.optimum.mean_norms_sq[label]
            lines.append(f"class {label} (n_k = {counts[label]}) died: at the optimum |mu_k|^2 = {norm:.3g}{limit}")
        if not math.isnan(self.gap.total):
            share, of_classes = getattr(self.gap, self.share), named(self.classes)
            part = share.sum() / self.gap.total
            lines.append(f"largest share of the gap: {SHARES[self.share][1]} ({part:.0%}), most of all {of_classes}")
        if self.cause:
            lines.append(f"likely cause: {self.cause}")
        elif self.gap.columns()["optimality_gap"] > REACHED:
            more = "" if self.convergence else ", and without three measurements of the gap its course is not known"
            lines.append(f"likely cause: none of the causes that can be told apart applies{more}; more epochs may help")
        if self.convergence:
            lines.append(f"the gap: {self.convergence.text()}")
        return lines


def named(labels: Sequence[int], most: int = 20) -> str:
    """Return classes in words, such as "classes 1 and 4"; of more than `most`, only their number."""
    if not labels:
        return "no class"
    if len(labels) > most:
        return f"{len(labels)} classes"
    *others, last = map(str, labels)
    return f"classes {', '.join(others)} and {last}" if others else f"class {last}"


def images(number: float, one: str, many: str) -> str:
    """Return so many training images as the subject of a verb, which is `one` after a single image, else `many`."""
    return f"{number:.0f} training image {one}" if number == 1 else f"{number:.0f} training images {many}"


def diagnose(
    optimum: Optimum,
    gap: GapShares,
    mean_norms_sq: ArrayLike,
    *,
    epochs: ArrayLike = (),
    gaps: ArrayLike = (),
    learning_rates: ArrayLike | None = None,
    accuracies: ArrayLike | None = None,
    zero_samples: ArrayLike | None = None,
    penalty_scale: float = 1.0,
    penalty_lr: float = 1.0,
    training_gap: float = math.nan,
    steps: int | None = None,
    batch_norm: bool = False,
    least_images: float = math.inf,
    precision: str = "fp32",
    NC0: float = math.nan,
) -> Diagnosis:
    """Return which classes died, the largest share of the gap, the likeliest cause, and the course of the gap.

    optimum: to compare with. gap: the network's `GapShares`. mean_norms_sq: |mu_k|^2 (K,). What follows is optional;
    a cause is only named if what was measured tells it apart from the others.

    epochs, gaps, learning_rates: of the measurements so far (E,), see `convergence`. accuracies: of the classes on the
    training set (K,), in percent. zero_samples: samples of each class whose features are all zero (K,). penalty_scale:
    factor of the penalties in the last epoch. penalty_lr: learning rate, over its largest, in the first epoch after
    which the penalties stay the same. training_gap: F / F* - 1 of the objective as training saw it, with the statistics
    of its batches. steps: optimizer steps so far. batch_norm: the model has BatchNorm. least_images: images
    of the rarest class in a batch, on average. precision: of the network's body. NC0: |sum_k w_k| / |W|.

    Raises ValueError for mean_norms_sq of another shape than (K,).

    Example:
        >>> import torch
        >>> from nc_theory import UFM, diagnose, gap_shares, solve
        >>> optimum = solve(UFM([10, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> weight, means = optimum.head(8), optimum.features(8)
        >>> means[0] = 0.0  # a class that died
        >>> losses = torch.nn.functional.cross_entropy(means @ weight.T, torch.arange(3), reduction="none")
        >>> gap = gap_shares(optimum, weight, means, losses, within_sums=[0, 0, 0])
        >>> diagnosis = diagnose(optimum, gap, means.square().sum(1))
        >>> diagnosis.died, diagnosis.share, diagnosis.classes, diagnosis.cause
        ((0,), 'margins', (0,), 'class 0 died')
        >>> diagnosis.lines()[1]
        'class 0 (n_k = 10) died: at the optimum |mu_k|^2 = 8.64, and only up to n_k = 0.0975 collapse'
    """
    norms, counts = array_of(mean_norms_sq), optimum.problem.counts.numpy()
    if norms.shape != counts.shape:
        raise ValueError(f"mean_norms_sq has shape {norms.shape}, wanted {counts.shape}, one number for each class")
    expected, collapsed = optimum.mean_norms_sq.numpy(), optimum.collapsed.numpy()
    zero = norms <= DEAD * np.where(collapsed, expected.max(), expected)
    died = np.flatnonzero(zero & ~collapsed).tolist()
    shares = {name: np.nan_to_num(array_of(getattr(gap, name))) for name in SHARES}
    share = max(shares, key=lambda name: shares[name].sum())
    parts = shares[share]
    if share == "means":
        parts = np.triu(parts + parts.T - np.diag(parts.diagonal()))
    classes = sorted({int(label) for label in np.unravel_index(parts.argmax(), parts.shape)})
    course = convergence(epochs, gaps, learning_rates)
    relative = gap.columns()["optimality_gap"]

    def cause() -> str | None:
        if penalty_scale != 1:
            return f"the penalties are at {penalty_scale:.3g} times their final strength: their schedule has not ended"
        nothing = zero | collapsed  # classes whose images are at zero, or get there, and have no largest logit
        alone = np.zeros(len(counts)) if zero_samples is None else np.where(nothing, 0, array_of(zero_samples))
        if alone.any():
            have = images(alone.sum(), "has", "have")
            return f"{have} features that are all zero, most in class {alone.argmax()}"
        if accuracies is not None:
            missed = np.where(nothing, 0, np.rint((100 - array_of(accuracies)) / 100 * counts))
            if missed.any():
                return (
                    f"{images(missed.sum(), 'is', 'are')} misclassified, most in class {missed.argmax()}: too few "
                    "steps, too small a network, or a learning rate that is too small or too large"
                )
        if not relative > REACHED:
            return None
        if batch_norm and training_gap < relative / 2:
            rest = max(training_gap, 0.0)
            return (
                f"BatchNorm's running averages: with the statistics of its batches, training was {rest:.1e} above the "
                "optimum (see --bn_statistics)"
            )
        if course is None or (course.flat_since is None and not course.lr_at_zero):
            return None if course is None else "too few epochs so far: the gap still changes"
        if course.stopped_by_lr:
            after = "" if steps is None else f", after {steps:,} steps"
            if penalty_lr < LOW_LR:
                return (
                    "the penalties reached their final strength too late, when the learning rate was at "
                    f"{penalty_lr:.0%} of its largest (see --penalty_warmup_epochs)"
                )
            return f"too few steps: the learning rate reached zero while the gap still fell{after}"
        if batch_norm and least_images < 2:
            return f"batches have {least_images:.1f} images of the rarest class, on whose statistics BatchNorm depends"
        if precision == "bf16":
            return "bf16: features rounded to three digits"
        symmetric = optimum.problem.loss == "CrossEntropy" and not optimum.problem.variant.logit_scaling
        if symmetric and NC0 > UNBALANCED:
            return f"NC0 is {NC0:.2g}, which no stationary point of the objective has: weight decay in the optimizer?"
        if course.flat_since is not None and course.relative_lr > LOW_LR:
            return (
                f"the learning rate is still {course.relative_lr:.0%} of its largest: the noise of such steps can keep "
                "the gap where it is (see --decay_type cosine)"
            )
        return None

    named_cause = cause()
    if died:
        part = shares["margins"][died].sum() / max(gap.total, np.finfo(float).tiny)  # what their loss at zero costs
        rest = f", which is {part:.0%} of the gap; {named_cause}" if named_cause and part < 0.5 else ""
        named_cause = f"{named(died)} died{rest}"
    zeros = tuple(np.flatnonzero(zero).tolist())
    return Diagnosis(optimum, gap, zeros, tuple(died), share, tuple(classes), named_cause, course)
