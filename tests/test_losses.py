"""The loss family against the formulas of its papers, written in NumPy float64, for training and for the solver."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nc_theory import UFM, LossVariant, VariantLoss

COUNTS = np.array([7.0, 90.0, 30.0, 12.0])
ALL = LossVariant(class_weights=0.7, logit_adjustment=1.1, logit_scaling=0.3, ldam_margin=0.5, label_smoothing=0.1)
PRIORS = COUNTS / COUNTS.sum()


def log_softmax(scores):
    return scores - np.logaddexp.reduce(scores)


def weighted(f, y):
    """Weighted cross entropy, weights 1/n_y with mean 1 over the samples."""
    return -log_softmax(f)[y] / COUNTS[y] * COUNTS.sum() / len(COUNTS)


def logit_adjusted(f, y):
    return -log_softmax(f + 1.5 * np.log(PRIORS))[y]


def class_dependent_temperatures(f, y):
    return -log_softmax(f * (COUNTS / COUNTS.max()) ** 0.3)[y]


def vector_scaling(f, y):
    return -log_softmax(f * (COUNTS / COUNTS.max()) ** 0.2 + np.log(PRIORS))[y]


def ldam(f, y):
    """z_y - Delta_y against the other logits; Delta_j = C / n_j^(1/4) scaled to a largest margin of 0.5."""
    delta = COUNTS**-0.25 * 0.5 / (COUNTS**-0.25).max()
    own, others = math.exp(f[y] - delta[y]), sum(math.exp(f[j]) for j in range(4) if j != y)
    return -math.log(own / (own + others))


def smoothed(f, y):
    targets = np.full(4, 0.1 / 4)
    targets[y] += 0.9
    return -targets @ log_softmax(f)


def whole_family(f, y):
    weights = COUNTS.sum() * COUNTS**-0.7 / (COUNTS**0.3).sum()
    scores = f * (COUNTS / COUNTS.max()) ** 0.3 + 1.1 * np.log(PRIORS)
    scores[y] -= 0.5 * (COUNTS.min() / COUNTS[y]) ** 0.25
    return -weights[y] * (np.full(4, 0.1 / 4) + 0.9 * np.eye(4)[y]) @ log_softmax(scores)


FORMULAS = {
    weighted: LossVariant(class_weights=1),
    logit_adjusted: LossVariant(logit_adjustment=1.5),
    class_dependent_temperatures: LossVariant(logit_scaling=0.3),
    vector_scaling: LossVariant(logit_adjustment=1, logit_scaling=0.2),
    ldam: LossVariant(ldam_margin=0.5),
    smoothed: LossVariant(label_smoothing=0.1),
    whole_family: ALL,
}


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return 4 * random.standard_normal((25, 4)), random.integers(0, 4, 25)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_each_loss_is_the_formula_of_its_paper(formula, batch):
    logits, labels = batch
    expected = np.array([formula(f.copy(), y) for f, y in zip(logits, labels, strict=True)])
    module = VariantLoss(FORMULAS[formula], COUNTS, dtype=torch.float64)
    trained = module(torch.from_numpy(logits), torch.from_numpy(labels))
    solved, _ = FORMULAS[formula].parameters(COUNTS).losses_and_residuals(logits, labels)
    atol = 1e-14  # logits are below 16: a small loss is their difference, and has their rounding
    np.testing.assert_allclose(trained.numpy(), expected, rtol=1e-12, atol=atol)
    np.testing.assert_allclose(solved, expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("variant", [*FORMULAS.values(), LossVariant()], ids=str)
def test_gradients(variant, batch):
    logits, labels = torch.from_numpy(batch[0]).requires_grad_(), torch.from_numpy(batch[1])
    module = VariantLoss(variant, COUNTS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: module(z, labels), [logits])
    (expected,) = torch.autograd.grad(module(logits, labels).sum(), logits)
    parameters = variant.parameters(COUNTS)
    found = parameters.gradients(parameters.losses_and_residuals(*batch)[1], batch[1])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-11, atol=1e-14)


def test_without_any_variant_it_is_the_cross_entropy_to_the_bit(batch):
    logits, labels = torch.from_numpy(batch[0]).float(), torch.from_numpy(batch[1])
    assert LossVariant().is_plain and not ALL.is_plain
    assert torch.equal(
        VariantLoss(LossVariant(), COUNTS)(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    )


def test_training_never_reads_a_value():
    """On the meta device, where tensors have no values, reading one is an error."""
    module = VariantLoss(ALL, COUNTS).to("meta")
    losses = module(torch.empty(9, 4, device="meta"), torch.empty(9, dtype=torch.int64, device="meta"))
    assert losses.shape == (9,) and losses.is_meta


def test_tables_are_no_part_of_a_checkpoint():
    assert not VariantLoss(ALL, COUNTS).state_dict()


def test_half_precision_logits_give_float_losses(batch):
    logits, labels = torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
    exact = VariantLoss(ALL, COUNTS, dtype=torch.float64)(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = VariantLoss(ALL, COUNTS)(logits.bfloat16(), labels)
    assert losses.dtype == torch.float32
    # bfloat16 has 8 bits, the logits are below 16, and a loss has slope of at most its weight by each of two logits
    assert (losses - exact).abs().max() < 2 * 16 * 2**-8 * VariantLoss(ALL, COUNTS).weights.max()


def test_the_mean_weight_of_a_sample_is_one():
    for exponent in (0.0, 0.5, 1.0, 30.0):
        weights = LossVariant(class_weights=exponent).parameters(COUNTS).weights
        assert COUNTS @ weights == pytest.approx(COUNTS.sum(), rel=1e-12)
    assert LossVariant(class_weights=300).parameters([1, 10**9]).weights.tolist() == [pytest.approx(10**9 + 1), 0]


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(size):
    """Losses that are tiny keep their digits, and losses that are huge are finite."""
    logits = np.array([[size, 0.0, 0, 0], [0.0, size, 0, 0]])
    losses, residuals = LossVariant().parameters(COUNTS).losses_and_residuals(logits, np.array([0, 0]))
    assert losses.tolist() == [pytest.approx(3 * math.exp(-size), rel=1e-12), pytest.approx(size, rel=1e-15)]
    np.testing.assert_allclose(residuals[1], [-1, 1, 0, 0], atol=1e-40)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"class_weights": math.nan}, "class_weights must be >= 0 and finite, got nan"),
        ({"logit_adjustment": math.inf}, "logit_adjustment must be >= 0 and finite"),
        ({"logit_scaling": -0.1}, "logit_scaling must be >= 0 and finite, got -0.1"),
        ({"ldam_margin": -1}, "ldam_margin must be >= 0"),
        ({"label_smoothing": 1}, "label_smoothing must be below 1, got 1.0"),
    ],
)
def test_bad_values_are_a_one_line_error(values, message):
    with pytest.raises(ValueError, match=message) as error:
        LossVariant(**values)
    assert "\n" not in str(error.value)


def test_a_problem_with_a_variant_goes_to_json_and_back():
    problem = UFM([5, 6], 1e-3, 1e-4, variant=ALL)
    assert UFM(**json.loads(json.dumps(dataclasses.asdict(problem)))) == problem
    with pytest.raises(ValueError, match="for the cross entropy, not for MSE"):
        UFM([5, 6], 1e-3, 1e-4, loss="MSE", variant=ALL)
