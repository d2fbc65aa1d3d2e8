"""Optimizers: the steps of ours against their formulas, exact resume of all, arguments, and those of a user's file."""

import copy
import math

import pytest
import torch

from engine.checkpoints import Checkpoints, load_optimizer
from engine.optim import NOT_FROM_ZERO, OPTIMIZERS, is_capturable, make_optimizer
from engine.run import Run
from tests.conftest import training_of
from utils import UserError

GRADIENTS = [[0.5, -2.0, 0.0], [-0.4, 1.0, 3.0], [0.1, 0.0, -1.0]]


def steps_of(optimizer, lr=0.1, weight_decay=0.2, arguments=None, gradients=GRADIENTS):
    """Return a parameter that starts at 1, 2, 3 after a step with each of the gradients."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    made = make_optimizer([parameter], optimizer=optimizer, lr=lr, weight_decay=weight_decay, arguments=arguments)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        made.step()
    return parameter.tolist()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", ["SGDW", "Signum"])
def test_sgdw_and_signum_are_their_formulas(name, momentum):
    expected = []
    for value, gradients in zip([1.0, 2.0, 3.0], zip(*GRADIENTS, strict=True), strict=True):
        buffer = 0.0
        for gradient in gradients:
            buffer = momentum * buffer + gradient
            direction = buffer if name == "SGDW" else math.copysign(1, buffer) if buffer else 0.0
            value = (1 - 0.1 * 0.2) * value - 0.1 * direction
        expected.append(value)
    assert steps_of(name, arguments=f"momentum={momentum}") == pytest.approx(expected, rel=1e-14)


def test_without_decay_sgdw_is_sgd_and_adamw_is_adam():
    assert steps_of("SGDW", weight_decay=0.0) == pytest.approx(steps_of("SGD", weight_decay=0.0), rel=1e-14)
    assert steps_of("AdamW", weight_decay=0.0) == pytest.approx(steps_of("Adam", weight_decay=0.0), rel=1e-14)


def test_muon_orthogonalises_the_matrices_of_the_body_alone():
    """Its first step has singular values near 0.2 sqrt(max(m, n)) lr; the head and the biases get AdamW's."""
    body, head = torch.nn.Linear(6, 9), torch.nn.Linear(9, 3, bias=False)
    before = [parameter.detach().clone() for parameter in (body.weight, body.bias, head.weight)]
    parameters = [*body.parameters(), *head.parameters()]
    made = make_optimizer(parameters, optimizer="Muon", lr=0.01, weight_decay=0.0, head=head.parameters())
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    matrix, bias, last = (old - new for old, new in zip(before, (body.weight, body.bias, head.weight), strict=True))
    values = torch.linalg.svdvals(matrix.detach()) / (0.01 * 0.2 * math.sqrt(9))
    assert values.min() > 0.6 and values.max() < 1.3
    for step in (bias, last):  # the first step of Adam is the sign of the gradient
        torch.testing.assert_close(step.detach().abs(), torch.full_like(step, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_exactly(name, tmp_path):
    """Three steps, of which the last two follow a save and a load, are those of an uncut run."""
    flags = ("--optimizer", name) if name == "Rprop" else ("--optimizer", name, "--no-sep_decay")
    flags += ("--lr", "0.001", "--weight_decay", "0.0" if name == "Rprop" else "0.1")
    batches, whole, cut = torch.arange(20).split(8), training_of(*flags), training_of(*flags)
    whole.step(batches[0])
    with Checkpoints(Run(tmp_path), whole.state, epochs=9, save_every=1) as checkpoints:
        checkpoints.save_state()
    Checkpoints(Run(tmp_path), cut.state, epochs=9, save_every=1).load_state("cpu")
    for indices in batches[1:]:
        assert torch.equal(whole.step(indices), cut.step(indices))
    for first, second in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_optimizers_whose_state_does_not_start_at_zero_are_not_captured():
    assert {"ASGD", "NAdam", "Rprop"} == set(NOT_FROM_ZERO) and not any(map(is_capturable, NOT_FROM_ZERO))
    assert is_capturable("SGD") and not is_capturable("SGD", "dampening=0.1")
    assert not is_capturable("Muon") and not is_capturable("my.py:make")


@pytest.mark.parametrize(
    ("saved", "other"), [("Adam", "SGD"), ("SGD", "Adam"), ("Adam", "Adamax"), ("SGD", "Adafactor")]
)
def test_the_state_of_another_optimizer_is_refused(saved, other):
    first, second = training_of("--optimizer", saved), training_of("--optimizer", other)
    first.step(torch.arange(8))
    with pytest.raises((ValueError, KeyError)):
        load_optimizer(second.optimizer, copy.deepcopy(first.optimizer.state_dict()))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--optimizer SGD --optimizer_args speed=3",
            ["--optimizer SGD speed=3", "unexpected keyword argument"],
        ),
        ("--optimizer Adam --optimizer_args eps=-1", ["--optimizer Adam eps=-1", "Invalid epsilon"]),
        ("--optimizer Rprop --no-sep_decay", ["--optimizer Rprop", "no weight decay"]),
        ("--optimizer Muon --model ResNet18 --planes 2", ["--optimizer Muon", "no matrices", "--model MLP"]),
        ("--optimizer nothing.py:make", ["nothing.py", "No such file"]),
    ],
)
def test_what_an_optimizer_does_not_take_is_one_line(flags, words):
    with pytest.raises(UserError) as error:
        training_of(*flags.split())
    assert error.value.status == 2 and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 3", "returns int, wanted a torch.optim.Optimizer"),
        ("return torch.optim.SGD(parameters[:1], lr=lr)", "does not have all parameters"),
        ("return torch.optim.SGD(parameters, lr=lr, colour=1)", "unexpected keyword argument"),
        ("raise RuntimeError('no luck')", "no luck"),
    ],
)
def test_a_function_that_makes_no_optimizer_is_one_line(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"import torch\ndef make(parameters, lr, weight_decay):\n    {body}\n")
    with pytest.raises(UserError, match=words):
        training_of("--optimizer", f"{tmp_path}/mine.py:make")
