"""What the folders of runs say, and which of them differ by nothing but their seed."""

import zipfile
import zlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from args import THEORY_SUFFIXES, check_config, parse_args, training_flags
from utils import UserError, read_config, read_csv, read_log

GEOMETRY = {"HTH": 2, "WWT": 2, "WH": 2, "margins": 1, "mean_norms_sq": 1}  # arrays of an npz: dimensions of size K


@dataclass
class Run:
    """A run's folder, read once."""

    folder: Path
    config: dict  # config.json; {} in a folder of bare checkpoints
    log: list  # the lines of train_log.jsonl
    rows: list  # the rows of nc_metrics.csv, by epoch
    suffix: str = ""  # of the CSV and of geometry/: that of --theory

    @property
    def seed(self):
        return self.config.get("flags", {}).get("seed")

    @property
    def setting(self):
        """The flags that make the run what it is, but for its seed; {} where they are not known."""
        if not self.config:
            return {}
        args = Namespace(**(vars(parse_args(argv=[])) | self.config["flags"]))  # a flag younger than the run: default
        flags = training_flags(args) | {"epochs": args.epochs}
        return {name: value for name, value in flags.items() if name != "seed"}

    @property
    def csv(self):
        return self.folder / f"nc_metrics{self.suffix}.csv"

    def steps_until(self, epochs):
        """Optimizer steps up to the end of an epoch, or of each of an array; NaN without a config.json."""
        if not self.config:
            return np.full(np.shape(epochs), np.nan)
        return np.multiply(epochs, -(-sum(self.config["class_counts"]) // self.config["flags"]["batch_size"]))

    def seconds_until(self, epochs):
        """Seconds of training alone up to the end of an epoch, or of each of an array; NaN without a log."""
        if not self.log:
            return np.full(np.shape(epochs), np.nan)
        seconds = np.cumsum([0.0] + [line.get("seconds", np.nan) for line in self.log])
        return seconds[np.searchsorted([line["epoch"] for line in self.log], epochs, side="right")]

    def geometry_file(self, epoch):
        return self.folder / f"geometry{self.suffix}" / f"epoch_{epoch:03d}.npz"

    def geometry(self, epoch):
        """The arrays of an epoch's npz: class_counts, HTH, WWT, WH, margins, mean_norms_sq and those of _theory."""
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


def read_run(folder, theory="objective"):
    """Reads a run's folder; `theory` says which rows, as validate's --theory."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    run = Run(folder, read_config(folder) or {}, read_log(folder), [], THEORY_SUFFIXES[theory])
    if run.config:
        check_config(run.config, folder)
    run.rows = sorted(read_csv(run.csv), key=lambda row: row["epoch"])
    return run


def by_setting(runs):
    """[(label, [runs that differ by their seed only])] in order of appearance.

    A label names the flags in which the settings differ from one another, "" where there is one setting; runs
    without a config.json are settings of their own, labelled by their folder.
    """
    groups = {}
    for run in runs:
        key = repr(sorted(run.setting.items())) if run.setting else str(run.folder.resolve())
        groups.setdefault(key, []).append(run)
    settings = [group[0].setting for group in groups.values()]
    names = dict.fromkeys(name for setting in settings for name in setting)
    differing = [name for name in names if len({repr(setting.get(name)) for setting in settings if setting}) > 1]
    return [(label_of(group[0], differing), group) for group in groups.values()]


def label_of(run, names):
    """The values of the flags `names` of a run, in one line."""
    if not run.setting:
        return run.folder.name
    values = {name: run.setting[name] for name in names if run.setting.get(name) is not None}
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value):
    """A flag's value, few characters long."""
    if isinstance(value, list):
        text = ",".join(map(str, value))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:10]}...{text[-10:]}"
