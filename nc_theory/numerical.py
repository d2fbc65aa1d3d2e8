"""Direct minimisation of (UFM) in float64, for problems without a closed form and to check the closed forms."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import Bounds, OptimizeResult, minimize

from nc_theory.certificate import lower_bound
from nc_theory.losses import losses_and_gradients
from nc_theory.problem import UFM, Optimum, class_margins

RERUNS = 10  # of L-BFGS-B, each from the last result
KICK = 1e-2  # length of a step away from zero, in scaled variables
UNUSED = 1e-6  # of the largest feature: no feature goes further in a direction that is not used
DEAD = 1e-4  # features shorter than this, in scaled variables, are at zero


@dataclass(frozen=True, eq=False)
class Minimum:
    """The result of `solve_numerically`, and what shows how far it can be trusted.

    Example:
        >>> from nc_theory import UFM, solve_numerically
        >>> minimum = solve_numerically(UFM([10, 20], lambda_w=1e-2, lambda_h=1e-3), starts=2)
        >>> len(minimum.losses), minimum.within_class_spread
        (2, 0.0)
    """

    optimum: Optimum
    losses: list[float]  # value of (UFM) at the end of each start, the best first
    within_class_spread: float  # max_i |h_i - h_{y_i}| / max_i |h_i|: 0 by construction at level "class"


def solve_numerically(
    problem: UFM,
    *,
    dim: int | None = None,
    level: Literal["class", "sample"] = "class",
    starts: int = 4,
    seed: int = 0,
) -> Minimum:
    """Minimise a UFM in float64 with L-BFGS-B from random starts, and return a `Minimum`.

    Every other start gives each class a feature of its own; from the others, a class may never leave zero. The
    variants of the cross entropy stop at the first start whose result is certified to be the minimum.

    dim: the number of features d. Default: K, and 2K for the variants, where features share directions and d = K has
    other local minima. level: "class" has one feature per class, weighted n_k/N, since features collapse at a minimum;
    "sample" leaves all N features free. starts: the number of starts. seed: of the starts.

    Raises ValueError for d < K, and for counts that are not whole numbers at level "sample".

    With W = sqrt(c / lambda_W) V and h_j = sqrt(c / (lambda_H m_j)) u_j, where h_j stands for m_j samples, both
    penalties are (c/2) |.|^2. The problem divided by c is then well scaled for any lambdas.

    Example:
        >>> from nc_theory import UFM, closed_form, solve_numerically
        >>> problem = UFM([10, 20], lambda_w=1e-2, lambda_h=1e-3)
        >>> minimum = solve_numerically(problem, starts=2)
        >>> f"{minimum.optimum.loss:.6f} {closed_form(problem).loss:.6f}"
        '0.086163 0.086163'
    """
    num_classes, counts = problem.num_classes, problem.counts.numpy()
    plain = problem.variant.is_plain
    if dim is None:
        dim = num_classes if plain else 2 * num_classes
    if dim < num_classes:
        raise ValueError(f"the theory needs as many features as classes: d = {dim} < K = {num_classes}")
    if level == "class":
        labels, multiplicity = np.arange(num_classes), counts
    elif (counts == counts.round()).all():
        labels = np.repeat(np.arange(num_classes), counts.astype(int))
        multiplicity = np.ones(len(labels))
    else:
        raise ValueError("level sample needs whole class counts")
    scaled = ScaledProblem(problem, labels, multiplicity, dim)
    random = np.random.default_rng(seed)
    ends = []
    for start in range(starts):
        ends.append(scaled.solve(random, apart=start % 2 == 0))
        ends.sort(key=lambda end: end.fun)
        if not plain and scaled.optimum(ends[0]).certified:
            break
    return Minimum(
        optimum=scaled.optimum(ends[0]),
        losses=[end.fun * scaled.cost for end in ends],
        within_class_spread=scaled.within_class_spread(ends[0]),
    )


class ScaledProblem:
    """(UFM) in the scaled variables (V, U, b) of `solve_numerically`, divided by c, with its gradient, for SciPy.

    labels, multiplicity: (S,) class of each feature, and the number of samples that it stands for.
    """

    def __init__(self, problem: UFM, labels: np.ndarray, multiplicity: np.ndarray, dim: int) -> None:
        counts = problem.counts.numpy()
        self.problem, self.labels = problem, labels
        self.shapes = (len(counts), dim), (len(labels), dim)
        root_w, root_h = math.sqrt(problem.lambda_w), math.sqrt(problem.lambda_h)
        self.cost = root_w * root_h * math.exp(0.5 * np.log(counts).mean())  # c
        self.head_scale = math.sqrt(self.cost) / root_w
        self.feature_scale = math.sqrt(self.cost) / (root_h * np.sqrt(multiplicity))
        self.logit_scale = self.head_scale * self.feature_scale
        self.weight = multiplicity / counts.sum() / self.cost
        self.class_share = multiplicity / counts[labels]
        self.bias_decay = problem.bias_decay / self.cost

    def split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return V (K, d), U (S, d) and b (K,) of a flat vector, as views (b: zeros if there is no bias)."""
        (num_classes, dim), (samples, _) = self.shapes
        head, features, bias = np.split(x, [num_classes * dim, (num_classes + samples) * dim])
        return (
            head.reshape(num_classes, dim),
            features.reshape(samples, dim),
            bias if self.problem.bias else np.zeros(num_classes),
        )

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value of the scaled problem at a flat vector, and its gradient."""
        head, features, bias = self.split(x)
        logits = features @ head.T * self.logit_scale[:, None] + bias
        losses, gradients = losses_and_gradients(self.problem, logits, self.labels)
        value = self.weight @ losses + 0.5 * np.square(head).sum() + 0.5 * np.square(features).sum()
        value += 0.5 * self.bias_decay * np.square(bias).sum()
        pull = gradients * self.weight[:, None]
        scaled = pull * self.logit_scale[:, None]
        parts = [(scaled.T @ features + head).ravel(), (scaled @ head + features).ravel()]
        if self.problem.bias:
            parts.append(pull.sum(0) + self.bias_decay * bias)
        return value, np.concatenate(parts)

    def solve(self, random: np.random.Generator, apart: bool) -> OptimizeResult:
        """Run L-BFGS-B from a random start, and return SciPy's result with its `projected_gradient`.

        apart: start with a feature of its own for each class.

        The minimiser is run again from its last result as long as the value falls, for two reasons. A line search that
        fails on rounding ends a run early, which cleared memory repairs. And zero is a critical point for a feature,
        even if it is not zero at the minimum, so that features at zero are kicked away from it.
        """
        head, features = (random.standard_normal(shape) for shape in self.shapes)
        if self.problem.relu:
            features = np.abs(features)
        if apart:
            features = 0.1 * features + 2 * np.eye(features.shape[1])[self.labels]
        x = np.concatenate([head.ravel(), features.ravel(), np.zeros(len(head) if self.problem.bias else 0)])
        low = np.full(len(x), -np.inf)
        if self.problem.relu:
            low[head.size : head.size + features.size] = 0.0
        options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 30, "ftol": 0.0, "gtol": 1e-11}
        bounds = Bounds(low, np.inf)

        def minimum_from(x: np.ndarray) -> OptimizeResult:
            return minimize(self.value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

        best = minimum_from(x)
        for _ in range(RERUNS - 1):
            end = minimum_from(self.kick(best.x))
            if not end.fun < best.fun * (1 - 1e-15):
                break
            best = end
        x = best.x
        gradient = self.value_and_gradient(x)[1]
        best.projected_gradient = float(np.abs(x - np.maximum(x - gradient, low)).max())
        return best

    def kick(self, x: np.ndarray) -> np.ndarray:
        """Return x with the classes that are at zero moved away from it, each in a direction that no other class uses.

        With ReLU there may be no such direction, because orthogonal features that share no axis can still use up all
        axes. Each class is therefore turned onto an axis of its own first, which at the optimum changes neither W H
        nor any norm. This does not hold for the variants, where features share directions: there the directions are
        the axes that are used least.
        """
        x = x.copy()
        head, features, bias = self.split(x)  # views of x
        norms = np.linalg.norm(features, axis=1)
        dead = norms < DEAD
        if self.problem.relu and not self.problem.variant.is_plain:
            directions = np.eye(head.shape[1])[np.argsort(features.sum(0))]
        elif self.problem.relu:
            units = np.array([features[self.labels == label].sum(0) for label in range(len(head))])
            lengths = np.linalg.norm(units, axis=1, keepdims=True)
            units /= np.where(lengths < DEAD, np.inf, lengths)  # the direction of a class at zero is rounding
            columns = head @ units.T
            head[:], features[:] = 0, 0
            head[:, : len(head)] = columns
            features[np.arange(len(features)), self.labels] = norms
            directions = np.eye(*head.shape)[np.unique(self.labels[dead])]
        else:
            directions = np.linalg.svd(features)[2][::-1]  # the unused directions and the least used ones first
        gradients = losses_and_gradients(self.problem, np.tile(bias, (len(features), 1)), self.labels)[1]
        for number, label in enumerate(np.unique(self.labels[dead])):
            own, direction = dead & (self.labels == label), directions[number]
            features[own] = KICK * direction
            fall = -gradients[own][0]  # where the loss falls fastest from zero
            head += KICK * np.outer(fall / np.linalg.norm(fall), direction)
        return x

    def class_means(self, features: np.ndarray) -> np.ndarray:
        """Return the class means (K, d), unscaled, of scaled features (S, d)."""
        means = np.zeros(self.shapes[0])
        np.add.at(means, self.labels, features * self.feature_scale[:, None] * self.class_share[:, None])
        return means

    def within_class_spread(self, end: OptimizeResult) -> float:
        """Return max_i |h_i - h_{y_i}| / max_i |h_i| at a result of `solve`."""
        features = self.split(end.x)[1]
        means, features = self.class_means(features), features * self.feature_scale[:, None]
        largest = np.linalg.norm(features, axis=1).max()
        return float(np.linalg.norm(features - means[self.labels], axis=1).max() / largest) if largest > 0 else 0.0

    def optimum(self, end: OptimizeResult) -> Optimum:
        """Return the Optimum at a result of `solve`."""
        head, features, bias = self.split(end.x)
        parts = head * self.head_scale, self.class_means(features), bias
        weight, means, offset = (torch.from_numpy(np.array(part)) for part in parts)
        gram, logits = means @ means.T, weight @ means.T
        return Optimum(
            problem=self.problem,
            margins=class_margins(logits),
            mean_norms_sq=gram.diag(),
            HTH=gram,
            WWT=weight @ weight.T,
            WH=logits,
            bias=offset,
            # Singular values of the class means below DEAD times the largest are zero up to the minimiser's error
            duality=logits @ torch.linalg.pinv(gram, rtol=DEAD**2, hermitian=True),
            loss=float(end.fun * self.cost),
            method="numerical",
            projected_gradient=end.projected_gradient,
            lower_bound=lower_bound(self.problem, logits, offset),
            factors=used_directions(weight, means, self.problem.relu),
        )


def used_directions(weight: torch.Tensor, means: torch.Tensor, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a head W (K, d) and class means (K, d) in the r <= d directions that the means use, both (K, r).

    With ReLU the directions are axes, so that the means stay non-negative; without it, they are orthonormal.
    """
    if relu:
        used = (means > UNUSED * means.norm(dim=1).max()).any(0)
        return weight[:, used], means[:, used]
    _, singular, directions = torch.linalg.svd(means, full_matrices=False)
    basis = directions[singular > UNUSED * singular[0]].T
    return weight @ basis, means @ basis
