"""Trains a classifier on an imbalanced subset of a data set, far past zero training error.

The paper's MLP on CIFAR-10 (on a GPU; 401 checkpoints of 38 MB), and its measurement afterwards:

    CUDA_VISIBLE_DEVICES=0 python train_1st_order_unbalanced.py --model MLP \\
        --no-bias --dataset cifar10 --depth_relu 6 --depth_linear 1 --width 1024 --seed 1 \\
        --sep_decay --batch_size 256 --feature_decay_rate 0.00001 --loss CrossEntropy --lr 0.0001 \\
        --weight_decay 0.0001 --optimizer Adam --epochs 4000 --patience 2000
    CUDA_VISIBLE_DEVICES=0 python validate_NC_unbalanced.py   (the same flags)

Writes config.json, train_log.jsonl, epoch_*.pth and last.pt into model_weights/<run name>/.
"""

import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from args import LOCAL_FLAGS, adopt_config, config_flags, parse_args, run_folder
from datasets import epoch_order, random_shifts
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
    optimizer, scheduler = make_optimizer(args, model, objective, device)
    wandb_run = start_wandb(args, folder) if args.wandb else None
    if args.force:
        clear(folder)  # now that all that the new run needs is there
    record = Record(-(-len(data.train) // args.batch_size), device)
    state = TrainingState(model, optimizer, scheduler, record)
    if resumed:
        state.load(folder / "last.pt", device)
    clean_up(folder, state.epoch)
    announce(args, data, model, device, folder, state.epoch)
    if state.epoch >= args.epochs:
        return
    write_config(args, data, model, objective, device, folder)
    measurement = Measurement(args, data, model, objective, device, folder) if args.nc_every else None

    count = len(data.train)
    shifts = torch.zeros(count, 3, dtype=torch.int64, device=device) if args.data_augmentation else None
    step = make_step(args, data.train, model, objective, optimizer, record, shifts)
    saved = time.monotonic()
    with HeldSignals() as signals, Progress(args.epochs, "epoch", state.epoch) as progress, Writer() as writer:
        try:
            while state.epoch < args.epochs:
                epoch, began = state.epoch + 1, time.perf_counter() - state.seconds
                lr = float(optimizer.param_groups[0]["lr"])
                model.train()
                order = epoch_order(count, epoch=epoch, seed=args.seed, shuffle=not args.no_shuffle).to(device)
                if shifts is not None:
                    shifts.copy_(random_shifts(count, epoch=epoch, seed=args.seed))
                for rows in order.split(args.batch_size)[state.steps :]:
                    step(rows)
                    state.steps, state.seconds = state.steps + 1, time.perf_counter() - began
                    signals.check()
                    if time.monotonic() - saved > RESUME_SECONDS:
                        state.save(folder, writer)
                        saved = time.monotonic()
                totals = record.take()
                check_finite(epoch, totals, model)
                line = log_line(epoch, lr, objective, totals, count, time.perf_counter() - began)
                append_line(folder / "train_log.jsonl", line)
                if wandb_run:
                    wandb_run.log(line, step=epoch)
                if args.nc_every and due(epoch, args.nc_every, args.epochs):
                    with signals.released():
                        measurement.append(epoch)
                if checkpoint_due(args, epoch):
                    writer.save(checkpoint_path(folder, epoch), copy_state(model.state_dict()))
                    thin_out(args, folder)
                scheduler.step()
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
    if wandb_run:
        wandb_run.finish()
    print(f"finished: {folder}")


def make_step(args, split, model, objective, optimizer, record, shifts=None):
    """step(rows): one optimizer step on the images rows (B,) of a split. Nothing in it waits for the device."""
    device, parameters = split.labels.device, list(model.parameters())

    def step(rows):
        images, labels = split.take(rows, shifts)
        with autocast(args.precision, device):
            logits, features = model(images)
        loss, data_term = objective(logits, features, labels, model.fc)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad_norm)
        optimizer.step()
        record.add(loss.detach(), data_term.detach(), logits.detach(), labels)

    if device.type != "cuda" or not args.cuda_graph:
        return step
    sizes = {len(rows) for rows in torch.empty(len(split)).split(args.batch_size)}
    state = lambda: [*model.state_dict().values(), *optimizer_tensors(optimizer), *record.tensors()]  # noqa: E731
    return GraphedStep(step, sizes, state, device)


def optimizer_tensors(optimizer):
    """The tensors that an optimizer keeps, which come into being in its first step."""
    return [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]


class Record:
    """Loss, data term and correct predictions of each step of an epoch, on the device."""

    def __init__(self, steps, device):
        self.sums = torch.zeros(steps, 3, dtype=torch.float64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, loss, data_term, logits, labels):
        """Adds a step: the mean losses of a batch become sums."""
        correct = (logits.argmax(1) == labels).sum()
        row = torch.stack([loss * len(labels), data_term * len(labels), correct])
        self.sums.index_copy_(0, self.position, row[None].double())
        self.position.add_(1).remainder_(len(self.sums))

    def take(self):
        """The epoch's rows (steps, 3) on the CPU; the next epoch starts anew."""
        self.position.zero_()
        return self.sums.cpu()

    def put(self, sums, steps):
        """Goes back to where `steps` steps of an epoch had been added; sums (steps, 3) as they were then."""
        self.sums.copy_(sums)
        self.position.fill_(steps % len(self.sums))

    def tensors(self):
        return [self.sums, self.position]


@dataclass
class TrainingState:
    """All that training changes. `epoch` epochs are complete, and `steps` steps of the next one, which took `seconds`.

    Batches depend on (seed, epoch) alone and the schedule on the epoch: there is no generator to keep.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    record: Record
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0

    def save(self, folder, writer):
        """Has last.pt written: all that a resumed run starts from."""
        check_finite(self.epoch + 1, self.record.sums[: self.steps], self.model)
        flush_to_disk(folder / "train_log.jsonl")  # its epochs will not be run again
        state = {
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "record": self.record.sums,
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
            if not counted or self.epoch < 0 or not 0 <= self.steps <= len(self.record.sums):
                raise ValueError("no such epoch or step")
            if self.steps:
                self.seconds = float(state["seconds"])
                self.record.put(state["record"], self.steps)
            # a step count of 1 would mean to the schedule that the optimizer has not begun
            self.scheduler.load_state_dict({"last_epoch": self.epoch, "_step_count": self.epoch + 2})
        except UserError:
            raise
        except Exception as error:  # whatever a file of something else leads to
            raise UserError(
                f"{path}: not the state of a run with these flags ({one_line(error)[:100]})", FAILED_WORK
            ) from None


def load_optimizer(optimizer, state):
    """Loads an optimizer's state_dict; of its groups only the learning rate, the rest is as flags and device say."""
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        lr = float(group["lr"])
        group.update(wanted)
        group["lr"] = torch.full_like(wanted["lr"], lr) if isinstance(wanted["lr"], torch.Tensor) else lr
    for parameter, kept in optimizer.state.items():
        if set(kept) != OPTIMIZER_STATE[type(optimizer).__name__]:
            raise ValueError(f"the optimizer's state has {', '.join(kept)}")
        if any(value.shape not in (parameter.shape, ()) for value in kept.values()):
            raise ValueError("the optimizer's state is of another model")


def make_optimizer(args, model, objective, device):
    """The optimizer, one fused kernel a step, and the schedule of its learning rate, stepped once an epoch."""
    # In a CUDA graph the learning rate is read from the device, and the optimizer's step counts are there too.
    on_gpu = device.type == "cuda" and args.cuda_graph
    lr = torch.tensor(args.lr, device=device) if on_gpu else args.lr
    common = {"lr": lr, "weight_decay": objective.optimizer_decay, "fused": True}
    if args.optimizer == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), capturable=on_gpu, **common)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **common)
    if args.decay_type == "step":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.patience, args.gamma)
    else:
        milestones = [int(epoch) for epoch in args.decay_type.split("_")[1:]]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)
    return optimizer, scheduler


