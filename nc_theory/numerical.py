"""Direct minimisation of (UFM) in float64, for problems without a closed form and to check the closed forms.

A stationary point is the global minimum if polar(G) <= sqrt(lambda_W lambda_H) for the matrix G of `lower_bound`.
Otherwise some v has a larger |G v|, and one more feature coordinate along v, with a column G v of the head, lowers the
loss: an escape from any stationary point that is not the global minimum. Minimisation and escapes alternate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import Bounds, OptimizeResult, minimize
from scipy.sparse.linalg import LinearOperator, minres

from nc_theory.certificate import best_bias, certify
from nc_theory.copositive import local_maxima
from nc_theory.losses import losses_and_gradients
from nc_theory.problem import UFM, Optimum, class_margins

ROUNDS = 100  # of minimisation and escapes
SHORT, LONG = 200, 20_000  # steps of L-BFGS-B: as long as there are directions with |G v| > 1 + COARSE, and then
COARSE = 1e-2
MEMORY, LEAST_MEMORY = 30, 5  # steps that L-BFGS-B remembers; its own time grows with their square, so that
MEMORY_ENTRIES = 150_000  # in large problems it remembers no more than this over the number of variables
FALL = 1e-14  # relative fall of the value in a round below which no more rounds follow
NEWTON_STEPS, KRYLOV_STEPS = 5, 300
DIFFERENCE = 1e-6  # relative to the point
ESCAPE = 1e-9  # a direction with |G v| > 1 + ESCAPE, in scaled variables, leads down
ALIKE = 0.9  # cosine of two directions of escape from which on the second is left out
FIRST_STEP, HALVINGS = 2.0, 30  # of the step along the directions of escape
UNUSED = 1e-6  # of the largest feature: no feature goes further in a direction that is not used
ZERO = 1e-6  # of the largest length: a shorter feature is zero
DEPENDENT = 1e-12  # eigenvalue of the Gram matrix of normalised rank-one terms at which one of them can go


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
    starts: int = 1,
    seed: int = 0,
    report: Callable[[str], object] | None = None,
) -> Minimum:
    """Minimise a UFM in float64 with L-BFGS-B and escapes from stationary points, and return a `Minimum`.

    dim: the largest number of features d; default: as many as the optimum needs. With fewer than that, the lower bound
    cannot be reached, and minima may be local. level: "class" has one feature per class, weighted n_k/N, since features
    collapse at a minimum; "sample" leaves all N features free. starts: the number of starts: the first is at zero
    features, except at level "sample", and the others are random, with K features. seed: of the starts. report: called
    after each round with what was reached, in words: for 100 classes that share directions there are about ten rounds
    of a second each.

    Raises ValueError for depth_linear > 1, and for counts that are not whole numbers at level "sample".

    With W = sqrt(c / lambda_W) V and h_j = sqrt(c / (lambda_H m_j)) u_j, where h_j stands for m_j samples, both
    penalties are (c/2) |.|^2. The problem divided by c is then well scaled for any lambdas.

    Example:
        >>> from nc_theory import UFM, closed_form, solve_numerically
        >>> problem = UFM([10, 20], lambda_w=1e-2, lambda_h=1e-3)
        >>> minimum = solve_numerically(problem)
        >>> f"{minimum.optimum.loss:.6f} {closed_form(problem).loss:.6f}"
        '0.086163 0.086163'
    """
    counts = problem.counts.numpy()
    if problem.depth_linear > 1:
        raise ValueError("direct minimisation is for depth_linear = 1")
    if level == "class":
        labels, multiplicity = np.arange(len(counts)), counts
    elif (counts == counts.round()).all():
        labels = np.repeat(np.arange(len(counts)), counts.astype(int))
        multiplicity = np.ones(len(labels))
    else:
        raise ValueError("level sample needs whole class counts")
    scaled = ScaledProblem(problem, labels, multiplicity, dim)
    random = np.random.default_rng(seed)
    ends = []
    for start in range(starts):
        at_zero = start == 0 and level == "class"
        ends.append(scaled.solve(scaled.zero() if at_zero else scaled.random_point(random), report))
    ends.sort(key=lambda end: end.fun)
    return Minimum(
        optimum=scaled.optimum(ends[0]),
        losses=[end.fun * scaled.cost for end in ends],
        within_class_spread=scaled.within_class_spread(ends[0]),
    )


class ScaledProblem:
    """(UFM) in the scaled variables (V, U, b) of `solve_numerically`, divided by c, with its gradient, for SciPy.

    labels, multiplicity: (S,) class of each feature, and the number of samples that it stands for. dim: the largest
    number of features, or None. A point is a flat vector, from which the number of its features follows.
    """

    def __init__(self, problem: UFM, labels: np.ndarray, multiplicity: np.ndarray, dim: int | None) -> None:
        counts = problem.counts.numpy()
        self.problem, self.labels, self.dim = problem, labels, dim
        root_w, root_h = math.sqrt(problem.lambda_w), math.sqrt(problem.lambda_h)
        self.cost = root_w * root_h * math.exp(0.5 * np.log(counts).mean())  # c
        self.head_scale = math.sqrt(self.cost) / root_w
        self.feature_scale = math.sqrt(self.cost) / (root_h * np.sqrt(multiplicity))
        self.logit_scale = self.head_scale * self.feature_scale
        self.weight = multiplicity / counts.sum() / self.cost
        self.class_share = multiplicity / counts[labels]
        self.bias_decay = problem.bias_decay / self.cost

    def split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return V (K, d), U (S, d) and b (K,) of a point, as views (b: zeros if there is no bias)."""
        rows, samples = self.problem.num_classes, len(self.labels)
        dim = len(x) // (rows + samples) if not self.problem.bias else (len(x) - rows) // (rows + samples)
        head, features, bias = np.split(x, [rows * dim, (rows + samples) * dim])
        return head.reshape(rows, dim), features.reshape(samples, dim), bias if self.problem.bias else np.zeros(rows)

    def join(self, head: np.ndarray, features: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Return the point of V, U and b, the reverse of `split`."""
        return np.concatenate([head.ravel(), features.ravel(), bias if self.problem.bias else []])

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value of the scaled problem at a point, and its gradient."""
        head, features, bias = self.split(x)
        logits = features @ head.T * self.logit_scale[:, None] + bias
        losses, gradients = losses_and_gradients(self.problem, logits, self.labels)
        value = self.weight @ losses + 0.5 * np.square(head).sum() + 0.5 * np.square(features).sum()
        value += 0.5 * self.bias_decay * np.square(bias).sum()
        pull = gradients * self.weight[:, None]
        scaled = pull * self.logit_scale[:, None]
        return value, self.join(
            scaled.T @ features + head, scaled @ head + features, pull.sum(0) + self.bias_decay * bias
        )

    # -----------------------------------------------------------------------------------------------------
    # Starts, minimisation and escapes
    # -----------------------------------------------------------------------------------------------------

    def zero(self) -> np.ndarray:
        """Return the point without features, at the best bias."""
        rows = self.problem.num_classes
        bias = np.zeros(rows)
        if self.problem.bias:
            bias = best_bias(self.problem, np.zeros((len(self.problem.class_counts), rows)), bias)
        return self.join(np.zeros((rows, 0)), np.zeros((len(self.labels), 0)), bias)

    def random_point(self, random: np.random.Generator) -> np.ndarray:
        """Return a random point with K features, or `dim` if that is fewer."""
        rows = self.problem.num_classes
        dim = min(rows, self.dim or rows)
        head, features = (random.standard_normal((count, dim)) for count in (rows, len(self.labels)))
        return self.join(head, np.abs(features) if self.problem.relu else features, np.zeros(rows))

    def solve(self, x: np.ndarray, report: Callable[[str], object] | None = None) -> OptimizeResult:
        """Alternate between escapes and minimisation from a point, and return SciPy's result.

        `fun` and `x` are of the result without features that are zero up to rounding, `projected_gradient` is theirs.
        """
        value, short = math.inf, True
        for _ in range(ROUNDS):
            if self.split(x)[0].size:
                x = self.reduced(self.minimum_from(x, SHORT if short else LONG))
                if not short and self.split(x)[0].size:  # else no feature is left
                    x = self.polished(self.minimum_from(x, LONG))
            fell = value - (end_value := self.value_and_gradient(x)[0])
            value = min(value, end_value)
            if report:
                report(f"minimising, loss {value * self.cost:.8g} with {self.split(x)[0].shape[1]} features")
            moved = self.escaped(x, COARSE if short else ESCAPE) if fell > FALL * value else x
            if moved is not x:
                x = moved
            elif short:
                short, value = False, math.inf
            else:
                break
        x = self.without_zeros(x)
        value, gradient = self.value_and_gradient(x)
        return OptimizeResult(x=x, fun=value, projected_gradient=largest_slack(x, gradient, self.lower_limits(x)))

    def lower_limits(self, x: np.ndarray) -> np.ndarray:
        """Return the least value of each variable of a point."""
        head, features, bias = self.split(x)
        least = 0.0 if self.problem.relu else -math.inf
        return self.join(np.full_like(head, -math.inf), np.full_like(features, least), np.full_like(bias, -math.inf))

    def minimum_from(self, x: np.ndarray, steps: int) -> np.ndarray:
        """Return the end of L-BFGS-B from a point, after at most so many steps."""
        memory = min(MEMORY, max(LEAST_MEMORY, MEMORY_ENTRIES // len(x)))
        options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": memory, "ftol": 0.0, "gtol": 1e-12}
        bounds = Bounds(self.lower_limits(x), math.inf)
        return minimize(self.value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x

    def polished(self, x: np.ndarray) -> np.ndarray:
        """Return the end of Newton's method from a point near a minimum, where rounding of the value stops L-BFGS-B.

        Variables at their limits stay there. Steps are solved for by MINRES, since the Hessian is singular where the
        frame of the features can turn, with central differences of the gradient.
        """
        limits = self.lower_limits(x)
        gradient = self.value_and_gradient(x)[1]
        slack = largest_slack(x, gradient, limits)
        for _ in range(NEWTON_STEPS):
            free = (x > limits) | (gradient < 0)

            def curvature(vector: np.ndarray, x: np.ndarray = x, free: np.ndarray = free) -> np.ndarray:
                step = np.zeros_like(x)
                step[free] = DIFFERENCE * np.linalg.norm(x) * vector / max(np.linalg.norm(vector), 1e-300)
                change = self.value_and_gradient(x + step)[1] - self.value_and_gradient(x - step)[1]
                return change[free] * np.linalg.norm(vector) / (2 * DIFFERENCE * np.linalg.norm(x))

            size = np.count_nonzero(free)
            hessian = LinearOperator((size, size), matvec=curvature, dtype=np.float64)
            moved = x.copy()
            moved[free] += minres(hessian, -gradient[free], rtol=1e-4, maxiter=KRYLOV_STEPS)[0]
            moved = np.maximum(moved, limits)
            new_gradient = self.value_and_gradient(moved)[1]
            new_slack = largest_slack(moved, new_gradient, limits)
            if not new_slack < slack / 2:
                break
            x, gradient, slack = moved, new_gradient, new_slack
        return x

    def dual_matrix(self, x: np.ndarray) -> np.ndarray:
        """Return G / sqrt(lambda_W lambda_H) (K, C) of `lower_bound`, at the class means of a point."""
        head, features, bias = self.split(x)
        logits = self.class_means(features) @ (head * self.head_scale).T + bias
        counts = self.problem.counts.numpy()
        gradients = losses_and_gradients(self.problem, logits, np.arange(len(counts)))[1]
        lam = math.sqrt(self.problem.lambda_w) * math.sqrt(self.problem.lambda_h)
        return -(gradients * (np.sqrt(counts) / (counts.sum() * lam))[:, None]).T

    def escaped(self, x: np.ndarray, excess: float) -> np.ndarray:
        """Return a point with a lower value and more features, or x itself if |G v| <= 1 + excess for each v found."""
        head, features, bias = self.split(x)
        matrix = self.dual_matrix(x)
        if self.problem.relu:
            values, directions = local_maxima(matrix.T @ matrix)
        else:
            values, directions = np.linalg.eigh(matrix.T @ matrix)
        chosen: list[int] = []
        for number in np.argsort(-values):
            direction = directions[:, number]
            if values[number] <= (1 + excess) ** 2 or (self.dim and head.shape[1] + len(chosen) == self.dim):
                break
            if all(direction @ directions[:, other] < ALIKE for other in chosen):
                chosen.append(number)
        if not chosen:
            return x
        columns = matrix @ directions[:, chosen]
        columns /= np.linalg.norm(columns, axis=0)
        rows = directions[self.labels][:, chosen] * np.sqrt(self.class_share)[:, None]
        value = self.value_and_gradient(x)[0]
        for length in FIRST_STEP * 0.5 ** np.arange(HALVINGS):
            moved = self.join(np.hstack([head, length * columns]), np.hstack([features, length * rows]), bias)
            if self.value_and_gradient(moved)[0] < value:
                return moved
        return x

    def reduced(self, x: np.ndarray) -> np.ndarray:
        """Return the point with fewer features and, at a stationary point, the same logits and penalties.

        W H is the sum over the coordinates of c_j u_j^T. Where these K x C matrices are linearly dependent, their
        weights can be changed until one of them is zero (Caratheodory), with the penalties unchanged because |c_j| and
        |u_j| are equal. Without ReLU, the coordinates are those of the singular value decomposition.
        """
        head, features, bias = self.split(x)
        if not self.problem.relu:
            _, singular, basis = np.linalg.svd(features, full_matrices=False)
            basis = basis[singular > UNUSED * singular.max(initial=0.0)].T
            return self.join(head @ basis, features @ basis, bias)
        used = (features > UNUSED * np.linalg.norm(features, axis=1).max(initial=0.0)).any(0)
        head, features = head[:, used], features[:, used]
        while features.size:
            sizes = np.linalg.norm(head, axis=0) * np.linalg.norm(features, axis=0)
            gram = (head.T @ head) * (features.T @ features) / np.outer(sizes, sizes)
            values, vectors = np.linalg.eigh(gram)
            if values[0] > DEPENDENT:
                break
            change = vectors[:, 0] / sizes
            change /= change[np.abs(change).argmax()]
            weights = np.maximum(1 - change, 0)
            keep = weights > DEPENDENT
            scale = np.sqrt(weights[keep])
            head, features = head[:, keep] * scale, features[:, keep] * scale
        return self.join(head, features, bias)

    def without_zeros(self, x: np.ndarray) -> np.ndarray:
        """Return the point with features shorter than ZERO times the longest set to zero."""
        head, features, bias = self.split(x)
        lengths = np.linalg.norm(features * self.feature_scale[:, None], axis=1)
        features = np.where((lengths > ZERO * lengths.max())[:, None], features, 0.0)
        return self.join(head, features, bias)

    # -----------------------------------------------------------------------------------------------------
    # Results
    # -----------------------------------------------------------------------------------------------------

    def class_means(self, features: np.ndarray) -> np.ndarray:
        """Return the class means (C, d), unscaled, of scaled features (S, d)."""
        means = np.zeros((len(self.problem.class_counts), features.shape[1]))
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
        certificate = certify(self.problem, logits, offset, gram=gram)
        return Optimum(
            problem=self.problem,
            margins=class_margins(logits, self.problem.targets.argmax(1)),
            mean_norms_sq=gram.diag(),
            HTH=gram,
            WWT=weight @ weight.T,
            WH=logits,
            bias=offset,
            # Singular values of the class means below UNUSED times the largest are zero up to the minimiser's error
            other_duality=logits @ torch.linalg.pinv(gram, rtol=UNUSED, hermitian=True),
            loss=float(end.fun * self.cost),
            method="numerical",
            projected_gradient=end.projected_gradient,
            lower_bound=certificate.bound,
            factors=(weight, means),
            certificate=certificate,
        )


def largest_slack(x: np.ndarray, gradient: np.ndarray, limits: np.ndarray) -> float:
    """Return the largest entry of the projected gradient at x, for lower limits of x."""
    return float(np.abs(x - np.maximum(x - gradient, limits)).max(initial=0.0))
