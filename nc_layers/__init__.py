"""Class statistics of any layers of any PyTorch model, over any loader of pairs (inputs, labels).

    head = head_input(model)                                      # such as "fc"
    statistics = layer_statistics(model, loader, ["layer3", "layer4", head], num_classes=10)
    rows = {layer: nc_metrics(of_layer) for layer, of_layer in statistics.items()}
    row = nc_metrics(statistics[head], head_weight(model.get_submodule(head)))

The model may be one of torchvision, timm or Hugging Face, or your own. Features are read by forward hooks, batch by
batch, in two passes over the loader, and are not kept: memory does not depend on the number of samples.
"""

import contextlib
import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nc_metrics import ClassStatistics

__all__ = ["average", "head_input", "head_weight", "layer_statistics", "linear_layers"]

HEADS = ("fc", "classifier", "head", "heads", "score")  # names of classifiers in torchvision, timm and Hugging Face


def average(outputs: torch.Tensor) -> torch.Tensor:
    """Return the average (B, d) of a layer's outputs over tokens (B, T, d) or positions (B, d, [D,] H, W).

    Example:
        >>> import torch
        >>> from nc_layers import average
        >>> average(torch.ones(8, 64, 7, 7)).shape, average(torch.ones(8, 197, 384)).shape
        (torch.Size([8, 64]), torch.Size([8, 384]))
    """
    positions = 1 if outputs.ndim == 3 else tuple(range(2, outputs.ndim))
    return outputs.mean(positions, dtype=torch.promote_types(outputs.dtype, torch.float32))


def layer_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Collection[str],
    num_classes: int,
    device: torch.device | str | None = None,
    *,
    features: Callable[[torch.Tensor], torch.Tensor] = average,
    between: str = "classes",
    reference: Mapping[str, ClassStatistics] | None = None,
) -> dict[str, ClassStatistics]:
    """Return {layer: ClassStatistics} of a model's layers after both passes, for `nc_metrics`.

    loader: yields pairs (inputs, labels), the same in both passes: no random augmentation, no drop_last. inputs are a
        tensor, or a dict of the keyword arguments that the model takes; labels (B,) are integers in 0..num_classes-1.
    layers: dotted names, as in `model.named_modules()`. A layer is measured at its output, but the head at its input,
        the features that it classifies. The head is the Linear layer that is called last, or a chain of Linear layers
        that ends with it.
    device: where inputs are moved to; by default where the model is.
    features: a function from outputs that are not (B, d) to features (B, d). The default averages over tokens
        (B, T, d), the class token included, and over positions (B, d, H, W). Layers with the channels last, such
        as those of a Swin transformer, need another function.
    between: as in `ClassStatistics`.
    reference: the result of an earlier call. Its class means are used, and the loader is read once: give the result
        on the training set to measure test samples against the training means.

    NC4 compares with the predictions of the model, if its output, or the output's `logits`, is (B, num_classes). The
    model runs in eval mode without gradients; its training modes, hooks and buffers are restored afterwards, also
    after an exception.

    Raises ValueError for layers that the model or the reference lacks, a layer that is not called, batches that are not
    pairs, features that are not finite, labels out of range, a class without samples, and a loader that is empty or
    cannot be read twice.

    Example:
        >>> import torch
        >>> from nc_layers import layer_statistics
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> loader = [(torch.rand(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> statistics = layer_statistics(model, loader, ["0", "2"], num_classes=3)
        >>> {layer: tuple(of_layer.means.shape) for layer, of_layer in statistics.items()}
        {'0': (3, 5), '2': (3, 5)}
    """
    if reference is None and isinstance(loader, Iterator):
        raise ValueError("the loader can be read once only, and two passes are needed: give a DataLoader or a list")
    modules = find_layers(model, layers)
    if reference is not None and (missing := set(modules) - set(reference)):
        raise ValueError(f"the reference has no layer {', '.join(sorted(missing))}: it has {', '.join(reference)}")
    with undisturbed(model), torch.no_grad(), Recorder(model, modules, features, device) as recorder:
        if reference is None:
            statistics = {name: ClassStatistics(num_classes, between) for name in modules}
            for name, h, labels, _ in recorder.batches(loader):
                statistics[name].update(h, labels)
        else:
            statistics = {name: reference[name].for_other_samples() for name in modules}
        for name, h, labels, logits in recorder.batches(loader):
            comparable = logits.shape == (len(labels), num_classes)
            statistics[name].update_within(h, labels, logits.argmax(1) if comparable else None)
    for found in statistics.values():
        if reference is None and not torch.equal(found.counts, found.within_counts):
            raise ValueError("the second pass over the loader has other samples than the first")
    return statistics