def log_line(epoch, lr, objective, totals, num_samples, seconds):
    """A line of train_log.jsonl, of an epoch's Record (steps, 3)."""
    loss, data_term, correct = (totals.sum(0) / num_samples).tolist()
    return {
        "epoch": epoch,
        "lr": float(f"{lr:.7g}"),  # on a GPU it is a float32
        "loss": loss,
        "ce" if objective.loss == "CrossEntropy" else "mse": data_term,
        "train_acc1": 100 * correct,
        "seconds": round(seconds, 4),
        "images_per_second": round(num_samples / seconds, 1),
    }


def check_finite(epoch, totals, model):
    """Stops at a loss that is not finite in an epoch's Record (steps, 3), or at weights that are not after it."""
    finite = totals.isfinite().all(1)
    if finite.all() and all(value.isfinite().all() for value in model.state_dict().values()):
        return
    what, step = ("weights are", len(totals)) if finite.all() else ("loss is", int((~finite).nonzero()[0]) + 1)
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


def start_wandb(args, folder):
    """A Weights & Biases run; the package is optional."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb True needs the package wandb: pip install wandb, or give --wandb False") from None
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    return wandb.init(
        project="neural-collapse-imbalance", name=Path(folder).name, dir=folder, config=config_flags(args), mode=mode
    )


if __name__ == "__main__":
    run_script(main, go_on="the same command with --resume goes on")
