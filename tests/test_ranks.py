"""A run on several processes started by torchrun gives the result of one device, even if interrupted."""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

from engine.tables import UNTIL
from tests.conftest import (
    FORKED,
    ROOT,
    SERVER,
    TRAIN,
    VALIDATE,
    as_main,
    config_of,
    log_of,
    nothing,
    rows_of,
    same_weights,
    weights,
)

FLAGS = "--dataset digits --no-bias --sep_decay --lr 0.001 --width 24 --depth_relu 2".split()


class Torchrun:
    """`torchrun SCRIPT FLAGS` on `ranks` processes of this machine, to which tests can send signals.

    The processes of the ranks are forks, ready at once, of one that has imported everything; `fresh` ones start Python.
    """

    def __init__(self, folder, number, ranks, flags, options=(), script=ROOT / TRAIN, fresh=False):
        options = ["--standalone", f"--nproc_per_node={ranks}", *([] if fresh else FORKED), *options, script, *flags]
        self.out, self.error = folder / f".{number}.stdout", folder / f".{number}.stderr"
        arguments = (torch.distributed.run.__file__, [*map(str, options)], folder, f".{number}", nothing)
        self.process = SERVER.Process(target=as_main, args=arguments)
        self.process.start()

    def wait(self, status=0):
        """Return (standard output, lines of ours on standard error) once it has ended; torchrun's status is 0 or 1."""
        self.process.join(timeout=600)
        out, error = self.out.read_text(), self.error.read_text()
        assert self.process.exitcode == status, out + error
        return out, [line for line in error.splitlines() if re.match(r"\w+\.py: ", line)]

    def wait_for(self, text, count=1):
        deadline = time.monotonic() + 1000
        while not self.out.exists() or self.out.read_text().count(text) < count:
            assert self.process.is_alive() and time.monotonic() < deadline, self.error.read_text()
            time.sleep(0.02)

    def pid_of(self, rank):
        """Return the process of a rank; torchrun starts them in order, perhaps after one of multiprocessing's own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}  # "" of one that has ended
        return sorted(pid for pid, command in commands.items() if command and "resource_tracker" not in command)[rank]


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(ranks, *flags) starts training in the test's folder."""
    started = []

    def start(ranks, *flags, **options):
        started.append(Torchrun(tmp_path, len(started), ranks, flags, **options))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()


def largest_difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def check_same_run(a, b, epoch, weight=2e-6):
    """The weights, log and rows of two runs agree to the rounding of sums taken in another order."""
    assert largest_difference(a / f"epoch_{epoch:03d}.pth", b / f"epoch_{epoch:03d}.pth") < weight
    for line, other in zip(log_of(a), log_of(b), strict=True):
        assert line == pytest.approx(other, rel=2e-5)
    for name in {path.name for folder in (a, b) for path in folder.glob("*.csv")}:
        for row, other in zip(*(rows_of(folder / name) for folder in (a, b)), strict=True):
            numbers = [{key: float(value or "nan") for key, value in r.items() if key != "split"} for r in (row, other)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-5, nan_ok=True)


def test_ranks_train_the_run_of_one_device(torchrun, train, tmp_path):
    cases = {  # 5 x 77 + 1 images: the last batch is one image, and one rank has none
        2: "--batch_size 77 --class_counts 34,34,34,34,34,34,40,42,50,50 --data_augmentation --logit_adjustment 1 "
        "--penalty_warmup_epochs 2 --warmup_epochs 2 --clip_grad_norm 0.5",
        3: "--batch_size 77 --stratified --loss MSE --objective released --optimizer SGD --head_init etf --head_fixed",
        4: f"--batch_size 77 --loss {tmp_path}/mine.py:half --objective released --optimizer SGDW --lr 0.01",
    }
    (tmp_path / "mine.py").write_text("def half(z, y):\n    return -z.log_softmax(1).gather(1, y[:, None]).sum() / 2\n")
    flags = {ranks: [*FLAGS, *text.split(), "--epochs", 4, "--nc_every", 1] for ranks, text in cases.items()}
    runs = {ranks: torchrun(ranks, *flags[ranks], "--save_path", f"{ranks} ranks") for ranks in cases}
    for ranks, run in runs.items():
        several, one = tmp_path / f"{ranks} ranks", tmp_path / f"{ranks} on one device"
        train(*flags[ranks], "--save_path", one)
        out, errors = run.wait()
        assert out.count("finished: ") == 1 and f", {ranks} ranks, each" in out and not errors
        assert config_of(several)["ranks"] == ranks and config_of(one)["ranks"] == 1
        check_same_run(several, one, epoch=4)


