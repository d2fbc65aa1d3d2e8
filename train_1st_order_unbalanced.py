"""Trains a classifier on an imbalanced subset of a data set, far past zero training error.

The paper's MLP on CIFAR-10 (on a GPU; 401 checkpoints of 38 MB), and its measurement afterwards:

    CUDA_VISIBLE_DEVICES=0 python train_1st_order_unbalanced.py --model MLP \\
        --no-bias --dataset cifar10 --depth_relu 6 --depth_linear 1 --width 1024 --seed 1 \\
        --sep_decay --batch_size 256 --feature_decay_rate 0.00001 --loss CrossEntropy --lr 0.0001 \\
        --weight_decay 0.0001 --optimizer Adam --epochs 4000 --patience 2000
    CUDA_VISIBLE_DEVICES=0 python validate_NC_unbalanced.py   (the same flags)

Writes config.json, train_log.jsonl, epoch_*.pth and last.pt into model_weights/<run name>/.
"""

import math
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

from args import LOCAL_FLAGS, adopt_config, config_flags, parse_args, run_folder
from datasets import epoch_batches, epoch_order, random_shifts
from loggers import TENSORBOARD_FILES, open_loggers
from objective import make_objective
from plot_nc import FIGURES, KINDS
from utils import (
    FAILED_WORK,
    GraphedStep,
    HeldSignals,
    Interrupted,
    Progress,
    UserError,
    Writer,
    append_line,
    autocast,
    checkpoint_path,
    clear_temporaries,
    copy_state,
    device_name,
    find_checkpoints,
    flush_to_disk,
    git_commit,
    keep_freed_memory,
    load_torch,
    load_weights,
    one_line,
    read_config,
    read_csv,
    read_log,
    run_lock,
    run_script,
    set_weights,
    write_csv,
    write_json,
    write_log,
)
from validate_NC_unbalanced import THEORY_SUFFIXES, Measurement, check_counts, set_up

RESULTS = ("train_log.jsonl", "nc_metrics.csv", "last.pt")  # of a run, beside its checkpoints
RESUME_SECONDS = 20  # from one last.pt, thrice a checkpoint's size, to the next: what a kill costs at most
OPTIMIZER_STATE = {"Adam": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}  # kept for a parameter


