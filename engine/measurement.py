"""Measure a model at an epoch: a row of metrics, the geometry, the accuracy of each class, and layers."""

import contextlib
import math
import sys
import warnings
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from engine.batch_norm import training_set_statistics
from engine.checkpoints import load_weights
from engine.device import autocast
from engine.ranks import OneProcess
from engine.run import Run
from engine.tables import GEOMETRY
from engine.training import make_model, read_data
from nc_layers import head_input, head_weight, layer_statistics
from nc_metrics import THEORY_COLUMNS, ClassStatistics, geometry, nc_metrics
from nc_theory import GAP_COLUMNS, gap_shares
from nc_theory.losses import losses_and_gradients
from utils import FAILED_WORK, UserError, is_first_rank

BATCH = 512  # images per forward pass
FEATURES_KEPT = 2**31  # bytes of features kept between the two passes; if they take more, they are computed twice


class Measurement:
    """Measure a model on the training and test images, and add the results to the rows of a `MeasuredRun`.

    after_batch: called after every batch; it may raise to abandon a measurement. ranks: `Ranks` that share the images.
    layers: names of layers that `record` measures, too; every rank measures them on all images.
    """

    def __init__(self, run, model, data, precision="fp32", after_batch=lambda: None, ranks=None, layers=None):
        self.run, self.model, self.data, self.precision, self.layers = run, model, data, precision, layers
        self.device, self.after_batch, self.ranks = data.train.labels.device, after_batch, ranks or OneProcess()
        self.notes = set()

    def record(self, epoch, loggers=()):
        """Measure the model, add the row to the run and the loggers, and return the row."""
        row, parts, accuracies = self.measure()
        row, parts = {"epoch": epoch, **row}, {name: part.numpy() for name, part in parts.items()}
        accuracies = [{"epoch": epoch, **accuracy} for accuracy in accuracies]
        self.run.add_row(row, {"class_counts": self.data.class_counts, **parts}, accuracies)
        for logger in loggers:
            logger.scalars("nc", row)
            logger.heatmaps(parts, epoch)
        if self.layers:
            self.run.add_layers(epoch, self.measure_layers())
        return row

    def measure_layers(self):
        """Return what the function `measure_layers` does, in the precision and with the BatchNorm of `measure`."""
        self.model.eval()
        splits = {"train": self.data.train, "test": self.data.test}
        loaders = {name: SplitLoader(split, self.after_batch) for name, split in splits.items() if len(split)}
        with warnings.catch_warnings(record=True) as caught:
            try:
                with self.batch_norm(), autocast(self.precision, self.device):
                    rows = measure_layers(self.model, loaders, self.layers, self.data.num_classes)
            except ValueError as error:
                raise UserError(f"--nc_layers: {error}", FAILED_WORK) from None
        for warning in caught:
            what = str(warning.message).rsplit(": ", 1)[0]  # without the numbers, which differ from epoch to epoch
            self.note(what, f"--nc_layers: {warning.message}")
        return rows

    @torch.inference_mode()
    def measure(self):
        """Return (metrics {column: float}, geometry {name: tensor}, accuracies of the classes [dict]) of the model.

        Metrics and geometry are of the training subset; accuracies are in percent, on both splits. All in eval mode.
        """
        self.model.eval()
        with self.batch_norm():
            return self._measure()

    def batch_norm(self):
        """Return the context in which BatchNorm uses the statistics that --bn_statistics selects."""
        if self.run.bn_statistics == "running":
            return contextlib.nullcontext()
        return training_set_statistics(self.model, lambda: (images for images, _ in SplitLoader(self.data.train)))

    def _measure(self):
        statistics, optimum = ClassStatistics(self.data.num_classes), self.run.comparison.optimum
        weight = head_weight(self.model.fc)
        # The gap is that of W and h in the problem that they are compared with, which may be one without a bias
        bias = self.model.fc[-1].bias if optimum and optimum.problem.bias else None
        losses = torch.zeros(self.data.num_classes, dtype=torch.float64)
        zero_samples = torch.zeros_like(losses, device=self.device)
        train, test = (ClassAccuracy(self.data, name) for name in ("train", "test"))
        passes = self.forward(self.data.train)
        if len(self.data.train) * weight.shape[1] * 4 <= FEATURES_KEPT:
            passes = list(passes)
        for logits, features, labels in passes:
            statistics.update(features, labels)
            train.update(logits, labels)
            zero_samples.index_add_(0, labels, (features == 0).all(1).double())
        statistics.merge(self.ranks.sum)
        if not statistics.sums.isfinite().all():
            raise UserError("the features overflow: there is nothing to measure", FAILED_WORK)
        for logits, features, labels in passes if isinstance(passes, list) else self.forward(self.data.train):
            statistics.update_within(features, labels, logits.argmax(1))
            if optimum:
                logits = F.linear(features.double(), weight, None if bias is None else bias.double()).cpu().numpy()
                sample_losses, _ = losses_and_gradients(optimum.problem, logits, labels.cpu().numpy())
                losses.index_add_(0, labels.cpu(), torch.from_numpy(sample_losses))
        statistics.merge(self.ranks.sum)
        for logits, _, labels in self.forward(self.data.test):
            test.update(logits, labels)
        for accuracy in (train, test):
            accuracy.merge(self.ranks.sum)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* entries are negative|.* class means is NaN")  # noted once instead
            warnings.filterwarnings("ignore", "NC1 depends on")  # the training set is no sample: it is what is measured
            metrics = nc_metrics(statistics, weight, optimum if optimum and optimum.problem.unique else None)
        if optimum and optimum.problem.relu and (share := statistics.negative_share) > 0:
            self.note(
                "negative",
                f"{share:.2%} of the features' entries are negative, but the optimum is that of ReLU features",
            )
        if reason := statistics.degeneracy:
            self.note(reason, f"{reason}: what compares class means is empty")
        row = {
            "train_acc1": train.overall(),
            "test_acc1": test.overall(),
            **top5(train, test),
            **test.by_frequency(),
            **metrics,
            **dict.fromkeys(GAP_COLUMNS, math.nan),
        }
        if optimum:
            losses = self.ranks.sum(losses) / statistics.counts.cpu()
            gap = gap_shares(optimum, weight, statistics.means, losses, statistics.within_sums, bias)
            row |= gap.columns()
        parts = geometry(statistics.means, weight) | {"zero_samples": self.ranks.sum(zero_samples).cpu()}
        if optimum:
            parts |= {f"{name}_theory": getattr(optimum, name) for name in GEOMETRY}
            parts |= {name: getattr(gap, name.removeprefix("gap_")) for name in GAP_COLUMNS[1:]}
            if bias is not None:
                parts["bias"] = bias.double().cpu()
        return row, parts, [line for accuracy in (train, test) for line in accuracy.rows()]

    def note(self, kind, text):
        """Print a note, the first of its kind only."""
        if kind not in self.notes and is_first_rank():
            print(f"note: {text}", file=sys.stderr)
        self.notes.add(kind)

    def forward(self, split):
        """Yield (logits, features, labels) of this rank's rows of each batch of a split, in order."""
        if not len(split):
            return
        size = BATCH * self.ranks.count
        for batch in zip(split.pixels.split(size), split.labels.split(size), strict=True):
            pixels, labels = map(self.ranks.rows, batch)
            with autocast(self.precision, self.device):
                logits, features = self.model(split.normalise(pixels))
            yield logits, features, labels
            self.after_batch()


