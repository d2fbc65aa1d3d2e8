"""The closed forms against direct minimisation of (UFM) in float64, and at their edges."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from nc_theory import (
    LOSSES,
    UFM,
    LossVariant,
    class_curve,
    class_margins,
    closed_form,
    collapse_count,
    collapse_products,
    collapse_threshold,
    gap_shares,
    lower_bound,
    released_formula,
    self_duality,
    seli,
    solve,
    solve_numerically,
    suggest_collapse,
    suggest_lambdas,
)
from nc_theory.geometries import square_root

SMALL = [100, 100, 200, 200, 300, 300, 400, 400, 500, 500]
PAPER = [10 * n for n in SMALL]


def literal_loss(head, features, labels, counts, lambda_w, lambda_h, loss, bias=None):
    """(UFM) written out: head (K, d), and one feature per class (K, d) with weight n_k / N."""
    total, value = sum(counts), 0.0
    for k, count in enumerate(counts):
        logits = head @ features[k] + (0 if bias is None else bias)
        if loss == "CrossEntropy":
            own = np.logaddexp.reduce(logits) - logits[labels[k]]
        else:
            own = 0.5 * np.square(logits - np.eye(len(counts))[labels[k]]).sum()
        value += count / total * own + lambda_h / 2 * count * features[k] @ features[k]
    return value + lambda_w / 2 * np.square(head).sum()


def realise(optimum, loss, lambda_w, lambda_h):
    """W (K, K) and features (K, K) with the optimum's geometry, on axis vectors."""
    norms = optimum.mean_norms_sq.sqrt().numpy()
    counts, num_classes = optimum.class_counts.numpy(), len(norms)
    if loss == "CrossEntropy":
        columns = np.sqrt(num_classes * lambda_h * counts / ((num_classes - 1) * lambda_w)) * norms
        return (np.eye(num_classes) - 1 / num_classes) * columns, np.diag(norms)
    return np.diag(np.sqrt(lambda_h * counts / lambda_w) * norms), np.diag(norms)


# The same examples in every run, without shrinking, because minimisation is slow.
REPRODUCIBLE = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}

# Penalties are drawn by where the largest class lies against its threshold, so that none, some or all collapse.
problems = st.tuples(
    st.lists(st.integers(1, 500), min_size=2, max_size=12),
    st.floats(-3, 0.3),  # log10 of threshold / largest count
    st.floats(-3, 3),  # log10 of lambda_W / lambda_H
    st.sampled_from(LOSSES),
)


def lambdas_of(counts, log_threshold, log_ratio, loss):
    num_classes = len(counts)
    shrink = num_classes / (num_classes - 1) if loss == "CrossEntropy" else 1.0
    product = 10**log_threshold * max(counts) / (sum(counts) ** 2 * shrink)
    return math.sqrt(product * 10**log_ratio), math.sqrt(product / 10**log_ratio)


@given(problems)
@example(([220, 220], 0.286, -2.712214937767356, "MSE"))  # from a random start, no feature is left
@settings(max_examples=60, **REPRODUCIBLE)
def test_closed_form_is_what_minimisation_finds(problem):
    counts, _, _, loss = problem
    lambda_w, lambda_h = lambdas_of(*problem)
    closed = closed_form(UFM(counts, lambda_w, lambda_h, loss=loss))
    edge = sum(counts) ** 2 * lambda_w * lambda_h * (len(counts) / (len(counts) - 1) if loss == "CrossEntropy" else 1)
    assume(all(abs(n / edge - 1) > 1e-2 for n in counts))  # at the threshold itself the minimum is flat
    found = solve_numerically(UFM(counts, lambda_w, lambda_h, loss=loss), starts=4)
    assert found.optimum.loss == pytest.approx(closed.loss, rel=1e-9)
    assert min(found.losses) >= closed.loss * (1 - 1e-12)  # no start goes below the closed form
    torch.testing.assert_close(found.optimum.margins, closed.margins, rtol=1e-5, atol=1e-5)
    unit = lambda_w**0.5 / (lambda_h * closed.class_counts) ** 0.5  # |h_k|^2 of a margin of about one
    torch.testing.assert_close(found.optimum.mean_norms_sq / unit, closed.mean_norms_sq / unit, rtol=1e-5, atol=1e-5)


