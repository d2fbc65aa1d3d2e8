"""Measure neural collapse in every checkpoint of a run, against the optimum that the theory predicts.

Takes the flags of train_1st_order_unbalanced.py and finds the run by them, or by --load_path:

    python validate_NC_unbalanced.py --load_path model_weights/RUN --data_dir ~/data

Writes nc_metrics.csv, class_accuracy.csv, geometry/epoch_*.npz, figures/ and, if Plotly is installed, report.html into
the run's folder (with --theory nominal or released, nc_metrics_nominal.csv and so on), and prints a table that compares
each class with the theorem.
"""

import math
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from analysis.diagnosis import explain
from analysis.figures import draw_runs, heatmaps
from analysis.report import write_report
from args import parse_args, run_folder
from engine.checkpoints import load_state_dict, load_torch
from engine.device import pick_device, set_precision
from engine.loggers import open_loggers, require_packages
from engine.measurement import Measurement
from engine.run import Run
from engine.tables import MeasuredRun
from engine.training import make_model, make_objective, read_data
from models import to_device
from nc_metrics import THEORY_COLUMNS
from nc_theory import GAP_COLUMNS
from utils import FAILED_WORK, Progress, UserError, run_script, shortened

CLASSES_PRINTED = 100  # at most, evenly spaced
NAME_WIDTH = 30  # largest number of characters of a class's name
WATCH_SECONDS = 2  # between two looks at the folder with --watch


def main():
    args = parse_args(__doc__)
    folder = Path(args.load_path) if args.load_path else run_folder(args)
    run = Run(folder)
    if args.watch and not run.config:
        wait_for_run(folder)
        run = Run(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train with the same flags first, or give --load_path")
    if run.config:
        args = parse_args(config=run.config, folder=folder)
    if not run.checkpoints() and not args.watch:
        raise UserError(f"{folder}: no epoch_*.pth in it; train with the same flags first, or give --load_path")
    require_packages(vars(args))

    device = pick_device(args.device, args.gpu_id)
    if args.precision == "tf32" and device.type == "cpu":
        print("tf32 needs a GPU: measured in fp32")
        args.precision = "fp32"
    set_precision(args.precision, device)
    data = read_data(args)
    run.check_data(data)
    model, data = to_device(make_model(args, data.num_classes, data.shape), data, device)
    problems = run.config.get("problems")
    if problems is None:  # a folder of bare checkpoints
        problems = make_objective(args, data.class_counts, model.fc[0].in_features).problems()
    measured = MeasuredRun(run, args.theory, args.bn_statistics, problems)
    if measured.comparison.optimum is None:
        print(f"columns {', '.join([*THEORY_COLUMNS, *GAP_COLUMNS])} stay empty: {measured.comparison.no_optimum}")

    first_epoch = 0 if args.recompute else None
    with open_loggers(vars(args), folder, "validate", heatmaps, first_epoch) as loggers:
        failed = measure_all(args, measured, Measurement(measured, model, data, args.precision), device, loggers)
    if measured.rows.empty:
        raise UserError(f"{folder}: no checkpoint could be measured", FAILED_WORK)
    print_table(measured)
    if args.head_fixed and args.head_init == "optimum":
        print("the head was fixed at the optimum, which leaves the least loss what it is with a free head")
    elif args.head_fixed:
        print(f"the head was fixed ({args.head_init}): the optimum above, with a free head, may be out of reach")
    print(f"figures in {draw_runs([measured], run.figures)[0].parent}")
    if find_spec("plotly"):
        print(f"report in  {write_report([measured], measured.report)}")
    return FAILED_WORK if failed else 0


def measure_all(args, measured, measurement, device, loggers):
    """Measure the checkpoints without a row (--watch: up to the last epoch); return the number of damaged ones."""
    run, fresh, damaged = measured.run, set(), set()
    while True:
        # Checked first, so that the last checkpoint is listed
        ended = not args.watch or run.checkpoint(run.last_epoch(args.epochs)).exists()
        done = fresh if args.recompute else set(measured.read_rows()["epoch"])
        todo = {e: path for e, path in run.checkpoints().items() if e not in done | damaged}
        with Progress(len(todo), "checkpoint") as progress:
            for epoch, path, load in read_ahead(todo, device):
                try:
                    load_state_dict(measurement.model, load(), path)
                    row = measurement.record(epoch, loggers)
                    fresh.add(epoch)
                    progress.step(f"epoch {epoch}  NC1 {row['NC1']:.2e}  NC2_W {row['NC2_W']:.2e}")
                except UserError as error:
                    if not path.exists():  # training with --keep has deleted it
                        continue
                    print(f"skipped: epoch {epoch}: {error}", file=sys.stderr)
                    damaged.add(epoch)
        if ended:
            return len(damaged)
        time.sleep(WATCH_SECONDS)


def read_ahead(checkpoints, device):
    """Yield (epoch, path, load) for {epoch: path}; load() returns the file's content, read one checkpoint ahead."""
    with ThreadPoolExecutor(1) as thread:
        items, ahead = list(checkpoints.items()), deque()
        for number, (epoch, path) in enumerate(items):
            while len(ahead) < 2 and number + len(ahead) < len(items):
                ahead.append(thread.submit(load_torch, items[number + len(ahead)][1], device))
            yield epoch, path, ahead.popleft().result


def wait_for_run(folder):
    """Wait until training has written the config.json of the run in `folder`."""
    print(f"waiting for a training run in {folder}; Ctrl-C stops waiting", flush=True)
    while not (folder / "config.json").exists():
        time.sleep(WATCH_SECONDS)


def print_table(run):
    """Print the last row of a `MeasuredRun`: measured against theorem class by class, and the metrics."""
    row = run.rows.iloc[-1]
    epoch = int(row["epoch"])
    parts = run.geometry(epoch)
    print(f"\nepoch {epoch}: measured against theorem")
    heads = ("margin", "theorem", "ratio", "|mu_k|^2", "theorem", "ratio")
    print(f"{'class':>5} {'n_k':>6}" + "".join(f" {head:>10}" for head in heads))
    every = -(-len(parts["class_counts"]) // CLASSES_PRINTED)
    names = run.class_names or [""] * len(parts["class_counts"])
    for label, count in list(enumerate(parts["class_counts"]))[::every]:
        cells = []
        for name in ("margins", "mean_norms_sq"):
            measured = parts[name][label]
            expected = parts[f"{name}_theory"][label] if f"{name}_theory" in parts else None
            cells += [f"{measured:10.4f}"]
            cells += [f"{expected:10.4f}" if expected is not None else f"{'-':>10}"]
            cells += [f"{measured / expected:10.4f}" if expected else f"{'-':>10}"]
        print(f"{label:>5} {count:>6} {' '.join(cells)}  {shortened(names[label], NAME_WIDTH)}".rstrip())
    print()
    width = max(map(len, row.index))
    for name, value in row.drop("epoch").items():
        print(f"{name:>{width}}  {'-' if math.isnan(value) else f'{value:.4g}'}")
    print("", *explain(run), sep="\n")
    print(f"\nrows in    {run.csv}")


if __name__ == "__main__":
    run_script(main)
