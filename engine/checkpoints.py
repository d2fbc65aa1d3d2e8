"""Checkpoints of a run: the weights, the state from which training resumes, retention, and writing by a thread."""

import pickle
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.optim import optimizer_tensors
from engine.step_log import check_finite
from utils import FAILED_WORK, UserError, atomic_write, first_rank_only, message_of

RESUME_SECONDS = 20  # between two saves of last.pt: the most training that a killed process loses


def is_due(epoch, every, epochs):
    """Return True at epochs 1, 1 + every, ... and at the last epoch."""
    return (epoch - 1) % every == 0 or epoch == epochs


def is_power_of_two(epoch):
    return epoch & (epoch - 1) == 0


@dataclass
class TrainingState:
    """Everything that training changes, after `epoch` complete epochs and `step` steps of the next one.

    Generators and schedulers have no state: batches depend only on the seed and the epoch, schedules on the epoch.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    rows: torch.Tensor  # (steps, STEP_COLUMNS) the measurements of the current epoch's steps (`engine.step_log`)
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # spent on the current epoch

    def tensors(self):
        """Return all tensors that a step changes."""
        return [*self.model.state_dict().values(), *optimizer_tensors(self.optimizer)]


class Checkpoints:
    """The checkpoints of a run, written by a thread while training continues.

    Use as a context manager; leaving it waits until all files are on the disk. An error in the thread, such as a full
    disk, is raised by the next call.
    """

    def __init__(self, run, state, *, epochs, save_every, keep=None):
        self.run, self.state, self.epochs, self.save_every, self.keep = run, state, epochs, save_every, keep
        self.thread, self.pending = ThreadPoolExecutor(1), None
        self.saved = time.monotonic()  # time of the last write of last.pt, at first of the start of the process
        self.waited = 0.0  # seconds that training has waited for the thread

    def is_due(self, epoch):
        """Return True if the weights are saved after this epoch; with --keep, powers of two are added."""
        return is_due(epoch, self.save_every, self.epochs) or bool(self.keep and is_power_of_two(epoch))

    @first_rank_only
    def save_weights(self):
        """Save the model after the epoch that has just ended, and delete the checkpoints that are not kept."""
        epoch = self.state.epoch
        self._write(self.run.checkpoint(epoch), self.state.model.state_dict())
        if epoch == 1:
            self.save_state()
        self.prune()

    def save_state_if_due(self):
        """Save last.pt if the last one is older than RESUME_SECONDS."""
        if time.monotonic() - self.saved > RESUME_SECONDS:
            self.save_state()

    @first_rank_only
    def save_state(self):
        """Save last.pt: everything an exact resume needs."""
        state = self.state
        check_finite(state.rows[: state.step].cpu(), state.model, state.epoch + 1)
        self.run.train_log.flush()  # a resumed run does not repeat the epochs in it
        parts = {
            "epoch": state.epoch,
            "steps": state.step,
            "seconds": state.seconds,
            "record": state.rows,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
        }
        self._write(self.run.last, parts)
        self.saved = time.monotonic()

    def load_state(self, device):
        """Restore the state from last.pt. Raises UserError if the file is damaged or from a run with other flags."""
        path, state = self.run.last, self.state
        try:
            saved = load_torch(path, device)
            load_state_dict(state.model, saved["model"], path)
            load_optimizer(state.optimizer, saved["optimizer"])
            epoch, step, seconds = saved["epoch"], saved["steps"], float(saved["seconds"])
            if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 and 0 <= step <= len(state.rows)):
                raise ValueError("no such epoch or step")
            if step:
                state.rows[:step] = saved["record"].reshape(state.rows.shape)[:step]
        except UserError as error:  # a file that this repository wrote, and that was damaged
            hint = "delete this file for --resume to go on from the newest checkpoint"
            raise UserError(f"{error}; {hint}" if self.run.checkpoints() else error, FAILED_WORK) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an unrelated file raises exceptions of many types
            reason = message_of(error)[:100]
            raise UserError(f"{path}: not the state of a run with these flags ({reason})", FAILED_WORK) from None
        state.epoch, state.step, state.seconds = epoch, step, seconds

    def load_newest_weights(self, device):
        """Load the weights of the newest checkpoint that is whole; raise UserError if there are some, but none is."""
        checkpoints, failed = self.run.checkpoints(), []
        for epoch, path in reversed(checkpoints.items()):
            try:
                load_weights(self.state.model, path, device)
            except UserError as error:
                failed.append(error)
                continue
            self.state.epoch = epoch
            return
        if failed:
            raise UserError(f"{failed[0]}; last.pt is missing, and no checkpoint is whole", FAILED_WORK)

    @first_rank_only
    def prune(self):
        """Delete the epoch_*.pth files that --keep does not keep."""
        checkpoints = self.run.checkpoints()
        for epoch in set(checkpoints) - self.kept(list(checkpoints)):
            checkpoints[epoch].unlink(missing_ok=True)

    def kept(self, epochs):
        """Return those of the sorted `epochs` that --keep keeps: the last ones and the powers of two."""
        return {*epochs[-self.keep :], *filter(is_power_of_two, epochs)} if self.keep else set(epochs)

    def bytes_needed(self):
        """Return how many checkpoints are still to be kept, and the bytes of these, last.pt and one temporary file."""
        due = [epoch for epoch in range(self.state.epoch + 1, self.epochs + 1) if self.is_due(epoch)]
        size = sum(value.numel() * value.element_size() for value in self.state.model.state_dict().values())
        count = len(self.kept(due))
        return count, (count + 3 + 3) * size  # last.pt and its temporary file: the weights and Adam's two moments

    def seconds_waited(self):
        """Return the seconds that training has waited for the thread since the last call of this method."""
        waited, self.waited = self.waited, 0.0
        return round(waited, 4)

    def disk_summary(self):
        """Return as text the disk space that the run needs and the free space, with a warning if that is too little."""
        count, needed = self.bytes_needed()
        free = shutil.disk_usage(self.run.folder).free
        text = f"{count} checkpoints and last.pt: {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free"
        if needed > free:
            text += f"\nwarning: the disk of {self.run.folder} is too small; raise --save_every or give --keep"
        return text

    def _write(self, path, state):
        """Let the thread write a copy of `state` to `path`, after waiting for the previous file."""
        began = time.perf_counter()
        self.wait()
        self.waited += time.perf_counter() - began
        self.pending = self.thread.submit(save_when_complete, path, *to_host(state))

    def wait(self):
        """Wait until all files are on the disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()
        self.wait()
        self.prune()


