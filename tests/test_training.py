"""The training step and its CUDA graph on the CPU, the log of an epoch, schedules, last.pt, and class accuracies."""

import copy
import gc
import math
import re
import threading
import traceback
import weakref
from functools import partial

import pytest
import torch

import engine.checkpoints as checkpoint_files
from datasets import Data, Split
from engine.checkpoints import Checkpoints, load_optimizer, load_torch, to_host
from engine.cuda_graph import GraphedStep
from engine.device import pick_device
from engine.measurement import ClassAccuracy, top5
from engine.optim import OPTIMIZERS, Schedule, is_capturable, make_optimizer, set_learning_rate
from engine.run import Run
from engine.step_log import MEASURED, STEP_COLUMNS, check_finite, epoch_means
from models import build_model, to_device
from tests.conftest import training_of
from utils import UserError

ORDER = torch.randperm(20, generator=torch.Generator().manual_seed(1))


def capture(step, indices):
    """Imitate the capture of a CUDA graph, which runs steps, and whose replay fills a fixed result."""
    result = torch.empty(len(MEASURED))
    for _ in range(4):
        step(indices)
    return lambda: result.copy_(step(indices))


@pytest.mark.parametrize("optimizer", filter(is_capturable, OPTIMIZERS))
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_graphed_step_trains_as_the_plain_one(optimizer, steps_before):
    """The steps of the capture leave no trace, and the buffers of both batch lengths are filled."""
    ours, expected = training_of("--optimizer", optimizer), training_of("--optimizer", optimizer)
    for indices in ORDER.split(8)[:steps_before]:
        ours.step(indices)
        expected.step(indices)
    before = copy.deepcopy(ours.optimizer.state_dict())
    graphed = GraphedStep(ours.step, [8, 4], ours.state.tensors, "cpu", capture)
    assert same_parameters(ours, expected)
    for kept, tensors in ours.optimizer.state_dict()["state"].items():
        for name, tensor in tensors.items():
            was = before["state"].get(kept, {}).get(name)
            assert torch.equal(tensor, was if was is not None else torch.zeros_like(tensor))
    for indices in ORDER.split(8):
        assert torch.equal(graphed(indices), expected.step(indices))
    assert same_parameters(ours, expected)


def same_parameters(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_a_step_returns_what_it_measured():
    training = training_of()
    images, labels = training.data.train.batch(ORDER[:8])
    logits, _ = training.model(images)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    correct = (logits.argmax(1) == labels).sum()
    row = dict(zip(MEASURED, training.step(ORDER[:8]).tolist(), strict=True))
    assert row["correct"] == correct and row["data_term"] == pytest.approx(expected.item())
    assert row["loss"] > row["data_term"] and row["grad_norm"] > 0


def test_a_graphed_step_continues_from_a_saved_state(tmp_path):
    """On a GPU the step is captured after last.pt is loaded: weights, optimizer and rows stay as they are."""
    batches, whole, cut = ORDER.split(8), training_of(), training_of()
    for number, indices in enumerate(batches[:2]):
        whole.state.rows[number, 1:] = whole.step(indices)
    whole.state.step = 2
    with Checkpoints(Run(tmp_path), whole.state, epochs=9, save_every=1) as checkpoints:
        checkpoints.save_state()
    whole.state.rows[2, 1:] = whole.step(batches[2])

    Checkpoints(Run(tmp_path), cut.state, epochs=9, save_every=1).load_state("cpu")
    graphed = GraphedStep(cut.step, [8, 4], cut.state.tensors, "cpu", capture)
    cut.state.rows[cut.state.step, 1:] = graphed(batches[2])
    assert (cut.state.epoch, cut.state.step) == (0, 2) and torch.equal(cut.state.rows, whole.state.rows)
    assert same_parameters(cut, whole)


def test_the_largest_batch_is_captured_first():
    sizes = []

    def capture(step, indices):
        sizes.append(len(indices))
        return step

    GraphedStep(lambda indices: None, [4, 8, 8, 5], list, "cpu", capture)
    assert sizes == [8, 5, 4]


def test_a_failed_capture_shows_its_first_cause_and_the_way_out():
    """With torch.cuda.graph, the end of a failed capture raises an error that hides the first one."""

    def capture(step, indices):
        try:
            raise ValueError("the step reads from the device")
        finally:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="give --no-cuda_graph") as failure:
        GraphedStep(lambda indices: None, [4], list, "cpu", capture)
    shown = "".join(traceback.format_exception(failure.value))
    assert shown.index("ValueError: the step reads from the device") < shown.index("operation failed")
    assert type(failure.value) is RuntimeError  # of which run_script shows the traceback


