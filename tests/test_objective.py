"""The training loss against literal formulas in float64, and the (UFM) that it corresponds to."""

import json
import math

import pytest
import torch

from datasets import epoch_order
from nc_theory import UFM
from objective import LOSSES, Objective
from utils import UserError, load_function, short_name

N, K, D, B = 22, 4, 6, 8  # the last batch of an epoch has 6


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, K, (N,), generator=generator)
    head = torch.nn.Sequential(torch.nn.Linear(D, K, bias=False, dtype=torch.float64))
    return features, labels, head


def make(kind="paper", loss="CrossEntropy", sep_decay=True, counts=(7, 6, 5, 4), batch_size=B, **flags):
    """The objective of N = 22 samples in K = 4 classes at lambda_W = 0.03, lambda_H = 0.002."""
    decays = {"weight_decay": 0.03, "feature_decay_rate": 0.002} | flags
    return Objective(list(counts), batch_size, D, loss=loss, objective=kind, sep_decay=sep_decay, **decays)


def data_term(loss, weight, feature, label):
    """The loss of a sample, one number at a time."""
    logits = [sum(w * h for w, h in zip(row, feature.tolist(), strict=True)) for row in weight.tolist()]
    if loss == "CrossEntropy":
        return math.log(sum(math.exp(z) for z in logits)) - logits[label]
    return 0.5 * sum((z - (k == label)) ** 2 for k, z in enumerate(logits))


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
@pytest.mark.parametrize("kind", ["paper", "released"])
@pytest.mark.parametrize("size", [B, 6])
def test_value_is_the_literal_formula(problem, loss, kind, size):
    features, labels, head = problem
    h, y, weight = features[:size], labels[:size], head[0].weight
    total, data = make(kind, loss)(head(h), h, y, head)
    mean = sum(data_term(loss, weight, f, int(k)) for f, k in zip(h, y, strict=True)) / size
    weights_sq = sum(w * w for row in weight.tolist() for w in row)
    features_sq = sum(x * x for row in h.tolist() for x in row)
    if kind == "paper":
        expected = mean + 0.03 / 2 * weights_sq + N / size * 0.002 / 2 * features_sq
    elif loss == "CrossEntropy":
        expected = mean / 2 + 0.03 / 2 * weights_sq + 0.002 / 2 * features_sq
    else:  # (1/2) of torch's mean over samples and classes
        elementwise = torch.nn.functional.mse_loss(head(h), torch.eye(K, dtype=torch.float64)[y])
        expected = elementwise.item() / 2 + 0.03 / 2 * weights_sq + 0.002 / 2 * features_sq
    assert data.item() == pytest.approx(mean, rel=1e-12)
    assert total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25, dtype=torch.float64)])
def test_the_scale_of_the_penalties_leaves_the_data_term(problem, scale):
    features, labels, head = problem
    batch = head(features), features, labels, head
    (full, data), (weak, same) = make()(*batch), make()(*batch, scale)
    assert torch.equal(data, same)
    torch.testing.assert_close(weak - data, 0.25 * (full - data))


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
def test_gradient_is_that_of_the_literal_formula(problem, loss):
    features, labels, head = problem
    weight = head[0].weight.detach().requires_grad_()
    logits = features @ weight.T
    one_hot = torch.eye(K, dtype=torch.float64)[labels]
    if loss == "CrossEntropy":
        data = (logits.exp().sum(1).log() - (logits * one_hot).sum(1)).sum() / N
    else:
        data = ((logits - one_hot) ** 2).sum() / (2 * N)
    literal = data + 0.03 / 2 * (weight**2).sum() + 0.002 / 2 * (features**2).sum()
    expected = torch.autograd.grad(literal, [weight, features])
    total, _ = make("paper", loss)(head(features), features, labels, head)
    found = torch.autograd.grad(total, [head[0].weight, features])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
