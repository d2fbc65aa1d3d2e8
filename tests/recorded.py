"""A recorded run, for the tests of figures, report and tables: an MLP on digits, 80 epochs, seed 1."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from args import parse_args, training_flags
from engine.tables import read_rows, write_table
from engine.training import make_objective

RECORDED = Path(__file__).parent / "recorded_run"
COUNTS = [34, 34, 68, 68, 102, 102, 136, 136, 170, 170]
EPOCHS = [1, 21, 41, 61, 80]
ROWS = np.genfromtxt(RECORDED / "nc_metrics.csv", delimiter=",", names=True)
LOG = [json.loads(line) for line in (RECORDED / "train_log.jsonl").read_text().splitlines()]


def recorded(folder, factor=1.0, counts=COUNTS, **flags):
    """Copy the recorded run, with other counts, flags and all measurements times a factor; return its folder."""
    shutil.copytree(RECORDED, folder)
    args = parse_args(argv=[])
    vars(args).update(json.loads((folder / "config.json").read_text())["flags"] | flags)
    objective = make_objective(args, counts, args.width)
    set_config(
        folder,
        class_counts=list(counts),
        flags=vars(args),
        training_flags=training_flags(args),
        problems=objective.problems(),
        data_factor=objective.data_factor,
    )
    change_rows(folder, lambda column: column if column.name == "epoch" else factor * column)
    lines = [{name: value if name == "epoch" else factor * value for name, value in line.items()} for line in LOG]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (folder / "geometry").iterdir():
        change_geometry(path, lambda name, array: array if name.endswith(("theory", "counts")) else factor * array)
    return folder


def set_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_rows(folder, change):
    write_table(folder / "nc_metrics.csv", read_rows(folder / "nc_metrics.csv").apply(change))


def change_geometry(path, change):
    arrays = {name: change(name, array) for name, array in np.load(path).items()}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def three_seeds(tmp_path, **flags):
    return [recorded(tmp_path / f"seed{n}", factor, seed=n, **flags) for n, factor in ((1, 1), (2, 2), (3, 4))]


def geometry(epoch):
    return np.load(RECORDED / "geometry" / f"epoch_{epoch:03d}.npz")


def write_accuracies(folder, values, epoch=80):
    """Write a class_accuracy.csv with unordered classes, and with other epochs and splits to be ignored."""
    rows = [
        {"epoch": e, "split": split, "class": label, "n_k": COUNTS[label], "accuracy": value + shift}
        for e, split, shift in ((epoch, "test", 0), (epoch, "train", 50), (41, "test", 30))
        for label, value in reversed(list(enumerate(values)))
    ]
    write_table(folder / "class_accuracy.csv", pd.DataFrame(rows))


def save_nothing(*arguments, **options):
    """Stand in for Figure.savefig, which takes seconds, where only the names of the files matter."""


def without_saving():
    Figure.savefig = save_nothing
