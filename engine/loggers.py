"""Optional logging to TensorBoard and Weights & Biases, of the same values that the run's own files hold."""

import contextlib
import importlib
import math
import os
from pathlib import Path

from utils import UserError, is_first_rank, message_of

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # flag: the module that it imports


def require_packages(flags):
    """Raise UserError if the flags {name: value} ask for --tensorboard or --wandb and its package is missing."""
    for flag, module in PACKAGES.items():
        if flags[flag]:
            try:
                importlib.import_module(module)
            except ImportError:
                raise UserError(f"--{flag} needs a package: pip install {flag}, or leave --{flag} out") from None


@contextlib.contextmanager
def open_loggers(flags, folder, job, draw_heatmaps, first_epoch=None):
    """Yield the list of loggers that the flags {name: value} select, and close them at the end.

    job: "train" or "validate". draw_heatmaps: a function of the geometry {name: array} and the epoch that returns a
    Matplotlib figure. first_epoch: TensorBoard hides what an earlier call has logged from this epoch on.
    """
    with contextlib.ExitStack() as stack:
        loggers = []
        flags = flags if is_first_rank() else dict.fromkeys(flags, False)
        if flags["tensorboard"]:
            loggers.append(TensorBoard(folder, job, draw_heatmaps, first_epoch))
        if flags["wandb"]:
            loggers.append(WeightsAndBiases(folder, job, draw_heatmaps, flags))
        for logger in loggers:
            stack.callback(logger.close)
        yield loggers


class TensorBoard:
    """Write TensorBoard event files into tensorboard/ in the run's folder."""

    def __init__(self, folder, job, draw_heatmaps, first_epoch):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.writer = SummaryWriter(Path(folder) / "tensorboard" / job, purge_step=first_epoch)
        self.draw_heatmaps = draw_heatmaps

    def scalars(self, group, row):
        """Log the values of a row (a dict with the key "epoch") under the names group/column."""
        for name, value in numbers(group, row).items():
            self.writer.add_scalar(name, value, row["epoch"])

    def heatmaps(self, geometry, epoch):
        self.writer.add_figure("heatmaps", self.draw_heatmaps(geometry, epoch), epoch)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """Log to the W&B project neural-collapse-imbalance, with a group per run folder; offline without an API key."""

    def __init__(self, folder, job, draw_heatmaps, config):
        import wandb

        self.image, self.draw_heatmaps = wandb.Image, draw_heatmaps
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
            print(f"wandb      offline; upload later with `wandb sync`: {message_of(error)}", flush=True)
            self.run = wandb.init(mode="offline", **begin)
        self.run.define_metric("*", step_metric="epoch")

    def scalars(self, group, row):
        """Log the values of a row (a dict with the key "epoch") under the names group/column."""
        self.run.log({"epoch": row["epoch"], **numbers(group, row)})

    def heatmaps(self, geometry, epoch):
        self.run.log({"epoch": epoch, "heatmaps": self.image(self.draw_heatmaps(geometry, epoch))})

    def close(self):
        self.run.finish()


def numbers(group, row):
    """Return {group/column: value} of a row, without its epoch and without NaN."""
    return {f"{group}/{name}": value for name, value in row.items() if name != "epoch" and not math.isnan(value)}
