"""Parts of the training loop that only a GPU uses in full, and files written beside training, on the CPU."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch

import utils
from datasets import Split
from models import build_model
from objective import Objective
from train_1st_order_unbalanced import Record, TrainingState, make_optimizer, make_step, optimizer_tensors
from utils import GraphedStep, Writer, copy_state, load_torch


def set_up(optimizer="Adam", **flags):
    torch.manual_seed(0)
    split = Split(torch.rand(20, 3, 32, 32), torch.arange(20) % 4, torch.zeros(3))
    model = build_model("MLP", 4, bias=False, depth_relu=1, width=8)
    objective = Objective("CrossEntropy", "paper", 1e-3, 1e-3, True, 20, 4, 8)
    args = SimpleNamespace(
        precision="fp32", clip_grad_norm=None, optimizer=optimizer, lr=1e-2, decay_type="step", patience=5, gamma=0.1,
        batch_size=8, cuda_graph=True, **flags,
    )  # fmt: skip
    chosen, _ = make_optimizer(args, model, objective, torch.device("cpu"))
    record = Record(3, "cpu")
    return model, chosen, record, make_step(args, split, model, objective, chosen, record)


ORDER = torch.randperm(20, generator=torch.Generator().manual_seed(1))


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
    assert torch.equal(record.take()[:2], found[:2])
    for a, b in zip(graphed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_graphed_step_goes_on_from_a_saved_state(tmp_path):
    """On a GPU the step is captured after last.pt is loaded: weights, optimizer and half a record stay as they are."""
    batches = ORDER.split(8)
    model, chosen, record, step = set_up()
    state = TrainingState(model, chosen, torch.optim.lr_scheduler.StepLR(chosen, 5), record, steps=2)
    for rows in batches[:2]:
        step(rows)
    with Writer() as writer:
        state.save(tmp_path, writer)
    step(batches[2])
    expected_model, expected = model, record.take()

    model, chosen, record, step = set_up()
    state = TrainingState(model, chosen, torch.optim.lr_scheduler.StepLR(chosen, 5), record)
    state.load(tmp_path / "last.pt", "cpu")

    def capture(step, rows):
        for _ in range(4):
            step(rows)
        return lambda: step(rows)

    tensors = lambda: [*model.state_dict().values(), *optimizer_tensors(chosen), *record.tensors()]  # noqa: E731
    graphed = GraphedStep(step, [8, 4], tensors, "cpu", capture)
    graphed(batches[2])
    assert (state.epoch, state.steps) == (0, 2) and torch.equal(record.take(), expected)
    for a, b in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_record_holds_sums_over_a_batch():
    record = Record(2, "cpu")
    logits, labels = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    record.add(torch.tensor(0.5), torch.tensor(0.25), logits, labels)
    record.add(torch.tensor(1.0), torch.tensor(2.0), logits[:1], labels[:1])
    assert record.take().tolist() == [[1.5, 0.75, 2.0], [1.0, 2.0, 1.0]]
    record.add(torch.tensor(9.0), torch.tensor(9.0), logits, labels)
    assert record.sums[0].tolist() == [27.0, 27.0, 2.0]


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
