"""Measures neural collapse in every checkpoint of a run, against the optimum that the theory predicts.

Takes the flags of train_1st_order_unbalanced.py and finds the run by them, or by --load_path:

    python validate_NC_unbalanced.py --load_path model_weights/RUN --data_dir ~/data

Writes nc_metrics.csv, geometry/epoch_*.npz and figures/ into the run's folder (with --theory nominal or released,
nc_metrics_nominal.csv and so on), and prints a table: measured against theorem, class by class.
"""

import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from args import THEORY_SUFFIXES, adopt_config, parse_args, run_folder
from datasets import load_data
from loggers import open_loggers, require_packages
from models import build_model
from models.classifier import head_weight
from nc_metrics import THEORY_COLUMNS, ClassStatistics, geometry, nc_metrics
from objective import make_objective
from plot_nc import draw_runs, heatmaps
from runs import read_run
from theory import CLOSED_FORMS, minimise, released_formula
from utils import (
    FAILED_WORK,
    Progress,
    UserError,
    atomic_write,
    autocast,
    checkpoint_path,
    clear_temporaries,
    file_lock,
    find_checkpoints,
    is_locked,
    load_torch,
    pick_device,
    read_config,
    read_csv,
    run_script,
    set_precision,
    set_weights,
    write_csv,
)

BATCH = 512  # images of a forward pass
FEATURES_KEPT = 2**31  # bytes of features kept between the two passes of statistics; above, they are computed twice
WATCH_SECONDS = 2  # between looks at a folder with --watch
WATCH_GRACE = 60  # seconds that --watch waits for a training run to begin, or to go on once its process is gone


