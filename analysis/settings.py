"""Finished runs grouped by setting: runs that differ only in their seed are one setting, with a label of its own."""

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from engine.run import Run
from engine.tables import BN_SUFFIXES, THEORY_SUFFIXES, MeasuredRun
from utils import UserError

MOST_SCALES = 100  # of the penalties while they change, at which the least loss is computed
ABSCISSAE = {"epoch": "epoch", "step": "optimizer step", "minutes": "minutes of training"}


def add_comparison_flags(add):
    """Add the flags that choose which measurements of a run are read."""
    add("--theory", choices=THEORY_SUFFIXES, default="objective", help="as in the validation script")
    add("--bn_statistics", choices=BN_SUFFIXES, default="running", help="as in the validation script")


def read_measured_run(folder, theory="objective", bn_statistics="running", columns=()):
    """Return the `MeasuredRun` of a folder; raise UserError if there is no such folder or its rows lack a column."""
    run = MeasuredRun(Run(folder), theory, bn_statistics)
    if not run.folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (run.config or run.run.holds_results()) and any(run.folder.glob("*/config.json")):
        raise UserError(f"{folder}: a folder of runs, not a run: give {folder}/*/")
    require_columns(run, columns)
    return run


def require_columns(run, columns):
    """Raise UserError if the rows of a run, if it has any, lack one of the columns."""
    if missing := set(columns) - set(run.rows) if len(run.rows) else set():
        raise UserError(f"{run.csv}: no column {min(missing)}; measure again with --recompute")


def flags_of_setting(run):
    """Return the flags that change the trained weights, and the epochs, without the seed; {} without a config.json.

    Flags that are off are left out, so that a run made before a flag existed has the same setting.
    """
    flags = run.config.get("training_flags", {}) | {"epochs": run.flags.get("epochs")}
    return {
        name: value
        for name, value in flags.items()
        if name != "seed" and (value not in (None, False, 0) or name == "feature_relu")  # on by default
    }


def by_setting(runs):
    """Return [(label, [runs])], in order of appearance, with runs that differ only in their seed in one group.

    A label names the flags in which the settings differ from each other; it is "" if there is only one setting.
    Each run without a config.json is a setting of its own, labelled with its folder.
    """
    groups = {}
    for run in runs:
        key = repr(sorted(flags_of_setting(run).items())) if run.config else str(run.folder.resolve())
        groups.setdefault(key, []).append(run)
    settings = [flags_of_setting(group[0]) for group in groups.values() if group[0].config]
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
    if not run.config or (named and run.run_name):
        return run.run_name or run.folder.name
    setting = flags_of_setting(run)
    values = {name: setting[name] for name in names if name in setting}
    values = values or {name: run.flags.get(name) or "off" for name in names}  # the defaults, such as head_init random
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


