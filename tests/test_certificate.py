"""Lower bounds of (UFM), what they certify, and the optimality gap of a network."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from certify import random_problem
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nc_theory import (
    LOSSES,
    MOST_CLASSES,
    UFM,
    LossVariant,
    closed_form,
    lower_bound,
    polar,
    released_formula,
    solve,
    solve_numerically,
    split_optimum,
)
from nc_theory.by_class import solve_by_class
from nc_theory.copositive import best_relaxation, largest_of_all_supports, local_maxima

SMALL = [10, 18, 33, 60, 110, 200]
REPRODUCIBLE = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
MEMBERS = {
    "plain": LossVariant(),
    "weighted": LossVariant(class_weights=1),
    "LA": LossVariant(logit_adjustment=1),
    "CDT": LossVariant(logit_scaling=0.3),
    "VS": LossVariant(logit_adjustment=1, logit_scaling=0.2),
    "LDAM": LossVariant(ldam_margin=0.5),
    "smoothed": LossVariant(label_smoothing=0.1),
    "all": LossVariant(0.5, 0.5, 0.1, 0.5, 0.05),
}


# ---------------------------------------------------------------------------------------------------------
# The bound
# ---------------------------------------------------------------------------------------------------------


def projected_power_iteration(gram, vector):
    """Return a local maximum of v^T gram v over |v| = 1, v >= 0."""
    for _ in range(300):
        vector = np.maximum(gram @ vector, 0)
        vector /= max(np.linalg.norm(vector), 1e-300)
    return vector @ gram @ vector


@pytest.mark.parametrize("num_classes", [2, 3, 6, 9])
def test_polar_is_the_maximum_over_nonnegative_vectors(num_classes):
    random = np.random.default_rng(num_classes)
    for _ in range(5):
        matrix = random.standard_normal((num_classes, num_classes))
        starts = np.vstack([random.random((50, num_classes)), np.eye(num_classes)])
        found = max(projected_power_iteration(matrix.T @ matrix, start) for start in starts)
        assert polar(matrix) == pytest.approx(math.sqrt(found), rel=1e-6)
        assert polar(matrix) >= math.sqrt(found) * (1 - 1e-12)
        assert polar(matrix, relu=False) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)


def test_polar_of_many_classes_is_a_bound_and_exact_without_positive_inner_products():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((20, 20))
    found = max(projected_power_iteration(matrix.T @ matrix, start) for start in random.random((50, 20)))
    assert math.sqrt(found) <= polar(matrix)
    centring = (np.eye(20) - 1 / 20) * random.uniform(1, 2, 20)
    assert polar(centring) == pytest.approx(np.linalg.norm(centring, axis=0).max(), rel=1e-14)


def test_polar_with_repeated_eigenvalues():
    """The maximum is reached on many supports at once; eigenvectors of a repeated eigenvalue have any sign."""
    assert polar(3 * np.eye(5)) == pytest.approx(3, rel=1e-14)
    assert polar(np.ones((4, 6))) == pytest.approx(math.sqrt(24), rel=1e-14)
    assert polar(np.zeros((3, 3))) == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, **REPRODUCIBLE)
def test_the_bound_is_never_above_the_minimum_found(seed):
    """Neither the bound from the minimiser's logits nor that from other logits, near or far."""
    random = np.random.default_rng(seed)
    problem = random_problem(random, 2, 8, relu=0.7)
    optimum = solve(problem)
    assert optimum.lower_bound <= optimum.loss * (1 + 1e-12)
    size = optimum.WH.abs().max().item() + 0.1
    for noise in (1e-6, 1e-2, 1.0, 10.0):
        logits = optimum.WH.numpy() + noise * size * random.standard_normal(optimum.WH.shape)
        assert lower_bound(problem, logits, optimum.bias) <= optimum.loss * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_random_problems_are_certified(seed):
    optimum = solve(random_problem(np.random.default_rng(seed), 2, 8, relu=0.7))
    assert optimum.certified and optimum.gap <= 1e-7


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("variant", MEMBERS.values(), ids=MEMBERS)
def test_every_member_is_certified_from_random_starts(variant, relu):
    found = solve_numerically(UFM(SMALL, 2e-3, 2e-4, relu=relu, variant=variant))
    assert found.optimum.method == "numerical" and -1e-12 < found.optimum.gap <= 1e-7
    expected = solve(found.optimum.problem)
    assert found.optimum.loss == pytest.approx(expected.loss, rel=1e-9)
    torch.testing.assert_close(found.optimum.margins, expected.margins, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias_decay", [0.0, 1e-3])
@pytest.mark.parametrize("loss, relu", [("CrossEntropy", True), ("CrossEntropy", False), ("MSE", True)])
def test_problems_with_a_bias_are_certified(loss, relu, bias_decay):
    optimum = solve(UFM([20, 30, 60, 90], 5e-3, 5e-4, loss=loss, relu=relu, bias=True, bias_decay=bias_decay))
    assert -1e-12 < optimum.gap <= 1e-7


def test_a_free_bias_takes_up_the_logit_adjustment():
    plain, adjusted = (
        solve(UFM([10, 30, 80], 5e-3, 5e-4, bias=True, variant=MEMBERS[name])) for name in ("plain", "LA")
    )
    assert adjusted.loss == pytest.approx(plain.loss, rel=1e-10) and adjusted.certified
    shift = adjusted.bias + adjusted.class_counts.log() - plain.bias
    torch.testing.assert_close(shift, shift.mean().expand(3), rtol=0, atol=1e-5)


def test_all_samples_free_collapse_to_the_class_means_that_share_directions():
    problem = UFM([3, 5, 20, 40], 2e-2, 2e-3, variant=LossVariant(logit_adjustment=2))
    assert split_optimum(problem) is None
    found = solve_numerically(problem, level="sample")
    assert found.within_class_spread < 1e-4 and found.optimum.certified
    assert found.optimum.loss == pytest.approx(solve(problem).loss, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 6, 50])