def top5(train, test):
    """Return the accuracies in percent of the five largest logits {column: float}; empty for five classes or fewer."""
    if train.data.num_classes <= 5:
        return {}
    return {"train_acc5": train.overall(top=5), "test_acc5": test.overall(top=5)}


class SplitLoader:
    """A split's pairs (images, labels), batch by batch and as often as it is read; calls `after_batch` after each."""

    def __init__(self, split, after_batch=lambda: None):
        self.split, self.after_batch = split, after_batch

    def __iter__(self):
        for pixels, labels in zip(self.split.pixels.split(BATCH), self.split.labels.split(BATCH), strict=True):
            yield self.split.normalise(pixels), labels
            self.after_batch()


def find_head(model, loader):
    """Return the name of a model's head, found with the first inputs of a loader."""
    return head_input(model, next((batch[0] for batch in loader), None))


def measure_layers(model, loaders, layers, num_classes, classes=None):
    """Return a row (a dict) of metrics for each layer and split; raise ValueError as `layer_statistics`.

    loaders: {"train": loader}, and "test" if there are test samples; these are measured against the training means.
    layers: their names in the model, or "head". num_classes and classes: as in `layer_statistics`. The columns that
    compare with an optimum are left out.
    """
    names = (find_head(model, loaders["train"]) if name == "head" else name for name in layers)
    layers = list(dict.fromkeys(names))
    train = layer_statistics(model, loaders["train"], layers, num_classes, classes=classes)
    statistics = {"train": train}
    if "test" in loaders:
        of_test = layer_statistics(model, loaders["test"], layers, num_classes, reference=train, classes=classes)
        statistics["test"] = of_test
    rows = []
    for layer in layers:
        means = train[layer].means
        weight = head_weight(model.get_submodule(layer)) if train[layer].at_head else None
        if weight is not None and weight.shape != (num_classes, means.shape[1]):  # a head for other classes
            weight = None
        for split, of_split in statistics.items():
            with warnings.catch_warnings(record=True, action="always") as caught:
                row = nc_metrics(of_split[layer], weight)
            for warning in caught:
                warnings.warn(f"{layer}, {split}: {warning.message}", type(warning.message), stacklevel=2)
            columns = {name: value for name, value in row.items() if name not in THEORY_COLUMNS}
            rows.append({"layer": layer, "split": split, "d": means.shape[1], **columns})
    return rows


