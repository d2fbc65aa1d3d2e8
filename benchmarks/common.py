"""What the benchmarks share: data, timing in pairs, tables and CSV files. Run them from the repository's root."""

import csv
import multiprocessing
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from args import parse_args
from datasets import Data, Split, load_data
from utils import device_name

ROOT = Path(__file__).resolve().parent.parent
COUNTS = [1000, 1000, 2000, 2000, 3000, 3000, 4000, 4000, 5000, 5000]  # the paper's CIFAR-10 subset


def setting(model, batch_size, **flags):
    """The flags of the paper's run of a model."""
    words = f"--model {model} --batch_size {batch_size} --no-bias --sep_decay".split()
    args = parse_args(argv=words)
    for name, value in flags.items():
        setattr(args, name, value)
    return args


def images(data_dir=None, fraction=1.0):
    """CIFAR-10 in --data_dir, or as many random images: the time does not depend on what they show."""
    counts = [int(count * fraction) for count in COUNTS]
    if data_dir:
        return load_data("cifar10", data_dir, class_counts=counts)
    torch.manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    num_test = int(10_000 * fraction)
    test_labels = torch.arange(num_test) % len(counts)
    black = torch.full((3,), -2.0)
    train = Split(torch.randn(len(labels), 3, 32, 32), labels, black)
    return Data(train, Split(torch.randn(num_test, 3, 32, 32), test_labels, black), list(counts))


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device):
    """Wall time of work()."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def in_turn(works, pairs, device):
    """{name: [seconds]} of works {name: function}, each run in turn, `pairs` times, after one round not counted."""
    times = {name: [] for name in works}
    for turn in range(pairs + 1):
        for name, work in works.items():
            spent = seconds(work, device)
            if turn:
                times[name].append(spent)
    return times


class Elsewhere:
    """A work in a process of its own, for `in_turn`: nothing that this process sets reaches it.

    make: a function of a module that returns the work. Use as a context; calling it runs the work once.
    """

    def __init__(self, make):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(make, theirs))

    def __enter__(self):
        self.process.start()
        return self

    def __call__(self):
        self.pipe.send(True)
        self.pipe.recv()

    def __exit__(self, *error):
        self.pipe.send(False)
        self.process.join()


def serve(make, pipe):
    work = make()
    while pipe.recv():
        work()
        pipe.send(True)


def ratios(slower, faster):
    """Median, least and largest of the ratios of two lists of times, pair by pair."""
    pairwise = [a / b for a, b in zip(slower, faster, strict=True)]
    return statistics.median(pairwise), min(pairwise), max(pairwise)


def matmul_rate(device, dtype=torch.float32, size=4096, repeats=5):
    """Measured rate of a square matrix product, in FLOP/s: the machine's ceiling."""
    size = size if device.type == "cuda" else size // 2
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = in_turn({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * size**3 / statistics.median(times)


def copy_rate(device, size=2**28, repeats=5):
    """Measured rate of a large copy, in bytes read and written a second: the memory's ceiling."""
    source, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    times = in_turn({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]
    return 2 * size / statistics.median(times)


def report(name, rows, device, folder):
    """Prints rows (dicts with the same keys) as a Markdown table, and writes <folder>/<name>.csv."""
    print(f"\n{name}: {date.today()}, {device_name(device)}, torch {torch.__version__}, {platform.machine()}\n")
    cells = [
        [str(key) for key in rows[0]],
        *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
