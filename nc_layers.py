"""Class statistics of any layers of any PyTorch model, over any loader of pairs (inputs, labels).

    head = head_input(model)                                      # such as "fc"
    statistics = layer_statistics(model, loader, ["layer3", "layer4", head], num_classes=10)
    rows = {layer: nc_metrics(of_layer) for layer, of_layer in statistics.items()}
    row = nc_metrics(statistics[head], head_weight(model.get_submodule(head)))

The model may be one of torchvision, timm or Hugging Face, or your own. Features are read by forward hooks, batch by
batch, in two passes over the loader, and are not kept: memory does not depend on the number of samples.

A head is measured at its input h, the features. On the first batch, W h + b must equal the head's output, and this the
model's logits; what is no such head, but could be meant as one, raises ValueError.
"""

import contextlib
import difflib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nc_metrics import ClassStatistics

__all__ = ["average", "find_layers", "head_input", "head_weight", "layer_statistics"]

HEADS = ("fc", "classifier", "head", "heads", "score")  # names of classifiers in torchvision, timm and Hugging Face
LOGITS = ("logits", "out")  # names of the logits in an output with names
ROWS = 64  # samples of the first batch on which W h + b is compared with the head's output
CHUNK = 2**24  # entries of W that are compared at a time

Features = Callable[..., torch.Tensor]


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
    features: Features = average,
    between: str = "classes",
    reference: Mapping[str, ClassStatistics] | None = None,
    classes: Sequence[int] | None = None,
) -> dict[str, ClassStatistics]:
    """Return {layer: ClassStatistics} of a model's layers after both passes, for `nc_metrics`.

    loader: yields pairs (inputs, labels), the same in both passes: no random augmentation, no drop_last. inputs are a
        tensor, an array, a list of them that the model takes, or a dict of its keyword arguments; labels (B,) are
        integers in 0..num_classes-1.
    layers: a dotted name, as in `model.named_modules()`, or several. A layer is measured at its output, but a head
        at its input, the features that it classifies; `at_head` of the result says which. A head is a linear map whose
        output is one of the model's outputs, or their softmax or sigmoid: a Linear layer, also one that is normalised,
        quantised or adapted, an nn.Sequential of them, or a 1x1 convolution of pooled features.
    device: where inputs are moved to; by default where the model is.
    features: a function from outputs that are not (B, d) to features (B, d); it may take the inputs of the model as a
        second argument, for example for an attention mask. The default averages over tokens (B, T, d), the class token
        and padding included, and over positions (B, d, H, W). Layers with the channels last, such as those of a Swin
        transformer, need another function. A head of tokens is measured at the token whose logits the model returns.
    between: as in `ClassStatistics`.
    reference: the result of an earlier call. Its class means are used, and the loader is read once: give the result
        on the training set to measure test samples against the training means.
    classes: the classes to measure, if the data have samples of some of the head's num_classes only; labels are numbers
        of the head's classes, among these. The results are in their order. NC4 compares with the largest logit among
        these classes. `nc_metrics` takes W of the whole head.

    NC4 compares with the predictions of the head, of other layers with those of the model, if its outputs contain
    logits (B, num_classes). The model runs in eval mode, without gradients, compiled code and the fast path of
    nn.TransformerEncoder; its training modes, hooks and buffers are restored afterwards, also after an exception.

    Raises ValueError for layers that the model or the reference lacks, a layer that is not called, a head whose output
    is not W h + b or not what the model returns, batches that are not pairs, features that are not finite, labels out
    of range, a class without samples, and a loader that is empty or cannot be read twice. Warns of a layer that is
    called several times in a batch, of two passes with different features, and if there are no predictions.

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
    modules = find_layers(model, [layers] if isinstance(layers, str) else layers)
    if reference is not None and (missing := set(modules) - set(reference)):
        raise ValueError(f"the reference has no layer {', '.join(sorted(missing))}: it has {', '.join(reference)}")
    reader = Recorder(model, modules, num_classes, features, device, classes)
    with undisturbed(model), torch.no_grad(), reader as recorder:
        if reference is None:
            statistics = {name: ClassStatistics(num_classes, between, classes=classes) for name in modules}
            for name, h, labels, _ in recorder.batches(loader):
                statistics[name].update(h, labels)
        else:
            statistics = {name: reference[name].for_other_samples() for name in modules}
        for name, h, labels, predictions in recorder.batches(loader):
            statistics[name].update_within(h, labels, predictions)
    for name, found in statistics.items():
        found.at_head = recorder.heads[name] is not None
        if reference is None and not torch.equal(found.counts, found.within_counts):
            raise ValueError("the second pass over the loader has other samples than the first")
        found.warn_of_drift(f"layer {name!r}: ", "by random augmentation or dropout")
    if not recorder.predicted:
        warnings.warn(f"NC4 is NaN: the model returns no logits of shape (B, {num_classes})", stacklevel=2)
    return statistics


def find_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Return {name: module} of dotted names; raise ValueError, with the nearest names, if one does not exist.

    Example:
        >>> from torch import nn
        >>> from nc_layers import find_layers
        >>> find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), ["1"])
        {'1': ReLU()}
    """
    modules = modules_by_name(model)
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, cutoff=0.4) or [name for name, _ in model.named_children()]
            raise ValueError(f"the model has no layer {name!r}; the nearest names are {', '.join(near)}")
    return {name: modules[name] for name in layers}


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return {dotted name: module} without what torch.compile wraps around them, whose hooks are not called."""
    wrapped = {name: module for name, module in model.named_modules() if not hasattr(module, "_orig_mod")}
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): wrapped[name] for name in wrapped}


class Head(NamedTuple):
    """How a layer that is a head is measured."""

    call: int  # at which of its calls in a batch
    way: str  # "features", "average", or "token": at the token whose logits the model returns
    output: int | None  # which of the `tensors` of the model's output are its logits; None if the model returns none


class Recorder:
    """Reads, inside its `with` block, the features of modules {name: module} whenever the model is called."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        num_classes: int | None = None,
        features: Features = average,
        device: torch.device | str | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.model, self.modules, self.num_classes = model, modules, num_classes
        self.classes = None if classes is None else torch.as_tensor(classes)  # that are predicted
        self.device = device or next((parameter.device for parameter in model.parameters()), "cpu")
        self.features = features if takes_inputs(features) else lambda outputs, inputs: features(outputs)
        self.named = [name for group in heads_by_name(model) for name in group]
        self.heads: dict[str, Head | None] = {}  # known after the first batch
        self.inputs: Any = None  # of the model, in the current batch
        self.calls: dict[str, list[tuple[torch.Tensor | None, torch.Tensor]]] = {}  # (input, output) of possible heads
        self.outputs: dict[str, torch.Tensor] = {}  # features of the other layers
        self.counts: dict[str, int] = {}  # calls of each layer in the current batch
        self.last: tuple[nn.Module, torch.Tensor] | None = None  # the linear layer called last, and its output
        self.predicted = False  # some layer has predictions to compare with
        self.paused = False

    def __enter__(self) -> "Recorder":
        linear = [module for module in self.model.modules() if is_linear_layer(module)]
        self.handles = [module.register_forward_hook(self.note) for module in linear]
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(partial(self.record, name), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.paused and (found := tensors(output)):
            self.last = module, found[0]

    def record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.paused:
            return
        self.counts[name] = self.counts.get(name, 0) + 1
        if not (found := tensors(output)):
            raise ValueError(f"layer {name!r}, {described(module)}, returns no features: {type(output).__name__}")
        outputs, x = found[0], next(iter(tensors([args, kwargs])), None)
        if name not in self.heads or self.heads[name]:
            known = x is not None and (is_linear_layer(module) or x.ndim == 2)
            if known or outputs.ndim == 2:
                self.calls.setdefault(name, []).append((x if known else None, outputs))
        if not self.heads.get(name):
            self.outputs[name] = self.flat(outputs).clone()  # because an in-place ReLU may overwrite it

    def flat(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the features (B, d) of a layer's outputs."""
        return outputs if outputs.ndim == 2 else self.features(outputs, self.inputs)

    def call(self, inputs: Any) -> list[torch.Tensor]:
        """Return the tensors that the model returns for inputs, a tensor or a dict of keyword arguments."""
        for of_batch in (self.outputs, self.calls, self.counts):
            of_batch.clear()
        self.inputs = moved(inputs, self.device)
        return tensors(self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(self.inputs))

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor, Any, torch.Tensor | None]]:
        """Yield (layer, features (B, d), labels (B,), predictions (B,) or None) for each layer of each batch."""
        number = None
        for number, batch in enumerate(loader):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                keys = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
                raise ValueError(f"the loader yields a {type(batch).__name__}{keys}, wanted pairs (inputs, labels)")
            returned = self.call(batch[0])
            logits: torch.Tensor | None
            for name, module in self.modules.items():
                if not self.counts.get(name):
                    raise ValueError(f"layer {name!r} is not called when the model runs")
                if not self.heads.get(name) and not self.outputs[name].isfinite().all():
                    raise ValueError(f"layer {name!r}: the features of batch {number} are not finite")
                if name not in self.heads:
                    self.heads[name] = self.find_head(name, module, returned)
                    self.warn_of_calls(name)
                if head := self.heads[name]:
                    h, logits = self.at_head(name, head, returned)
                    if not h.isfinite().all():
                        raise ValueError(f"layer {name!r}: the features of batch {number} are not finite")
                else:
                    h, logits = self.outputs[name], self.logits(returned)
                predictions = None
                if logits is not None and logits.shape == (len(h), self.num_classes):
                    predictions, self.predicted = logits.argmax(1), True
                    if self.classes is not None:
                        kept = self.classes.to(logits.device)
                        predictions = kept[logits[:, kept].argmax(1)]
                yield name, h.cpu() if h.device.type == "mps" else h, batch[1], predictions
        if number is None:
            raise ValueError("the loader yields no batch")

    def warn_of_calls(self, name: str) -> None:
        """Warn if a layer is called several times in a batch."""
        if (count := self.counts[name]) > 1:
            head = self.heads[name]
            which = f"call {head.call + 1}, which makes the logits" if head else "the last one"
            warnings.warn(f"layer {name!r} is called {count} times in a batch: measured at {which}", stacklevel=4)

    def logits(self, returned: list[torch.Tensor]) -> torch.Tensor | None:
        """Return the model's logits (B, K): what the last linear layer makes, or the first output of this shape."""
        flat = [self.flat(output) for output in returned if self.num_classes in (output.shape[1], output.shape[-1])]
        logits = [output for output in flat if output.shape[1:] == (self.num_classes,)]
        last = [output for output in logits if self.last and difference(self.last[1], output) == 0]
        return next(iter(last + logits), None)

    # -----------------------------------------------------------------------------------------------------
    # Is it a head?
    # -----------------------------------------------------------------------------------------------------

    def find_head(self, name: str, module: nn.Module, returned: list[torch.Tensor]) -> Head | None:
        """Return how a layer is measured as a head, after the first batch; None if it is measured at its output.

        Raises ValueError for a layer that makes the logits but is not linear, and for one that has the name of a head,
        or is the last linear layer, but does not make the logits.
        """
        calls, last = self.calls.get(name, []), self.last[0] if self.last else None
        chain = linear_layers(module)
        linear = bool(chain) or is_linear_layer(module)
        is_last = module is last or (bool(chain) and chain[-1] is last)
        head = self.match(calls, returned)
        if not returned and calls and linear and (name in self.named or is_last):
            head = Head(len(calls) - 1, "features", None)
        if head is None:
            made = [outputs.shape for _, outputs in calls[-1:]]
            like_logits = any(shape[-1] == self.num_classes or shape in [of.shape for of in returned] for shape in made)
            if calls and linear and (name in self.named or (is_last and like_logits)):
                raise ValueError(
                    f"layer {name!r}, {described(module)}, is no head that can be measured: its output "
                    f"{shapes(calls[-1][1])} is not what the model returns, {shapes(*returned)}"
                )
            return None
        inner = next((inner for inner, part in modules_by_name(module).items() if part is last), None)
        reason = "not of features (B, d)"
        if calls[head.call][0] is not None and (linear or inner is not None):
            reason = self.mismatch(module, *self.at_head(name, head, returned))
            if not reason:
                return head
        if not linear:
            if inner is None or not self.last or not self.match([(None, self.last[1])], returned):
                return None  # the model returns features, not logits
            reason += f"; name the linear layer in it, {'.'.join(filter(None, [name, inner]))!r}"
        raise ValueError(f"layer {name!r}, {described(module)}, makes the logits, but is no linear head: {reason}")

    def match(self, calls: list[tuple[torch.Tensor | None, torch.Tensor]], returned: list[torch.Tensor]) -> Head | None:
        """Return where a layer's outputs are among the model's, or their softmax or sigmoid; None if nowhere."""
        found = []
        for call, (x, outputs) in enumerate(calls):
            for index, logits in enumerate(returned):
                for way in ("features", "average", "token"):
                    parts = self.reduce(way, outputs if x is None else x, outputs, logits)
                    eps = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, logits))
                    if parts is not None and (error := difference(*parts[1:])) <= 32 * eps:
                        found.append((error, Head(call, way, index)))
        return min(found, key=lambda match: match[0])[1] if found else None

    def reduce(
        self, way: str, x: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return a head's input, its output and the model's logits as matrices (B, .); None if they do not fit."""
        if logits.ndim > 2 and logits.shape != outputs.shape:
            return None
        if way == "token":
            if x.ndim != 3 or outputs.ndim != 3 or outputs.shape[::2] != logits.shape:
                return None
            token = (outputs - logits[:, None]).abs().sum(2).argmin(1)
            rows = torch.arange(len(x), device=x.device)
            return x[rows, token], outputs[rows, token], logits
        if way == "average":
            x, outputs, logits = (of if of.ndim == 2 else average(of) for of in (x, outputs, logits))
        else:
            x, outputs, logits = (self.flat(of) for of in (x, outputs, logits))
        return (x, outputs, logits) if x.ndim == 2 and outputs.shape == logits.shape else None

    def at_head(self, name: str, head: Head, returned: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features (B, d) that a head is given, and its logits."""
        if head.call >= len(self.calls.get(name, [])):
            raise ValueError(f"layer {name!r} is called fewer times than in the first batch")
        x, outputs = self.calls[name][head.call]
        logits = outputs if head.output is None else returned[head.output]
        parts = None if x is None else self.reduce(head.way, x, outputs, logits)
        if parts is None or difference(*parts[1:]) > 1e-2:
            raise ValueError(f"layer {name!r} makes the logits of the first batch, but not of each: {shapes(outputs)}")
        return parts[:2]

    def mismatch(self, module: nn.Module, h: torch.Tensor, outputs: torch.Tensor) -> str:
        """Return as text why W h + b of features (B, d) is not a head's output (B, K); empty if it is."""
        self.paused = True
        try:
            weight, bias = affine(module, h.shape[1])
        except ValueError as error:
            return str(error)
        finally:
            self.paused = False
        if weight.shape != (outputs.shape[1], h.shape[1]):
            return f"W {shapes(weight)} does not take the features {shapes(h)} to its output {shapes(outputs)}"
        step = -(-len(h) // ROWS)
        h, z = dense(h[::step]).double(), dense(outputs[::step]).double()
        off, size, rows = 0.0, z.square().sum().item(), max(1, CHUNK // h.shape[1])
        for k in range(0, len(weight), rows):
            w, b = weight[k : k + rows].to(h), 0.0 if bias is None else bias[k : k + rows].to(h)
            off += (h @ w.T + b - z[:, k : k + rows]).square().sum().item()
            size += (h.square() @ w.square().T).sum().item()
        weights = [layer.weight for layer in linear_layers(module)]
        plain = bool(weights) and all(type(of) in (torch.Tensor, nn.Parameter) for of in weights)
        exact = plain and outputs.dtype in (torch.float32, torch.float64)
        relative = (off / size) ** 0.5 if size else 0.0
        return "" if relative <= (1e-3 if exact else 3e-2) else f"W h + b is {relative:.2g} off its output"


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the float tensors (B, ...) in a model's output, first those that its names call logits."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() and output.ndim > 1 else []
    if not isinstance(output, (Mapping, tuple, list)):
        output = {name: getattr(output, name) for name in LOGITS if hasattr(output, name)}
    if isinstance(output, Mapping):
        output = [output[name] for name in LOGITS if name in output] + [
            output[name] for name in output if name not in LOGITS
        ]
    return [tensor for part in output for tensor in tensors(part)]


def moved(inputs: Any, device: torch.device | str) -> Any:
    """Return a model's inputs with the tensors and arrays in them, also in lists and dicts, on a device."""
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biuf":
        inputs = torch.tensor(inputs, dtype=torch.get_default_dtype() if inputs.dtype == np.float64 else None)
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: moved(value, device) for name, value in inputs.items()}
    return [moved(value, device) for value in inputs] if isinstance(inputs, (list, tuple)) else inputs


def takes_inputs(features: Features) -> bool:
    """Return True if a function of outputs needs the model's inputs as a second argument."""
    try:
        parameters = inspect.signature(features).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(of.kind in positional and of.default is of.empty for of in parameters) > 1


def difference(outputs: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the least |f(z) - logits| / |logits| of outputs z, f the identity, log-softmax, softmax or sigmoid."""
    if outputs.shape != logits.shape:
        return math.inf
    z, logits = dense(outputs).float(), dense(logits).float()
    if torch.equal(z, logits):
        return 0.0
    functions = (torch.Tensor.clone, partial(torch.log_softmax, dim=1), partial(torch.softmax, dim=1), torch.sigmoid)
    errors = [((function(z) - logits).norm() / logits.norm()).item() for function in functions]
    return min((error for error in errors if math.isfinite(error)), default=math.inf)


def described(module: nn.Module) -> str:
    """Return a module's type, and the types in it, as text."""
    inner = dict.fromkeys(type(part).__name__ for part in module.children())
    return f"a {type(module).__name__}" + (f" of {', '.join([*inner][:5])}" if inner else "")


def shapes(*of: torch.Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in of[:5]) or "no tensor"


# ---------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------


def head_input(model: nn.Module, inputs: Any = None) -> str:
    """Return the dotted name of a model's head, the linear map whose input is the features.

    This is what timm's `get_classifier` or Hugging Face's `get_output_embeddings` returns, or the attribute fc,
    classifier, head, heads or score: all of it if it is linear, else the last linear layer in it. With `inputs`, a
    batch of a loader, the head must make an output of the model, and is looked for under other names too. Raises
    ValueError if there is no head, or several.

    Example:
        >>> from torch import nn
        >>> from nc_layers import head_input
        >>> head_input(nn.ModuleDict({"body": nn.Linear(2, 5), "fc": nn.Linear(5, 3)}))
        'fc'
    """
    groups = heads_by_name(model)
    if inputs is None:
        if not groups:
            raise ValueError(
                f"{type(model).__name__} has no Linear layer under {', '.join(HEADS)}; name the head, or give a batch "
                "of inputs"
            )
        if len(groups[0]) > 1:
            raise ValueError(f"{type(model).__name__} has several heads: {', '.join(groups[0])}; name one")
        return groups[0][0]
    modules = modules_by_name(model)
    with undisturbed(model), torch.no_grad():
        with Recorder(model, {}) as first:
            sizes = {size for output in first.call(inputs) for size in output.shape[1:]}
        last = None if first.last is None else first.last[0]
        found = [name for group in groups for name in group]
        found += [name for name, of in modules.items() if is_linear_layer(of) and (of is last or out_size(of) in sizes)]
        with Recorder(model, {name: modules[name] for name in found}) as recorder:
            returned, reasons = recorder.call(inputs), []
            for name in dict.fromkeys(found):
                try:
                    if recorder.counts.get(name) and recorder.find_head(name, modules[name], returned):
                        return name
                except ValueError as error:
                    reasons.append(str(error))
    reason = [*reasons, "none makes what the model returns"][0]
    raise ValueError(f"{type(model).__name__} has no Linear layer, or the like, that is its head: {reason}")


def heads_by_name(model: nn.Module) -> list[list[str]]:
    """Return the names of what may be a model's head, by its methods and attributes; of several heads in one list."""
    names = {module: name for name, module in modules_by_name(model).items()}
    found = []
    for method in ("get_classifier", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(getattr(model, method)())
    found += [getattr(model, name, None) for name in HEADS]
    groups = []
    for head in found:
        group = []
        for part in head if isinstance(head, (tuple, list, nn.ModuleList)) else [head]:
            for of in part.values() if isinstance(part, nn.ModuleDict) else [part]:
                if isinstance(of, nn.Module):
                    group += [of] if linear_layers(of) or is_sum(of) else outermost_linear(of)[-1:]
        if named := list(dict.fromkeys(names[of] for of in group if of in names)):
            groups.append(named)
    return groups


def outermost_linear(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers in a module, but not those of which others are made, such as an adapter's."""
    if is_linear_layer(module):
        return [module]
    return [layer for child in module.children() for layer in outermost_linear(child)]


def is_sum(module: nn.Module) -> bool:
    """Return True for a module of several linear layers that is itself a linear map, such as one with an adapter."""
    if len(inner := outermost_linear(module)) < 2:
        return False
    with contextlib.suppress(Exception), undisturbed(module), torch.no_grad():
        weight, bias = probe(module, dim := in_size(inner[0]))
        of = next(module.parameters())
        point = torch.linspace(-1, 1, dim, dtype=of.dtype, device=of.device)[None]
        expected = torch.nn.functional.linear(point.double(), weight, bias)
        return torch.allclose(module(point).double(), expected, rtol=1e-3, atol=1e-5)
    return False


def is_linear_layer(module: nn.Module) -> bool:
    """Return True for a Linear layer, of any package, and a 1x1 convolution."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return set(module.kernel_size) == {1} and module.groups == 1 and not any(module.padding)
    return isinstance(getattr(module, "in_features", None), int) and out_size(module) is not None


def in_size(module: nn.Module) -> Any:
    return module.in_features if hasattr(module, "in_features") else module.in_channels


def out_size(module: nn.Module) -> int | None:
    size = getattr(module, "out_features", getattr(module, "out_channels", None))
    return size if isinstance(size, int) else None


def linear_layers(module: nn.Module) -> list[Any]:
    """Return the plain linear layers that a module is a chain of, in order; [] if it contains anything else."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        chain = [linear_layers(part) for part in module if not isinstance(part, (nn.Identity, nn.Dropout))]
        return [layer for part in chain for layer in part] if all(chain) else []
    return [module] if is_plain(module) else []


def is_plain(module: nn.Module) -> bool:
    """Return True for a linear layer that computes W h + b of its `weight` and `bias`, also by a method of its own."""
    convolutions = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if type(module).forward in (nn.Linear.forward, *convolutions):
        return is_linear_layer(module)
    if not isinstance(module, nn.Linear):
        return False
    weight, bias = dense(module.weight), None if module.bias is None else dense(module.bias)
    with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError):
        point = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
        return torch.allclose(module.forward(point), nn.functional.linear(point, weight, bias), rtol=1e-3, atol=1e-6)
    return False


def head_weight(head: nn.Module) -> torch.Tensor:
    """Return W (K, d), float64, of a head: of a chain of linear layers, the product of their matrices.

    Raises ValueError for a module that is no linear map of features (B, d).

    Example:
        >>> from torch import nn
        >>> from nc_layers import head_weight
        >>> head_weight(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3))).shape
        torch.Size([3, 5])
    """
    return affine(head)[0].double()


def affine(head: nn.Module, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W (K, d) and b (K,) of a head that maps h to W h + b; b is None for zero. ValueError if it is none."""
    layers = linear_layers(head)
    if not layers:
        if not (inner := outermost_linear(head)):
            raise ValueError(f"the head is {described(head)}, wanted a linear map of features (B, d)")
        return probe(head, dim or in_size(inner[0]))
    weight, bias = dense(layers[0].weight).flatten(1), None if layers[0].bias is None else dense(layers[0].bias)
    for layer in layers[1:]:
        other = dense(layer.weight).flatten(1).double()
        weight, bias = other @ weight.double(), None if bias is None else other @ bias.double()
        if layer.bias is not None:
            bias = dense(layer.bias).double() + (0.0 if bias is None else bias)
    return weight, bias


def probe(head: nn.Module, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W (K, d) and b (K,) of a head of any kind, from its outputs for zero and the unit vectors."""
    state = [*head.named_parameters(), *head.named_buffers()]
    dtype = next((of.dtype for _, of in state if of.is_floating_point()), torch.float32)
    device = next((of.device for _, of in state), torch.device("cpu"))
    reason = ""
    with undisturbed(head), torch.no_grad():
        for exact in (True, False):  # in float64 if the head can
            try:
                doubled = {name: dense(of).double() for name, of in state if of.is_floating_point()} if exact else {}
                points = torch.eye(dim, dtype=torch.float64 if exact else dtype, device=device)
                points = torch.cat([torch.zeros_like(points[:1]), points])
                outputs = torch.func.functional_call(head, doubled, (points,)).double()
                return (outputs[1:] - outputs[0]).T, outputs[0]
            except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
                reason = " ".join(str(error).split())[:200]
    raise ValueError(f"the head is {described(head)}, wanted a linear map of features (B, {dim}): {reason}")


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor with the values of a distributed or quantised parameter, on the CPU instead of MPS."""
    for method in ("full_tensor", "dequantize"):
        if (type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_quantized) and hasattr(tensor, method):
            tensor = getattr(tensor, method)()
    return tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, as plain layers one by one; at the end restore its training modes and buffers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, unexpanded(buffer).clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()  # of nn.TransformerEncoder, which makes nested tensors
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with compiler:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            unexpanded(buffer).copy_(value)
            setattr(module, name, buffer)


def unexpanded(buffer: torch.Tensor) -> torch.Tensor:
    """Return a view of a buffer with each of its numbers once, even if `expand` made the buffer."""
    if buffer.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
            buffer = buffer.narrow(dim, 0, 1) if size > 1 and stride == 0 else buffer
    return buffer
