"""A run's folder: the names of its files, the config, the log, the measured rows, and the lock.

config.json            flags, class counts, the UFM problem that training corresponds to, versions, device
train_log.jsonl        a line per epoch
epoch_001.pth, ...     weights (`engine.checkpoints`)
last.pt                the state from which training resumes
nc_metrics.csv         a row per measured epoch; nc_metrics_bn.csv, nc_metrics_nominal.csv and so on for other
                           --bn_statistics and --theory
class_accuracy.csv     a row per measured epoch, split and class
geometry/epoch_001.npz the K x K matrices of an epoch, measured and of the optimum
figures/               PDF and PNG
report.html            the report of this run, if Plotly is installed
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import platform
import re
import subprocess
import zipfile
import zlib
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch

from nc_theory import UFM, closed_form, has_released_formula, released_formula, solve
from objective import Objective
from utils import (
    FAILED_WORK,
    UserError,
    atomic_write,
    first_rank_only,
    from_flags,
    is_first_rank,
    remove_temporaries,
    write_json,
)

# Suffixes of nc_metrics.csv, geometry/ and the figures for each --theory and --bn_statistics
THEORY_SUFFIXES = {"objective": "", "nominal": "_nominal", "released": "_released"}
BN_SUFFIXES = {"running": "", "training_set": "_bn"}
SUFFIXES = [batch_norm + theory for batch_norm in BN_SUFFIXES.values() for theory in THEORY_SUFFIXES.values()]
GEOMETRY = {"HTH": 2, "WWT": 2, "WH": 2, "margins": 1, "mean_norms_sq": 1}  # array of an npz: its number of axes (K)
FIGURES = ("nc_curves", "theorem", "heatmaps", "training", "class_accuracy", "heatmaps_animation")
FIGURE_KINDS = ("pdf", "png", "gif")
TENSORBOARD_FILES = "tensorboard/*/events.out.tfevents.*"
LOCK_SECONDS = 60  # longest wait for another process that is adding a row

# Flags that belong to a call and not to the run: they are neither taken from config.json nor compared with it.
CALL_FLAGS = set(
    "data_dir download device gpu_id save_path load_path keep resume force theory bn_statistics watch recompute "
    "tensorboard wandb cuda_graph".split()
)


class Run:
    """A run's folder. `config` is the content of config.json when the object is made; {} if there is none.

    theory, bn_statistics: the --theory and --bn_statistics of the rows and geometry to read and write.
    """

    def __init__(self, folder, theory="objective", bn_statistics="running"):
        self.folder, self.theory, self.bn_statistics = Path(folder), theory, bn_statistics
        self.suffix = BN_SUFFIXES[bn_statistics] + THEORY_SUFFIXES[theory]
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder}: not a folder")
        self.config = read_config(self.folder / "config.json")
        self.flags = self.config.get("flags", {})
        self.problems = self.config.get("problems", {})
        self.log_file, self.last = self.folder / "train_log.jsonl", self.folder / "last.pt"
        self.csv = self.folder / f"nc_metrics{self.suffix}.csv"
        self.accuracy_csv = self.folder / f"class_accuracy{BN_SUFFIXES[bn_statistics]}.csv"
        self.figures, self.report = self.folder / "figures", self.folder / f"report{self.suffix}.html"

    # ---- setting and problem

    @property
    def seed(self):
        return self.flags.get("seed")

    @property
    def setting(self):
        """The flags that change the trained weights, without the seed; {} if they are not known.

        Flags that are off are left out, so that a run made before a flag existed has the same setting.
        """
        flags = self.config.get("training_flags")
        if flags is None:  # a config.json of an earlier version
            local = CALL_FLAGS | {"save_every", "nc_every"}
            flags = {name: value for name, value in self.flags.items() if name not in local}
        flags = flags | {"epochs": self.flags.get("epochs")}
        return {
            name: value
            for name, value in flags.items()
            if name != "seed" and (value not in (None, False, 0) or name == "feature_relu")  # on by default
        }

    @property
    def problem(self):
        """The `nc_theory.UFM` whose optimum the rows are compared with, or None (see `no_optimum`)."""
        entry = self.problems.get("objective" if self.theory == "objective" else "nominal")
        return UFM(**entry) if isinstance(entry, dict) and self.no_optimum is None else None

    @property
    def no_optimum(self):
        """One sentence on why there is no optimum to compare with; None if there is one."""
        entry = self.problems.get("objective" if self.theory == "objective" else "nominal")
        if self.theory == "released" and isinstance(entry, dict) and not has_released_formula(UFM(**entry)):
            return "the released formula is for the cross entropy with ReLU features only"
        return entry if isinstance(entry, str) else None

    @cached_property
    def optimum(self):
        """The `nc_theory.Optimum` that the rows are compared with, or None."""
        if self.problem is None:
            return None
        return released_formula(self.problem) if self.theory == "released" else solve(self.problem)

    @property
    def comparison(self):
        """The theory and the BatchNorm statistics of the rows as text, as far as they are not the default."""
        theory = f"theory {self.theory}" if self.theory != "objective" else ""
        batch_norm = "training-set BatchNorm statistics" if self.bn_statistics != "running" else ""
        return ", ".join(filter(None, (theory, batch_norm)))

    def theory_summary(self):
        """Return the theory's predictions in one line; without a closed form, only say that it takes minimisation."""
        if self.problem is None:
            return self.no_optimum
        if (optimum := closed_form(self.problem)) is None:
            return "no closed form: measuring finds the optimum by minimisation"
        least = optimum.loss * self.config.get("data_factor", 1)
        collapsed = (optimum.mean_norms_sq == 0).nonzero().flatten().tolist()
        named = f"classes {', '.join(map(str, collapsed))}" if len(collapsed) <= 20 else f"{len(collapsed)} classes"
        classes = f"{named} collapse to zero" if collapsed else "no class collapses"
        return f"least loss {least:.6f}; margins {optimum.margins.min():.3f} to {optimum.margins.max():.3f}; {classes}"

    # ---- log, rows and geometry

    @cached_property
    def log(self):
        """train_log.jsonl as a DataFrame, sorted by epoch; if an epoch has two lines, the later one counts."""
        return read_log(self.log_file)

    @cached_property
    def rows(self):
        """nc_metrics.csv as a DataFrame, sorted by epoch and cached; empty if there is no file."""
        return self.read_rows()

    def read_rows(self):
        """Read nc_metrics.csv again, since another process may have added rows, and return it."""
        self.rows = read_rows(self.csv)
        return self.rows

    def test_accuracy(self, epoch):
        """Return the test accuracy of each class (K,) at an epoch, in percent; empty if it was not measured."""
        table = read_rows(self.accuracy_csv)
        if table.empty:
            return np.empty(0)
        table = table[(table["epoch"] == epoch) & (table["split"] == "test")]
        return table.sort_values("class")["accuracy"].to_numpy()

    @first_rank_only
    def append_log(self, line):
        with open(self.log_file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def flush_log(self):
        """Wait until all lines of the log are on the disk."""
        with open(self.log_file, "a") as file:
            os.fsync(file.fileno())

    @first_rank_only
    def add_row(self, row, geometry, accuracies=()):
        """Write a measured epoch: its geometry {name: array}, its row, and its accuracies by class (dicts)."""
        epoch = row["epoch"]
        path = self.geometry_file(epoch)
        path.parent.mkdir(exist_ok=True)
        with self.rows_lock():  # training and validate --watch may both add rows
            with atomic_write(path) as file:
                np.savez(file, **geometry)
            if accuracies and epoch > last_epoch(self.accuracy_csv):
                append_rows(self.accuracy_csv, accuracies)
            elif accuracies:
                self._replace_epoch(self.accuracy_csv, epoch, accuracies)
            self.rows = self._replace_epoch(self.csv, epoch, [row])

    def _replace_epoch(self, path, epoch, rows):
        table = read_rows(path)
        others = [table[table["epoch"] != epoch]] if len(table) else []
        table = pd.concat([*others, pd.DataFrame(rows)]).sort_values("epoch", kind="stable", ignore_index=True)
        write_table(path, table)
        return table

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

    # ---- checkpoints

    def checkpoint(self, epoch):
        return self.folder / f"epoch_{epoch:03d}.pth"

    def checkpoints(self):
        """Return {epoch: path} of the existing checkpoints, in order."""
        found = {}
        for path in self.folder.glob("epoch_*.pth"):
            if match := re.fullmatch(r"epoch_(\d+)\.pth", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    # ---- starting, resuming and deleting

    def check_startable(self, resume, force):
        """Raise UserError if the folder holds another run and neither --resume nor --force is given."""
        holds_results = bool(self.checkpoints()) or any(path.exists() for path in (self.last, *self.tables()))
        if resume and holds_results and not self.config:
            raise UserError(
                f"{self.folder} holds a run without its config.json: it cannot be resumed; give --save_path"
            )
        if holds_results and not (resume or force):
            raise UserError(
                f"{self.folder} holds a run: give --resume to continue it, --force to delete it, or --save_path"
            )

    def check_class_counts(self, class_counts):
        """Raise UserError if the run was trained with other class counts."""
        if self.config and self.config["class_counts"] != class_counts:
            raise UserError(
                f"{self.folder}/config.json: the run was trained on {self.config['class_counts']} images of its "
                f"classes, --data_dir has {class_counts}"
            )

    @contextlib.contextmanager
    def lock(self):
        """Lock the folder for this run; raise UserError if another process is training there."""
        if not is_first_rank():  # the first rank holds the lock for all
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = filelock.FileLock(self.folder / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"{self.folder}: another process is training there; wait for it or give --save_path"
            ) from None
        with held:
            yield

    @contextlib.contextmanager
    def rows_lock(self):
        """Lock the rows for this process, after waiting if another one is adding a row."""
        path = self.csv.with_name(f".{self.csv.name}.lock")
        try:
            held = filelock.FileLock(path).acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout:
            raise UserError(f"{path}: another process has held this lock for a minute", FAILED_WORK) from None
        with held:
            yield

    def write_config(self, flags, training_flags, **facts):
        """Write config.json; for a resumed run, keep the facts and the CALL_FLAGS of its first call."""
        if self.config:
            kept = {name: value for name, value in self.flags.items() if name in CALL_FLAGS}
            self.config |= {"flags": flags | kept, "training_flags": training_flags}
        else:
            self.config = {"flags": flags, "training_flags": training_flags, **facts}
            self.config["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            self.config["versions"] |= {name: version(name) for name in ("torchvision", "numpy")}
            self.config["git_commit"] = git_commit()
        self.flags, self.problems = self.config["flags"], self.config.get("problems", {})
        if is_first_rank():
            write_json(self.folder / "config.json", self.config)

    @first_rank_only
    def repair(self, epoch):
        """Delete temporary files, and the log lines and rows of epochs after `epoch`, which training will repeat."""
        remove_temporaries(self.folder, "epoch_*.pth", "last.pt", "config.json", "train_log.jsonl", "*.csv")
        if self.log_file.exists():
            lines = [line for line in read_log_lines(self.log_file) if line["epoch"] <= epoch]
            with atomic_write(self.log_file, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        for path in self.tables():
            table = read_rows(path)
            if (table["epoch"] > epoch).all():
                path.unlink(missing_ok=True)
            elif (table["epoch"] > epoch).any():
                write_table(path, table[table["epoch"] <= epoch])
        for suffix in SUFFIXES:
            remove_temporaries(self.folder / f"geometry{suffix}", "epoch_*.npz")

    def tables(self):
        """Return the paths of all CSV files that measurements may write."""
        accuracies = [self.folder / f"class_accuracy{suffix}.csv" for suffix in BN_SUFFIXES.values()]
        return [self.folder / f"nc_metrics{suffix}.csv" for suffix in SUFFIXES] + accuracies

    def delete(self):
        """Delete the files that a run has written into the folder, and nothing else."""
        self.config, self.flags, self.problems = {}, {}, {}
        if not is_first_rank():
            return
        written = [
            *(self.folder / "config.json", self.log_file, self.last),  # first: without them, nothing can be resumed
            *self.checkpoints().values(),
            *self.tables(),
            *self.folder.glob(TENSORBOARD_FILES),
        ]
        for suffix in SUFFIXES:
            written += self.folder.glob(f"geometry{suffix}/epoch_*.npz")
            written += [self.figures / f"{name}{suffix}.{kind}" for name in FIGURES for kind in FIGURE_KINDS]
            written.append(self.folder / f"report{suffix}.html")
        for path in written:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# Reading and writing the files
# ---------------------------------------------------------------------------------------------------------


def read_config(path):
    """Return the content of a config.json, or {} if there is no such file; raise UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
        dicts = (config["flags"], config.get("training_flags", {}))
        if not (all(isinstance(entry, dict) for entry in dicts) and isinstance(config["class_counts"], list)):
            raise TypeError
        if "problems" not in config:  # written by an earlier version
            flags = config["flags"]
            facts = {"class_counts": config["class_counts"], "feature_dim": flags.get("width", math.inf)}
            objective = from_flags(Objective, flags, **facts)
            config |= {"problems": objective.problems(), "data_factor": objective.data_factor}
        for problem in config["problems"].values():
            if not isinstance(problem, str) and UFM(**problem).class_counts != tuple(config["class_counts"]):
                raise ValueError
        math.isfinite(config.get("data_factor", 1))  # raises TypeError unless it is a number
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path}: damaged, not a run's config") from None
    return config


def read_log_lines(path):
    """Return the lines of a train_log.jsonl as dicts, sorted by epoch, without damaged or half-written lines."""
    lines = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                lines[line["epoch"]] = line
    return [lines[epoch] for epoch in sorted(lines)]


def read_log(path):
    """Return a train_log.jsonl as a DataFrame of numbers."""
    return pd.DataFrame(read_log_lines(path)).apply(pd.to_numeric, errors="coerce")


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
        table = pd.read_csv(io.StringIO(text))
        numbers = table.drop(columns="split", errors="ignore")
        numbers = numbers.astype({name: float for name in numbers if name not in ("epoch", "class", "n_k")})
        if table["epoch"].dtype != int:
            raise ValueError
    except (ValueError, KeyError, TypeError, csv.Error):
        raise UserError(f"{path}: damaged, not a table of numbers; delete it to have it measured again") from None
    return table.assign(**numbers).sort_values("epoch", kind="stable")


def write_table(path, table):
    """Write a DataFrame as CSV, so that every float reads back as the same number."""
    with atomic_write(path, "w", newline="") as file:
        table.to_csv(file, index=False, lineterminator="\n")


def last_epoch(path):
    """Return the epoch of a CSV's last row, without reading the other rows; infinity if it is missing or truncated."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
        file.seek(-min(200, path.stat().st_size), os.SEEK_END)
        line = file.readlines()[-1]
        return int(line.split(b",")[0]) if line.endswith(b"\n") else math.inf
    return math.inf


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


def git_commit():
    """Return the git commit of this code, with '-dirty' if files were changed, or None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------


def read_measured_run(folder, columns, theory="objective", bn_statistics="running"):
    """Return the `Run` of a folder; raise UserError if the folder does not exist or its rows lack a column."""
    run = Run(folder, theory, bn_statistics)
    if not run.folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    require_columns(run, columns)
    return run


def require_columns(run, columns):
    """Raise UserError if the rows of a run, if it has any, lack one of the columns."""
    if missing := set(columns) - set(run.rows) if len(run.rows) else set():
        raise UserError(f"{run.csv}: no column {min(missing)}; measure again with --recompute")


def by_setting(runs):
    """Return [(label, [runs])], in order of appearance, with runs that differ only in their seed in one group.

    A label names the flags in which the settings differ from each other; it is "" if there is only one setting.
    Each run without a config.json is a setting of its own, labelled with its folder.
    """
    groups = {}
    for run in runs:
        key = repr(sorted(run.setting.items())) if run.config else str(run.folder.resolve())
        groups.setdefault(key, []).append(run)
    settings = [group[0].setting for group in groups.values() if group[0].config]
    names = dict.fromkeys(name for setting in settings for name in setting)
    differing = [name for name in names if len({repr(setting.get(name)) for setting in settings}) > 1]
    labelled = [(label_of(group[0], differing), group) for group in groups.values()]
    labels = [label for label, _ in labelled]
    return [
        (label if labels.count(label) == 1 else f"{label}, {label_of(group[0], differing, named=False)}", group)
        for label, group in labelled
    ]


def label_of(run, names, named=True):
    """Return a run's --run_name if `named`, else its values of the flags `names`, else the folder's name.

    Flags that are off are left out, unless all of them are.
    """
    if not run.config or (named and run.flags.get("run_name")):
        return run.flags.get("run_name") or run.folder.name
    values = {name: run.setting[name] for name in names if name in run.setting} or dict.fromkeys(names, "off")
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value):
    """Format a flag's value in at most 24 characters."""
    if isinstance(value, list):
        text = ",".join(map(str, value))
    elif value is True:
        text = "on"
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:10]}...{text[-10:]}"
