"""The optimum of the unconstrained features model, for any class counts, penalties and loss.

>>> from nc_theory import UFM, LossVariant, solve
>>> optimum = solve(UFM(class_counts=[100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
>>> optimum.margins, optimum.gap
(tensor([4.3776, 4.7315, 4.9375], dtype=torch.float64), 0.0)
>>> optimum = solve(UFM([100, 200, 300], 5e-3, 5e-5, variant=LossVariant(logit_adjustment=1.0)))
>>> optimum.certified
True
"""

__version__ = "1.0.0"

from collections.abc import Callable

from nc_theory.by_class import solve_by_class
from nc_theory.certificate import lower_bound
from nc_theory.closed_form import (
    class_curve,
    closed_form,
    collapse_count,
    collapse_products,
    collapse_threshold,
    has_released_formula,
    released_formula,
    suggest_collapse,
    suggest_lambdas,
)
from nc_theory.copositive import polar
from nc_theory.diagnosis import Convergence, Diagnosis, convergence, diagnose
from nc_theory.duality import FocalLoss, dual_bound
from nc_theory.gap import GAP_COLUMNS, SHARES, GapBounds, GapShares, gap_bounds, gap_shares
from nc_theory.geometries import seli, simplex_etf
from nc_theory.losses import LossVariant, VariantLoss
from nc_theory.numerical import Minimum, solve_numerically
from nc_theory.problem import (
    CERTIFIED,
    LOSSES,
    UFM,
    Optimum,
    class_margins,
    random_frame,
    self_duality,
    validate_counts,
)

__all__ = [
    "CERTIFIED",
    "GAP_COLUMNS",
    "LOSSES",
    "MOST_CLASSES",
    "SHARES",
    "UFM",
    "Convergence",
    "Diagnosis",
    "FocalLoss",
    "GapBounds",
    "GapShares",
    "LossVariant",
    "Minimum",
    "Optimum",
    "VariantLoss",
    "class_curve",
    "class_margins",
    "closed_form",
    "collapse_count",
    "collapse_products",
    "collapse_threshold",
    "convergence",
    "diagnose",
    "dual_bound",
    "gap_bounds",
    "gap_shares",
    "has_released_formula",
    "lower_bound",
    "polar",
    "random_frame",
    "released_formula",
    "self_duality",
    "seli",
    "simplex_etf",
    "solve",
    "solve_numerically",
    "split_optimum",
    "suggest_collapse",
    "suggest_lambdas",
    "validate_counts",
]


MOST_CLASSES = 200  # beyond which direct minimisation takes too long for a problem that nearly splits by class
SPLIT = 1e-9  # largest gap of the class-by-class solution at which the problem counts as split


def solve(problem: UFM, report: Callable[[str], object] | None = None) -> Optimum:
    """Return the Optimum of a UFM; its `gap` tells how close to the minimum it is proved to be.

    It is found in closed form or class by class where the problem splits, else by direct minimisation, which calls
    `report` after each round with what was reached, in words.

    Example:
        >>> from nc_theory import UFM, solve
        >>> optimum = solve(UFM([100, 200, 300], lambda_w=5e-3, lambda_h=5e-5))
        >>> optimum.method, optimum.certified
        ('closed form', True)
    """
    return split_optimum(problem) or solve_numerically(problem, report=report).optimum


def split_optimum(problem: UFM) -> Optimum | None:
    """Return the Optimum of a UFM that splits by class, without direct minimisation, or None if it does not split.

    Beyond MOST_CLASSES classes, the result for MSE, or for the cross entropy without a bias, with ReLU is the best with
    orthogonal features, even if features share directions at the minimum. Its `gap` is then large.

    Example:
        >>> from nc_theory import UFM, split_optimum
        >>> split_optimum(UFM([100, 200, 300], 5e-3, 5e-5)).method
        'closed form'
        >>> split_optimum(UFM([100, 200, 300], 5e-3, 5e-5, bias=True)) is None
        True
    """
    optimum = closed_form(problem)
    if optimum is None and problem.relu and (problem.loss == "MSE" or not problem.bias):
        optimum = solve_by_class(problem)
        if not abs(optimum.gap) <= SPLIT and problem.num_classes <= MOST_CLASSES:
            return None
    return optimum
