"""The gap of a network as a sum of neural-collapse properties, and what it proves, against direct computations."""

import math
from functools import cache

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from nc_theory import (
    UFM,
    LossVariant,
    VariantLoss,
    gap_bounds,
    gap_shares,
    released_formula,
    solve,
    solve_numerically,
)
from nc_theory.certificate import certify

COUNTS = (4, 6, 12, 20)
SMALL = (1, 6, 12, 20)  # class 0 collapses at the optimum
PROBLEMS = {
    "cross entropy": UFM(COUNTS, 1e-2, 1e-3),
    "collapsed": UFM(SMALL, 4e-2, 4e-2),
    "weighted": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(class_weights=1)),
    "LA": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(logit_adjustment=1)),
    "CDT": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(logit_scaling=0.3)),
    "VS": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(logit_adjustment=1, logit_scaling=0.2)),
    "LDAM": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(ldam_margin=0.5)),
    "smoothed": UFM(COUNTS, 1e-2, 1e-3, variant=LossVariant(label_smoothing=0.1)),
    "MSE": UFM(COUNTS, 1e-2, 1e-3, loss="MSE"),
    "MSE, bias": UFM(COUNTS, 1e-2, 1e-3, loss="MSE", bias=True),
    "bias": UFM(COUNTS, 1e-2, 1e-3, bias=True),
    "bias with decay": UFM(COUNTS, 1e-2, 1e-3, bias=True, bias_decay=1e-2),
    "VS, bias with decay": UFM(COUNTS, 1e-2, 1e-3, bias=True, bias_decay=1e-2, variant=LossVariant(0, 1, 0.2)),
    "free": UFM(COUNTS, 1e-2, 1e-3, relu=False),
    "free, LA, bias": UFM(COUNTS, 1e-2, 1e-3, relu=False, bias=True, variant=LossVariant(logit_adjustment=1)),
}


@cache
def optimum_of(name):
    return solve(PROBLEMS[name])


def losses_of(problem, logits, labels):
    """The losses (...,) of logits (..., K) by PyTorch's own cross entropy, in float64."""
    if problem.loss == "MSE":
        return 0.5 * (logits - torch.eye(problem.num_classes, dtype=torch.float64)[labels]).square().sum(-1)
    module = VariantLoss(problem.variant, problem.class_counts, dtype=torch.float64)
    flat = module(logits.flatten(0, -2), labels.expand(logits.shape[:-1]).flatten())
    return flat.reshape(logits.shape[:-1])


def networks(problem, optimum, count, dim, sizes, seed):
    """Features (P, N, d), heads (P, K, d) and biases (P, K) at distances `sizes` (P,) from a minimiser, or anywhere."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(count, *shape, generator=random, dtype=torch.float64)

    labels = torch.repeat_interleave(torch.arange(problem.num_classes), problem.counts.long())
    weight, means = torch.zeros(problem.num_classes, dim).double(), torch.zeros(problem.num_classes, dim).double()
    if dim >= 2 * problem.num_classes:  # near the minimiser, which needs room
        weight, means = optimum.head(dim), optimum.features(dim)
    sizes = torch.as_tensor(sizes, dtype=torch.float64)[:, None, None]
    features = (means + sizes * noise(*means.shape))[:, labels] + sizes * noise(1)[:, :, None] * noise(len(labels), dim)
    features = features.clamp(min=0) if problem.relu else features
    heads = weight + sizes * noise(*weight.shape)
    biases = optimum.bias + sizes[:, 0] * noise(problem.num_classes) if problem.bias else torch.zeros(count, 1)
    return labels, features, heads, biases


def statistics_of(problem, labels, features, heads, biases):
    """Class means (P, K, d), the classes' mean losses (P, K) and scatters (P, K), and F (P,), by definition."""
    one_hot = torch.nn.functional.one_hot(labels).double()
    means = torch.einsum("nk,pnd->pkd", one_hot, features) / problem.counts[:, None]
    losses = losses_of(problem, features @ heads.mT + biases[:, None], labels)
    scatters = (features - means[:, labels]).square().sum(-1) @ one_hot
    penalties = problem.lambda_w * heads.square().sum((1, 2)) + problem.lambda_h * features.square().sum((1, 2))
    values = losses.mean(-1) + 0.5 * penalties + 0.5 * problem.bias_decay * biases.square().sum(1)
    return means, losses @ one_hot / problem.counts, scatters, values


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_shares_sum_to_f_minus_its_minimum(name):
    """20 networks a problem, 300 in all: near the optimum and far from it, with more and with fewer features than K."""
    problem, optimum = PROBLEMS[name], optimum_of(name)
    assert optimum.certified
    for dim, seed in ((9, 0), (2, 1)):
        network = networks(problem, optimum, 10, dim, np.geomspace(1e-5, 3, 10), seed)
        means, losses, scatters, values = statistics_of(problem, *network)
        for number, value in enumerate(values.tolist()):
            bias = network[3][number] if problem.bias else None
            gap = gap_shares(optimum, network[2][number], means[number], losses[number], scatters[number], bias)
            assert gap.total == pytest.approx(value - optimum.lower_bound, rel=1e-9, abs=1e-13)
            assert gap.total == pytest.approx(value - optimum.loss, rel=1e-9, abs=1e-6 * optimum.loss)
            row = gap.columns()
            entropy = problem.irreducible_loss
            relative = (value - entropy) / (optimum.lower_bound - entropy) - 1
            assert row["optimality_gap"] == pytest.approx(relative, rel=1e-9, abs=1e-12)
            assert sum(list(row.values())[1:]) == pytest.approx(gap.total, rel=1e-12)
            assert min(row.values()) > -1e-13 and min(map(torch.min, (gap.margins, gap.duality, gap.within))) > -1e-13
            spread = 0.5 * problem.lambda_h * scatters[number].sum()
            assert row["gap_within"] == pytest.approx(spread.item(), rel=1e-12)