# ---------------------------------------------------------------------------------------------------------
# Files of tensors
# ---------------------------------------------------------------------------------------------------------


def save_torch(path, state):
    """Save with torch.save, atomically: the file is never incomplete."""
    with atomic_write(path) as file:
        torch.save(state, file)


def save_when_complete(path, state, wait):
    wait()
    save_torch(path, state)


def to_host(state):
    """Return a CPU copy of the tensors in a nested dict, list or tuple, and a function that waits for the copy.

    Tensors on a GPU are first copied on the GPU, in stream order, so that training can continue. Another stream
    then copies them to pinned memory; this copy is complete once the returned function has returned.
    """
    copies = copy_state(state, lambda tensor: tensor.detach().clone())
    if not torch.cuda.is_initialized():
        return copies, lambda: None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        host = copy_state(copies, lambda copy: torch.empty_like(copy, device="cpu", pin_memory=True).copy_(copy, True))
    filled = stream.record_event()

    def wait():
        filled.synchronize()
        copies.clear()  # kept until now, so that their memory is not reused before the copy is complete

    return host, wait


def copy_state(state, copy):
    """Return a nested dict, list or tuple (as a list) with each tensor replaced by copy(tensor)."""
    if isinstance(state, torch.Tensor):
        return copy(state)
    if isinstance(state, dict):
        return type(state)((key, copy_state(value, copy)) for key, value in state.items())
    return [copy_state(value, copy) for value in state] if isinstance(state, (list, tuple)) else state


def load_torch(path, device="cpu"):
    """Return the content, tensors and plain values, of a file written by torch.save.

    Raises UserError for a pickle that would run code, and for a wrong checksum, which torch.load does not verify.
    """
    path = Path(path)
    if not path.is_file():  # opening a named pipe would block
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if zipfile.is_zipfile(path):  # the format of torch.save since 1.6
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{path}: truncated or damaged, cannot be read: {damaged}", FAILED_WORK)
        return torch.load(path, map_location=device, weights_only=True)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        if kind := kind_of(path):
            raise UserError(f"{path}: {kind}, not a checkpoint of torch.save") from None
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds a {refused[1]}" if refused else "it is no pickle of tensors"
        raise UserError(f"{path}: not a plain checkpoint: {what}; save model.state_dict() alone") from None
    except Exception as error:  # damaged files raise exceptions of many types
        if kind := kind_of(path):
            raise UserError(f"{path}: {kind}, not a checkpoint of torch.save") from None
        opened = not isinstance(error, OSError) or error.filename is None
        reason = "truncated or damaged" if opened else error.strerror
        raise UserError(f"{path}: {reason}, cannot be read", FAILED_WORK) from None


KINDS = {  # how the files begin that are given in place of a checkpoint
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "an array of NumPy",
    b"version https://git-lfs": "a pointer of Git LFS, whose file is not downloaded",
    b"<!doctype": "a page of HTML",
    b"<html": "a page of HTML",
}