def test_the_bound_at_a_closed_form_is_its_loss(loss, num_classes):
    counts = np.linspace(3, 400, num_classes).round()
    for product in (1e-8, 1e-6, 1e-4):
        optimum = closed_form(UFM(counts, math.sqrt(product), math.sqrt(product), loss=loss))
        assert lower_bound(optimum.problem, optimum.WH) == pytest.approx(optimum.loss, rel=1e-10)
        assert optimum.gap == 0 and optimum.certified


def test_the_bound_keeps_its_digits_where_the_loss_is_tiny():
    optimum = closed_form(UFM([5, 6, 7], 1e-12, 1e-12))
    assert optimum.loss < 1e-9
    assert lower_bound(optimum.problem, optimum.WH) == pytest.approx(optimum.loss, rel=1e-9)


def test_what_is_not_the_minimum_is_not_certified():
    problem = UFM(SMALL, 2e-3, 2e-4, variant=MEMBERS["VS"])
    elsewhere = solve(UFM(SMALL, 2e-3, 2e-4))
    assert lower_bound(problem, elsewhere.WH) < 0.99 * solve(problem).loss
    released = released_formula(UFM(SMALL, 2e-3, 2e-4))
    assert not released.certified and released.gap == released.loss / elsewhere.loss - 1
    assert released_formula(UFM(SMALL, 2e-3, 2e-4, bias=True)).gap == math.inf


# ---------------------------------------------------------------------------------------------------------
# Closed forms, and problems that split by class
# ---------------------------------------------------------------------------------------------------------


