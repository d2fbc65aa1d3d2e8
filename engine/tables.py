"""The tables that a run writes: its log, the measured rows, the accuracies by class, and the geometry.

train_log.jsonl        a line per epoch of training
nc_metrics.csv         a row per measured epoch
class_accuracy.csv     a row per measured epoch, split and class
nc_layers.csv          a row per measured epoch, layer of --nc_layers and split
geometry/epoch_001.npz the K x K matrices of an epoch, measured and of the optimum

Their names have a suffix for each --bn_statistics and --theory that is not the default, such as nc_metrics_bn.csv.
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import zipfile
import zlib
from functools import cached_property

import filelock
import numpy as np
import pandas as pd

from engine.comparison import Comparison
from utils import FAILED_WORK, UserError, atomic_write, first_rank_only

THEORY_SUFFIXES = {"objective": "", "nominal": "_nominal", "released": "_released"}
BN_SUFFIXES = {"running": "", "training_set": "_bn"}
SUFFIXES = [batch_norm + theory for batch_norm in BN_SUFFIXES.values() for theory in THEORY_SUFFIXES.values()]
GEOMETRY = {"HTH": 2, "WWT": 2, "WH": 2, "margins": 1, "mean_norms_sq": 1}  # array of an npz: its number of axes (K)
UNTIL = ["NC2_H", "NC3_WH", "margin_rel_err", "norm_rel_err"]  # the columns that --until looks at
LOCK_SECONDS = 60  # longest wait for another process that is adding a row


class MeasuredRun:
    """The measurements of a run for one --theory and one --bn_statistics.

    run: an `engine.run.Run`. problems: as in `Comparison`; by default those of its config.json. run_name: the name in
    legends and tables, instead of the run's --run_name.
    """

    def __init__(self, run, theory="objective", bn_statistics="running", problems=None, run_name=None):
        self.run, self.folder, self.config, self.flags = run, run.folder, run.config, run.flags
        self.theory, self.bn_statistics = theory, bn_statistics
        self.run_name = run_name or run.flags.get("run_name")
        problems = run.config.get("problems", {}) if problems is None else problems
        self.comparison = Comparison(problems, theory, run.config.get("data_factor", 1))
        self.suffix = BN_SUFFIXES[bn_statistics] + THEORY_SUFFIXES[theory]
        self.csv = self.folder / f"nc_metrics{self.suffix}.csv"
        self.accuracy_csv = self.folder / f"class_accuracy{BN_SUFFIXES[bn_statistics]}.csv"
        self.layers_csv = self.folder / f"nc_layers{BN_SUFFIXES[bn_statistics]}.csv"
        self.report = self.folder / f"report{self.suffix}.html"

    @property
    def class_names(self):
        """The names of the classes (K,), or None if these are only their numbers."""
        names = self.config.get("class_names")
        return None if names is None or names == [str(label) for label in range(len(names))] else names

    @property
    def caption(self):
        """The theory and the BatchNorm statistics of the rows as text, as far as they are not the default."""
        theory = f"theory {self.theory}" if self.theory != "objective" else ""
        batch_norm = "training-set BatchNorm statistics" if self.bn_statistics != "running" else ""
        return ", ".join(filter(None, (theory, batch_norm)))

    # ---- reading

    @cached_property
    def log(self):
        """train_log.jsonl as a DataFrame, sorted by epoch; if an epoch has two lines, the later one counts."""
        return self.run.train_log.table()

    @cached_property
    def rows(self):
        """nc_metrics.csv as a DataFrame, sorted by epoch and cached; empty if there is no file."""
        return self.read_rows()

    def read_rows(self):
        """Read nc_metrics.csv again, since another process may have added rows, and return it."""
        self.rows = read_rows(self.csv)
        return self.rows

    @property
    def layers(self):
        """nc_layers.csv as a DataFrame, sorted by epoch; empty if there is no file."""
        return read_rows(self.layers_csv)

    def has_reached(self, limit, epochs):
        """Return True if all columns of UNTIL were at most `limit` in the last two rows of these epochs."""
        rows = self.rows[self.rows["epoch"].isin(epochs)]
        return len(rows) > 1 and bool((rows[UNTIL].iloc[-2:] <= limit).all(axis=None))

    def class_accuracy(self, epoch, split="test"):
        """Return the accuracy of each class (K,) on a split at an epoch, in percent; empty if it was not measured."""
        table = read_rows(self.accuracy_csv)
        if table.empty:
            return np.empty(0)
        table = table[(table["epoch"] == epoch) & (table["split"] == split)]
        return table.sort_values("class")["accuracy"].to_numpy()

    def geometry_file(self, epoch):
        return self.folder / f"geometry{self.suffix}" / f"epoch_{epoch:03d}.npz"

    def geometry(self, epoch):
        """Return {name: array} of an epoch: class_counts, and the arrays of GEOMETRY, also with suffix _theory."""
        path = self.geometry_file(epoch)
        try:
            with np.load(path) as stored:
                arrays = dict(stored)
            shape = arrays["class_counts"].shape
            for name, dimensions in GEOMETRY.items():
                for array in (arrays[name], arrays.get(f"{name}_theory", arrays[name])):
                    if array.shape != shape * dimensions:
                        raise ValueError
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{path}: missing or damaged; measure again with --recompute") from None
        return arrays

    def steps_until(self, epochs):
        """Return the number of optimizer steps up to the end of `epochs` (int or array); NaN without a config.json."""
        if not self.config:
            return np.full(np.shape(epochs), np.nan)
        return np.multiply(epochs, -(-sum(self.config["class_counts"]) // self.flags["batch_size"]))

    def seconds_until(self, epochs):
        """Return the seconds of training up to the end of `epochs` (int or array); NaN without a log."""
        if self.log.empty:
            return np.full(np.shape(epochs), np.nan)
        seconds = np.concatenate([[0.0], self.log["seconds"].cumsum()])
        return seconds[np.searchsorted(self.log["epoch"], epochs, side="right")]

    # ---- writing

    @first_rank_only
    def add_row(self, row, geometry, accuracies=()):
        """Write a measured epoch: its geometry {name: array}, its row, and its accuracies by class (dicts)."""
        epoch = row["epoch"]
        path = self.geometry_file(epoch)
        path.parent.mkdir(exist_ok=True)
        with self.lock():  # training and validate --watch may both add rows
            with atomic_write(path) as file:
                np.savez(file, **geometry)
            if accuracies and epoch > last_epoch(self.accuracy_csv) and has_columns(self.accuracy_csv, accuracies[0]):
                append_rows(self.accuracy_csv, accuracies)
            elif accuracies:
                replace_epoch(self.accuracy_csv, epoch, accuracies)
            self.rows = replace_epoch(self.csv, epoch, [row])

    @first_rank_only
    def add_layers(self, epoch, rows):
        """Write the rows (dicts) of the layers at an epoch."""
        with self.lock():
            replace_epoch(self.layers_csv, epoch, [{"epoch": epoch, **row} for row in rows])

    @contextlib.contextmanager
    def lock(self):
        """Lock the rows for this process, after waiting if another one is adding a row."""
        path = self.csv.with_name(f".{self.csv.name}.lock")
        try:
            held = filelock.FileLock(path).acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout:
            raise UserError(f"{path}: another process has held this lock for a minute", FAILED_WORK) from None
        with held:
            yield


# ---------------------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------------------


def read_rows(path):
    """Return a CSV with a column `epoch` as a DataFrame sorted by epoch, with floats exactly as written.

    Raises UserError if the file is not such a table.
    """
    if not path.exists():
        return pd.DataFrame({"epoch": pd.Series(dtype=int)})
    try:
        text = path.read_text()
        if len({len(cells) for cells in csv.reader(io.StringIO(text))}) > 1:
            raise ValueError  # pandas would fill a truncated row with empty cells
        table = pd.read_csv(io.StringIO(text), converters={"name": str, "layer": str})  # a class may be called "nan"
        numbers = table.drop(columns=["split", "name", "layer"], errors="ignore")
        numbers = numbers.astype({name: float for name in numbers if name not in ("epoch", "class", "n_k", "d")})
        if table["epoch"].dtype != int:
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error):
        raise UserError(f"{path}: damaged, not a table of numbers; delete it to have it measured again") from None
    table = table.assign(**numbers).sort_values("epoch", kind="stable")
    if "gap_head" in table:  # of a version that split the gap otherwise, in relative units, under the same names
        table = table.drop(columns=["gap_within", "gap_head", "gap_means"], errors="ignore")
    return table


def write_table(path, table):
    """Write a DataFrame as CSV, so that every float reads back as the same number."""
    with atomic_write(path, "w", newline="") as file:
        table.to_csv(file, index=False, lineterminator="\n")


def replace_epoch(path, epoch, rows):
    """Write rows (dicts) of an epoch into a CSV, instead of those that it has of the epoch; return the whole table."""
    table = read_rows(path)
    others = [table[table["epoch"] != epoch]] if len(table) else []
    table = pd.concat([*others, pd.DataFrame(rows)]).sort_values("epoch", kind="stable", ignore_index=True)
    write_table(path, table)
    return table


def keep_until(path, epoch):
    """Delete the rows of a CSV after an epoch, and the file if no row is left."""
    table = read_rows(path)
    if (table["epoch"] > epoch).all():
        path.unlink(missing_ok=True)
    elif (table["epoch"] > epoch).any():
        write_table(path, table[table["epoch"] <= epoch])


def last_epoch(path):
    """Return the epoch of a CSV's last row, without reading the other rows; infinity if it is missing or truncated."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
        file.seek(-min(200, path.stat().st_size), os.SEEK_END)
        line = file.readlines()[-1]
        return int(line.split(b",")[0]) if line.endswith(b"\n") else math.inf
    return math.inf


