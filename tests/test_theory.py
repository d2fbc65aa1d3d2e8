"""The closed forms against direct minimisation of (UFM) in float64, and at their edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from theory import cross_entropy_optimum, minimise, mse_optimum, released_formula, square_root

CLOSED_FORMS = {"CrossEntropy": cross_entropy_optimum, "MSE": mse_optimum}
SMALL = [100, 100, 200, 200, 300, 300, 400, 400, 500, 500]
PAPER = [10 * n for n in SMALL]


def literal_loss(head, features, labels, counts, lambda_w, lambda_h, loss, bias=None):
    """(UFM), written down: head (K, d), one feature a class (K, d) with weight n_k / N."""
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


# The same examples in every run, and no search for a smaller one: minimisation is slow for that.
REPRODUCIBLE = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}

# Penalties are drawn by where the largest class lies against its threshold, so that none, some or all collapse.
problems = st.tuples(
    st.lists(st.integers(1, 500), min_size=2, max_size=12),
    st.floats(-3, 0.3),  # log10 of threshold / largest count
    st.floats(-3, 3),  # log10 of lambda_W / lambda_H
    st.sampled_from(["CrossEntropy", "MSE"]),
)


def lambdas_of(counts, log_threshold, log_ratio, loss):
    num_classes = len(counts)
    shrink = num_classes / (num_classes - 1) if loss == "CrossEntropy" else 1.0
    product = 10**log_threshold * max(counts) / (sum(counts) ** 2 * shrink)
    return math.sqrt(product * 10**log_ratio), math.sqrt(product / 10**log_ratio)


@given(problems)
@settings(max_examples=60, **REPRODUCIBLE)
def test_closed_form_is_what_minimisation_finds(problem):
    counts, _, _, loss = problem
    lambda_w, lambda_h = lambdas_of(*problem)
    closed = CLOSED_FORMS[loss](counts, lambda_w, lambda_h)
    edge = sum(counts) ** 2 * lambda_w * lambda_h * (len(counts) / (len(counts) - 1) if loss == "CrossEntropy" else 1)
    assume(all(abs(n / edge - 1) > 1e-2 for n in counts))  # at the threshold itself the minimum is flat
    found = minimise(counts, lambda_w, lambda_h, loss=loss, starts=4)
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
    closed = CLOSED_FORMS[loss](counts, lambda_w, lambda_h)
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


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_the_threshold_is_sharp(loss, num_classes):
    """Minority collapse: n_k just below N^2 lambda_W lambda_H [K/(K-1)] is zero, just above is not."""
    shrink = num_classes / (num_classes - 1) if loss == "CrossEntropy" else 1.0
    counts = [100] * (num_classes - 1) + [40]
    product = 40 / (sum(counts) ** 2 * shrink)
    for factor, collapsed in ((1 + 1e-6, True), (1 - 1e-6, False)):
        lambda_w = lambda_h = math.sqrt(product * factor)
        closed = CLOSED_FORMS[loss](counts, lambda_w, lambda_h)
        assert closed.collapsed.tolist() == [False] * (num_classes - 1) + [collapsed]
    for factor, collapsed in ((1.02, True), (0.98, False)):
        lambda_w = lambda_h = math.sqrt(product * factor)
        found = minimise(counts, lambda_w, lambda_h, loss=loss).optimum.mean_norms_sq
        assert (found[-1].item() < 1e-9 * found.max().item()) == collapsed


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
def test_all_samples_free_collapse_to_the_class_means(loss):
    """Over all N features, not one a class: the same minimum, and no spread within a class."""
    counts = [12, 12, 25, 40]
    closed = CLOSED_FORMS[loss](counts, 2e-2, 2e-3)
    found = minimise(counts, 2e-2, 2e-3, loss=loss, level="sample")
    assert found.within_class_spread < 1e-5
    assert found.optimum.loss == pytest.approx(closed.loss, rel=1e-12)
    torch.testing.assert_close(found.optimum.margins, closed.margins, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.optimum.mean_norms_sq, closed.mean_norms_sq, rtol=1e-6, atol=0)


def test_geometry_of_the_minimum_is_the_closed_form():
    closed, found = cross_entropy_optimum(SMALL, 5e-3, 5e-5), minimise(SMALL, 5e-3, 5e-5).optimum
    for name in ("HTH", "WWT", "WH"):
        expected = getattr(closed, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    a, b = closed.duality / closed.duality.norm(), found.duality / found.duality.norm()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("closed_form", CLOSED_FORMS.values())
def test_balanced_classes(closed_form):
    """Equal norms, and centred class means that are the simplex ETF."""
    optimum = closed_form([300] * 7, 1e-3, 1e-4)
    assert optimum.mean_norms_sq.min().item() == pytest.approx(optimum.mean_norms_sq.max().item(), rel=1e-14)
    centring = torch.eye(7, dtype=torch.float64) - 1 / 7
    centred = centring @ optimum.HTH @ centring
    torch.testing.assert_close(centred / centred.norm(), centring / centring.norm())


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
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
    optimum = CLOSED_FORMS[loss](counts, lambda_w, lambda_h)
    for name in ("margins", "mean_norms_sq", "HTH", "WWT", "WH"):
        assert getattr(optimum, name).isfinite().all(), name
    assert math.isfinite(optimum.loss) and optimum.loss >= 0
    assert (optimum.margins >= 0).all()


def test_all_classes_collapsed():
    optimum = cross_entropy_optimum([5, 6, 7], 10.0, 10.0)
    assert optimum.collapsed.all() and not optimum.WWT.any() and not optimum.WH.any()
    assert optimum.loss == pytest.approx(math.log(3))
    assert mse_optimum([5, 6, 7], 10.0, 10.0).loss == pytest.approx(0.5)


@pytest.mark.parametrize("function", [cross_entropy_optimum, mse_optimum, released_formula, minimise])
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
    ],
)
def test_what_is_not_defined_is_an_error(function, counts, lambda_w, lambda_h, message):
    with pytest.raises(ValueError, match=message):
        function(counts, lambda_w, lambda_h)


def test_too_few_features_are_an_error():
    with pytest.raises(ValueError, match="as many features as classes"):
        minimise([5, 6, 7], 1e-3, 1e-3, dim=2)
    with pytest.raises(ValueError, match="whole class counts"):
        minimise([5.5, 6], 1e-3, 1e-3, level="sample")
    with pytest.raises(ValueError, match="bias_decay"):
        minimise([5, 6], 1e-3, 1e-3, bias=True, bias_decay=-1.0)


def normalised(a, b):
    return (a / a.norm() - b / b.norm()).norm().item()


def test_the_released_formula_is_not_the_optimum():
    """What even a perfect optimum scores against it: DESIGN's figures, on the paper's setting and a small one."""
    optimum, released = cross_entropy_optimum(PAPER, 2e-4, 2e-5 / 118), released_formula(PAPER, 1e-4, 1e-5)
    assert normalised(optimum.HTH, released.HTH) == pytest.approx(0.017, abs=5e-4)
    assert normalised(optimum.WH, released.WH) == pytest.approx(0.015, abs=5e-4)
    optimum, released = cross_entropy_optimum(SMALL, 5e-3, 5e-5), released_formula(SMALL, 5e-3, 5e-5)
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
    found = minimise(counts, 5e-3, 5e-4, bias=True, bias_decay=bias_decay)
    assert found.optimum.loss == pytest.approx(convex_bias_loss(counts, 5e-3, 5e-4, bias_decay), rel=1e-7)
    assert found.optimum.loss < cross_entropy_optimum(counts, 5e-3, 5e-4).loss
    assert (found.optimum.bias.diff() > 0).all()  # larger classes have the larger bias
    assert found.projected_gradient < 1e-5


def test_without_relu_the_balanced_optimum_is_the_etf():
    found = minimise([50] * 5, 1e-3, 1e-4, relu=False).optimum
    etf = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert normalised(found.HTH, etf) < 1e-6
    assert normalised(found.WWT, etf) < 1e-6


def test_without_relu_the_loss_is_lower():
    counts = [10, 30, 90]
    free, constrained = minimise(counts, 1e-2, 1e-3, relu=False), cross_entropy_optimum(counts, 1e-2, 1e-3)
    assert free.optimum.loss < constrained.loss * (1 - 1e-3)


def test_the_square_root_of_a_singular_matrix_has_no_part_in_its_kernel():
    """Whatever the sign of the rounding with which an eigenvalue of zero comes out."""
    counts = torch.tensor([7.0, 5, 11, 3], dtype=torch.float64)
    centring = torch.eye(4, dtype=torch.float64) - 1 / 4
    matrix = centring * counts @ centring
    for shift in (-5e-16, 0.0, 5e-16):
        root = square_root(matrix + shift * torch.ones(4, 4, dtype=torch.float64))
        assert (root.sum(0).abs() < 1e-12).all() and torch.allclose(root @ root, matrix, rtol=0, atol=1e-12)
