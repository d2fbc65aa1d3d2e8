"""A run's folder: where its files are, the config, the lock, and how a run starts, resumes and is deleted.

config.json            flags, class counts, the UFM problem that training corresponds to, versions, device
epoch_001.pth, ...     weights (`engine.checkpoints`)
last.pt                the state from which training resumes
train_log.jsonl, nc_metrics.csv, class_accuracy.csv, nc_layers.csv, geometry/    (`engine.tables`)
figures/               PDF and PNG, and .drawn, a list of those that we drew
report.html            the report of this run, if Plotly is installed
"""

import contextlib
import json
import math
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import filelock
import torch

from engine.tables import BN_SUFFIXES, SUFFIXES, TrainLog, keep_until
from nc_theory import UFM
from utils import UserError, atomic_write, class_text, first_rank_only, is_first_rank, remove_temporaries, write_json

TENSORBOARD_FILES = "tensorboard/*/events.out.tfevents.*"
DRAWN = ".drawn"  # file in figures/ that lists the figures that we have drawn there, one per line


class Run:
    """A run's folder. `config` is the content of config.json when the object is made; {} if there is none."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{folder}: not a folder")
        self.config = read_config(self.folder / "config.json")
        self.train_log, self.last = TrainLog(self.folder / "train_log.jsonl"), self.folder / "last.pt"
        self.figures = self.folder / "figures"

    @property
    def flags(self):
        """{flag: value} of the run; {} without a config.json."""
        return self.config.get("flags", {})

    def checkpoint(self, epoch):
        return self.folder / f"epoch_{epoch:03d}.pth"

    def checkpoints(self):
        """Return {epoch: path} of the existing checkpoints, in order."""
        found = {}
        for path in self.folder.glob("epoch_*.pth"):
            if match := re.fullmatch(r"epoch_(\d+)\.pth", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def tables(self):
        """Return the paths of all CSV files that measurements may write."""
        names = [f"{name}{suffix}.csv" for name in ("class_accuracy", "nc_layers") for suffix in BN_SUFFIXES.values()]
        return [self.folder / name for name in [*(f"nc_metrics{suffix}.csv" for suffix in SUFFIXES), *names]]

    def holds_results(self):
        """Return True if the folder holds checkpoints, tables, last.pt, or a log of more than an epoch.

        With a single line in its log and nothing else, a run has failed before its first checkpoint.
        """
        files = any(path.exists() for path in (self.last, *self.tables()))
        return files or bool(self.checkpoints()) or len(self.train_log.lines()) > 1

    def check_startable(self, resume, force):
        """Raise UserError if the folder holds another run and neither --resume nor --force is given."""
        holds_results = self.holds_results()
        if resume and holds_results and not self.config:
            raise UserError(
                f"{self.folder} holds a run without its config.json: it cannot be resumed; give --save_path"
            )
        if holds_results and not (resume or force):
            raise UserError(
                f"{self.folder} holds a run: give --resume to continue it, --force to delete it, or --save_path"
            )

    def check_resumable(self):
        """Raise UserError if the folder holds results, but neither last.pt nor a checkpoint to go on from."""
        if lines := [] if self.last.exists() or self.checkpoints() else self.train_log.lines()[1:]:
            raise UserError(
                f"{self.folder}: last.pt and all checkpoints are missing, and the log has {lines[-1]['epoch']} epochs: "
                "give --force to delete it and start again, or --save_path"
            )

    def check_data(self, data):
        """Raise UserError if the run was trained on other classes or other images than a `datasets.Data`."""
        if not self.config:
            return
        path, counts = f"{self.folder}/config.json", self.config["class_counts"]
        if counts != data.class_counts:
            raise UserError(
                f"{path}: the run was trained on {counts} images of its classes, --data_dir has {data.class_counts}"
            )
        names, images = self.config.get("class_names"), self.config.get("class_images")
        for label, name in enumerate(data.class_names or []):
            if names and names[label] != name:
                then = names[label]
                raise UserError(f"{path}: class {label} was '{then}' in training, and is '{name}' in --data_dir")
        for label, digest in enumerate(data.class_images or []):
            if images and images[label] != digest:
                text = class_text(label, data.class_names)
                raise UserError(f"{path}: the run was trained on other images of {text} than --data_dir has")

    def last_epoch(self, epochs):
        """Return the epoch at which training ends: that at which --until has ended it, or else `epochs`."""
        return read_config(self.folder / "config.json").get("ended_at_epoch", epochs)

    @first_rank_only
    def write_end(self, epoch):
        """Record in config.json that --until has ended training at an epoch."""
        self.config["ended_at_epoch"] = epoch
        write_json(self.folder / "config.json", self.config)

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

    def write_config(self, flags, training_flags, facts):
        """Write config.json. A resumed run keeps the `facts`, versions and commit of its first call."""
        if not self.config:
            self.config = {"flags": flags, "training_flags": training_flags, **facts}
            self.config["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            self.config["versions"] |= {name: version(name) for name in ("torchvision", "numpy")}
            self.config["git_commit"] = git_commit()
        self.config |= {"flags": flags, "training_flags": training_flags}
        self.config.pop("ended_at_epoch", None)  # the run goes on
        if is_first_rank():
            write_json(self.folder / "config.json", self.config)

    @first_rank_only
    def repair(self, epoch):
        """Delete temporary files, and the log lines and rows of epochs after `epoch`, which training will repeat."""
        remove_temporaries(self.folder, "epoch_*.pth", "last.pt", "config.json", "train_log.jsonl", "*.csv")
        self.train_log.keep_until(epoch)
        for path in self.tables():
            keep_until(path, epoch)
        for suffix in SUFFIXES:
            remove_temporaries(self.folder / f"geometry{suffix}", "epoch_*.npz")

    def delete(self):
        """Delete the files that a run has written into the folder, and nothing else."""
        self.config = {}
        if not is_first_rank():
            return
        written = [
            *(self.folder / "config.json", self.train_log.path, self.last),  # first: without them, no resume
            *self.checkpoints().values(),
            *self.tables(),
            *self.folder.glob(TENSORBOARD_FILES),
        ]
        for suffix in SUFFIXES:
            written += self.folder.glob(f"geometry{suffix}/epoch_*.npz")
            written.append(self.folder / f"report{suffix}.html")
        written += [self.figures / name for name in [*drawn(self.figures), DRAWN]]
        for path in written:
            path.unlink(missing_ok=True)


def read_config(path):
    """Return the content of a config.json, or {} if there is no such file; raise UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
        dicts = (config["flags"], config["training_flags"], config["problems"])
        if not (all(isinstance(entry, dict) for entry in dicts) and isinstance(config["class_counts"], list)):
            raise TypeError
        for name in ("class_names", "class_images"):
            texts = config.get(name)
            if texts is not None and [type(text) for text in texts] != [str] * len(config["class_counts"]):
                raise TypeError
        for problem in config["problems"].values():
            if not isinstance(problem, str) and UFM(**problem).class_counts != tuple(config["class_counts"]):
                raise ValueError
        math.isfinite(config["data_factor"])  # raises TypeError unless it is a number
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path}: damaged, not a run's config") from None
    return config


def drawn(folder):
    """Return the names of the files in a folder of figures that we have drawn."""
    path = folder / DRAWN
    return [Path(name).name for name in path.read_text().splitlines() if name] if path.exists() else []


def note_drawn(folder, names):
    """Note the names of figures drawn in a folder, so that `Run.delete` deletes these and nothing else."""
    with atomic_write(folder / DRAWN, "w") as file:
        file.writelines(f"{name}\n" for name in dict.fromkeys([*drawn(folder), *names]))


def git_commit():
    """Return the git commit of this code, with '-dirty' if files were changed, or None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