def test_minibatch_gradients_of_an_epoch_average_to_the_full_gradient(problem, loss):
    """Each batch weighted by its share of the samples: the last one is smaller."""
    features, labels, head = problem
    objective, variables = make("paper", loss), [head[0].weight, features]
    full = torch.autograd.grad(objective(head(features), features, labels, head)[0], variables)
    mean = [torch.zeros_like(variable) for variable in variables]
    for rows in epoch_order(N, epoch=1, seed=1).split(B):
        h = features[rows]
        gradient = torch.autograd.grad(objective(head(h), h, labels[rows], head)[0], variables)
        mean = [total + part * len(rows) / N for total, part in zip(mean, gradient, strict=True)]
    for a, b in zip(mean, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
@pytest.mark.parametrize("kind", ["paper", "released"])
def test_effective_decays_make_an_epoch_the_problem(problem, loss, kind):
    """With equal batches, the epoch's mean over the data term's factor is (UFM) at the effective decays."""
    features, labels, head = problem
    features, labels = features[:16], labels[:16]
    objective = make(kind, loss, counts=(4, 4, 4, 4))
    losses = [objective(head(h), h, y, head)[0] for h, y in zip(features.split(B), labels.split(B), strict=True)]
    epoch = (
        sum(losses).item() / 2 / {"paper": 1, "CrossEntropy": 1 / 2, "MSE": 1 / K}[loss if kind == "released" else kind]
    )
    lambda_w, lambda_h = objective.effective_decays()
    literal = sum(data_term(loss, head[0].weight, h, int(y)) for h, y in zip(features, labels, strict=True)) / 16
    literal += lambda_w / 2 * head[0].weight.square().sum().item() + lambda_h / 2 * features.square().sum().item()
    assert epoch == pytest.approx(literal, rel=1e-12)


def test_released_decays_on_the_papers_setting():
    """N = 30,000, batch 256: 118 batches; lambda_H is 59 times smaller than the flag's."""
    decays = {"weight_decay": 1e-4, "feature_decay_rate": 1e-5}
    objective = make("released", counts=[3_000] * 10, batch_size=256, **decays)
    assert objective.effective_decays() == pytest.approx((2e-4, 2e-5 / 118))


def test_without_sep_decay_the_optimizer_decays_all(problem):
    features, labels, head = problem
    objective = make(sep_decay=False)
    total, data = objective(head(features), features, labels, head)
    assert total.item() == data.item()
    assert objective.effective_decays() is None
    assert objective.optimizer_decay == 0.03
    assert make().optimizer_decay == 0.0


def test_every_layer_of_a_deep_head_is_penalised():
    head = torch.nn.Sequential(torch.nn.Linear(D, D, bias=False), torch.nn.Linear(D, K))
    features, labels = torch.zeros(2, D), torch.tensor([0, 1])
    total, data = make()(head(features), features, labels, head)
    expected = 0.015 * (head[0].weight.square().sum() + head[1].weight.square().sum())
    assert (total - data).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_problem_is_that_of_the_effective_decays():
    problem = make("released", batch_size=8).problem()
    assert (problem.lambda_w, problem.lambda_h) == pytest.approx((0.06, 0.004 / 3))
    assert problem.class_counts == (7, 6, 5, 4) and problem.loss == "CrossEntropy" and not problem.bias
    assert make(bias=True).problem().bias and not make(bias=True).nominal_problem().bias
    assert make("released").nominal_problem().lambda_w == 0.03
    recorded = json.loads(json.dumps(make().problems()))
    assert UFM(**recorded["objective"]) == make().problem() and UFM(**recorded["nominal"]) == make().nominal_problem()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"sep_decay": False}, "without --sep_decay no optimum"),
        ({"depth_linear": 2}, "with --depth_linear > 1 an optimum is known only for --loss MSE"),
        ({"depth_linear": 2, "loss": "MSE", "bias": True}, "only for --loss MSE with --no-bias"),
        ({"weight_decay": 0.0}, "without a positive --weight_decay"),
        ({"counts": (30,) * 7}, "the optimum has features in 7 directions, and the model has 6 features"),
    ],
)
def test_a_run_without_a_known_optimum_says_why(flags, words):
    assert words in make(**flags).problem() and words in make(**flags).problems()["objective"]


# ---------------------------------------------------------------------------------------------------------
# Losses of a user's file
# ---------------------------------------------------------------------------------------------------------

OWN = """
import torch
from torch.nn.functional import cross_entropy, mse_loss, one_hot

def samples(logits, labels):
    return cross_entropy(logits, labels, reduction="none")

def total(logits, labels):
    return cross_entropy(logits, labels, reduction="sum")

def mean(logits, labels):
    return cross_entropy(logits, labels)

def matrix(logits, labels):
    return logits.square()

def detached(logits, labels):
    return samples(logits.detach(), labels)

def infinite(logits, labels):
    return samples(logits, labels) / 0

def number(logits, labels):
    return 3.0

def failing(logits, labels):
    raise ValueError("no luck")

something = 3
"""