def main():
    args = parse_args(__doc__.split("\n")[0])
    folder = Path(args.load_path) if args.load_path else run_folder(args)
    if args.watch:
        wait_for_run(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train with the same flags first, or give --load_path")
    config = read_config(folder)
    if config:
        adopt_config(args, config, folder)
    if not find_checkpoints(folder) and not args.watch:
        raise UserError(f"{folder}: no epoch_*.pth in it; train with the same flags first, or give --load_path")

    if args.precision == "tf32" and pick_device(args.device, args.gpu_id).type == "cpu":
        print("tf32 needs a GPU: measured in fp32")
        args.precision = "fp32"
    device, data, model = set_up(args)
    check_counts(config, data, folder)
    measurement = Measurement(args, data, model, make_objective(args, data), device, folder)
    if measurement.reason:
        print(f"columns {', '.join(THEORY_COLUMNS)} stay empty: {measurement.reason}")

    with open_loggers(args, folder, "validate", first_epoch=0 if args.recompute else None) as loggers:
        failed = measure_all(args, measurement, model, device, folder, loggers)
    if not measurement.rows:
        raise UserError(f"{folder}: no checkpoint could be measured", FAILED_WORK)
    run = read_run(folder, args.theory)
    print_table(run)
    print(f"figures in {draw_runs([run], folder / 'figures')[0].parent}")
    return FAILED_WORK if failed else 0


def set_up(args):
    """What the flags mean on this machine: the device, and the data and a fresh model on it."""
    require_packages(args)
    device = pick_device(args.device, args.gpu_id)
    set_precision(args.precision, device)
    data = load_data(
        args.dataset,
        args.data_dir,
        imbalance=args.imbalance,
        n_max=args.n_max,
        class_counts=args.class_counts,
        download=args.download,
    )
    torch.manual_seed(args.seed)  # of the weights, drawn on the CPU: the same on every device
    model = build_model(
        args.model,
        data.num_classes,
        bias=args.bias,
        depth_linear=args.depth_linear,
        depth_relu=args.depth_relu,
        width=args.width,
        revive=args.revive,
    )
    memory_format = torch.contiguous_format if args.model == "MLP" else torch.channels_last
    data.train, data.test = data.train.to(device, memory_format), data.test.to(device, memory_format)
    return device, data, model.to(device, memory_format=memory_format)


def check_counts(config, data, folder):
    """Stops where the images are not as many as those of the run's config."""
    if config and config["class_counts"] != data.class_counts:
        raise UserError(
            f"{folder}/config.json: the run was trained on {config['class_counts']} images of its classes, "
            f"--data_dir has {data.class_counts}"
        )


def measure_all(args, measurement, model, device, folder, loggers):
    """Measures the checkpoints that have no row yet, with --watch until training ends; counts damaged ones."""
    damaged, measured = set(), set()
    seen = time.monotonic()  # when training was last known to live
    while True:
        ended = not args.watch or is_finished(folder)  # asked before the look at the folder: its last file is seen
        if not ended and is_locked(folder):
            seen = time.monotonic()
        gone = time.monotonic() - seen > WATCH_GRACE
        done = measured if args.recompute else measurement.epochs()
        todo = {e: path for e, path in find_checkpoints(folder).items() if e not in done and e not in damaged}
        with Progress(len(todo), "checkpoint") as progress:
            for epoch, path, load in read_ahead(todo, device):
                try:
                    set_weights(model, load(), path)
                    row = measurement.append(epoch, loggers)
                    measured.add(epoch)
                    progress.step(f"epoch {epoch}  NC1 {row['NC1']:.2e}  NC2_W {row['NC2_W']:.2e}")
                except UserError as error:
                    if not path.exists():  # training with --keep deleted it
                        continue
                    print(f"skipped: epoch {epoch}: {error}", file=sys.stderr)
                    damaged.add(epoch)
        if ended:
            return len(damaged)
        if gone:
            print(f"no process has trained in {folder} for {WATCH_GRACE} seconds: the watch ends")
            return len(damaged)
        time.sleep(WATCH_SECONDS)


def is_finished(folder):
    """Whether training has written the last checkpoint that the run's config.json asks for."""
    config = read_config(folder)
    return config is not None and checkpoint_path(folder, config["flags"].get("epochs", 0)).exists()


def read_ahead(checkpoints, device):
    """Yields (epoch, path, load) of {epoch: path}; load() gives what torch.load reads, begun one step ahead."""
    with ThreadPoolExecutor(1) as thread:
        items, ahead = list(checkpoints.items()), deque()
        for number, (epoch, path) in enumerate(items):
            while len(ahead) < 2 and number + len(ahead) < len(items):
                ahead.append(thread.submit(load_torch, items[number + len(ahead)][1], device))
            yield epoch, path, ahead.popleft().result


def wait_for_run(folder):
    """Waits a while for a training run to write its config.json."""
    deadline = time.monotonic() + WATCH_GRACE
    while not (folder / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: no training run began there within {WATCH_GRACE} seconds")
        time.sleep(WATCH_SECONDS)


# ---------------------------------------------------------------------------------------------------------
# One checkpoint -> one row
# ---------------------------------------------------------------------------------------------------------


class Measurement:
    """Measures a model at an epoch, and keeps the run's nc_metrics.csv and geometry/."""

    def __init__(self, args, data, model, objective, device, folder):
        self.data, self.model, self.device, self.precision = data, model, device, args.precision
        suffix = THEORY_SUFFIXES[args.theory]
        self.csv, self.geometry_folder = Path(folder) / f"nc_metrics{suffix}.csv", Path(folder) / f"geometry{suffix}"
        self.optimum, self.reason = find_optimum(args, objective, data.class_counts, head_weight(model).shape[1])
        self.lock = self.csv.with_name(f".{self.csv.name}.lock")  # training and validate --watch both add rows
        with file_lock(self.lock):
            clear_temporaries(self.csv.parent, self.csv.name)
            clear_temporaries(self.geometry_folder, "epoch_*.npz")
        self.rows = read_csv(self.csv)

    def epochs(self):
        """Epochs that have a row, by whichever process."""
        self.rows = read_csv(self.csv)
        return {int(row["epoch"]) for row in self.rows}

    def append(self, epoch, loggers):
        """Measures the model as it is; writes the geometry, then the row, which it returns, and logs both."""
        row, parts = self.measure()
        row, parts = {"epoch": epoch, **row}, {name: part.numpy() for name, part in parts.items()}
        self.geometry_folder.mkdir(exist_ok=True)
        with file_lock(self.lock):  # training and validate --watch both add rows
            with atomic_write(self.geometry_folder / f"epoch_{epoch:03d}.npz") as file:
                np.savez(file, class_counts=self.data.class_counts, **parts)
            others = [other for other in read_csv(self.csv) if other["epoch"] != epoch]
            self.rows = sorted([*others, row], key=lambda other: other["epoch"])
            write_csv(self.csv, self.rows)
        for logger in loggers:
            logger.scalars("nc", row)
            logger.figure("heatmaps", heatmaps(parts, epoch), epoch)
        return row

    @torch.inference_mode()
    def measure(self):
        """The metrics of the model's features and head on the training subset, its accuracies, its geometry."""
        self.model.eval()
        statistics = ClassStatistics(self.data.num_classes)
        weight = head_weight(self.model)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        passes = self.forward(self.data.train)
        if len(self.data.train) * weight.shape[1] * 4 <= FEATURES_KEPT:
            passes = list(passes)
        for logits, features, labels in passes:
            statistics.update(features, labels)
            correct += (logits.argmax(1) == labels).sum()
        if not statistics.means.isfinite().all():
            raise UserError("the features overflow: there is nothing to measure", FAILED_WORK)
        for logits, features, labels in passes if isinstance(passes, list) else self.forward(self.data.train):
            statistics.update_within(features, labels, logits.argmax(1))
        test_correct = sum((logits.argmax(1) == labels).sum() for logits, _, labels in self.forward(self.data.test))
        row = {
            "train_acc1": 100 * float(correct) / len(self.data.train),
            "test_acc1": 100 * float(test_correct) / len(self.data.test) if len(self.data.test) else float("nan"),
            **nc_metrics(statistics, weight, self.optimum),
        }
        parts = geometry(statistics.means, weight)
        if self.optimum:
            parts |= {f"{name}_theory": getattr(self.optimum, name) for name in list(parts)}
        return row, parts

    def forward(self, split):
        """Yields (logits, features, labels) of a split in order, batch by batch."""
        if not len(split):
            return
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            with autocast(self.precision, self.device):
                logits, features = self.model(images)
            yield logits, features, labels


def find_optimum(args, objective, class_counts, dim):
    """The `theory.Optimum` that --theory means, or None and the reason why there is none."""
    decays = (args.weight_decay, args.feature_decay_rate)
    if args.theory == "objective":
        decays = objective.effective_decays()
        if decays is None:
            return None, "without --sep_decay no optimum is known (--theory nominal compares all the same)"
        if args.depth_linear > 1:
            return None, "with --depth_linear > 1 no optimum is known (--theory nominal compares all the same)"
    if min(decays) <= 0:
        return None, "without a positive --weight_decay and --feature_decay_rate there is no optimum"
    if dim < len(class_counts):
        return None, f"the theory needs as many features as classes, the model has {dim}"
    if args.theory == "released":
        if args.loss != "CrossEntropy":
            return None, "the released formula is for the cross entropy only"
        return released_formula(class_counts, *decays), None
    if args.theory == "objective" and args.bias:
        return minimise(class_counts, *decays, loss=args.loss, bias=True).optimum, None
    return CLOSED_FORMS[args.loss](class_counts, *decays), None


# ---------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------


def print_table(run):
    """The last row of a `Run`: measured against theorem class by class, and the metrics."""
    row = run.rows[-1]
    epoch = int(row["epoch"])
    parts = run.geometry(epoch)
    print(f"\nepoch {epoch}: measured against theorem")
    heads = ("margin", "theorem", "ratio", "|mu_k|^2", "theorem", "ratio")
    print(f"{'class':>5} {'n_k':>6}" + "".join(f" {head:>10}" for head in heads))
    for label, count in enumerate(parts["class_counts"]):
        cells = []
        for name in ("margins", "mean_norms_sq"):
            measured = parts[name][label]
            expected = parts[f"{name}_theory"][label] if f"{name}_theory" in parts else None
            cells += [f"{measured:10.4f}"]
            cells += [f"{expected:10.4f}" if expected is not None else f"{'-':>10}"]
            cells += [f"{measured / expected:10.4f}" if expected else f"{'-':>10}"]
        print(f"{label:>5} {count:>6} " + " ".join(cells))
    print()
    for name, value in row.items():
        if name != "epoch":
            print(f"{name:>20}  {'-' if np.isnan(value) else f'{value:.4g}'}")
    print(f"\nrows in    {run.csv}")


if __name__ == "__main__":
    run_script(main, go_on="the same command goes on")