class ClassAccuracy:
    """Count the correct predictions on a split of a `datasets.Data`: "train" or "test".

    They are counted class by class, and also if the label is among the five largest logits.
    """

    def __init__(self, data, name):
        self.data, self.name, self.labels = data, name, getattr(data, name).labels
        self.correct = torch.zeros(data.num_classes, dtype=torch.float64, device=self.labels.device)
        self.in_top5 = torch.zeros_like(self.correct[:1])

    def update(self, logits, labels):
        self.correct.index_add_(0, labels, (logits.argmax(1) == labels).double())
        own = logits.gather(1, labels[:, None])
        later = torch.arange(logits.shape[1], device=logits.device) >= labels[:, None]
        behind = (logits < own) | ((logits == own) & later)  # ties as in argmax; topk has them in any order
        self.in_top5 += (behind.sum(1) > logits.shape[1] - 5).sum()

    def merge(self, sum_over_processes):
        """Sum the counts over processes that have each seen a part of the split, as `ClassStatistics.merge` does."""
        self.correct, self.in_top5 = sum_over_processes(self.correct), sum_over_processes(self.in_top5)

    def overall(self, top=1):
        """Return the accuracy in percent, of the largest logit or of the five largest; NaN for no images."""
        correct = self.correct if top == 1 else self.in_top5
        return 100 * float(correct.sum()) / len(self.labels) if len(self.labels) else float("nan")

    def of_classes(self):
        """Return the accuracy of each class (K,), in percent; NaN for a class without images."""
        return 100 * self.correct.cpu() / self.labels.bincount(minlength=self.data.num_classes).cpu()

    def by_frequency(self):
        """Return the mean accuracy over all classes, and over the classes with many, medium and few training images.

        With the classes sorted by n_k in descending order, the first ceil(K/3) are `many` and the last ceil(K/3) are
        `few`.
        """
        accuracy = self.of_classes()
        accuracy = accuracy[torch.tensor(self.data.class_counts).argsort(descending=True, stable=True)]
        third = -(-self.data.num_classes // 3)
        thirds = {"many": accuracy[:third], "medium": accuracy[third:-third], "few": accuracy[-third:]}
        means = {f"{name}_acc1": part.nanmean().item() for name, part in thirds.items()}
        return {"balanced_acc1": accuracy.nanmean().item(), **means}

    def rows(self):
        """Return a row of class_accuracy.csv for each class."""
        accuracy = self.of_classes().tolist()
        names = self.data.class_names or range(self.data.num_classes)
        return [
            {"split": self.name, "class": label, "name": name, "n_k": count, "accuracy": accuracy[label]}
            for label, (name, count) in enumerate(zip(names, self.data.class_counts, strict=True))
        ]


# ---------------------------------------------------------------------------------------------------------
# Loading a trained run, for example in a notebook
# ---------------------------------------------------------------------------------------------------------


def load_run(folder, epoch=None, data_dir=None):
    """Return (config, data, model) of a trained run, on the CPU, for your own analysis.

    folder: the run's folder, with its config.json. epoch: of the checkpoint; default: the last one. data_dir: folder of
    the images; default: the one used in training. Raises UserError if a file is missing.
    """
    run = Run(folder)
    checkpoints = run.checkpoints()
    if not run.config or not checkpoints:
        raise UserError(f"{folder}: no config.json with epoch_*.pth files beside it")
    epoch = max(checkpoints) if epoch is None else epoch
    if epoch not in checkpoints:
        raise UserError(f"{folder}: no checkpoint of epoch {epoch}, there are {', '.join(map(str, checkpoints))}")
    flags = SimpleNamespace(**run.flags | ({"data_dir": data_dir} if data_dir else {}))
    try:
        data = read_data(flags)
        model = make_model(flags, data.num_classes, data.shape)
    except AttributeError as error:
        if error.obj is not flags:
            raise
        raise UserError(f"{folder}/config.json: of another version of this code, without --{error.name}") from None
    run.check_data(data)
    load_weights(model, checkpoints[epoch])
    return run.config, data, model.eval()


@torch.inference_mode()
def features(model, split):
    """Return (features (N, d), labels (N,)) of all images of a split; in float64, like `nc_layers.head_weight`."""
    model.eval()
    return torch.cat([model(images)[1] for images, _ in SplitLoader(split)]).double(), split.labels