@pytest.mark.parametrize("lam", [1e-6, 1e-10])
@pytest.mark.parametrize("bias", [False, True])
def test_mse_with_tiny_penalties_against_mpmath(lam, bias):
    """Of the residuals z - e_k, which are then about N lam, logits in float64 keep few digits."""
    mp.mp.dps = 50
    counts = (9, 10, 12, 14)
    problem, total = UFM(counts, lam, lam, loss="MSE", bias=bias), sum(counts)
    roots, optimum = [mp.sqrt(n) for n in counts], solve(problem)

    def distances(offset):
        return [mp.norm([(j == k) - offset[j] for j in range(4)]) for k in range(4)]

    def balance(*first):
        """The slopes of the penalties with respect to the bias, whose entries sum to one."""
        offset = [*first, 1 - sum(first)]
        weights = [root / length for root, length in zip(roots, distances(offset), strict=True)]
        return [weights[j] - offset[j] * sum(weights) for j in range(3)]

    offset = [mp.mpf(0)] * 4
    if bias:
        first = list(mp.findroot(balance, [mp.mpf(b) for b in optimum.bias[:3].tolist()]))
        offset = [*first, 1 - sum(first)]
    exact = sum(
        lam * root * length - total * mp.mpf(lam) ** 2 / 2
        for root, length in zip(roots, distances(offset), strict=True)
    )
    assert optimum.certified and abs(optimum.loss / exact - 1) < 1e-14 and abs(optimum.lower_bound / exact - 1) < 1e-14
    labels, features, heads, biases = networks(problem, optimum, 4, 9, [0, 1e-12, 1e-8, 1e-4], 0)
    means, losses, scatters, _ = statistics_of(problem, labels, features, heads, biases)
    for number in range(4):
        weight, b = mp.matrix(heads[number].tolist()), mp.matrix(biases[number].tolist() if bias else [0] * 4)
        value = mp.mpf(0)
        for label, feature in zip(labels.tolist(), features[number].tolist(), strict=True):
            logits = weight * mp.matrix(feature) + b
            logits[label] -= 1
            value += (logits.T * logits)[0] / (2 * total) + mp.mpf(lam) / 2 * sum(mp.mpf(x) ** 2 for x in feature)
        value += mp.mpf(lam) / 2 * sum(x**2 for x in weight)
        offset = biases[number] if bias else None
        gap = gap_shares(optimum, heads[number], means[number], losses[number], scatters[number], offset)
        assert gap.total == pytest.approx(float(value - exact), rel=1e-9, abs=1e-13 * float(exact))


def test_with_smoothed_labels_the_gap_is_relative_to_what_a_network_can_change():
    problem = UFM(COUNTS, 1e-5, 1e-5, variant=LossVariant(label_smoothing=0.99))
    optimum, entropy = solve(problem), problem.irreducible_loss
    zero = gap_shares(optimum, torch.zeros(4, 2), torch.zeros(4, 2), [math.log(4)] * 4, [0.0] * 4)
    relative = (math.log(4) - entropy) / (optimum.loss - entropy) - 1
    assert zero.columns()["optimality_gap"] == pytest.approx(relative) and relative > 1
    assert math.log(4) / optimum.loss - 1 < 1e-3