def has_columns(path, names):
    """Return True if a CSV has the columns `names`, in that order: an earlier version may have written others."""
    with open(path, newline="") as file:
        return next(csv.reader(file), None) == list(names)


def append_rows(path, rows):
    """Append rows (dicts with the columns of the table) to a CSV: all of them, or none if the disk is full."""
    text = pd.DataFrame(rows).to_csv(header=False, index=False, lineterminator="\n").encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from None


# ---------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------


class TrainLog:
    """train_log.jsonl at `path`: a line, a JSON object with the key "epoch", for each epoch of training."""

    def __init__(self, path):
        self.path = path

    @first_rank_only
    def append(self, line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self):
        """Wait until all lines are on the disk."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def keep_until(self, epoch):
        """Delete the lines after an epoch, and damaged or half-written ones."""
        if self.path.exists():
            lines = [line for line in self.lines() if line["epoch"] <= epoch]
            with atomic_write(self.path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def lines(self):
        """Return the lines as dicts, sorted by epoch, without damaged or half-written lines."""
        lines = {}
        for text in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                    lines[line["epoch"]] = line
        return [lines[epoch] for epoch in sorted(lines)]

    def table(self):
        """Return the log as a DataFrame of numbers."""
        return pd.DataFrame(self.lines()).apply(pd.to_numeric, errors="coerce")