def kind_of(path):
    """Return as text what a file is that is no checkpoint, by its first bytes; None if it is not known."""
    with open(path, "rb") as file:
        begin = file.read(512)
    if begin[257:262] == b"ustar":
        return "a tar archive"
    if begin[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "arrays of NumPy (.npz)" if all(name.endswith(".npy") for name in archive.namelist()) else None
    return next((kind for start, kind in KINDS.items() if begin.lstrip().lower().startswith(start.lower())), None)


PARTS = ("state_dict", "model", "net", "model_state_dict")  # names of the weights in other people's checkpoints
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning


def load_weights(model, path, device="cpu"):
    """Load a checkpoint into `model`."""
    load_state_dict(model, load_torch(path, device), path)


def unwrapped(saved, wanted, path):
    """Return the state dict in what a file of this repository or of another holds; print what was taken off.

    wanted: names of the model's weights. They may be the entry "state_dict", "model", "net" or "model_state_dict" of a
    dict, as in Lightning's files and last.pt, and all be preceded by "module.", "_orig_mod." or "model.". Raises
    UserError if there are such entries, and none or several fit.
    """
    entries = [name for name in PARTS if isinstance(saved, dict) and isinstance(saved.get(name), dict)]
    found = {name: without_prefixes(saved[name], wanted) for name in entries} or {None: without_prefixes(saved, wanted)}
    fitting = [name for name, (state, _) in found.items() if fits(state, wanted)]
    if entries and len(fitting) != 1:
        begins = {name: str(next(iter(saved[name]), "")).split(".")[0] for name in entries}
        keys = ", ".join(f"keys of its {name} begin with {begin}." for name, begin in begins.items())
        what = f"give one of {', '.join(fitting)}" if fitting else f"no entry fits the model: {keys}"
        raise UserError(f"{path}: it holds {', '.join(map(str, [*saved][:10]))}; {what}")
    entry = fitting[0] if entries else None
    state, prefix = found[entry]
    if entry or prefix:
        of_entry, off = (
            f" of its {entry}" if entry else "",
            f", without {prefix!r} before their names" if prefix else "",
        )
        print(f"{path}: the weights{of_entry}{off}")
    return state


def fits(state, wanted):
    """Return True if these are the names of a model's weights; those of batch_norm are unused in every model."""
    return isinstance(state, dict) and {key for key in state if not str(key).startswith("batch_norm.")} == set(wanted)


def without_prefixes(state, wanted):
    """Return a state dict and the prefix that was taken from all its names, if they are the wanted ones without it."""
    short, prefix = state, ""
    while isinstance(short, dict) and short and not fits(short, wanted):
        begin = next((of for of in PREFIXES if all(str(key).startswith(of) for key in short)), None)
        if begin is None:
            return state, ""
        short, prefix = {key[len(begin) :]: value for key, value in short.items()}, prefix + begin
    return short, prefix


def load_state_dict(model, state, path):
    """Load what was read from `path` into `model`. Raises UserError with the first key that does not match."""
    state = unwrapped(state, model.state_dict().keys(), path)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    ):
        raise UserError(f"{path}: holds no state_dict of a model")
    state = {key: value for key, value in state.items() if not key.startswith("batch_norm.")}  # unused in every model
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{path}: holds weights that are not finite")
    for key, value in model.state_dict().items():
        if key in state and state[key].is_floating_point() != value.is_floating_point():
            raise UserError(f"{path}: {key} is {state[key].dtype} in the file, {value.dtype} in the model")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # a heading, then a line for each kind of mismatch
        reason = str(error).split("\n")[1].strip().rstrip(".")
        raise UserError(f"{path}: does not fit the model: {reason[:200]}") from None


def load_optimizer(optimizer, state):
    """Load an optimizer's state dict, but keep the current hyperparameters, which the flags and the device set.

    Raises ValueError if the state is not what a step of this optimizer leaves, in names and shapes.
    """
    groups, expected = [dict(group) for group in optimizer.param_groups], state_after_a_step(optimizer)
    optimizer.load_state_dict(state)
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        group.update(wanted)
    for parameter in {*expected, *optimizer.state}:
        kept = optimizer.state.get(parameter, {})
        if {name: shape_of(value) for name, value in kept.items()} != expected.get(parameter, {}):
            raise ValueError("the optimizer's state belongs to another model or optimizer")
        for name, value in kept.items():  # in the parameter's memory format, whatever the file's
            if shape_of(value) == parameter.shape:
                kept[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def state_after_a_step(optimizer):
    """Return {parameter: {name: shape}} of the state after a step with zero gradients, which leaves the weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return {
        parameter: {name: shape_of(value) for name, value in kept.items()}
        for parameter, kept in optimizer.state.items()
    }


def shape_of(value):
    """Return the shape of a tensor; the type of any other value."""
    return value.shape if isinstance(value, torch.Tensor) else type(value)
