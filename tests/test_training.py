"""Parts of the training loop that only a GPU uses in full, and files written beside training, on the CPU."""

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch

import utils
from datasets import Split, epoch_batches
from models import build_model
from objective import Objective
from train_1st_order_unbalanced import (
    Record,
    TrainingState,
    batch_sizes,
    check_finite,
    learning_rate,
    log_line,
    make_optimizer,
    make_step,
    optimizer_tensors,
    penalty_strength,
    set_learning_rate,
)
from utils import GraphedStep, UserError, Writer, copy_state, load_torch


def set_up(optimizer="Adam", **flags):
    torch.manual_seed(0)
    split = Split(torch.rand(20, 3, 32, 32), torch.arange(20) % 4, torch.zeros(3))
    model = build_model("MLP", 4, bias=False, depth_relu=1, width=8)
    objective = Objective("CrossEntropy", "paper", 1e-3, 1e-3, True, 20, 4, 8)
    args = SimpleNamespace(
        precision="fp32", clip_grad_norm=None, optimizer=optimizer, lr=1e-2, adam_beta2=0.9, adam_eps=1e-8,
        amsgrad=False, batch_size=8, cuda_graph=True, stratified=False,
    )  # fmt: skip
    args = SimpleNamespace(**vars(args) | flags)
    chosen = make_optimizer(args, model, objective, torch.device("cpu"))
    record = Record(3, "cpu")
    return model, chosen, record, make_step(args, split, model, objective, chosen, record)


ORDER = torch.randperm(20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stratified, sizes", [(False, {8, 4}), (True, {7, 6})])
def test_the_graphs_are_of_the_sizes_that_an_epoch_has(stratified, sizes):
    args = SimpleNamespace(batch_size=8, stratified=stratified)
    assert batch_sizes(args, 20) == {len(rows) for rows in epoch_batches(ORDER, 8, even=stratified)} == sizes


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_graphed_step_trains_as_the_plain_one(optimizer, steps_before):
    """With a capture that runs the step a few times and then calls it again: the warm-up leaves no trace, the buffers
    of both batch lengths are filled, and the record starts where it was."""
    model, chosen, record, step = set_up(optimizer)
    for rows in ORDER.split(8)[:steps_before]:
        step(rows)
    record.take()
    graphed_model, expected_model = model, copy.deepcopy(model)

    def capture(step, rows):
        for _ in range(4):
            step(rows)  # more often than there are steps in an epoch
        return lambda: step(rows)

    state = lambda: [*model.state_dict().values(), *optimizer_tensors(chosen), *record.tensors()]  # noqa: E731
    before = copy.deepcopy(chosen.state_dict())
    graphed = GraphedStep(step, [8], state, "cpu", capture)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected_model.parameters(), strict=True))
    for kept, tensors in chosen.state_dict()["state"].items():
        for name, tensor in tensors.items():
            was = before["state"].get(kept, {}).get(name)
            assert torch.equal(tensor, was if was is not None else torch.zeros_like(tensor))
    for rows in ORDER.split(8)[:2]:
        graphed(rows)
    found = record.take()

    model, _, record, step = set_up(optimizer)
    for rows in ORDER.split(8)[:steps_before]:
        step(rows)
    record.take()
    for rows in ORDER.split(8)[:2]:
        step(rows)
    for name, column in record.take().items():
        assert torch.equal(column[:2], found[name][:2])
    for a, b in zip(graphed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_graphed_step_goes_on_from_a_saved_state(tmp_path):
    """On a GPU the step is captured after last.pt is loaded: weights, optimizer and half a record stay as they are."""
    batches = ORDER.split(8)
    model, chosen, record, step = set_up()
    state = TrainingState(model, chosen, record, steps=2)
    for rows in batches[:2]:
        step(rows)
    with Writer() as writer:
        state.save(tmp_path, writer)
    step(batches[2])
    expected_model, expected = model, record.take()

    model, chosen, record, step = set_up()
    state = TrainingState(model, chosen, record)
    state.load(tmp_path / "last.pt", "cpu")

    def capture(step, rows):
        for _ in range(4):
            step(rows)
        return lambda: step(rows)

    tensors = lambda: [*model.state_dict().values(), *optimizer_tensors(chosen), *record.tensors()]  # noqa: E731
    graphed = GraphedStep(step, [8, 4], tensors, "cpu", capture)
    graphed(batches[2])
    assert (state.epoch, state.steps) == (0, 2)
    assert all(torch.equal(column, expected[name]) for name, column in record.take().items())
    for a, b in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_record_holds_a_row_a_step():
    record = Record(2, "cpu")
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    record.add(torch.tensor(0.5), torch.tensor(0.25), logits, labels, torch.tensor(7.0))
    record.add(torch.tensor(1.0), torch.tensor(2.0), logits[:1], labels[:1], torch.tensor(8.0))
    columns = {name: column.tolist() for name, column in record.take().items()}
    assert columns == {"size": [3, 1], "loss": [0.5, 1], "data_term": [0.25, 2], "correct": [2, 1], "grad_norm": [7, 8]}
    record.add(torch.tensor(9.0), torch.tensor(9.0), logits, labels, torch.tensor(9.0))
    assert record.rows[0].tolist() == [3, 9, 9, 2, 9]


def log_of(losses, sizes, norms=None):
    columns = {"size": sizes, "loss": losses, "data_term": losses, "correct": [1.0] * len(sizes)}
    columns["grad_norm"] = norms or [1.0] * len(sizes)
    objective = Objective("CrossEntropy", "paper", 1e-3, 1e-3, True, 20, 4, 8)
    return log_line(3, 0.1, objective, {name: torch.tensor(c, dtype=torch.float64) for name, c in columns.items()}, 2.0)


def test_the_log_weighs_batches_by_their_size_and_names_the_largest_gradient():
    line = log_of([1.0, 4.0], [8.0, 2.0], norms=[0.5, 3.0])
    assert line["loss"] == line["ce"] == 1.6 and line["train_acc1"] == 20.0 and line["grad_norm_max"] == 3.0
    assert line["epoch"] == 3 and line["lr"] == 0.1 and line["images_per_second"] == 5.0


@pytest.mark.parametrize(
    "losses, spike",
    [([3, 2, 1], False), ([1, 1.9], False), ([1, 2.1, 1], True), ([4, 1, 1.5, 2.5], True), ([5], False)],
)
def test_a_loss_spikes_when_it_more_than_doubles_within_an_epoch(losses, spike):
    assert log_of([float(loss) for loss in losses], [5.0] * len(losses))["loss_spike"] is spike


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    model = build_model("MLP", 4, depth_relu=1, width=8)
    with pytest.raises(UserError, match="loss is not finite in epoch 3, step 2"):
        check_finite(3, torch.tensor([1.0, math.inf, math.nan]), model)
    check_finite(3, torch.ones(3), model)
    model.fc[0].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="weights are not finite in epoch 3, step 3"):
        check_finite(3, torch.ones(3), model)