@pytest.mark.parametrize("error", [UserError("another rank has ended"), torch.OutOfMemoryError("out of memory")])
def test_errors_that_users_understand_pass_a_capture_unchanged(error):
    def capture(step, indices):
        raise error

    with pytest.raises(type(error)) as failure:
        GraphedStep(lambda indices: None, [4], list, "cpu", capture)
    assert failure.value is error


def test_a_graph_keeps_the_tensors_of_its_step_alive():
    """Graphs replay with their addresses, and hold no reference to tensors that were made outside."""
    one = torch.ones(())
    watched = weakref.ref(one)
    graphed = GraphedStep(partial(torch.add, one), [4], list, "cpu", lambda step, indices: lambda: None)
    del one
    gc.collect()
    assert graphed and watched() is not None


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "AdamW", "SGDW", "RMSprop"])
def test_an_optimizer_goes_on_from_a_file_in_another_memory_format(optimizer):
    flags = {"lr": 0.1, "weight_decay": 0.0, "adam_beta2": 0.9}
    weights = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        first = torch.nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
        gradient = torch.randn_like(first)
        before = make_optimizer([first], optimizer=optimizer, **flags)
        first.grad = gradient.clone()
        before.step()
        second = torch.nn.Parameter(first.detach().clone(memory_format=layout))
        after = make_optimizer([second], optimizer=optimizer, **flags)
        load_optimizer(after, copy.deepcopy(before.state_dict()))
        second.grad = gradient.clone(memory_format=layout)
        after.step()
        weights[layout] = second.detach()
        moments = [value for value in after.state[second].values() if value.dim()]
        assert moments and all(value.stride() == second.stride() for value in moments)
    torch.testing.assert_close(*weights.values(), rtol=1e-12, atol=0)


def log_of(losses, sizes, norms=None):
    columns = {"size": sizes, "loss": losses, "data_term": losses, "correct": [1.0] * len(sizes)}
    columns["grad_norm"] = norms or [1.0] * len(sizes)
    rows = torch.tensor([columns[name] for name in STEP_COLUMNS], dtype=torch.float64).T
    return epoch_means(rows, "ce", 2.0)


def test_the_log_weighs_batches_by_their_size_and_names_the_largest_gradient():
    line = log_of([1.0, 4.0], [8.0, 2.0], norms=[0.5, 3.0])
    assert line["loss"] == line["ce"] == 1.6 and line["train_acc1"] == 20.0 and line["grad_norm_max"] == 3.0
    assert line["images_per_second"] == 5.0 and line["seconds"] == 2.0


@pytest.mark.parametrize(
    "losses, spike",
    [([3, 2, 1], False), ([1, 1.9], False), ([1, 2.1, 1], True), ([4, 1, 1.5, 2.5], True), ([5], False)],
)
def test_a_loss_spikes_when_it_more_than_doubles_within_an_epoch(losses, spike):
    assert log_of([float(loss) for loss in losses], [5.0] * len(losses))["loss_spike"] is spike


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    model = build_model("MLP", 4, depth_relu=1, width=8)
    with pytest.raises(UserError, match="loss is not finite in epoch 3, step 2"):
        check_finite(torch.tensor([[1.0, 1.0], [1.0, math.inf], [1.0, math.nan]]), model, 3)
    check_finite(torch.ones(3, 5), model, 3)
    model.fc[0].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="weights are not finite in epoch 3, step 3"):
        check_finite(torch.ones(3, 5), model, 3)


def schedule(**flags):
    return Schedule(**{"lr": 8.0, "gamma": 0.5, "patience": 2, "epochs": 6, "decay_type": "step"} | flags)


def rates(**flags):
    return [schedule(**flags).learning_rate(epoch) for epoch in range(1, 7)]


def test_learning_rates():
    assert rates(decay_type="step") == [8, 8, 4, 4, 2, 2]
    assert rates(decay_type="step_1_4") == [8, 4, 4, 4, 2, 2]
    halfway = 8 * (1 + math.cos(math.pi / 4)) / 2
    assert rates(decay_type="cosine") == pytest.approx([8, 8, 8, halfway, 4, 8 - halfway])
    assert rates(decay_type="step", warmup_epochs=4) == [2, 4, 6, 8, 2, 2]


def test_penalties_rise_to_their_full_size():
    scales = [schedule(penalty_warmup_epochs=4).penalty_scale(epoch) for epoch in range(1, 7)]
    assert scales == [0, 0.25, 0.5, 0.75, 1, 1]
    assert schedule().penalty_scale(1) == 1


def test_penalties_fall_to_their_full_size():
    falling = {"penalty_start": 9.0, "penalty_hold_epochs": 2, "penalty_fall_epochs": 2}
    scales = [schedule(**falling).penalty_scale(epoch) for epoch in range(1, 7)]
    assert scales == pytest.approx([9, 9, 9, 3, 1, 1], rel=1e-15) and scales[4:] == [1, 1]
    warmed = [schedule(penalty_warmup_epochs=2, **falling).penalty_scale(epoch) for epoch in range(1, 7)]
    assert warmed == pytest.approx([0, 4.5, 9, 3, 1, 1], rel=1e-15)