def test_weighted_cross_entropy_has_its_closed_form():
    counts, lambda_w, lambda_h = np.array(SMALL), 2e-3, 2e-4
    for exponent in (0.5, 1.0, 1.7):
        weights = counts.sum() * counts**-exponent / (counts ** (1 - exponent)).sum()
        ratio = weights * np.sqrt(counts) / (counts.sum() * math.sqrt(lambda_w * lambda_h * 5 / 6))
        expected = np.log(np.maximum(5 * (ratio - 1), 1))
        optimum = solve(UFM(counts, lambda_w, lambda_h, variant=LossVariant(class_weights=exponent)))
        np.testing.assert_allclose(optimum.margins.numpy(), expected, rtol=1e-12)
        assert optimum.method == "closed form"
        assert lower_bound(optimum.problem, optimum.WH) == pytest.approx(optimum.loss, rel=1e-12)
    margins = {
        e: solve(UFM(counts, lambda_w, lambda_h, variant=LossVariant(class_weights=e))).margins for e in (0.5, 1)
    }
    assert (margins[0.5] - margins[0.5][0]).abs().max() < 1e-13 and margins[1].argmax() == 0


@pytest.mark.parametrize("variant", [LossVariant(0.8, 0, 0, 1.2, 0.2), MEMBERS["LDAM"], MEMBERS["smoothed"]], ids=str)
def test_margins_and_smoothing_have_a_closed_form(variant):
    problem = UFM([1, *SMALL], 2e-2, 2e-3, variant=variant)
    closed, found = closed_form(problem), solve_numerically(problem).optimum
    assert closed.collapsed[0].item() == (variant.class_weights == 0)  # class weights prevent its collapse
    assert not closed.collapsed.all()
    assert lower_bound(problem, closed.WH) == pytest.approx(closed.loss, rel=1e-12)
    assert found.loss == pytest.approx(closed.loss, rel=1e-10)
    for name in ("HTH", "WWT", "WH"):
        expected = getattr(closed, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_by_class_is_the_closed_form_where_there_is_one():
    for variant in (LossVariant(), LossVariant(0.8, 0, 0, 1.2, 0.2)):
        problem = UFM([1, *SMALL], 2e-2, 2e-3, variant=variant)
        closed, by_class = closed_form(problem), solve_by_class(problem)
        assert by_class.method == "class by class" and by_class.projected_gradient < 1e-6
        assert by_class.loss == pytest.approx(closed.loss, rel=1e-12) and abs(by_class.gap) < 1e-9
        for name in ("margins", "mean_norms_sq", "HTH", "WWT", "WH"):
            torch.testing.assert_close(getattr(by_class, name), getattr(closed, name), rtol=1e-6, atol=1e-6)
        kept = ~closed.collapsed
        ratio = by_class.duality[:, kept] / closed.duality[:, kept]
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5, atol=0)


def test_problems_split_by_class_where_counts_differ_little():
    problem = UFM([40, 50, 60, 70], 2e-3, 2e-4, variant=LossVariant(logit_adjustment=0.5, logit_scaling=0.1))
    split, found = split_optimum(problem), solve_numerically(problem).optimum
    assert split.method == "class by class" and split.gap < 1e-9
    assert found.loss == pytest.approx(split.loss, rel=1e-10)
    assert (split.WH.diag() > 0).all()


def test_logit_adjustment_lets_small_classes_share_directions():
    problem = UFM(SMALL, 2e-3, 2e-4, variant=MEMBERS["LA"])
    assert split_optimum(problem) is None
    optimum, apart = solve(problem), solve_by_class(problem)
    norms = optimum.mean_norms_sq.sqrt()
    cosines = optimum.HTH / norms / norms[:, None]
    assert cosines[0, 1] > 0.05 and cosines[-1, -2] < 1e-4
    assert optimum.loss < apart.loss and not apart.certified and optimum.certified


def test_a_thousand_classes_in_seconds():
    counts = np.geomspace(10, 500, 1000).round()
    start = time.process_time()
    optimum = solve(UFM(counts, 1e-5, 1e-7, variant=LossVariant(logit_scaling=0.05)))
    assert optimum.method == "class by class" and optimum.gap < 1e-9
    assert solve(UFM(counts, 1e-5, 1e-7, variant=LossVariant(1, 0, 0, 0.5, 0.1))).method == "closed form"
    assert time.process_time() - start < 10


