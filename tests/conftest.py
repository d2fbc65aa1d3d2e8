"""Shared helpers: running the real scripts in their own processes, reading what they wrote, and real images."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from args import parse_args, training_flags  # noqa: E402
from datasets import Data, Split  # noqa: E402
from engine.run import Run  # noqa: E402
from engine.tables import MeasuredRun  # noqa: E402
from engine.training import Training, make_model, make_objective  # noqa: E402
from nc_metrics import ClassStatistics  # noqa: E402

UNPACK = ROOT.parent / "shared" / "tools" / "unpack-cifar10"  # beside a development checkout only

torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}

# Scripts run in forks of a process that has already imported torch and so on, which saves seconds in each test.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_1st_order_unbalanced", "validate_NC_unbalanced", "summarize", "sklearn.datasets", "torchvision"]
)

TRAIN, VALIDATE = "train_1st_order_unbalanced.py", "validate_NC_unbalanced.py"
PAPER = (
    "--model MLP --no-bias --dataset cifar10 --depth_relu 6 --depth_linear 1 --width 1024 --seed 1 --sep_decay "
    "--batch_size 256 --feature_decay_rate 0.00001 --loss CrossEntropy --lr 0.0001 --weight_decay 0.0001 "
    "--optimizer Adam --epochs 4000 --patience 2000"
)
FORKED = ["--run-path", "--start-method=fork"]  # options of torchrun
TINY = "--dataset digits --width 24 --depth_relu 1 --epochs 2 --lr 0.001 --batch_size 50 --no-bias --sep_decay".split()


def nothing():
    pass


def documented(page, head):
    """The names in the first column of those tables of a page of docs/ whose first head is `head`."""
    tables = re.findall(rf"^\| {head} \|.*\n\|.*\n((?:\|.*\n?)+)", (ROOT / "docs" / page).read_text(), re.M)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    return [name.strip(" `") for cell in cells for name in cell.split(",")]


def as_main(script, flags, folder, output, before, after=nothing):
    """Run a script in this process as `python script flags` does, in `folder`, with its output in files."""
    os.chdir(folder)
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(output + name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv = [str(script), *flags]
    before()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        after()


def without_figures():
    """Have validation draw no figures and no report, which take longer than the rest of a small run."""
    import analysis.figures
    import analysis.report

    analysis.figures.draw_runs = lambda runs, folder, *options: [folder / "none.pdf"]
    analysis.report.write_report = lambda runs, path: path


class Script:
    """An entry script in its own process, which tests can wait for or send signals to."""

    numbers = itertools.count()

    def __init__(self, name, flags, folder, before=nothing, after=nothing):
        self.command, self.folder, self.output = f"{name} {flags}", folder, f".output-{next(self.numbers)}"
        arguments = (ROOT / name, [str(flag) for flag in flags], folder, self.output, before, after)
        self.process = SERVER.Process(target=as_main, args=arguments, daemon=True)
        self.process.start()

    def text(self, name):
        path = self.folder / f"{self.output}.{name}"
        return path.read_text() if path.exists() else ""

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait_for(self, condition):
        """Return once condition() holds, while the script runs or of what it left."""
        deadline = time.monotonic() + 1000
        while True:
            alive = self.process.is_alive()  # asked first: what the script wrote just before its end counts
            if condition():
                return
            if not alive or time.monotonic() > deadline:
                pytest.fail(f"{self.command} ends, or hangs, too early\n{self.text('stdout')}\n{self.text('stderr')}")
            time.sleep(0.01)

    def wait(self, status=0):
        """Return its (stdout, stderr) once it has ended with that exit status; a negative one is a signal's."""
        self.process.join(timeout=1000)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{self.command} hangs")
        out, error = self.text("stdout"), self.text("stderr")
        assert self.process.exitcode == status, f"{self.command}: exit {self.process.exitcode}\n{out}\n{error}"
        assert "Traceback" not in error, error
        return out, error


@pytest.fixture
def start(tmp_path):
    """start(name, *flags) starts an entry script in a folder of its own; returns the Script."""
    return lambda name, *flags, **options: Script(name, flags, tmp_path, **options)


@pytest.fixture
def run_script(start):
    """run_script(name, *flags, status=0) runs an entry script in a folder of its own; returns (stdout, stderr)."""
    return lambda name, *flags, status=0, **options: start(name, *flags, **options).wait(status)


@pytest.fixture
def train(run_script):
    return lambda *flags, **options: run_script(TRAIN, *flags, **options)


@pytest.fixture
def validate(run_script):
    return lambda *flags, **options: run_script(VALIDATE, *flags, **options)