@pytest.mark.parametrize("decay_type", ["step", "step_3_7"])
def test_steps_of_the_learning_rate_are_those_of_torch(decay_type):
    ours = schedule(lr=0.3, gamma=0.1, patience=3, epochs=12, decay_type=decay_type)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedulers = torch.optim.lr_scheduler
    scheduler = (
        schedulers.StepLR(optimizer, 3, 0.1)
        if decay_type == "step"
        else schedulers.MultiStepLR(optimizer, [3, 7], gamma=0.1)
    )
    for epoch in range(1, 13):
        assert ours.learning_rate(epoch) == pytest.approx(scheduler.get_last_lr()[0])
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
    (group,) = training_of("--adam_beta2", "0.5").optimizer.param_groups
    assert (group["betas"], group["lr"], group["weight_decay"], group["fused"]) == ((0.9, 0.5), 0.01, 0, True)


def test_a_clipped_gradient_is_logged_as_it_was():
    """SGD's first step has length lr times the clipped norm; the row has the norm before."""
    training = training_of("--optimizer", "SGD", "--clip_grad_norm", "0.01")
    model = training.model
    before = [parameter.detach().clone() for parameter in model.parameters()]
    row = training.step(ORDER[:8])
    moved = sum((a.detach() - b).square().sum() for a, b in zip(model.parameters(), before, strict=True)).sqrt()
    assert float(moved) == pytest.approx(1e-2 * 0.01, rel=1e-3)  # weights of order 0.1 in fp32 move by 1e-4
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3) and float(row[MEASURED.index("grad_norm")]) > 0.02


def make_checkpoints(folder):
    state = training_of().state
    state.epoch = 5
    return Checkpoints(Run(folder), state, epochs=9, save_every=1)


def test_files_are_written_in_order_while_training_continues(tmp_path, monkeypatch):
    real, released = checkpoint_files.save_torch, threading.Event()

    def slow(path, state):
        assert released.wait(60)
        real(path, state)

    monkeypatch.setattr(checkpoint_files, "save_torch", slow)
    with make_checkpoints(tmp_path) as checkpoints:
        state, weight = checkpoints.state, checkpoints.state.model.fc[0].weight
        weight.data.fill_(1)
        checkpoints.save_weights()
        assert not (tmp_path / "epoch_005.pth").exists()
        weight.data.fill_(2)  # training continues; the file has the weights of before
        released.set()
        state.epoch = 6
        checkpoints.save_weights()
        assert (tmp_path / "epoch_005.pth").exists()
    for epoch, value in ((5, 1), (6, 2)):
        assert (load_torch(tmp_path / f"epoch_{epoch:03d}.pth")["fc.0.weight"] == value).all()


def test_the_writer_waits_for_the_copy_and_training_does_not(tmp_path, monkeypatch):
    """On a GPU the copy to the host runs while training continues; here it is made when waited for."""
    arrived, waits = threading.Event(), []

    def to_host(state):
        now = {key: value.clone() for key, value in state.items()}
        later = {key: torch.empty_like(value) for key, value in state.items()}

        def wait():
            waits.append(threading.current_thread())
            assert arrived.wait(60)
            for key, value in now.items():
                later[key].copy_(value)

        return later, wait

    monkeypatch.setattr(checkpoint_files, "to_host", to_host)
    with make_checkpoints(tmp_path) as checkpoints:
        weight = checkpoints.state.model.fc[0].weight
        weight.data.fill_(1)
        checkpoints.save_weights()
        weight.data.fill_(2)
        assert not (tmp_path / "epoch_005.pth").exists() and checkpoints.seconds_waited() < 1
        threading.Timer(0.3, arrived.set).start()
        checkpoints.state.epoch = 6
        checkpoints.save_weights()  # waits for the file before it
        assert checkpoints.seconds_waited() > 0.2 and checkpoints.seconds_waited() == 0
    assert (load_torch(tmp_path / "epoch_005.pth")["fc.0.weight"] == 1).all()
    assert len(waits) == 2 and threading.main_thread() not in waits


def test_an_error_of_the_writing_thread_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError), make_checkpoints(tmp_path / "nowhere") as checkpoints:
        checkpoints.save_weights()


