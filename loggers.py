"""TensorBoard and Weights & Biases, both optional: they get what a run's own files get, when it is written."""

import contextlib
import importlib
import math
import os
from pathlib import Path

from args import config_flags
from utils import UserError, one_line

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # flag: what it imports
TENSORBOARD_FILES = "tensorboard/*/events.out.tfevents.*"  # in a run's folder


def require_packages(args):
    """Stops where a package is missing that the flags --tensorboard and --wandb need."""
    for flag, module in PACKAGES.items():
        if getattr(args, flag):
            try:
                importlib.import_module(module)
            except ImportError:
                raise UserError(f"--{flag} needs a package: pip install {flag}, or leave --{flag} out") from None


@contextlib.contextmanager
def open_loggers(args, folder, job, first_epoch=None):
    """The list of loggers that the flags ask for, empty by default; closed at the end.

    job: "train" or "validate". first_epoch: what an earlier call logged from there on is to be logged again.
    """
    with contextlib.ExitStack() as stack:
        loggers = []
        if args.tensorboard:
            loggers.append(TensorBoard(folder, job, first_epoch))
        if args.wandb:
            loggers.append(WeightsAndBiases(folder, job, config_flags(args)))
        for logger in loggers:
            stack.callback(logger.close)
        yield loggers


class TensorBoard:
    """Event files in the run's folder, under tensorboard/; first_epoch hides older points from there on."""

    def __init__(self, folder, job, first_epoch):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.writer = SummaryWriter(Path(folder) / "tensorboard" / job, purge_step=first_epoch)

    def scalars(self, group, row):
        """Logs the numbers of a row (a dict with its epoch), named group/column."""
        for name, value in numbers(group, row).items():
            self.writer.add_scalar(name, value, row["epoch"])

    def figure(self, name, figure, epoch):
        self.writer.add_figure(name, figure, epoch)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of the project neural-collapse-imbalance, grouped by the folder; offline where there is no account."""

    def __init__(self, folder, job, config):
        import wandb

        self.image = wandb.Image
        begin = dict(
            project="neural-collapse-imbalance",
            name=f"{Path(folder).name} {job}",
            group=Path(folder).name,
            job_type=job,
            dir=folder,
            config=config,
            settings=wandb.Settings(init_timeout=30),
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        try:
            self.run = wandb.init(mode=mode, **begin)
        except wandb.Error as error:
            print(f"wandb      offline, to be sent by `wandb sync` later: {one_line(error)}", flush=True)
            self.run = wandb.init(mode="offline", **begin)
        self.run.define_metric("*", step_metric="epoch")

    def scalars(self, group, row):
        """Logs the numbers of a row (a dict with its epoch), named group/column."""
        self.run.log({"epoch": row["epoch"], **numbers(group, row)})

    def figure(self, name, figure, epoch):
        self.run.log({"epoch": epoch, name: self.image(figure)})

    def close(self):
        self.run.finish()


def numbers(group, row):
    """{group/column: value} of a row's columns that have a value, but for its epoch."""
    return {f"{group}/{name}": value for name, value in row.items() if name != "epoch" and not math.isnan(value)}