@pytest.fixture
def measure(validate):
    """Run validation without its figures and report."""
    return lambda *flags, **options: validate(*flags, before=without_figures, **options)


@pytest.fixture(scope="session")
def real_images(tmp_path_factory):
    """A --data_dir with real CIFAR-10 images, a few of each class."""
    if not UNPACK.exists():
        pytest.skip("real CIFAR-10 images are not at hand")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([UNPACK, folder, "--class_counts", "9,9,9,9,9,9,9,9,9,9"], check=True)
    for path in folder.glob("cifar10/test/*/*"):
        if int(path.stem) >= 20:
            path.unlink()
    return folder


# ---------------------------------------------------------------------------------------------------------
# What a run has written, read without the project's own code
# ---------------------------------------------------------------------------------------------------------


def rows_of(path):
    """Return the rows of a CSV as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log_of(folder, drop=("seconds", "images_per_second", "seconds_waiting")):
    """Return the lines of a run's log, without its wall times."""
    lines = [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def weights(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------
# What tests start from, and waiting
# ---------------------------------------------------------------------------------------------------------


def write_folder(root, train=4, test=2, classes=("ant", "bee", "cow"), size=(32, 32), suffix="png"):
    """Pictures of known pixels; returns {(split, class, index): array}."""
    random, written = np.random.default_rng(3), {}
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:04d}.{suffix}")
                written[split, name, index] = pixels
    return written


def make_run(folder, *flags, drop=()):
    """Return a run with the config.json that training writes for these flags, without those in `drop`."""
    folder.mkdir()
    args = parse_args(argv=[*flags])
    parts = {"flags": vars(args), "training_flags": training_flags(args)}
    config = {name: {k: v for k, v in part.items() if k not in drop} for name, part in parts.items()}
    objective = make_objective(args, [3, 4], args.width)
    config |= {"class_counts": [3, 4], "problems": objective.problems(), "data_factor": objective.data_factor}
    (folder / "config.json").write_text(json.dumps(config))
    return MeasuredRun(Run(folder))


def training_of(*flags):
    """Return the `Training` of a small MLP on 20 random images, with further flags."""
    words = "--depth_relu 1 --width 8 --batch_size 8 --no-bias --sep_decay --lr 0.01 --weight_decay 0.001"
    args = parse_args(argv=[*words.split(), "--feature_decay_rate", "0.001", *flags])
    torch.manual_seed(0)
    split = Split(torch.rand(20, 3, 32, 32), torch.arange(20) % 4, torch.zeros(3))
    return Training(args, Data(split, split, [5] * 4), make_model(args, 4), torch.device("cpu"))


def python_examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------
# Features, and NC1 from its definition
# ---------------------------------------------------------------------------------------------------------


def samples(counts, dim, noise=0.3, seed=0, rank=None):
    """Features >= 0 around random class means, labels in random order, a random head."""
    random = np.random.default_rng(seed)
    means = random.random((len(counts), dim)) * 3
    if rank is not None:
        means = random.random((len(counts), rank)) @ random.random((rank, dim))
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    features = means[labels] + noise * random.random((len(labels), dim))
    return features, labels, random.standard_normal((len(counts), dim))


def statistics_of(features, labels, num_classes, predictions=None, batch=7, dtype=torch.float64, **options):
    """ClassStatistics of arrays, in two passes over batches."""
    features, labels = torch.from_numpy(features).to(dtype), torch.from_numpy(labels)
    predictions = labels if predictions is None else torch.from_numpy(predictions)
    statistics = ClassStatistics(num_classes, **options)
    for h, y in zip(features.split(batch), labels.split(batch), strict=True):
        statistics.update(h, y)
    for h, y, p in zip(features.split(batch), labels.split(batch), predictions.split(batch), strict=True):
        statistics.update_within(h, y, p)
    return statistics


def full_nc1(features, labels, num_classes):
    """trace(Sigma_W pinv(Sigma_B)) / K with the d x d matrices themselves and SciPy's pinv."""
    total_mean = features.mean(0)
    sigma_w = np.zeros((features.shape[1],) * 2)
    sigma_b = np.zeros_like(sigma_w)
    for label in range(num_classes):
        own = features[labels == label]
        deviation = own - own.mean(0)
        sigma_w += deviation.T @ deviation / len(features)
        shift = own.mean(0) - total_mean
        sigma_b += np.outer(shift, shift) / num_classes
    return np.trace(sigma_w @ scipy.linalg.pinv(sigma_b)) / num_classes