def test_the_first_checkpoint_can_be_resumed(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.state.epoch = 1
    with checkpoints:
        checkpoints.save_weights()
    assert load_torch(tmp_path / "last.pt")["epoch"] == 1


def test_the_copy_of_a_state_is_deep():
    state = {"a": [torch.zeros(2), {"b": torch.zeros(1)}], "c": (1, "x")}
    copied, _ = to_host(state)
    state["a"][0] += 1
    state["a"][1]["b"] += 1
    assert copied["a"][0].tolist() == [0, 0] and copied["a"][1]["b"].tolist() == [0] and copied["c"] == [1, "x"]


def class_accuracy(labels, predicted, counts=(10, 50, 30, 10, 20)):
    """The ClassAccuracy of a test set with these labels (N,) and predictions (N,) of K classes, in two batches."""
    split = Split(torch.zeros(len(labels), 3, 32, 32), torch.tensor(labels, dtype=torch.int64), torch.zeros(3))
    accuracy = ClassAccuracy(Data(split, split, list(counts), class_names=list("abcdefg"[: len(counts)])), "test")
    for rows in torch.arange(len(labels)).tensor_split(2):
        logits = torch.eye(len(counts))[torch.tensor(predicted, dtype=torch.int64)[rows]]
        accuracy.update(logits, split.labels[rows])
    return accuracy


def test_class_accuracies_by_hand():
    """The test set has no image of class 4; by n_k the classes are 1, 2 | 4 | 0, 3, where the tie keeps its order."""
    labels, predicted = [0, 3, 1, 3, 2, 0, 0, 3, 1, 2, 3, 0, 3], [0, 3, 1, 4, 2, 0, 1, 0, 1, 1, 2, 0, 2]
    accuracy = class_accuracy(labels, predicted)
    assert accuracy.overall() == pytest.approx(100 * 7 / 13)
    nan = pytest.approx(math.nan, nan_ok=True)
    classes = zip("abcde", [10, 50, 30, 10, 20], [75, 100, 50, 20, nan], strict=True)
    assert accuracy.rows() == [
        {"split": "test", "class": label, "name": name, "n_k": count, "accuracy": percent}
        for label, (name, count, percent) in enumerate(classes)
    ]
    expected = {"balanced_acc1": (75 + 100 + 50 + 20) / 4, "many_acc1": 75, "medium_acc1": nan, "few_acc1": 47.5}
    assert accuracy.by_frequency() == expected
    few_first = {"many_acc1": 47.5, "medium_acc1": 50, "few_acc1": 100}  # the order of n_k decides, not the label
    assert class_accuracy(labels, predicted, [50, 10, 30, 40, 20]).by_frequency() == expected | few_first


def test_class_accuracies_of_an_empty_split():
    accuracy = class_accuracy([], [], [3, 2, 1])
    assert math.isnan(accuracy.overall()) and math.isnan(accuracy.overall(top=5))
    assert all(math.isnan(value) for value in accuracy.by_frequency().values())


def test_the_five_largest_logits():
    """The logits of image i are those of class 0 (the least) to 6: labels 0 and 1 are not among the five largest."""
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    split = Split(torch.zeros(8, 3, 32, 32), labels, torch.zeros(3))
    accuracy = ClassAccuracy(Data(split, split, [1, 1, 1, 1, 1, 1, 2]), "train")
    accuracy.update(torch.arange(7.0).expand(8, 7), labels)
    assert top5(accuracy, accuracy) == {"train_acc5": 75, "test_acc5": 75} and accuracy.overall() == 25
    assert top5(class_accuracy([0], [1]), None) == {}  # of five classes
    dead = ClassAccuracy(accuracy.data, "train")
    dead.update(torch.zeros(8, 7), labels)  # of equal logits the first count, as argmax has it
    assert (dead.overall(), dead.overall(top=5)) == (12.5, 62.5)
    lost = ClassAccuracy(accuracy.data, "train")
    lost.update(torch.full((8, 7), math.nan), labels)
    assert lost.overall(top=5) == 0


# ---------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------


def test_a_gpu_that_cannot_be_initialised_is_not_used(monkeypatch, capsys):
    """Such as with a driver that is too old, where the GPU is still counted."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert pick_device("auto", 0) == torch.device("cpu")
    reason = "the GPU cannot be used: The NVIDIA driver on your system is too old (found version 11040)"
    assert capsys.readouterr().out == f"note       {reason}; training on the CPU\n"
    with pytest.raises(UserError, match=f"{re.escape(reason)}; give --device cpu"):
        pick_device("cuda", 0)


@pytest.mark.parametrize("planes, layout", [(8, torch.channels_last), (7, torch.contiguous_format)])
def test_weights_and_images_have_the_memory_format_of_the_model(planes, layout):
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), *torch.ones(3, 3))
    model, data = to_device(build_model("ResNet18", 4, planes=planes), Data(split, split, [1] * 4), torch.device("cpu"))
    convolutions = [weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[-1] > 1]
    for tensor in (*convolutions, data.train.pixels, data.test.pixels):
        assert tensor.is_contiguous(memory_format=layout) and tensor.is_contiguous() == (layout != torch.channels_last)
