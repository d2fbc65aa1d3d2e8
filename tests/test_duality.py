"""Lower bounds for any loss: against the certificate of the cross entropy, and minima found; the focal loss."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from nc_theory import UFM, FocalLoss, dual_bound, lower_bound, solve

COUNTS = [10, 20, 30, 60]
LAMBDAS = 2e-3, 2e-4
K = len(COUNTS)


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def squared_hinge(logits, labels):
    """Convex in the logits, and zero where the class leads all others by one."""
    own = logits.gather(1, labels[:, None])
    return torch.relu(1 + logits - own).square().sum(1) - 1


def minimum(loss, relu=True, seed=0):
    """Return the least value of (UFM) with one feature a class that L-BFGS-B finds, and its logits (K, K)."""
    generator, dim = np.random.default_rng(seed), 2 * K
    shares = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)

    def value_and_gradient(x):
        x = torch.from_numpy(x).requires_grad_()
        weight, features = x.view(2, K, dim)
        penalties = LAMBDAS[0] * weight.square().sum() + LAMBDAS[1] * torch.tensor(
            COUNTS, dtype=torch.float64
        ) @ features.square().sum(1)
        value = shares @ loss(features @ weight.T, torch.arange(K)) + penalties / 2
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    start = generator.random(2 * K * dim)
    bounds = [(None, None)] * (K * dim) + [(0 if relu else None, None)] * (K * dim)
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-11, "maxcor": 30}
    found = minimize(value_and_gradient, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    weight, features = found.x.reshape(2, K, dim)
    return found.fun, weight @ features.T


@pytest.mark.parametrize("relu", [True, False])
def test_with_its_conjugate_the_cross_entropy_has_the_bound_of_the_certificate(relu):
    """The focal loss at gamma = 0 is the cross entropy; at any logits the two bounds are one number."""
    problem = UFM(COUNTS, *LAMBDAS, relu=relu)
    focal = FocalLoss(0.0)
    for seed in range(5):
        logits = 3 * torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        exact = lower_bound(problem, logits)
        bound = dual_bound(COUNTS, *LAMBDAS, cross_entropy, logits, focal.conjugate, relu=relu)
        assert bound == pytest.approx(exact, rel=1e-10)
        assert dual_bound(COUNTS, *LAMBDAS, focal, logits, focal.conjugate, relu=relu) == pytest.approx(
            exact, rel=1e-10
        )
        assert dual_bound(COUNTS, *LAMBDAS, cross_entropy, logits, relu=relu) <= exact + 1e-15
    optimum = solve(problem)
    assert dual_bound(COUNTS, *LAMBDAS, cross_entropy, optimum.WH, relu=relu) == pytest.approx(optimum.loss, rel=1e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("loss", [squared_hinge, cross_entropy], ids=["squared hinge", "cross entropy"])
def test_values_and_gradients_of_a_convex_loss_certify_its_minimum(loss, relu):
    least, logits = minimum(loss, relu)
    assert 0 <= least / dual_bound(COUNTS, *LAMBDAS, loss, logits, relu=relu) - 1 <= 1e-6
    for seed in range(5):
        other = torch.randn(K, K, generator=torch.Generator().manual_seed(seed))
        assert dual_bound(COUNTS, *LAMBDAS, loss, other, relu=relu) <= least


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_minimum_of_the_focal_loss_is_certified(gamma):
    focal = FocalLoss(gamma)
    least, logits = minimum(focal)
    for conjugate in (None, focal.conjugate):
        assert 0 <= least / dual_bound(COUNTS, *LAMBDAS, focal, logits, conjugate) - 1 <= 1e-6
    other = torch.randn(K, K, generator=torch.Generator().manual_seed(0))
    assert dual_bound(COUNTS, *LAMBDAS, focal, other, focal.conjugate) <= least


@pytest.mark.parametrize("gamma", [0.2, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_its_formula_and_convex_nowhere_far_on_the_wrong_side(gamma):
    logits = torch.randn(6, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) % K
    own = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(FocalLoss(gamma)(logits, labels), -((1 - own) ** gamma) * own.log())
    margins = -4 - 1 / gamma + torch.tensor([[-0.1], [0.0], [0.1]], dtype=torch.float64)
    below, at, above = FocalLoss(gamma)(torch.cat([margins, torch.zeros(3, 1)], 1), torch.zeros(3, dtype=torch.int64))
    assert below + above - 2 * at < 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_conjugate_of_the_focal_loss_is_the_supremum(gamma):
    """Against a search over the margin, at the best split among the other classes, and against random logits."""
    focal, label = FocalLoss(gamma), torch.tensor([0])
    for pull, seed in ((0.01, 0), (0.3, 1), (0.9, 2), (0.99, 3)):
        generator = torch.Generator().manual_seed(seed)
        split = torch.rand(K - 1, generator=generator, dtype=torch.float64)
        split = split / split.sum()
        gradient = torch.cat([torch.tensor([-pull], dtype=torch.float64), pull * split])[None]
        margins = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None]
        logits = torch.cat([margins, split.log().expand(len(margins), -1)], 1)
        reached = (logits @ gradient[0] - focal(logits, torch.zeros(len(margins), dtype=torch.int64))).max()
        found = focal.conjugate(gradient, label)
        assert found.item() == pytest.approx(reached.item(), abs=1e-8)
        random = 5 * torch.randn(10_000, K, generator=generator, dtype=torch.float64)
        assert (random @ gradient[0] - focal(random, torch.zeros(10_000, dtype=torch.int64))).max() <= found + 1e-12


def test_beyond_a_pull_of_one_the_focal_loss_has_no_bound():
    focal, label = FocalLoss(2.0), torch.tensor([0])
    gradients = torch.tensor([[-1.01, 1.01, 0.0], [-0.5, 0.6, -0.1], [-0.5, 0.4, 0.0], [0.5, -0.5, 0.0]])
    assert focal.conjugate(gradients, label.expand(4)).tolist() == [math.inf] * 4
    assert focal.conjugate(torch.zeros(1, 3), label).item() == 0.0
    wrong = -5 * torch.eye(K) + 5  # every sample far on the wrong side, where the slope is steeper than one
    assert dual_bound(COUNTS, 1.0, 1.0, focal, wrong, focal.conjugate) == -math.inf


def test_what_is_no_loss_is_refused():
    logits = torch.eye(K)
    with pytest.raises(ValueError, match="logits have shape"):
        dual_bound(COUNTS, *LAMBDAS, cross_entropy, torch.eye(K + 1))
    with pytest.raises(ValueError, match="the loss returns shape"):
        dual_bound(COUNTS, *LAMBDAS, torch.nn.functional.cross_entropy, logits)
    with pytest.raises(ValueError, match="negative"):
        dual_bound(COUNTS, *LAMBDAS, lambda z, y: z.sum(1) - 9, logits)
    with pytest.raises(ValueError, match="gamma"):
        FocalLoss(-1.0)