def rates(**flags):
    args = SimpleNamespace(**{"lr": 8.0, "gamma": 0.5, "patience": 2, "epochs": 6, "warmup_epochs": 0} | flags)
    return [learning_rate(args, epoch) for epoch in range(1, args.epochs + 1)]


def test_learning_rates():
    assert rates(decay_type="step") == [8, 8, 4, 4, 2, 2]
    assert rates(decay_type="step_1_4") == [8, 4, 4, 4, 2, 2]
    halfway = 8 * (1 + math.cos(math.pi / 4)) / 2
    assert rates(decay_type="cosine") == pytest.approx([8, 8, 8, halfway, 4, 8 - halfway])
    assert rates(decay_type="step", warmup_epochs=4) == [2, 4, 6, 8, 2, 2]


def test_penalties_rise_to_their_full_size():
    strengths = [penalty_strength(SimpleNamespace(penalty_warmup_epochs=4), epoch) for epoch in range(1, 7)]
    assert strengths == [0, 0.25, 0.5, 0.75, 1, 1]
    assert penalty_strength(SimpleNamespace(penalty_warmup_epochs=0), 1) == 1


@pytest.mark.parametrize("decay_type", ["step", "step_3_7"])
def test_steps_of_the_learning_rate_are_those_of_torch(decay_type):
    args = SimpleNamespace(lr=0.3, gamma=0.1, patience=3, epochs=12, warmup_epochs=0, decay_type=decay_type)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedulers = torch.optim.lr_scheduler
    scheduler = (
        schedulers.StepLR(optimizer, 3, 0.1)
        if decay_type == "step"
        else schedulers.MultiStepLR(optimizer, [3, 7], gamma=0.1)
    )
    for epoch in range(1, 13):
        assert learning_rate(args, epoch) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_learning_rate_is_set_in_place(kind):
    lr = kind(1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    set_learning_rate(optimizer, 0.25)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25
    assert not isinstance(lr, torch.Tensor) or optimizer.param_groups[0]["lr"] is lr


def test_adam_takes_its_flags():
    _, adam, _, _ = set_up(adam_beta2=0.5, adam_eps=0.25, amsgrad=True)
    group = adam.param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"], group["fused"]) == ((0.9, 0.5), 0.25, True, True)


def test_a_clipped_gradient_is_logged_as_it_was():
    """SGD's first step has length lr times the clipped norm; the record has the norm before."""
    model, _, record, step = set_up("SGD", clip_grad_norm=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(ORDER[:8])
    moved = sum((a.detach() - b).square().sum() for a, b in zip(model.parameters(), before, strict=True)).sqrt()
    assert float(moved) == pytest.approx(1e-2 * 0.01, rel=1e-3)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3) and float(record.take()["grad_norm"][0]) > 0.02


def test_files_are_written_in_order_while_the_caller_goes_on(tmp_path, monkeypatch):
    real = utils.save_torch

    def slow(path, state):
        time.sleep(0.2)
        real(path, state)

    monkeypatch.setattr(utils, "save_torch", slow)
    weights = {"w": torch.zeros(3)}
    with Writer() as writer:
        began = time.monotonic()
        writer.save(tmp_path / "a.pth", copy_state(weights))
        assert time.monotonic() - began < 0.1
        weights["w"] += 1  # training goes on; the file has the weights of before
        writer.save(tmp_path / "b.pth", copy_state(weights))
        assert (tmp_path / "a.pth").exists()
    assert load_torch(tmp_path / "a.pth")["w"].tolist() == [0, 0, 0]
    assert load_torch(tmp_path / "b.pth")["w"].tolist() == [1, 1, 1]


def test_an_error_of_the_writing_thread_comes_up(tmp_path):
    with pytest.raises(FileNotFoundError), Writer() as writer:
        writer.save(tmp_path / "nowhere" / "a.pth", {})


def test_copy_state_is_deep():
    state = {"a": [torch.zeros(2), {"b": torch.zeros(1)}], "c": (1, "x")}
    copied = copy_state(state)
    state["a"][0] += 1
    state["a"][1]["b"] += 1
    assert copied["a"][0].tolist() == [0, 0] and copied["a"][1]["b"].tolist() == [0] and copied["c"] == [1, "x"]