def test_each_share_is_zero_for_its_property_alone():
    """For the closed form: class means turned towards each other, a scaled head, and noise around the means."""
    problem, optimum = PROBLEMS["cross entropy"], optimum_of("cross entropy")
    weight, means = optimum.head(8), optimum.features(8)

    def row(weight, means, scatter=0.0):
        losses = losses_of(problem, means @ weight.T, torch.arange(4))
        return gap_shares(optimum, weight, means, losses, [scatter] * 4).columns()

    assert max(map(abs, row(weight, means).values())) < 1e-14
    spread = row(weight, means, 1.0)
    assert spread["gap_within"] == pytest.approx(0.5 * problem.lambda_h * 4) and abs(spread["gap_duality"]) < 1e-14
    longer = row(1.1 * weight, means)
    assert longer["gap_duality"] == pytest.approx(0.5 * problem.lambda_w * 0.01 * weight.square().sum().item())
    assert abs(longer["gap_means"]) < 1e-14 < longer["gap_margins"]
    turned = means.clone()
    turned[0] += 0.1 * means[1]
    expected = problem.lambda_h / 3 * math.sqrt(4 * 6) * (turned[0] @ turned[1]).item()  # DESIGN: the closed form
    assert row(weight, turned)["gap_means"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_network_breaks_what_its_gap_proves(name):
    """1,400 networks a problem, 21,000 in all, always. Of W, the distance to the dual of the class means is bounded."""
    problem, optimum = PROBLEMS[name], optimum_of(name)
    sizes = np.tile(np.geomspace(1e-5, 1, 140), 10)
    labels, features, heads, biases = networks(problem, optimum, 1400, 9, sizes, 2)
    means, _, scatters, values = statistics_of(problem, labels, features, heads, biases)
    gaps = values - optimum.lower_bound
    logits = means @ heads.mT + biases[:, None]
    if problem.loss != "MSE":
        logits = logits * torch.from_numpy(problem.loss_parameters.scales)
    own = logits.diagonal(dim1=1, dim2=2)
    margins = own - (logits.sum(2) - own) / 3
    products = means @ means.mT
    optimal = (optimum.WH + optimum.bias[:, None]).T.clone().requires_grad_()
    total = losses_of(problem, optimal, torch.arange(4)) @ problem.counts / problem.counts.sum()
    (gradients,) = torch.autograd.grad(total, optimal)
    distances = (heads + torch.einsum("kj,pkd->pjd", gradients, means) / problem.lambda_w).norm(dim=(1, 2))
    grid = np.geomspace(gaps.min(), gaps.max(), 120)  # a network is compared with the next larger gap on it
    places = np.searchsorted(grid, gaps.numpy() * (1 - 1e-12)).clip(max=len(grid) - 1)
    for place in set(places):
        own, bounds = torch.from_numpy(places == place), gap_bounds(optimum, grid[place])
        slack = 1e-9 * (1 + bounds.margins.abs())
        assert (margins[own] > (bounds.margins - slack)[:, 0]).all()
        assert (margins[own] < (bounds.margins + slack)[:, 1]).all()
        assert (products[own] <= bounds.inner_products * (1 + 1e-9) + 1e-14).all()
        assert (scatters[own].sum(1) <= bounds.within_sum * (1 + 1e-9)).all()
        assert (distances[own] <= bounds.head_distance * (1 + 1e-9) + 1e-6).all()  # the optimum found is rounded


@pytest.mark.parametrize("name", ["cross entropy", "weighted", "LDAM", "smoothed"])
def test_a_margin_between_equal_classes_ends_where_the_binary_divergence_is_spent(name):
    problem, optimum, gap = PROBLEMS[name], optimum_of(name), 1e-4
    bounds = gap_bounds(optimum, gap)
    margins = bounds.optimal_margins
    torch.testing.assert_close(margins, optimum.margins)
    shift = torch.from_numpy(problem.loss_parameters.margins)
    best = torch.sigmoid(margins - shift - math.log(3))
    for label, (low, high) in enumerate(bounds.margins.tolist()):

        def spent(margin, label=label):
            q, p = best[label].item(), torch.sigmoid(margin - shift - math.log(3))[label].item()
            divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            return problem.loss_parameters.weights[label] * divergence - gap * 42 / problem.class_counts[label]

        middle = margins[label].item()
        assert low == pytest.approx(brentq(spent, middle - 9, middle), rel=1e-6)
        assert high == pytest.approx(brentq(spent, middle, middle + 9), rel=1e-6)


def test_the_interval_of_a_margin_is_the_smallest_for_unequal_classes():
    """LA: the ends are those that SciPy's constrained minimiser finds over all logits."""
    problem, optimum, gap = PROBLEMS["LA"], optimum_of("LA"), 1e-3
    bounds = gap_bounds(optimum, gap)
    target = torch.softmax(optimum.WH.T + torch.from_numpy(problem.loss_parameters.offsets), dim=1)[1].numpy()
    coefficients = np.array([-1, 3, -1, -1]) / 3

    def rest(z):
        scores = z + problem.loss_parameters.offsets
        return gap * 42 / 6 - target @ (np.log(target) - scores + np.logaddexp.reduce(scores))

    for end, sign in zip(bounds.margins[1].tolist(), (1, -1), strict=True):
        constraints = {"type": "ineq", "fun": rest}
        options = {"maxiter": 1000, "ftol": 1e-13}
        start = optimum.WH[:, 1].numpy()
        found = minimize(lambda z, s=sign: s * coefficients @ z, start, constraints=constraints, options=options)
        assert sign * found.fun == pytest.approx(end, rel=1e-5)


def test_the_gap_of_the_readme_proves_every_margin_within_two_thirds_of_a_percent():
    optimum = solve(UFM([100, 100, 200, 200, 300, 300, 400, 400, 500, 500], 5e-3, 5e-5))
    bounds = gap_bounds(optimum, 2.8e-6 * optimum.loss)
    assert (bounds.margins / optimum.margins[:, None] - 1).abs().max() == pytest.approx(0.0062, abs=1e-4)
    assert bounds.inner_products[0, 1] / optimum.mean_norms_sq[0] < 6e-4


def test_of_a_collapsed_class_the_norm_is_bounded():
    optimum = optimum_of("collapsed")
    assert optimum.collapsed.tolist() == [True, False, False, False]
    bounded = gap_bounds(optimum, 1e-4).inner_products.isfinite()
    assert bounded.tolist() == (~torch.eye(4).bool() | torch.diag(torch.tensor([1, 0, 0, 0])).bool()).tolist()


def test_a_numerical_optimum_gives_the_shares_of_the_closed_form():
    problem, optimum = PROBLEMS["cross entropy"], optimum_of("cross entropy")
    labels, features, heads, biases = networks(problem, optimum, 1, 9, [0.3], 5)
    means, losses, scatters, _ = statistics_of(problem, labels, features, heads, biases)
    rows = [
        gap_shares(each, heads[0], means[0], losses[0], scatters[0]).columns()
        for each in (optimum, solve_numerically(problem).optimum)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-7)


def test_a_numerical_optimum_is_certified_once(monkeypatch):
    """Its certificate takes seconds for many classes; the shares and what they prove use it again."""
    calls = []
    monkeypatch.setattr("nc_theory.numerical.certify", lambda *a, **b: calls.append(1) or certify(*a, **b))
    monkeypatch.setattr("nc_theory.gap.certify", None)
    optimum = solve(UFM(COUNTS, 1e-2, 1e-3, relu=False))
    gap_shares(optimum, torch.zeros(4, 2), torch.zeros(4, 2), [math.log(4)] * 4, [0.0] * 4)
    gap_bounds(optimum, 1e-3)
    assert len(calls) == 1 and optimum.certified


def test_the_released_formula_has_the_gap_of_its_problem():
    problem = PROBLEMS["cross entropy"]
    arguments = torch.rand(4, 9), torch.rand(4, 9), [1.0] * 4, [0.1] * 4
    rows = [gap_shares(each, *arguments).columns() for each in (released_formula(problem), solve(problem))]
    assert rows[0] == pytest.approx(rows[1])


def test_without_a_bound_there_is_no_gap():
    released = released_formula(UFM([5, 6], 1e-2, 1e-3, bias=True))
    row = gap_shares(released, torch.ones(2, 3), torch.ones(2, 3), [1.0, 1.0], [0.0, 0.0]).columns()
    assert all(map(math.isnan, row.values()))
    bounds = gap_bounds(released, 1.0)
    assert not bounds.margins.isfinite().any() and not bounds.inner_products.isfinite().any()