@pytest.fixture
def own(tmp_path):
    """own(name) is --loss FILE.py:name."""
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path}/own.py:{name}"


@pytest.mark.parametrize("kind", ["paper", "released"])
@pytest.mark.parametrize("name", ["samples", "total"])
@pytest.mark.parametrize("rows", [slice(0, B), slice(0, 3), slice(0, 0)], ids=["batch", "share of a rank", "no share"])
def test_a_loss_of_a_file_is_treated_as_the_cross_entropy(problem, own, kind, name, rows):
    features, labels, head = problem
    h, y = features[:B][rows], labels[:B][rows]
    for found, expected in zip(
        make(kind, own(name))(head(h), h, y, head, batch_size=B),
        make(kind)(head(h), h, y, head, batch_size=B),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    mine, built_in = make(kind, own(name)), make(kind)
    assert mine.data_factor == built_in.data_factor and mine.effective_decays() == built_in.effective_decays()


def test_a_loss_of_a_file_has_its_own_name_and_no_known_optimum(own):
    objective = make(loss=own("samples"))
    objective.check_loss()
    assert objective.criterion.column == short_name(own("samples")) == "own.samples"
    for reason in objective.problems().values():
        assert reason == "no optimum is known for --loss own.samples; docs/losses.md bounds it from below"
    assert {name: loss.column for name, loss in LOSSES.items()} == {"CrossEntropy": "ce", "MSE": "mse"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mean", "together and .* one by one: return the losses of the samples, or their sum"),
        ("matrix", r"returns shape \(5, 4\) for 5 samples"),
        ("detached", "RuntimeError: "),
        ("infinite", "not finite"),
        ("number", "AttributeError"),
        ("failing", "ValueError: no luck"),
        ("something", "own.py: has no function something"),
        ("nothing", "own.py: has no function nothing"),
    ],
)
def test_what_is_no_loss_is_one_line(own, name, words):
    with pytest.raises(UserError, match=words) as error:
        make(loss=own(name)).check_loss()
    assert error.value.status == 2


BROKEN = [
    ("import nothing_of_that_name", "ModuleNotFoundError"),
    ("def f(:", "SyntaxError"),
    ("raise KeyError", "KeyError"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_a_file_that_does_not_run_is_one_line(tmp_path, text, words):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=f"own.py: {words}"):
        load_function(f"{tmp_path}/own.py:f")
    with pytest.raises(UserError, match=r"absent\.py: cannot be read: No such file"):
        load_function(f"{tmp_path}/absent.py:f")


def test_deferred_class_weights_are_the_cross_entropy_before_and_the_weighted_one_after(problem):
    features, labels, head = problem
    batch = head(features), features, labels, head
    deferred = make(class_weights=1.0)
    deferred.use_class_weights(False)
    torch.testing.assert_close(deferred(*batch)[1], make()(*batch)[1], rtol=1e-12, atol=0)
    table = deferred.variant_loss.weights
    deferred.use_class_weights(True)
    assert torch.equal(deferred(*batch)[1], make(class_weights=1.0)(*batch)[1])
    assert deferred.variant_loss.weights is table  # which a CUDA graph reads


def test_as_many_features_as_the_optimum_needs_are_enough():
    """Free features without a bias: K - 1; with ReLU, as many as classes that do not collapse."""
    assert isinstance(make(counts=(30,) * 7, feature_relu=False).problem(), UFM)
    assert isinstance(make(counts=(30,) * 6 + (1,)).problem(), UFM)


def test_mse_with_a_deep_head_has_its_optimum():
    problem = make(loss="MSE", depth_linear=2).problem()
    assert problem.depth_linear == 2 and UFM(**make(loss="MSE", depth_linear=2).problems()["nominal"]) == problem


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, math.log(3)),
        ({"objective": "released"}, math.log(3) / 2),
        ({"loss": "MSE"}, 0.5),
        ({"class_weights": 1.0}, math.log(3)),  # the mean weight of a sample is 1
        ({"label_smoothing": 0.1}, math.log(3)),
    ],
)
def test_loss_of_a_network_of_zeros(flags, expected):
    assert Objective([10, 20, 40], 8, 5, sep_decay=True, **flags).loss_at_zero() == pytest.approx(expected, rel=1e-6)