def find_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Return {name: module} of dotted names; raise ValueError, with the nearest names, if one does not exist."""
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, cutoff=0.4) or [name for name, _ in model.named_children()]
            raise ValueError(f"the model has no layer {name!r}; the nearest names are {', '.join(near)}")
    return {name: modules[name] for name in layers}


class Recorder:
    """Reads, inside its `with` block, the features of modules {name: module} whenever the model is called."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        features: Callable[[torch.Tensor], torch.Tensor] = average,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.modules, self.features = model, modules, features
        self.device = device or next((parameter.device for parameter in model.parameters()), "cpu")
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.last: nn.Module | None = None  # the Linear layer that was called last

    def __enter__(self) -> "Recorder":
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        self.handles = [module.register_forward_pre_hook(self.note) for module in linear]
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(partial(self.record, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, module: nn.Module, inputs: Any) -> None:
        self.last = module

    def record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.outputs[name] = self.features_of(output)
        if linear_layers(module):
            self.inputs[name] = self.features_of(inputs)

    def features_of(self, output: Any) -> torch.Tensor:
        """Return the features of a layer's output, copied because an in-place ReLU may overwrite it."""
        found = first(output)
        return (found if found.ndim == 2 else self.features(found)).clone()

    def call(self, inputs: Any) -> Any:
        """Return the model's output for inputs, a tensor or a dict of keyword arguments."""
        if isinstance(inputs, Mapping):
            return self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        return self.model(inputs.to(self.device))

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (layer, features (B, d), labels (B,), logits) for each layer of each batch."""
        number = None
        for number, batch in enumerate(loader):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                keys = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
                raise ValueError(f"the loader yields a {type(batch).__name__}{keys}, wanted pairs (inputs, labels)")
            self.outputs.clear()
            output = self.call(batch[0])
            for name, module in self.modules.items():
                if name not in self.outputs:
                    raise ValueError(f"layer {name!r} is not called when the model runs")
                is_head = linear_layers(module)[-1:] == [self.last]
                h = (self.inputs if is_head else self.outputs)[name]
                if not h.isfinite().all():
                    raise ValueError(f"layer {name!r}: the features of batch {number} are not finite")
                labels, logits = torch.as_tensor(batch[1]), first(getattr(output, "logits", output))
                yield name, h, labels.to(h.device), logits
        if number is None:
            raise ValueError("the loader yields no batch")


def first(output: Any) -> torch.Tensor:
    """Return a tensor, or the first element of a tuple, such as (hidden states, attention weights)."""
    return output if isinstance(output, torch.Tensor) else output[0]


# ---------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------


def head_input(model: nn.Module, inputs: Any = None) -> str:
    """Return the dotted name of a model's head, the Linear layer, or chain of them, whose input is the features.

    This is what timm's `get_classifier` or Hugging Face's `get_output_embeddings` returns, or the attribute fc,
    classifier, head, heads or score: all of it if it is linear, else the last Linear layer in it. Of other models it is
    the Linear layer that is called last on `inputs`, a batch of a loader. Raises ValueError if there is no such layer.

    Example:
        >>> from torch import nn
        >>> from nc_layers import head_input
        >>> head_input(nn.ModuleDict({"body": nn.Linear(2, 5), "fc": nn.Linear(5, 3)}))
        'fc'
    """
    names = {module: name for name, module in model.named_modules()}
    getters = [getattr(model, name, lambda: None) for name in ("get_classifier", "get_output_embeddings")]
    for head in [getter() for getter in getters] + [getattr(model, name, None) for name in HEADS]:
        if not isinstance(head, nn.Module):
            continue
        if linear := [module for module in head.modules() if isinstance(module, nn.Linear)]:
            return names[head if linear_layers(head) else linear[-1]]
    if inputs is not None:
        with undisturbed(model), torch.no_grad(), Recorder(model, {}) as recorder:
            recorder.call(inputs)
        if recorder.last is not None:
            return names[recorder.last]
    raise ValueError(
        f"{type(model).__name__} has no Linear layer under {', '.join(HEADS)}; name the head, or give a batch of inputs"
    )


def head_weight(head: nn.Module) -> torch.Tensor:
    """Return W (K, d), float64, of a head, a Linear layer or a chain of them: the product of their matrices.

    Raises ValueError for any other module.

    Example:
        >>> from torch import nn
        >>> from nc_layers import head_weight
        >>> head_weight(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3))).shape
        torch.Size([3, 5])
    """
    if not (layers := linear_layers(head)):
        raise ValueError(f"the head is a {type(head).__name__}, wanted a Linear layer or a chain of them")
    weight, *others = (layer.weight.detach().double() for layer in layers)
    for other in others:
        weight = other @ weight
    return weight


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """Return the Linear layers that a module is a chain of, in order; [] if it contains any other layer.

    Example:
        >>> from torch import nn
        >>> from nc_layers import linear_layers
        >>> linear_layers(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
        [Linear(in_features=5, out_features=4, bias=True), Linear(in_features=4, out_features=3, bias=True)]
        >>> linear_layers(nn.Sequential(nn.Linear(5, 4), nn.ReLU()))
        []
    """
    leaves = [part for part in module.modules() if not list(part.children())]
    linear = [leaf for leaf in leaves if isinstance(leaf, nn.Linear)]
    return linear if len(linear) == len(leaves) else []


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and at the end restore its training modes and buffers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            setattr(module, name, buffer)
