"""The operations, host reads and leftovers of a step, and the host reads of an epoch, checked on the CPU."""

import gc

import pytest
import torch
from kernels import Trace
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from args import parse_args
from datasets import Data, Split
from engine.batches import Batches
from engine.run import Run
from engine.training import Training, make_model
from models import MODELS, build_model
from tests.conftest import TINY, log_of
from train_1st_order_unbalanced import train

TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__}
TO_HOST |= {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__}


def build(name="MLP", *flags):
    """step(indices) of a small model of the paper's depth on 20 images, with further flags."""
    size = ["--width", "8"] if name == "MLP" else ["--planes", "4"]
    args = parse_args(argv=["--model", name, *size, "--batch_size", "8", "--no-bias", "--sep_decay", *flags])
    split = Split(torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 4, *torch.rand(3, 3))
    return Training(args, Data(split, split, [5] * 4), make_model(args, 4), torch.device("cpu")).step


class NothingGoesToTheHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in TO_HOST
        return function(*args, **(kwargs or {}))


LAYERS = 8  # of the paper's MLP, the head included


@pytest.mark.parametrize(
    "flags, more",
    [
        ("", 0),
        ("--precision bf16", 4 * LAYERS),  # casts of a layer's weight and bias, and of their gradients
        ("--clip_grad_norm 1", 5),  # the factor, from the norm, and one operation for all gradients
        ("--revive", 4 * (LAYERS - 1)),  # in place of one threshold, a largest unit, a comparison and a choice
    ],
    ids=["fp32", "bf16", "clipped", "revived"],
)
def test_a_step_of_the_papers_mlp_launches_few_operations(flags, more):
    """A layer has a product and a ReLU forwards; two products, its bias's gradient and a threshold backwards.

    Each of the other operations is one for all layers: four to normalise the images, which lie on the device as bytes,
    two to take them, eight each for loss and penalties, and the rest for what is logged and Adam.
    """
    step, indices = build("MLP", *flags.split()), torch.arange(8)
    step(indices)
    with Trace() as recorded:
        step(indices)
    assert len(recorded.launches()) <= 6 * LAYERS + 30 + more


SETTINGS = [(name, "") for name in MODELS]
SETTINGS += [(name, "--precision bf16") for name in ("MLP", "ResNet18", "VGG11")]
SETTINGS += [(name, "--revive --data_augmentation") for name in ("MLP", "ResNet18")]
SETTINGS += [
    ("MLP", flags)
    for flags in (
        "--loss MSE", "--class_weights 1", "--logit_adjustment 1", "--logit_scaling 1", "--ldam_margin 1",
        "--label_smoothing 0.1", "--objective released", "--clip_grad_norm 1", "--no-feature_relu",
        *(f"--optimizer {name}" for name in ("SGD", "AdamW", "SGDW", "Signum", "RMSprop")),
    )
]  # fmt: skip


@pytest.mark.parametrize("name, flags", SETTINGS)
def test_a_step_reads_nothing_and_is_the_same_every_time(name, flags):
    """Its tensors are fake: what depends on their values cannot be computed. The first step makes Adam's moments."""
    with FakeTensorMode(), NothingGoesToTheHost():
        step, traces = build(name, *flags.split()), [Trace() for _ in range(3)]
        for recorded in traces:
            with recorded:
                step(torch.arange(8))
    assert traces[1].operations == traces[2].operations


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist, torch.nonzero, lambda row: row[row > 0], bool]
)
def test_a_step_that_reads_is_found(read):
    with (
        pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)),
        FakeTensorMode(),
        NothingGoesToTheHost(),
    ):
        read(build()(torch.arange(8)).sum())


def test_no_autograd_node_outlives_a_step():
    def with_history():
        gc.collect()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        return {id(tensor) for tensor in tensors if tensor.grad_fn is not None}

    step, before = build("MLP", "--revive", "--logit_adjustment", "1"), with_history()
    row = step(torch.arange(8))
    assert with_history() == before and not row.requires_grad


# ---------------------------------------------------------------------------------------------------------
# An epoch
# ---------------------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A tensor that behaves as if on a GPU: results stay there, and reading one is recorded as an event."""

    events = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function in TO_HOST:
            cls.events.append("read")
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


@pytest.mark.parametrize("flags", [[], ["--stratified", "--data_augmentation", "--revive"]], ids=["plain", "more"])
def test_the_next_epoch_is_drawn_before_this_one_is_read(monkeypatch, tmp_path, flags):
    """An epoch is read twice: its rows, and whether all weights are finite."""
    events, draw = [], Batches.draw
    monkeypatch.setattr(OnDevice, "events", events)
    monkeypatch.setattr(Batches, "draw", lambda self, epoch: events.append(epoch) or draw(self, epoch))
    args = parse_args(argv=[*TINY, "--epochs", "4", "--save_every", "9", *flags])
    model = build_model("MLP", 4, bias=False, depth_relu=1, width=24)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().as_subclass(OnDevice))
    parts = torch.rand(70, 3, 32, 32), torch.arange(70) % 4, torch.zeros(3)
    split = Split(*(part.as_subclass(OnDevice) for part in parts))
    training = Training(args, Data(split, split, [18, 18, 17, 17]), model, torch.device("cpu"))
    training.state.rows = training.state.rows.as_subclass(OnDevice)
    train(args, Run(tmp_path), training)
    assert len(log_of(tmp_path)) == 4
    at = {event: number for number, event in enumerate(events) if event != "read"}
    assert events[at[3] : at[5]] == [3, "read", "read", 4, "read", "read"]