@given(problems, st.integers(0, 2**32 - 1))
@settings(max_examples=100, **REPRODUCIBLE)
def test_no_feasible_perturbation_lowers_the_loss(problem, seed):
    counts, _, _, loss = problem
    lambda_w, lambda_h = lambdas_of(*problem)
    closed = closed_form(UFM(counts, lambda_w, lambda_h, loss=loss))
    head, features = realise(closed, loss, lambda_w, lambda_h)
    labels = range(len(counts))
    lowest = literal_loss(head, features, labels, counts, lambda_w, lambda_h, loss)
    assert closed.loss == pytest.approx(lowest, rel=1e-10)  # the value that Optimum gives is that of its geometry
    random = np.random.default_rng(seed)
    for size in 10.0 ** -np.arange(0, 7):
        head_step = random.standard_normal(head.shape) * max(np.abs(head).max(), 1e-3) * size
        step = random.standard_normal(features.shape) * max(np.abs(features).max(), 1e-3) * size
        moved = literal_loss(head + head_step, np.maximum(features + step, 0), labels, counts, lambda_w, lambda_h, loss)
        assert moved >= lowest * (1 - 1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_the_threshold_is_sharp(loss, num_classes):
    """Minority collapse: n_k just below N^2 lambda_W lambda_H [K/(K-1)] is zero, just above is not."""
    shrink = num_classes / (num_classes - 1) if loss == "CrossEntropy" else 1.0
    counts = [100] * (num_classes - 1) + [40]
    product = 40 / (sum(counts) ** 2 * shrink)
    for factor, collapsed in ((1 + 1e-6, True), (1 - 1e-6, False)):
        lambda_w = lambda_h = math.sqrt(product * factor)
        closed = closed_form(UFM(counts, lambda_w, lambda_h, loss=loss))
        assert closed.collapsed.tolist() == [False] * (num_classes - 1) + [collapsed]
    for factor, collapsed in ((1.02, True), (0.98, False)):
        lambda_w = lambda_h = math.sqrt(product * factor)
        minimum = solve_numerically(UFM(counts, lambda_w, lambda_h, loss=loss))
        found = minimum.optimum.mean_norms_sq
        assert (found[-1].item() < 1e-9 * found.max().item()) == collapsed
        assert max(minimum.losses) == pytest.approx(min(minimum.losses), rel=1e-8)  # from every start


@pytest.mark.parametrize("loss", LOSSES)
def test_all_samples_free_collapse_to_the_class_means(loss):
    """Over all N features instead of one per class: the same minimum, and no spread within a class."""
    counts = [12, 12, 25, 40]
    closed = closed_form(UFM(counts, 2e-2, 2e-3, loss=loss))
    found = solve_numerically(UFM(counts, 2e-2, 2e-3, loss=loss), level="sample")
    assert found.within_class_spread < 1e-5
    assert found.optimum.loss == pytest.approx(closed.loss, rel=1e-12)
    torch.testing.assert_close(found.optimum.margins, closed.margins, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.optimum.mean_norms_sq, closed.mean_norms_sq, rtol=1e-6, atol=0)


def test_geometry_of_the_minimum_is_the_closed_form():
    problem = UFM(SMALL, 5e-3, 5e-5)
    closed, found = closed_form(problem), solve_numerically(problem).optimum
    for name in ("HTH", "WWT", "WH"):
        expected = getattr(closed, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    a, b = closed.duality / closed.duality.norm(), found.duality / found.duality.norm()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_balanced_classes(loss):
    """Equal norms, and centred class means that form the simplex ETF."""
    optimum = solve(UFM([300] * 7, 1e-3, 1e-4, loss=loss))
    assert optimum.mean_norms_sq.min().item() == pytest.approx(optimum.mean_norms_sq.max().item(), rel=1e-14)
    centring = torch.eye(7, dtype=torch.float64) - 1 / 7
    centred = centring @ optimum.HTH @ centring
    torch.testing.assert_close(centred / centred.norm(), centring / centring.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "counts, lambda_w, lambda_h",
    [
        ([1, 1], 1e-3, 1e-3),
        ([1, 500], 1e-3, 1e-4),
        ([10**9, 10**9, 1], 1e-6, 1e-12),
        ([10**9] * 1000, 1e-9, 1e-20),
        ([3, 4, 5], 1e-300, 1e-300),
        ([3, 4, 5], 1e-320, 1e-3),
        ([3, 4, 5], 1e3, 1e-300),
        ([3, 4, 5], 1e200, 1e200),
    ],
)
def test_extremes_are_finite(loss, counts, lambda_w, lambda_h):
    optimum = closed_form(UFM(counts, lambda_w, lambda_h, loss=loss))
    for name in ("margins", "mean_norms_sq", "HTH", "WWT", "WH"):
        assert getattr(optimum, name).isfinite().all(), name
    assert math.isfinite(optimum.loss) and optimum.loss >= 0
    assert (optimum.margins >= 0).all()


def test_all_classes_collapsed():
    optimum = solve(UFM([5, 6, 7], 10.0, 10.0))
    assert optimum.collapsed.all() and not optimum.WWT.any() and not optimum.WH.any()
    assert optimum.loss == pytest.approx(math.log(3))
    assert solve(UFM([5, 6, 7], 10.0, 10.0, loss="MSE")).loss == pytest.approx(0.5)


@pytest.mark.parametrize(
    "counts, lambda_w, lambda_h, message",
    [
        ([5], 1e-3, 1e-3, "two classes or more"),
        ([[5, 6]], 1e-3, 1e-3, "two classes or more"),
        ([5, 0], 1e-3, 1e-3, "one sample or more"),
        ([5, math.nan], 1e-3, 1e-3, "one sample or more"),
        ([5, 6], 0.0, 1e-3, "lambda_W must be > 0"),
        ([5, 6], 1e-3, -1e-3, "lambda_H must be > 0"),
        ([5, 6], math.nan, 1e-3, "lambda_W must be > 0"),
        ([5, 6], 1e-3, math.inf, "lambda_H must be > 0"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_defined_is_an_error(loss, counts, lambda_w, lambda_h, message):
    with pytest.raises(ValueError, match=message):
        UFM(counts, lambda_w, lambda_h, loss=loss)


def test_further_errors():
    with pytest.raises(ValueError, match="whole class counts"):
        solve_numerically(UFM([5.5, 6], 1e-3, 1e-3), level="sample")
    with pytest.raises(ValueError, match="bias_decay"):
        UFM([5, 6], 1e-3, 1e-3, bias=True, bias_decay=-1.0)
    with pytest.raises(ValueError, match="loss must be one of CrossEntropy, MSE"):
        UFM([5, 6], 1e-3, 1e-3, loss="Hinge")
    with pytest.raises(ValueError, match="cross entropy with ReLU features only"):
        released_formula(UFM([5, 6], 1e-3, 1e-3, loss="MSE"))


def test_a_problem_goes_to_json_and_back():
    problem = UFM(np.array([5, 6]), 1e-3, 1e-4, bias=True, bias_decay=0.5)
    assert UFM(**json.loads(json.dumps(dataclasses.asdict(problem)))) == problem
    assert problem.class_counts == (5, 6) and UFM(torch.tensor([5.5, 6]), 1, 1).class_counts == (5.5, 6)


def normalised(a, b):
    return (a / a.norm() - b / b.norm()).norm().item()


def test_the_released_formula_is_not_the_optimum():
    """What even a perfect optimum scores against it, on the paper's setting and a small one."""
    optimum, released = solve(UFM(PAPER, 2e-4, 2e-5 / 118)), released_formula(UFM(PAPER, 1e-4, 1e-5))
    assert normalised(optimum.HTH, released.HTH) == pytest.approx(0.017, abs=5e-4)
    assert normalised(optimum.WH, released.WH) == pytest.approx(0.015, abs=5e-4)
    optimum, released = solve(UFM(SMALL, 5e-3, 5e-5)), released_formula(UFM(SMALL, 5e-3, 5e-5))
    assert normalised(optimum.HTH, released.HTH) == pytest.approx(0.24, abs=5e-3)
    assert normalised(optimum.WH, released.WH) == pytest.approx(0.18, abs=5e-3)


# ---------------------------------------------------------------------------------------------------------
# Problems without a closed form
# ---------------------------------------------------------------------------------------------------------


def convex_bias_loss(counts, lambda_w, lambda_h, bias_decay):
    """The least value of (UFM) with a bias over orthogonal features, as a convex problem in the logits.

    With h_k = |h_k| e_k the penalties of class k are least at sqrt(lambda_W lambda_H n_k) |z_k| for logits z_k + b.
    """
    from scipy.optimize import minimize

    counts, num_classes = np.asarray(counts, float), len(counts)
    cost = np.sqrt(lambda_w * lambda_h * counts)

    def value_and_gradient(x):
        z, b = x[:-num_classes].reshape(num_classes, num_classes), x[-num_classes:]
        norms = np.sqrt(np.square(z).sum(1))
        log_p = (z + b) - np.logaddexp.reduce(z + b, axis=1)[:, None]
        pull = (np.exp(log_p) - np.eye(num_classes)) * (counts / counts.sum())[:, None]
        value = -counts / counts.sum() @ log_p.diagonal() + cost @ norms + bias_decay / 2 * b @ b
        return value, np.concatenate([(pull + (cost / norms)[:, None] * z).ravel(), pull.sum(0) + bias_decay * b])

    x = np.concatenate([5 * (np.eye(num_classes) - 1 / num_classes).ravel(), np.zeros(num_classes)])
    for _ in range(3):
        x = minimize(value_and_gradient, x, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-12}).x
    return value_and_gradient(x)[0]


@pytest.mark.parametrize("bias_decay", [0.0, 1e-2])
def test_bias_against_a_convex_form(bias_decay):
    counts = [20, 30, 60, 90]
    found = solve(UFM(counts, 5e-3, 5e-4, bias=True, bias_decay=bias_decay))
    assert found.loss == pytest.approx(convex_bias_loss(counts, 5e-3, 5e-4, bias_decay), rel=1e-7)
    assert found.loss < solve(UFM(counts, 5e-3, 5e-4)).loss
    assert (found.bias.diff() > 0).all()  # larger classes have the larger bias
    assert found.method == "numerical" and 0 < found.projected_gradient < 1e-5


def test_without_relu_the_balanced_optimum_is_the_etf():
    found = solve(UFM([50] * 5, 1e-3, 1e-4, relu=False))
    etf = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert normalised(found.HTH, etf) < 1e-6
    assert normalised(found.WWT, etf) < 1e-6


def test_without_relu_the_loss_is_lower():
    counts = [10, 30, 90]
    free, constrained = solve(UFM(counts, 1e-2, 1e-3, relu=False)), solve(UFM(counts, 1e-2, 1e-3))
    assert free.loss < constrained.loss * (1 - 1e-3)


def test_mse_has_the_same_closed_form_without_relu():
    problem = UFM([12, 25, 40], 1e-2, 1e-3, loss="MSE", relu=False)
    closed, found = closed_form(problem), solve_numerically(problem).optimum
    assert found.loss == pytest.approx(closed.loss, rel=1e-12)
    for name in ("HTH", "WWT", "WH"):
        expected = getattr(closed, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    assert normalised(found.duality, closed.duality) < 1e-6  # D is given up to a factor


def test_the_duality_ignores_directions_without_features():
    """The class means of the ETF have rank K-1: D is centred like W and H, and not dominated by 0/0 rounding."""
    found = solve(UFM([50] * 5, 1e-3, 1e-4, relu=False))
    scale = found.duality.abs().max().item()
    assert found.duality.sum(0).abs().max().item() < 1e-4 * scale > found.duality.sum(1).abs().max().item()
    torch.testing.assert_close(found.duality @ found.HTH, found.WH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [[5, 5, 5, 2, 2, 9], [1, 2, 3, 4, 7], [400, 1, 1, 1]])
def test_seli_by_groups_of_equal_counts_is_that_of_all_classes(counts):
    """Against eigenvectors of the K x K matrices themselves, clipped where LAPACK's zero is negative."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.where(values > 1e-12 * values.max(), values, 0) ** 0.5) @ vectors.T

    d, centring = np.diag(counts) ** 0.5, np.eye(len(counts)) - 1 / len(counts)
    gram, weights = seli(counts)
    np.testing.assert_allclose(gram, np.linalg.inv(d) @ root(d @ centring @ d) @ np.linalg.inv(d), atol=1e-12)
    np.testing.assert_allclose(weights, root(centring @ d @ d @ centring), atol=1e-11)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: class_margins(np.ones((3, 4))), r"logits have shape \(3, 4\), wanted \(K, K\)"),
        (lambda: class_margins(np.ones(3)), r"logits have shape \(3,\)"),
        (lambda: seli([[1, 2]]), "class counts of shape"),
        (lambda: self_duality([[1, 2]]), "class counts of shape"),
        (lambda: lower_bound(UFM([1, 2], 1e-3, 1e-3), np.ones((3, 3))), r"wanted \(K, K\) = \(2, 2\)"),
        (lambda: gap_shares(solve(UFM([1, 2], 1, 1)), np.ones((3, 2)), np.ones((2, 3)), [1, 1], [0, 0]), "weight"),
        (lambda: gap_shares(solve(UFM([1, 2], 1, 1)), np.ones((2, 3)), np.ones((2, 3)), 1, [0, 0]), "class_losses"),
        (lambda: gap_shares(solve(UFM([1, 2], 1, 1)), *np.ones((2, 2, 3)), [1, 1], [0, 0], [0, 1]), "has no bias"),
        (lambda: suggest_lambdas([1, 5000], margin=1000), "at most 500"),
    ],
)
def test_wrong_shapes_and_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seli_of_balanced_classes_is_the_etf():
    gram, weights = seli([7] * 5)
    etf = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert normalised(gram, etf) < 1e-12 and normalised(weights, etf) < 1e-12


def test_the_square_root_of_a_singular_matrix_has_no_part_in_its_kernel():
    """Whatever the sign of the rounding error of a zero eigenvalue."""
    counts = torch.tensor([7.0, 5, 11, 3], dtype=torch.float64)
    centring = torch.eye(4, dtype=torch.float64) - 1 / 4
    matrix = centring * counts @ centring
    for shift in (-5e-16, 0.0, 5e-16):
        root = square_root(matrix + shift * torch.ones(4, 4, dtype=torch.float64))
        assert (root.sum(0).abs() < 1e-12).all() and torch.allclose(root @ root, matrix, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# What follows from the closed forms
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_the_curve_of_a_class_goes_through_the_classes(loss):
    problem = UFM(SMALL, 5e-3, 5e-5, loss=loss)
    margins, norms_sq = class_curve(problem, SMALL)
    assert torch.equal(margins, solve(problem).margins) and torch.equal(norms_sq, solve(problem).mean_norms_sq)
    count = collapse_count(problem)
    margins, norms_sq = class_curve(problem, [count * (1 - 1e-9), count * (1 + 1e-9)])
    assert margins[0] == norms_sq[0] == 0 and margins[1] > 0 and norms_sq[1] > 0
    edge = UFM(SMALL, math.sqrt(collapse_threshold(SMALL, loss)), math.sqrt(collapse_threshold(SMALL, loss)), loss=loss)
    assert collapse_count(edge) == pytest.approx(min(SMALL), rel=1e-12)


def test_the_curve_of_the_released_formula():
    problem = UFM(SMALL, 5e-3, 5e-5)
    margins, norms_sq = class_curve(problem, SMALL, formula="released")
    released = released_formula(problem)
    assert torch.equal(margins, released.margins) and torch.equal(norms_sq, released.mean_norms_sq)
    assert released.method == "released formula"


def test_no_curve_without_a_closed_form():
    problem = UFM(SMALL, 5e-3, 5e-5, bias=True)
    assert closed_form(problem) is class_curve(problem, SMALL) is collapse_count(problem) is None


def test_suggested_lambdas_give_the_margin_and_no_collapse():
    for counts in ([1, 1], [10, 20, 500], SMALL):
        lambda_w, lambda_h = suggest_lambdas(counts, margin=7.0, ratio=30.0)
        optimum = solve(UFM(counts, lambda_w, lambda_h))
        assert optimum.margins.max().item() == pytest.approx(7.0, rel=1e-12) and not optimum.collapsed.any()
        assert lambda_w / lambda_h == pytest.approx(30.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"must be above 5\.73, or the smallest class .n = 1. collapses; got 5"):
        suggest_lambdas([*[1000] * 9, 1], margin=5.0)
    edge = math.log(10 * math.sqrt(1000) - 9)  # where the class of 1 collapses
    assert not solve(UFM([*[1000] * 9, 1], *suggest_lambdas([*[1000] * 9, 1], edge * (1 + 1e-9)))).collapsed.any()


def test_the_optimum_of_vs_misclassifies_the_rarest_classes_of_shuttle():
    """As docs/natural_imbalance.md says; with the cross entropy every class has its largest logit."""
    counts = [36469, 40, 137, 7123, 2614, 8, 11]
    variants = LossVariant(), LossVariant(logit_adjustment=1, logit_scaling=0.3)
    largest = [solve(UFM(counts, 1e-3, 1e-6, variant=variant)).WH.argmax(0).tolist() for variant in variants]
    assert largest == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 2, 3, 4, 2, 2]]


@pytest.mark.parametrize(
    "variant", [{}, {"class_weights": 0.3}, {"class_weights": 1.0}, {"ldam_margin": 0.5}, {"label_smoothing": 0.2}]
)
def test_each_class_collapses_at_its_product(variant):
    """At a margin M, class k costs (n_k/N) l_k(M) + sqrt(lambda_W lambda_H n_k (K-1)/K) M, which is convex in M."""
    problem = UFM([3, 20, 100, 400], 1, 1, variant=LossVariant(**variant))
    parameters, counts = problem.loss_parameters, problem.counts.numpy()
    step, shares = 1e-6, np.array([1.0, -1 / 3, -1 / 3, -1 / 3]) * 3 / 4  # logits of a margin of 1
    for label, product in enumerate(collapse_products(problem).tolist()):
        logits = np.stack([np.zeros(4), step * np.roll(shares, label)])
        losses, _ = parameters.losses_and_residuals(logits, np.array([label, label]))
        fall = (losses[0] - losses[1]) / step * counts[label] / counts.sum()
        assert math.sqrt(product * counts[label] * 3 / 4) == pytest.approx(max(fall, 0), rel=1e-5)


def test_mse_collapses_at_its_product():
    problem = UFM([3, 20, 100, 400], 1, 1, loss="MSE")
    for label, product in enumerate(collapse_products(problem).tolist()):
        for factor in (0.99, 1.01):
            root = math.sqrt(product * factor)
            assert closed_form(UFM([3, 20, 100, 400], root, root, loss="MSE")).collapsed[label] == (factor > 1)


def test_no_lambdas_for_equal_classes_or_other_losses():
    with pytest.raises(ValueError, match="2 classes of 9 samples collapse together: exactly 1 or 3 can, not 2"):
        suggest_collapse(UFM([3, 9, 9, 20], 1, 1), 2)
    for fields in ({"bias": True}, {"relu": False}, {"variant": LossVariant(logit_adjustment=1)}):
        with pytest.raises(ValueError, match="no threshold of collapse is known"):
            collapse_products(UFM([3, 9], 1, 1, **fields))
    with pytest.raises(ValueError, match="ratio"):
        suggest_collapse(UFM([3, 9], 1, 1), 1, ratio=0)