def main():
    args = parse_args(__doc__.split("\n")[0])
    folder = run_folder(args)
    check_folder(args, folder)
    keep_freed_memory()
    device, data, model = set_up(args)
    check_counts(read_config(folder) if args.resume else None, data, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        check_folder(args, folder)  # again, now that no other process can write there
        train(args, data, model, device, folder)


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def train(args, data, model, device, folder):
    """Runs the epochs that are left, and writes the files of the run."""
    resumed = args.resume and (folder / "last.pt").exists()
    if args.init_from and not resumed:
        load_weights(model, args.init_from, device)
    objective = make_objective(args, data)
    optimizer = make_optimizer(args, model, objective, device)
    if args.force:
        clear(folder)  # now that all that the new run needs is there
    record = Record(-(-len(data.train) // args.batch_size), device)
    state = TrainingState(model, optimizer, record)
    if resumed:
        state.load(folder / "last.pt", device)
    clean_up(folder, state.epoch)
    announce(args, data, model, device, folder, state.epoch)
    if state.epoch >= args.epochs:
        return
    write_config(args, data, model, objective, device, folder)
    measurement = Measurement(args, data, model, objective, device, folder) if args.nc_every else None

    count = len(data.train)
    strata = data.train.labels.cpu() if args.stratified else None
    shifts = torch.zeros(count, 3, dtype=torch.int64, device=device) if args.data_augmentation else None
    strength = torch.ones((), device=device)  # of the penalties
    step = make_step(args, data.train, model, objective, optimizer, record, shifts, strength)
    saved = time.monotonic()
    with (
        HeldSignals() as signals,
        Progress(args.epochs, "epoch", state.epoch) as progress,
        Writer() as writer,
        open_loggers(args, folder, "train", first_epoch=state.epoch + 1) as loggers,
    ):
        try:
            while state.epoch < args.epochs:
                epoch, began = state.epoch + 1, time.perf_counter() - state.seconds
                lr = set_learning_rate(optimizer, learning_rate(args, epoch))
                strength.fill_(penalty_strength(args, epoch))
                model.train()
                order = epoch_order(count, epoch=epoch, seed=args.seed, shuffle=not args.no_shuffle, labels=strata)
                if shifts is not None:
                    shifts.copy_(random_shifts(count, epoch=epoch, seed=args.seed))
                batches = epoch_batches(order.to(device), args.batch_size, even=args.stratified)
                for rows in batches[state.steps :]:
                    step(rows)
                    state.steps, state.seconds = state.steps + 1, time.perf_counter() - began
                    signals.check()
                    if time.monotonic() - saved > RESUME_SECONDS:
                        state.save(folder, writer)
                        saved = time.monotonic()
                steps = record.take()
                line = log_line(epoch, lr, objective, steps, time.perf_counter() - began)
                append_line(folder / "train_log.jsonl", line)
                check_finite(epoch, steps["loss"], model)
                for logger in loggers:
                    logger.scalars("train", line)
                if args.nc_every and due(epoch, args.nc_every, args.epochs):
                    with signals.released():
                        measurement.append(epoch, loggers)
                if checkpoint_due(args, epoch):
                    writer.save(checkpoint_path(folder, epoch), copy_state(model.state_dict()))
                    thin_out(args, folder)
                state.epoch, state.steps, state.seconds = epoch, 0, 0.0
                progress.step(
                    f"loss {line['loss']:.6f}  accuracy {line['train_acc1']:.2f} %  "
                    f"{line['images_per_second']:.0f} images/s"
                )
        except Interrupted:
            state.save(folder, writer)
            raise
        state.save(folder, writer)
        writer.wait()
        thin_out(args, folder)
    print(f"finished: {folder}")


def make_step(args, split, model, objective, optimizer, record, shifts=None, strength=1.0):
    """step(rows): one optimizer step on the images rows (B,) of a split. Nothing in it waits for the device."""
    device, parameters = split.labels.device, list(model.parameters())

    def step(rows):
        images, labels = split.take(rows, shifts)
        with autocast(args.precision, device):
            logits, features = model(images)
        loss, data_term = objective(logits, features, labels, model.fc, strength)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if args.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_grad_norm, grad_norm)
        optimizer.step()
        record.add(loss.detach(), data_term.detach(), logits.detach(), labels, grad_norm)

    if device.type != "cuda" or not args.cuda_graph:
        return step
    state = lambda: [*model.state_dict().values(), *optimizer_tensors(optimizer), *record.tensors()]  # noqa: E731
    return GraphedStep(step, batch_sizes(args, len(split)), state, device)


def batch_sizes(args, count):
    """The sizes, one or two of them, of the batches of an epoch of `count` images."""
    return {len(rows) for rows in epoch_batches(torch.empty(count), args.batch_size, even=args.stratified)}


def optimizer_tensors(optimizer):
    """The tensors that an optimizer keeps, which come into being in its first step."""
    return [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]


class Record:
    """What the log says of an epoch: a row a step, on the device."""

    COLUMNS = ("size", "loss", "data_term", "correct", "grad_norm")  # means over the batch, but for the count `correct`

    def __init__(self, steps, device):
        self.rows = torch.zeros(steps, len(self.COLUMNS), dtype=torch.float64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, loss, data_term, logits, labels, grad_norm):
        """Adds a step: mean losses of a batch, its logits (B, K) and labels (B,), the norm of its gradient."""
        correct = (logits.argmax(1) == labels).sum()
        size = torch.full_like(loss, len(labels))
        row = torch.stack([size, loss, data_term, correct, grad_norm])
        self.rows.index_copy_(0, self.position, row[None].double())
        self.position.add_(1).remainder_(len(self.rows))

    def take(self):
        """The epoch's columns, {name: (steps,)} on the CPU; the next epoch starts anew."""
        self.position.zero_()
        return dict(zip(self.COLUMNS, self.rows.cpu().unbind(1), strict=True))

    def losses(self, steps):
        """The losses (steps,) of the first steps of an epoch."""
        return self.rows[:steps, self.COLUMNS.index("loss")]

    def put(self, rows, steps):
        """Goes back to where `steps` steps of an epoch had been added; rows (steps, columns) as they were then."""
        self.rows.copy_(rows)
        self.position.fill_(steps % len(self.rows))

    def tensors(self):
        return [self.rows, self.position]


@dataclass
class TrainingState:
    """All that training changes. `epoch` epochs are complete, and `steps` steps of the next one, which took `seconds`.

    Batches depend on (seed, epoch) alone, schedules on the epoch: there is no generator and no scheduler to keep.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    record: Record
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0

    def save(self, folder, writer):
        """Has last.pt written: all that a resumed run starts from."""
        check_finite(self.epoch + 1, self.record.losses(self.steps), self.model)
        flush_to_disk(folder / "train_log.jsonl")  # its epochs will not be run again
        state = {
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "record": self.record.rows,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        writer.save(folder / "last.pt", copy_state(state))

    def load(self, path, device):
        """Goes back to where last.pt was saved."""
        state = load_torch(path, device)
        try:
            set_weights(self.model, state["model"], path)
            load_optimizer(self.optimizer, state["optimizer"])
            self.epoch, self.steps = state["epoch"], state.get("steps", 0)  # an older one is between epochs
            counted = isinstance(self.epoch, int) and isinstance(self.steps, int)
            if not counted or self.epoch < 0 or not 0 <= self.steps <= len(self.record.rows):
                raise ValueError("no such epoch or step")
            if self.steps:
                self.seconds = float(state["seconds"])
                self.record.put(state["record"], self.steps)
        except UserError:
            raise
        except Exception as error:  # whatever a file of something else leads to
            raise UserError(
                f"{path}: not the state of a run with these flags ({one_line(error)[:100]})", FAILED_WORK
            ) from None


def load_optimizer(optimizer, state):
    """Loads an optimizer's state_dict, but for its groups, which are as flags and device say."""
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        group.update(wanted)
    expected = OPTIMIZER_STATE[type(optimizer).__name__]
    if optimizer.defaults.get("amsgrad"):
        expected = expected | {"max_exp_avg_sq"}
    for parameter, kept in optimizer.state.items():
        if set(kept) != expected:
            raise ValueError(f"the optimizer's state has {', '.join(kept)}")
        if any(value.shape not in (parameter.shape, ()) for value in kept.values()):
            raise ValueError("the optimizer's state is of another model")


def make_optimizer(args, model, objective, device):
    """The optimizer, one fused kernel a step."""
    # In a CUDA graph the learning rate is read from the device, and the optimizer's step counts are there too.
    on_gpu = device.type == "cuda" and args.cuda_graph
    lr = torch.tensor(args.lr, device=device) if on_gpu else args.lr
    common = {"lr": lr, "weight_decay": objective.optimizer_decay, "fused": True}
    if args.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **common)
    adam = {"betas": (0.9, args.adam_beta2), "eps": args.adam_eps, "amsgrad": args.amsgrad, "capturable": on_gpu}
    return torch.optim.Adam(model.parameters(), **adam, **common)


def learning_rate(args, epoch):
    """The learning rate of an epoch, counted from 1; it depends on nothing but the flags."""
    if epoch <= args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    done = epoch - 1
    if args.decay_type == "cosine":
        progress = max(0, done - args.patience) / (args.epochs - args.patience)
        return args.lr * (1 + math.cos(math.pi * progress)) / 2
    if args.decay_type == "step":
        return args.lr * args.gamma ** (done // args.patience)
    return args.lr * args.gamma ** sum(done >= int(milestone) for milestone in args.decay_type.split("_")[1:])


def penalty_strength(args, epoch):
    """What the penalties are multiplied with in an epoch, counted from 1."""
    return min(1.0, (epoch - 1) / args.penalty_warmup_epochs) if args.penalty_warmup_epochs else 1.0


def set_learning_rate(optimizer, lr):
    """Sets the learning rate, in place where a CUDA graph reads it; returns it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def log_line(epoch, lr, objective, steps, seconds):
    """A line of train_log.jsonl, of an epoch's Record.

    The loss spiked if a step's was more than twice the least before it in the epoch.
    """
    size, loss = steps["size"], steps["loss"]
    count = float(size.sum())
    return {
        "epoch": epoch,
        "lr": float(f"{lr:.7g}"),
        "loss": float((size * loss).sum()) / count,
        "ce" if objective.loss == "CrossEntropy" else "mse": float((size * steps["data_term"]).sum()) / count,
        "train_acc1": 100 * float(steps["correct"].sum()) / count,
        "grad_norm_max": float(steps["grad_norm"].max()),
        "loss_spike": bool((loss > 2 * loss.cummin(0).values).any()),
        "seconds": round(seconds, 4),
        "images_per_second": round(count / seconds, 1),
    }


def check_finite(epoch, loss, model):
    """Stops at a loss that is not finite, of the losses (steps,) of an epoch, or at weights that are not after them."""
    finite = loss.isfinite()
    if finite.all() and all(value.isfinite().all() for value in model.state_dict().values()):
        return
    what, step = ("weights are", len(loss)) if finite.all() else ("loss is", int((~finite).nonzero()[0]) + 1)
    raise UserError(
        f"the {what} not finite in epoch {epoch}, step {step}: lower --lr or give --clip_grad_norm 1; "
        f"checkpoints up to then are kept",
        FAILED_WORK,
    )


def due(epoch, every, epochs):
    """Whether something done `every` so many epochs is due: after epochs 1, 1 + every, ... and the last."""
    return (epoch - 1) % every == 0 or epoch == epochs


def checkpoint_due(args, epoch):
    """Whether a checkpoint is: every --save_every epochs, and with --keep at those that are kept for good."""
    return due(epoch, args.save_every, args.epochs) or bool(args.keep and is_power_of_two(epoch))


def is_power_of_two(epoch):
    return epoch & (epoch - 1) == 0


# ---------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------


def check_folder(args, folder):
    """Stops where an earlier run would be overwritten or contradicted."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give another --save_path")
    holds_run = bool(find_checkpoints(folder)) or any((folder / name).exists() for name in RESULTS)
    config = read_config(folder) if args.resume else None
    if config:
        adopt_config(args, config, folder)
    elif args.resume and holds_run:
        raise UserError(f"{folder} holds a run without its config.json: it cannot be resumed; give --save_path")
    elif holds_run and not args.force:
        raise UserError(f"{folder} holds a run: give --resume to go on with it, --force to delete it, or --save_path")


def clear(folder):
    """Deletes what an earlier run wrote, and nothing else."""
    written = [
        *(folder / name for name in ("config.json", "train_log.jsonl", "last.pt")),  # first: half a run is no run
        *find_checkpoints(folder).values(),
        *folder.glob(TENSORBOARD_FILES),
    ]
    for suffix in THEORY_SUFFIXES.values():
        written += [folder / f"nc_metrics{suffix}.csv", *folder.glob(f"geometry{suffix}/epoch_*.npz")]
        written += [folder / "figures" / f"{name}{suffix}.{kind}" for name in FIGURES for kind in KINDS]
    for path in written:
        path.unlink(missing_ok=True)


def clean_up(folder, epoch):
    """Deletes half-written files, and drops log lines and rows of later epochs, which are to be run again."""
    clear_temporaries(folder, "epoch_*.pth", "last.pt", "config.json", "train_log.jsonl")
    if (folder / "train_log.jsonl").exists():
        write_log(folder, [line for line in read_log(folder) if line["epoch"] <= epoch])
    for suffix in THEORY_SUFFIXES.values():
        path = folder / f"nc_metrics{suffix}.csv"
        if rows := read_csv(path):
            kept = [row for row in rows if row["epoch"] <= epoch]
            write_csv(path, kept) if kept else path.unlink()


def thin_out(args, folder):
    """Deletes the checkpoints that --keep does not keep, of those that are complete."""
    checkpoints = find_checkpoints(folder)
    for epoch in set(checkpoints) - kept_epochs(args, list(checkpoints)):
        checkpoints[epoch].unlink(missing_ok=True)


def kept_epochs(args, epochs):
    """Those of a list of epochs with checkpoints that --keep keeps: the last N and the powers of two; default: all."""
    if not args.keep:
        return set(epochs)
    return {*epochs[-args.keep :], *filter(is_power_of_two, epochs)}


def write_config(args, data, model, objective, device, folder):
    """Everything that says what the run is; a resumed run keeps what it began with, but for the flags typed."""
    if args.resume and (config := read_config(folder)):
        typed = {name: value for name, value in config_flags(args).items() if name in args.given - LOCAL_FLAGS}
        write_json(folder / "config.json", config | {"flags": config["flags"] | typed})
        return
    decays = objective.effective_decays() or (None, None)
    config = {
        "flags": config_flags(args),
        "class_counts": data.class_counts,
        "num_test": len(data.test),
        "effective_weight_decay": decays[0],
        "effective_feature_decay": decays[1],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": np.__version__,
        },
        "device": device_name(device),
        "git_commit": git_commit(),
    }
    write_json(folder / "config.json", config)


def announce(args, data, model, device, folder, epoch):
    """Says at the start what will be done, on what, and what it takes."""
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    left = len(kept_epochs(args, [e for e in range(epoch + 1, args.epochs + 1) if checkpoint_due(args, e)]))
    needed = (left + 3 + 3) * size  # with last.pt, and the file that takes its place or a checkpoint's
    free = shutil.disk_usage(folder).free
    print(f"run        {folder}")
    print(f"data       {args.dataset}: {len(data.train)} training images in {data.num_classes} classes, ", end="")
    print(f"{min(data.class_counts)} to {max(data.class_counts)} each; {len(data.test)} test images")
    print(f"model      {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"device     {device_name(device)}, {args.precision}")
    if epoch >= args.epochs:
        print(f"epochs     {epoch} are done; a larger --epochs goes on", flush=True)
        return
    print(f"epochs     {epoch + 1} to {args.epochs}, {-(-len(data.train) // args.batch_size)} steps each")
    print(f"disk       {left} checkpoints and last.pt: {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free", flush=True)
    if needed > free:
        print(f"warning: the disk of {folder} is too small; raise --save_every or give --keep", flush=True)


if __name__ == "__main__":
    run_script(main, go_on="the same command with --resume goes on")