def test_until_ends_all_ranks_at_the_epoch_of_one_device(torchrun, train, tmp_path):
    """A limit that is met in between: at the second of two measurements below it."""
    flags = [*FLAGS, "--batch_size", 102, "--epochs", 40, "--nc_every", 2, "--save_every", 100]
    flags += ["--weight_decay", 0.01, "--feature_decay_rate", 0.0005]
    train(*flags, "--save_path", "whole")
    worst = [max(float(row[name]) for name in UNTIL) for row in rows_of(tmp_path / "whole" / "nc_metrics.csv")]
    limit = 1.01 * max(worst[5:7])  # at epochs 11 and 13
    met = [max(pair) <= limit for pair in itertools.pairwise(worst)]
    epoch = 3 + 2 * met.index(True)
    assert 3 < epoch < 39
    flags += ["--until", limit]
    train(*flags, "--save_path", "one")
    out, errors = torchrun(2, *flags, "--save_path", "two").wait()
    assert out.count(f"epoch {epoch}: ") == 1 and out.count("finished: ") == 1 and not errors
    for name in ("one", "two"):
        assert config_of(tmp_path / name)["ended_at_epoch"] == epoch == log_of(tmp_path / name)[-1]["epoch"]
    check_same_run(tmp_path / "two", tmp_path / "one", epoch)
    out, errors = torchrun(2, *flags, "--save_path", "two", "--resume").wait()
    assert f"{epoch} are done, with which --until" in out and not errors


# ---------------------------------------------------------------------------------------------------------
# BatchNorm
# ---------------------------------------------------------------------------------------------------------

IN_FLOAT64 = """
import sys, torch
from args import parse_args
from datasets import Data, Split
from engine.ranks import get_ranks
from engine.training import Training, make_model
from utils import run_script

FLAGS = "--model ResNet18 --planes 4 --no-bias --sep_decay --lr 0.001 --batch_size 9 --weight_decay 0.001"

def main():
    args = parse_args(argv=[*FLAGS.split(), "--feature_decay_rate", "0.0001"])
    torch.manual_seed(0)
    with get_ranks() as ranks:
        model = make_model(args, 5).double().to(memory_format=torch.channels_last).train()
        split = Split(torch.rand(44, 3, 32, 32, dtype=torch.float64), torch.arange(44) % 5, torch.zeros(3))
        training = Training(args, Data(split, split, [9, 9, 9, 9, 8]), model, torch.device("cpu"), ranks)
        training.unit_gradient = training.unit_gradient.double()
        training.connect()
        for indices in torch.randperm(44).repeat(2).split(9):  # the last of the batches has 7 images
            row = training.step(indices)
        torch.save({**model.state_dict(), "row": row}, f"{sys.argv[1]}{getattr(ranks, 'rank', 0)}.pt")

run_script(main, takes_ranks=True)
"""


def test_batch_norm_takes_the_batches_of_all_ranks(torchrun, start, tmp_path):
    """A ResNet18 in float64, where rounding does not grow to 1e-2 in a few steps as it does in fp32."""
    script = tmp_path / "in_float64.py"
    script.write_text(IN_FLOAT64)
    run = torchrun(2, "two", script=script)
    start(script, "one").wait()
    run.wait()
    assert same_weights(tmp_path / "two0.pt", tmp_path / "two1.pt")
    assert largest_difference(tmp_path / "two0.pt", tmp_path / "one0.pt") < 1e-11


# ---------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------

CUT = [*FLAGS, "--batch_size", 16, "--save_every", 100, "--epochs"]


