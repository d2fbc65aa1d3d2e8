"""What the measurements of a run are compared with: a theory, the problem it stands for, and its optimum."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from nc_theory import UFM, closed_form, collapse_count, has_released_formula, released_formula, solve
from utils import Progress

MANY = 50  # classes from which on finding an optimum by minimisation takes seconds
THEORIES = ("objective", "nominal", "released")


@dataclass(frozen=True)
class Comparison:
    """The optimum that a run is compared with.

    problems: {objective, nominal: the fields of a `nc_theory.UFM`, or a sentence that says why there is none}, as
    `objective.Objective.problems` returns them and config.json records them. theory: one of THEORIES. data_factor: the
    factor of the data term in the training objective.
    """

    problems: dict
    theory: str = "objective"
    data_factor: float = 1.0

    @property
    def entry(self):
        return self.problems.get("objective" if self.theory == "objective" else "nominal")

    @property
    def problem(self):
        """The `nc_theory.UFM` whose optimum the run is compared with, or None (see `no_optimum`)."""
        return UFM(**self.entry) if isinstance(self.entry, dict) and self.no_optimum is None else None

    @property
    def no_optimum(self):
        """One sentence on why there is no optimum to compare with; None if there is one."""
        if self.theory == "released" and isinstance(self.entry, dict) and not has_released_formula(UFM(**self.entry)):
            return "the released formula is for the cross entropy with ReLU features only"
        return self.entry if isinstance(self.entry, str) else None

    @cached_property
    def optimum(self):
        """The `nc_theory.Optimum` that the run is compared with, or None."""
        if self.problem is None:
            return None
        return released_formula(self.problem) if self.theory == "released" else solved(self.problem)

    @property
    def least_loss(self):
        """The least value of the training objective, or None if it is not known."""
        if self.theory != "objective" or self.optimum is None:
            return None
        return self.optimum.loss * self.data_factor

    def least_loss_at(self, scale):
        """Return the least value of the objective with penalties `scale` times as strong; NaN where it is not known."""
        if scale == 1:
            return self.least_loss
        if not scale > 0:
            return math.nan  # without penalties the loss has no minimum
        lambdas = {name: scale * getattr(self.problem, name) for name in ("lambda_w", "lambda_h")}
        optimum = closed_form(replace(self.problem, **lambdas))
        return math.nan if optimum is None else optimum.loss * self.data_factor

    def summary(self):
        """Return the theory's predictions in one line; without a closed form, only say that it takes minimisation."""
        if self.problem is None:
            return self.no_optimum
        if not self.problem.unique:
            return "the minimisers form a line, along which W H + b is constant: only the optimality gap is measured"
        if (optimum := closed_form(self.problem)) is None:
            return "no closed form: measuring finds the optimum by minimisation"
        collapsed = (optimum.mean_norms_sq == 0).nonzero().flatten().tolist()
        named = f"classes {', '.join(map(str, collapsed))}" if len(collapsed) <= 20 else f"{len(collapsed)} classes"
        classes = f"{named} collapse to zero" if collapsed else "no class collapses"
        if (threshold := collapse_count(self.problem)) is not None:
            classes += f", the threshold is n_k = {threshold:.3g}"
        least, low, high = optimum.loss * self.data_factor, optimum.margins.min(), optimum.margins.max()
        return f"least loss {least:.6f}; margins {low:.3f} to {high:.3f}; {classes}"


@lru_cache(maxsize=16)
def solved(problem):
    """Return the optimum of a problem; runs of many seeds share it."""
    if problem.num_classes < MANY:
        return solve(problem)
    with Progress(None, "optimum: round") as progress:
        return solve(problem, progress.step)