def test_too_many_classes_to_search_are_reported_as_uncertified():
    counts = np.geomspace(10, 500, MOST_CLASSES + 1).round()
    optimum = solve(UFM(counts, 1e-5, 1e-7, variant=LossVariant(logit_adjustment=1)))
    assert optimum.method == "class by class" and not optimum.certified and 0 < optimum.gap < 1


@pytest.mark.parametrize("counts", [[1, 1], [1, 300], [1, 1, 1, 1], [1, 1, 50]])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("member", ["LA", "all"])
def test_two_classes_and_classes_of_one_image(counts, relu, member):
    optimum = solve(UFM(counts, 1e-2, 1e-3, relu=relu, variant=MEMBERS[member]))
    assert -1e-12 < optimum.gap <= 1e-7
    for name in ("margins", "mean_norms_sq", "HTH", "WWT", "WH", "duality"):
        assert getattr(optimum, name).isfinite().all(), name


# ---------------------------------------------------------------------------------------------------------
# Many classes, soft labels, and what is not unique
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [16, 24, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_many_classes_that_share_directions_are_certified(num_classes, bias):
    counts = np.random.default_rng(num_classes).integers(1, 300, num_classes)
    product = 0.01 * counts.max() / counts.sum() ** 2
    optimum = solve(UFM(counts, math.sqrt(product), math.sqrt(product), bias=bias, variant=MEMBERS["VS"]))
    norms = optimum.mean_norms_sq.sqrt()
    cosines = optimum.HTH / norms / norms[:, None]
    assert (cosines - torch.eye(num_classes)).nan_to_num().max() > 0.1
    assert optimum.certified and optimum.gap > -1e-12


def test_each_round_of_a_minimisation_is_reported():
    said = []
    optimum = solve(UFM(SMALL, 2e-3, 2e-4, variant=MEMBERS["VS"]), said.append)
    assert said[-1] == f"minimising, loss {optimum.loss:.8g} with {optimum.directions} features"


def test_the_relaxation_is_a_bound_that_is_exact_where_all_supports_can_be_tried():
    random = np.random.default_rng(0)
    for _ in range(10):
        matrix = random.standard_normal((7, 7))
        gram = matrix.T @ matrix
        exact = largest_of_all_supports(gram)
        assert exact * (1 - 1e-12) <= best_relaxation(gram) <= exact * (1 + 1e-6)
        assert local_maxima(gram)[0].max() == pytest.approx(exact, rel=1e-9)


def test_collapsed_classes_are_zero_in_a_numerical_optimum():
    optimum = solve(UFM([163, 43, 11, 3], 0.265, 0.00265, variant=MEMBERS["LA"]))
    assert optimum.method == "numerical" and optimum.certified
    assert optimum.collapsed.any() and not optimum.collapsed.all()
    assert (optimum.mean_norms_sq[~optimum.collapsed] > 1e-6).all()
    assert not optimum.margins[optimum.collapsed].any() and not optimum.HTH[optimum.collapsed].any()


def test_the_gap_is_relative_to_what_can_be_changed():
    problem = UFM([10, 20, 30], 1e-3, 1e-3, variant=LossVariant(label_smoothing=0.99))
    zero, optimum = math.log(3), solve(problem)
    assert problem.irreducible_loss < optimum.loss <= zero and zero - problem.irreducible_loss < 2e-4
    bad = dataclasses.replace(optimum, loss=optimum.loss + 0.1 * (zero - problem.irreducible_loss))
    assert optimum.certified and bad.gap > 0.05


@pytest.mark.parametrize("loss", LOSSES)
def test_two_classes_with_a_bias_have_a_line_of_minimisers(loss):
    """Moving the bias between the two total logits leaves the loss what it is, unless something tells them apart."""
    problem = UFM([50, 50], 1e-2, 1e-3, loss=loss, bias=True)
    optimum = solve(problem)
    total = optimum.WH + optimum.bias[:, None]
    for share in (0.2, 0.5, 0.9):
        bias = total @ torch.tensor([share, 1 - share], dtype=torch.float64)
        rest = (total - bias[:, None]).norm(dim=0).sum().item()
        assert rest == pytest.approx((total[:, 0] - total[:, 1]).norm().item(), rel=1e-12)
        penalty = math.sqrt(problem.lambda_w * problem.lambda_h * 50) * rest
        assert penalty == pytest.approx(
            0.5 * problem.lambda_w * optimum.WWT.trace().item()
            + 0.5 * problem.lambda_h * 50 * optimum.mean_norms_sq.sum().item(),
            rel=1e-6,
        )
    assert not problem.unique and optimum.certified
    for other in ({"bias_decay": 0.1}, {"relu": False}, {"class_counts": [50, 51]}, {"class_counts": [50] * 3}):
        assert dataclasses.replace(problem, **other).unique


@pytest.mark.parametrize("relu, bias", [(True, False), (False, False), (True, True)])
def test_soft_labels(relu, bias):
    """One-hot rows are the usual problem; other rows are its convex combination, checked by their own minimisation."""
    counts, arguments = [10, 20, 40], {"lambda_w": 5e-3, "lambda_h": 5e-4, "relu": relu, "bias": bias}
    hard, usual = solve(UFM(labels=np.diag(counts), **arguments)), solve(UFM(counts, **arguments))
    assert hard.loss == pytest.approx(usual.loss, rel=1e-9) and hard.certified
    torch.testing.assert_close(hard.margins, usual.margins, rtol=1e-5, atol=1e-5)
    labels = np.array([[6, 4, 0, 2], [5, 5, 1, 1], [0, 0, 9, 9], [1, 0, 30, 9], [1, 1, 1, 0]])
    problem = UFM(labels=labels, **arguments)
    optimum = solve(problem)
    assert optimum.WH.shape == (4, 5) and optimum.HTH.shape == (5, 5) and optimum.certified
    targets = torch.from_numpy(labels / labels.sum(1, keepdims=True))
    logits = (optimum.WH + optimum.bias[:, None]).T
    data = -(targets * torch.log_softmax(logits, 1)).sum(1) @ problem.counts / problem.counts.sum()
    head, features = optimum.head(8), optimum.features(8)
    penalty = 0.5 * problem.lambda_w * head.square().sum()
    penalty += 0.5 * problem.lambda_h * problem.counts @ features.square().sum(1)
    assert optimum.loss == pytest.approx((data + penalty).item(), rel=1e-10)
    assert optimum.loss > problem.irreducible_loss > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": [1, 2]}, "wanted .contexts, K. with K >= 2"),
        ({"labels": [[1, -2], [3, 4]]}, "must be >= 0"),
        ({"labels": [[1, 2], [0, 0]]}, "every row needs one or more"),
        ({"labels": [[1, 2], [3, math.inf]]}, "labels must be finite"),
        ({"labels": [[1, 2], [3, 4]], "class_counts": [3, 8]}, "must be the sums of the rows"),
        ({"labels": [[1, 2], [3, 4]], "loss": "MSE"}, "class_counts can be left out only"),
        (
            {"labels": [[1, 2], [3, 4]], "loss": "MSE", "class_counts": [1, 1, 1]},
            "2 rows, and there are 3 class_counts",
        ),
        ({"labels": [[1, 2], [3, 4]], "variant": MEMBERS["LA"]}, "for one label a sample"),
        ({}, "class_counts can be left out only"),
        ({"class_counts": [3, 4], "depth_linear": 0}, "depth_linear must be 1 or more"),
        ({"class_counts": [3, 4], "depth_linear": 2}, "only for MSE without a bias"),
    ],
)
def test_labels_and_depths_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        UFM(lambda_w=1e-3, lambda_h=1e-3, **arguments)