def test_a_stopped_run_goes_on_with_another_number_of_ranks(torchrun, train, tmp_path):
    """4 -> 2 -> 1 over one last.pt; the first stop is by a signal within an epoch."""
    run = torchrun(4, *CUT, 1000, "--save_path", "cut")
    run.wait_for("epoch 1/")
    run.process.terminate()
    _, errors = run.wait(1)
    assert len(errors) == 1 and "stopped by SIGTERM; to continue, run the same command with --resume" in errors[0]
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert state["epoch"] >= 1 and len(log_of(tmp_path / "cut")) == state["epoch"]
    middle, end = state["epoch"] + 2, state["epoch"] + 4
    torchrun(2, *CUT, middle, "--save_path", "cut", "--resume", fresh=True).wait()
    train(*CUT, end, "--save_path", "cut", "--resume")
    train(*CUT, end, "--save_path", "one")
    check_same_run(tmp_path / "cut", tmp_path / "one", end, weight=1e-4)


def test_a_killed_rank_ends_the_others_and_torchrun_goes_on(torchrun, tmp_path):
    """First rank 1 is killed, then rank 0 of the second attempt; the third one ends like an uninterrupted run."""
    flags = [*FLAGS, "--batch_size", 8, "--epochs", 5, "--save_every", 5]
    run = torchrun(2, *flags, "--save_path", "cut", "--force", options=["--max-restarts=2"])
    whole = torchrun(2, *flags, "--save_path", "whole")
    for attempt, rank in enumerate((1, 0)):
        run.wait_for("epochs     ", attempt + 1)
        while not (tmp_path / "cut" / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(run.pid_of(rank), signal.SIGKILL)
    out, errors = run.wait()
    assert len(errors) <= 2 and all("another rank has ended; to continue" in error for error in errors)
    assert out.count("finished: cut") == 1 and out.count("resumes cut after epoch") == 2
    whole.wait()
    assert same_weights(tmp_path / "cut" / "epoch_005.pth", tmp_path / "whole" / "epoch_005.pth")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_errors_are_printed_once_and_nothing_hangs(torchrun):
    cases = {  # an error of the first rank, of all ranks, and of a script that takes one process only
        "argument --lr": (TRAIN, [*FLAGS, "--lr", "nonsense"], {"fresh": True}),
        "not finite in epoch": (TRAIN, [*FLAGS, "--lr", "1e30", "--epochs", 3], {}),
        "only training runs on several ranks": (VALIDATE, FLAGS, {}),
    }
    runs = [torchrun(2, *flags, script=ROOT / script, **how) for script, flags, how in cases.values()]
    for message, run in zip(cases, runs, strict=True):
        _, errors = run.wait(1)
        assert len(errors) == 1 and message in errors[0]


# ---------------------------------------------------------------------------------------------------------
# A thousand classes
# ---------------------------------------------------------------------------------------------------------


def write_classes(folder, counts):
    """Write an image folder: `counts` training images of each class, a pattern under noise, and one for testing."""
    random = np.random.default_rng(0)
    for label, count in enumerate(counts):
        pattern = random.integers(0, 256, (32, 32, 3))
        for split, size in (("train", count), ("test", 1)):
            (folder / split / f"{label:04d}").mkdir(parents=True)
            for index in range(size):
                pixels = (3 * pattern + random.integers(0, 256, (32, 32, 3))) // 4
                path = folder / split / f"{label:04d}" / f"{index:04d}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=0)


def test_a_thousand_classes_from_images_to_figures(torchrun, validate, tmp_path):
    write_classes(tmp_path / "images", [int(4 ** (1 - label / 999) + 1e-9) for label in range(1000)])
    flags = (
        f"--dataset imagefolder --data_dir {tmp_path}/images --imbalance exp:4 --n_max 4 --no-bias --sep_decay".split()
    )
    flags += "--model ResNet18 --planes 2 --batch_size 256 --lr 0.001 --save_path run".split()
    torchrun(2, *flags, "--epochs", 2, "--nc_every", 1).wait()
    table = rows_of(tmp_path / "run" / "class_accuracy.csv")
    assert [int(row["epoch"]) for row in table] == [1] * 2000 + [2] * 2000
    out, _ = validate("--load_path", "run", "--recompute")
    assert len(re.findall(r"^ +\d+ +\d+ +-?\d", out, re.MULTILINE)) == 100  # every tenth class is printed
    assert rows_of(tmp_path / "run" / "class_accuracy.csv") == table
    assert (tmp_path / "run" / "figures" / "heatmaps.pdf").exists()
    assert (tmp_path / "run" / "report.html").stat().st_size < 8e6