@dataclass
class Setting:
    """Runs that differ only in their seed, and their geometry at the epoch that the figures show."""

    label: str  # the flags in which the setting differs from the others; "" for a single setting
    name: str  # the label as a part of a file name; "" for a single setting
    index: int  # of its colour and marker in a figure of several settings
    runs: list
    epoch: int | None  # None if there is no epoch with a geometry in all runs
    geometries: list  # the geometry of each run at that epoch

    @property
    def seeds(self):
        return f"{len(self.runs)} seeds" if len(self.runs) > 1 else ""

    @property
    def note(self):
        """The caption of a figure that shows the first run alone."""
        run = self.runs[0]
        seed = f"seed {run.flags.get('seed')}, one of {len(self.runs)}" if self.seeds else ""
        return listed(self.label, run.caption, seed)

    @property
    def class_names(self):
        """The names of the classes (K,), or None if these are only their numbers."""
        return self.runs[0].class_names

    @property
    def class_counts(self):
        return self.geometries[0]["class_counts"]

    @property
    def least_loss(self):
        """The least value of the training objective, or None if it is not known."""
        return self.runs[0].comparison.least_loss

    def least_losses(self, x):
        """Return x (P,) and the least value (P,) of the objective at the penalties of the moment, or None.

        The two ends suffice where the penalties are constant.
        """
        if self.least_loss is None:
            return None
        ends, _ = self.series("loss", x)
        if not self.runs[0].flags.get("sep_decay"):
            return ends[[0, -1]], np.full(2, self.least_loss)
        times, scales = self.series("penalty_scale", x)
        if not len(ends) or not len(times) or (scales == 1).all():
            return ends[[0, -1]] if len(ends) else ends, np.full(2, self.least_loss)
        changes = np.flatnonzero(np.diff(scales[0], prepend=math.nan, append=math.nan))  # first of each scale, and end
        kept = np.unique([*thinned(changes[changes < len(times)].tolist(), MOST_SCALES), len(times) - 1])
        return times[kept], np.array([self.runs[0].comparison.least_loss_at(scale) for scale in scales[0][kept]])

    def class_values(self, name):
        """Return values (S, K) of S seeds and K classes at the epoch, or None if a run lacks them.

        name: "test_accuracy", in percent, or an array of the geometry.
        """
        values = [
            run.class_accuracy(self.epoch) if name == "test_accuracy" else geometry[name]
            for run, geometry in zip(self.runs, self.geometries, strict=False)  # no geometries without an epoch
        ]
        return np.array(values) if values and all(map(len, values)) else None

    def series(self, column, x):
        """Return x (E,) and values (S, E) of a column at the E epochs where all S runs have a value.

        x is the mean over the runs. The column is read from the log if it is there, else from the rows.
        """
        tables = [run.log if column in run.log else run.rows for run in self.runs]
        values = [table.reindex(columns=["epoch", column]).groupby("epoch")[column].last() for table in tables]
        values = pd.concat(values, axis=1, join="inner").replace([np.inf, -np.inf], np.nan).dropna()
        return np.mean([abscissa(run, values.index, x) for run in self.runs], axis=0), values.to_numpy().T


def make_settings(runs, epoch=None):
    """Group runs by setting, and return a list of `Setting`; `epoch` is as in `choose_epoch`."""
    if empty := [run for run in runs if run.rows.empty]:
        raise UserError(f"{empty[0].folder}: no rows in {empty[0].csv.name}; run validate_NC_unbalanced.py first")
    groups, settings = by_setting(runs), []
    for index, (label, group) in enumerate(groups):
        label = (label or group[0].folder.name) if len(groups) > 1 else ""
        name = f"_{index + 1}_{re.sub(r'[^A-Za-z0-9.]+', '-', label)[:60].strip('-')}" if label else ""
        chosen = choose_epoch(group, epoch)
        geometries = [run.geometry(chosen) for run in group if chosen]
        settings.append(Setting(label, name, index, group, chosen, geometries))
    return settings


def geometry_epochs(runs):
    """Return the sorted epochs at which all runs have a row and a geometry."""
    epochs = [{epoch for epoch in run.rows["epoch"].tolist() if run.geometry_file(epoch).exists()} for run in runs]
    return sorted(set.intersection(*epochs))


def choose_epoch(runs, epoch):
    """Return `epoch`; if that is None, the last epoch with a geometry in all runs, or None if there is none."""
    epochs = geometry_epochs(runs)
    if epoch is None:
        return epochs[-1] if epochs else None
    if epoch not in epochs:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{folders}: no geometry of epoch {epoch}, there are {', '.join(map(str, epochs)) or 'none'}")
    return epoch


def thinned(values, most):
    """Return at most `most` values of a list, evenly spaced, including the first and the last."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def abscissa(run, epochs, x):
    """Return the positions (E,) of the ends of epochs (E,) of a run on the axis `x`, a key of ABSCISSAE."""
    ends = {"epoch": np.array, "step": run.steps_until, "minutes": lambda e: run.seconds_until(e) / 60}[x](epochs)
    if np.isnan(ends).any():
        raise UserError(f"{run.folder}: no {'config.json' if x == 'step' else 'train_log.jsonl'}: --x {x} is not known")
    return ends


def listed(*texts):
    """Join the non-empty texts with commas."""
    return ", ".join(filter(None, texts))
