"""Optima that other papers publish, against the solver: see docs/checks.md."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from nc_theory import UFM, closed_form, collapse_count, seli, solve

# ---------------------------------------------------------------------------------------------------------
# Hong and Ling, JMLR 2024, arXiv 2309.09725: cross entropy with a bias and free features
# ---------------------------------------------------------------------------------------------------------


def imbalanced(large, penalty):
    """The optimum for `large` classes of 500 samples and the others of 100, K = 10, at their penalty l."""
    counts = [500] * large + [100] * (10 - large)
    return solve(UFM(counts, 10 * penalty, penalty / 10, relu=False, bias=True, bias_decay=0.02))


def minority_spread(optimum):
    """The distance between the logits of two minority classes."""
    return (optimum.WH[:, -1] - optimum.WH[:, -2]).norm().item()


@pytest.mark.parametrize("large, merges, vanishes", [(5, 1 / 300, 0.0075), (3, 1 / 220, 0.0102)])
def test_minority_classes_merge_at_the_published_penalty(large, merges, vanishes):
    """Their theorem: at l = sqrt(n_min) / N, which is where solutions change from distinct to equal."""
    low, high = 0.9 * merges, 1.1 * merges
    while high - low > 4e-7 * merges:
        middle = (low + high) / 2
        optimum = imbalanced(large, middle)
        assert optimum.certified
        low, high = (middle, high) if minority_spread(optimum) > 1e-9 else (low, middle)
    assert (low + high) / 2 == pytest.approx(merges, rel=1e-6)
    assert imbalanced(large, 0.98 * vanishes).WH.norm() > 1e-3 and imbalanced(large, vanishes).collapsed.all()


@pytest.mark.parametrize(
    "large, below, above", [(5, (0.0027, 0.0030, 0.0033), 0.0039), (3, (0.0037, 0.0041, 0.0045), 0.0053)]
)
def test_their_sweeps_lie_around_it(large, below, above):
    assert all(minority_spread(imbalanced(large, penalty)) > 0.1 for penalty in below)
    assert minority_spread(imbalanced(large, above)) < 1e-6


# ---------------------------------------------------------------------------------------------------------
# Dang et al., ICML 2023, arXiv 2301.00437: MSE and several linear layers
# ---------------------------------------------------------------------------------------------------------


def deep_loss(x, counts, depth, lambda_w, lambda_h):
    """The problem written out in matrices, and its gradient: `depth` matrices (K, K) and one feature a class."""
    matrices = torch.from_numpy(x).reshape(depth + 1, len(counts), len(counts)).requires_grad_()
    *layers, features = matrices
    logits = features
    for layer in layers:
        logits = layer @ logits
    weights = counts / counts.sum()
    value = 0.5 * weights @ (logits - torch.eye(len(counts))).square().sum(0)
    value = value + 0.5 * lambda_w * sum(layer.square().sum() for layer in layers)
    value = value + 0.5 * lambda_h * counts @ features.square().sum(0)
    value.backward()
    return value.item(), matrices.grad.numpy().ravel()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mse_of_several_linear_layers(depth):
    """Gradient descent never ends below the closed form, and from the best of six starts ends at it."""
    counts, lambda_w, lambda_h = torch.tensor([200.0, 100, 50, 10], dtype=torch.float64), 2e-2, 1e-4
    optimum = closed_form(UFM(counts, lambda_w, lambda_h, loss="MSE", depth_linear=depth))
    random = np.random.default_rng(0)
    arguments = counts, depth, lambda_w, lambda_h
    starts = [random.standard_normal((depth + 1) * 16) for _ in range(6)]
    ends = [minimize(deep_loss, x, args=arguments, jac=True, options={"gtol": 1e-10}).fun for x in starts]
    assert min(ends) == pytest.approx(optimum.loss, rel=1e-7)


def test_the_published_scalar_problem():
    """n/(2N) (1-z)^2 + ((L+1)/2) (lambda_W^L lambda_H n)^(1/(L+1)) z^(2/(L+1)) on a fine grid, and the jump to zero."""
    counts, grid = np.array([200.0, 100, 50, 50]), np.linspace(0, 1, 200_001)
    for depth in (1, 2, 4):
        for penalty in (1e-4, 1e-3, 3e-3, 1e-2):
            found = closed_form(UFM(counts, penalty, penalty, loss="MSE", depth_linear=depth))
            cost = (penalty ** (depth + 1) * counts) ** (1 / (depth + 1))
            power = grid[:, None] ** (2 / (depth + 1))
            values = counts / counts.sum() / 2 * (1 - grid[:, None]) ** 2 + (depth + 1) / 2 * cost * power
            assert found.loss == pytest.approx(values.min(0).sum(), rel=1e-8)
            np.testing.assert_allclose(found.margins, grid[values.argmin(0)], atol=1e-5)
            alive = found.margins[found.margins > 0].numpy()
            assert (alive >= (depth - 1) / depth).all()
    two_layers = closed_form(UFM([200, 100, 50, 50], 2e-3, 2e-4, loss="MSE", depth_linear=2))
    np.testing.assert_allclose(two_layers.margins, [0.989103, 0.982664, 0.972384, 0.972384], atol=5e-7)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_class_collapses_at_the_jump(depth):
    problem = UFM([200, 100, 50, 50], 1e-2, 1e-2, loss="MSE", depth_linear=depth)
    count = collapse_count(problem)
    edges = [
        UFM([400 - count * f, count * f], 1e-2, 1e-2, loss="MSE", depth_linear=depth) for f in (1 - 1e-9, 1 + 1e-9)
    ]
    assert [closed_form(edge).collapsed[1].item() for edge in edges] == [True, False]
    assert closed_form(edges[1]).margins[1].item() == pytest.approx((depth - 1) / depth, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Other geometries
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_seli_has_the_published_singular_values(ratio):
    """Thrampoulidis et al. 2022, arXiv 2208.05512: (R, 1/2)-STEP imbalance of K classes, in units of sqrt(n_min)."""
    num_classes = 8
    _, gram = seli([ratio] * (num_classes // 2) + [1] * (num_classes // 2))
    expected = [0.0, *[1.0] * 3, math.sqrt((ratio + 1) / 2), *[math.sqrt(ratio)] * 3]
    np.testing.assert_allclose(torch.linalg.eigvalsh(gram), sorted(expected), atol=1e-12)


def test_multivariate_regression_collapses_as_published():
    """Andriopoulos et al. 2024, arXiv 2409.04180 (NRC3); their penalty of the features is (lambda_H / (2M)) |H|^2."""
    random = np.random.default_rng(0)
    targets = random.standard_normal((40, 3)) @ np.diag([1.0, 2.0, 0.7]) + [1, 2, 3]
    lambda_h, lambda_w = 0.05, 0.02
    problem = UFM([1] * 40, lambda_w, lambda_h / 40, loss="MSE", relu=False, bias=True, labels=targets)
    optimum = solve(problem)
    values, vectors = np.linalg.eigh(np.cov(targets.T, bias=True))
    root = vectors * np.sqrt(values) @ vectors.T
    expected = math.sqrt(lambda_h / lambda_w) * (root - math.sqrt(lambda_h * lambda_w) * np.eye(3))
    assert optimum.certified and optimum.method == "numerical"
    np.testing.assert_allclose(optimum.WWT, expected, atol=1e-6)
    np.testing.assert_allclose(optimum.bias, targets.mean(0), atol=1e-6)


@pytest.mark.parametrize("num_classes, published", [(5, 0.69098), (8, 0.29289), (12, 0.13397)])
def test_more_classes_than_features_on_the_circle(num_classes, published):
    """Jiang et al. 2024, arXiv 2310.05351: unit features and weights in d = 2; the temperature divides the logits."""
    classes, temperature = np.arange(num_classes), 0.2

    def losses(x):
        weights, features = np.split(x, 2)
        logits = np.cos(features[:, None] - weights) / temperature
        return np.mean(np.logaddexp.reduce(logits, axis=1) - logits[classes, classes])

    start = 2 * np.pi * classes / num_classes + 0.1 * np.random.default_rng(0).standard_normal(num_classes)
    weights, features = np.split(minimize(losses, np.tile(start, 2), options={"gtol": 1e-9}).x, 2)
    cosines = np.cos(features[:, None] - weights)
    margins = cosines[classes, classes] - np.where(np.eye(num_classes), -1, cosines).max(1)
    np.testing.assert_allclose(margins, published, atol=1e-4)


def whole_network_loss(x, shapes, penalty):
    """MSE of a ReLU network on one free feature >= 0 a class, all of it penalised, and its gradient."""
    point = torch.from_numpy(x.copy()).requires_grad_()
    features, *layers = (part.view(shape) for part, shape in zip(parts_of(point, shapes), shapes, strict=True))
    logits = layers[-1] @ hidden_features(features, layers)[-1]
    value = (
        0.5 * (logits - torch.eye(shapes[-1][0])).square().sum() / shapes[-1][0] + penalty / 2 * point.square().sum()
    )
    value.backward()
    return value.item(), point.grad.numpy()


def parts_of(point, shapes):
    return point.split([rows * columns for rows, columns in shapes])


def hidden_features(features, layers):
    found = [features.relu()]
    for layer in layers[:-1]:
        found.append((layer @ found[-1]).relu())
    return found


def test_with_decay_of_the_whole_network_collapse_is_not_the_optimum():
    """Sukenik et al. 2024, arXiv 2405.14468: K = 10, five layers, one sample a class; of lower rank and loss."""
    num_classes, depth, width, penalty = 10, 5, 20, 4e-4
    collapsed = closed_form(UFM([1] * num_classes, penalty, penalty, loss="MSE", depth_linear=depth))
    shapes = [(width, num_classes), *[(width, width)] * (depth - 1), (num_classes, width)]
    random = np.random.default_rng(0)
    start = [random.standard_normal(rows * columns) * math.sqrt(2 / columns) for rows, columns in shapes]
    options = {"maxiter": 1500, "maxfun": 3000}
    found = minimize(
        whole_network_loss, np.concatenate(start), (shapes, penalty), "L-BFGS-B", jac=True, options=options
    )
    assert found.fun < 0.9 * collapsed.loss and not collapsed.collapsed.any()
    parts = parts_of(torch.from_numpy(found.x), shapes)
    features, *layers = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    ranks = [torch.linalg.matrix_rank(part, rtol=1e-2).item() for part in hidden_features(features, layers)]
    assert min(ranks) < num_classes == collapsed.directions
    assert (layers[-1] @ hidden_features(features, layers)[-1]).argmax(0).tolist() == list(range(num_classes))


def test_spectral_descent_learns_all_classes_at_the_same_rate():
    """Vasudeva et al. 2025, arXiv 2510.22980: d = K = 3, W_cc = min(eta t, s_yx / s_xx); gradient descent does not."""
    priors, noise, rate = np.array([0.5, 0.3, 0.2]), 0.1, 1e-3
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]  # the class means, of length one
    s_xx, s_yx = priors + noise**2, priors
    second_moments, targets = basis * s_xx @ basis.T, s_yx[:, None] * basis.T
    spectral, plain = np.zeros((3, 3)), np.zeros((3, 3))
    for step in range(1, 1501):
        left, _, right = np.linalg.svd(spectral @ second_moments - targets)
        spectral = spectral - rate * left @ right
        plain = plain - rate * (plain @ second_moments - targets)
        if step % 100 == 0:
            expected = np.diag(np.minimum(rate * step, s_yx / s_xx))
            np.testing.assert_allclose(spectral @ basis, expected, atol=1.01 * rate)
            expected = np.diag((1 - (1 - rate * s_xx) ** step) * s_yx / s_xx)
            np.testing.assert_allclose(plain @ basis, expected, atol=1e-12)


@pytest.mark.parametrize("counts", [(3, 3, 3), (2, 3, 9), (2, 2, 14)])
def test_supervised_contrastive_features_after_relu_are_an_orthogonal_frame(counts):
    """Kini et al. 2023, arXiv 2306.07960: whatever the class counts."""
    labels, dim, temperature = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)), 6, 0.5
    other = ~torch.eye(len(labels), dtype=torch.bool)
    positive = (labels[:, None] == labels) & other

    def normalised(x):
        features = torch.as_tensor(x).view(len(labels), dim)
        return features / features.norm(dim=1, keepdim=True)

    def loss(x):
        point = torch.from_numpy(x.copy()).requires_grad_()
        similarities = normalised(point) @ normalised(point).T / temperature
        logits = similarities - similarities.masked_fill(~other, -math.inf).logsumexp(1, keepdim=True)
        value = -((logits * positive).sum(1) / positive.sum(1)).mean()
        value.backward()
        return value.item(), point.grad.numpy()

    start = np.random.default_rng(0).random(len(labels) * dim)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    gram = normalised(found.x) @ normalised(found.x).T
    np.testing.assert_allclose(gram, (labels[:, None] == labels).double(), atol=1e-3)


@pytest.mark.parametrize("relu", [True, False])
def test_next_token_logits_tend_to_the_log_probabilities(relu):
    """Zhao et al. 2024, arXiv 2408.15417: centred on a context's support, as the penalties vanish; the other logits
    fall below them without end."""
    labels = np.array([[30, 10, 60, 0, 0], [0, 5, 40, 5, 0], [20, 0, 0, 10, 70], [5, 5, 5, 5, 5]])
    worst, apart = [], []
    for penalty in (1e-3, 1e-4, 1e-5):
        optimum = solve(UFM(labels=labels, lambda_w=penalty, lambda_h=penalty, relu=relu))
        assert optimum.certified
        errors, distances = [], []
        for row, logits in zip(labels, optimum.WH.T.numpy(), strict=True):
            expected, found = np.log(row[row > 0]), logits[row > 0]
            errors.append(np.abs(found - found.mean() - expected + expected.mean()).max())
            distances.append(found.min() - logits[row == 0].max(initial=-math.inf))
        worst.append(max(errors))
        apart.append(min(distances))
    assert worst[1] < worst[0] / 3 and worst[2] < worst[1] / 3 and worst[2] < 0.01
    assert 0 < apart[0] < apart[1] < apart[2]
