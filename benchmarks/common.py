"""Shared by the benchmarks: flags, images, timing in turn, and tables. Run them from the repository's root."""

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from args import parse_args  # noqa: E402
from datasets import Data, Split  # noqa: E402
from engine.device import device_name  # noqa: E402

COUNTS = [1000, 1000, 2000, 2000, 3000, 3000, 4000, 4000, 5000, 5000]  # the paper's CIFAR-10 subset


def make_parser(description):
    """Return a parser with the flags that all timing benchmarks have."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024, help="width of the MLP")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=5, help="timings of each candidate")
    parser.add_argument("--fraction", type=float, default=1, help="share of the paper's 30,000 training images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV files")
    return parser


def paper_args(model, batch_size, width, precision="fp32"):
    """Return the parsed flags of the paper's run of a model."""
    flags = f"--model {model} --batch_size {batch_size} --width {width} --precision {precision} --no-bias --sep_decay"
    return parse_args(argv=flags.split())


def random_images(fraction=1.0):
    """Return random 8-bit images, a pattern per class plus noise, as many as in the paper's data.

    Timings do not depend on the content of the images, but NC1 needs classes that a network can separate: on pure noise
    the pseudo-inverse of the usual way, in fp32, cuts off most of the between-class covariance.
    """
    torch.manual_seed(0)
    counts = [int(count * fraction) for count in COUNTS]
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))], torch.arange(int(10_000 * fraction)) % 10
    patterns = torch.randint(256, (10, 3, 32, 32), dtype=torch.int16)

    def split(labels):
        pixels = (patterns[labels] + torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.int16)) // 2
        return Split(pixels.byte(), labels, *(torch.full((3,), value) for value in (-2.0, 0.5, 0.25)))

    return Data(*map(split, labels), counts)


def time_in_turn(works, repeats, device):
    """Return {name: [seconds]} of works {name: function}, run in turn after one round that is not counted."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            synchronise()
            began = time.perf_counter()
            work()
            synchronise()
            times[name].append(time.perf_counter() - began)
    return {name: spent[1:] for name, spent in times.items()}


def ratios(slower, faster):
    """Return the median, least and largest ratio of two lists of times, pair by pair."""
    pairwise = [a / b for a, b in zip(slower, faster, strict=True)]
    return statistics.median(pairwise), min(pairwise), max(pairwise)


def write_table(name, rows, folder):
    """Write rows (dicts with the same keys) to <folder>/<name>.csv; return them as a DataFrame."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(folder / f"{name}.csv", index=False)
    return table


def report(name, rows, device, folder):
    """Write rows as CSV, and print them as a Markdown table under a line that names the machine."""
    table = write_table(f"{name}_{device.type}", rows, folder)
    print(f"\n{name}: {date.today()}, {device_name(device)}, torch {torch.__version__}\n")
    print(table.to_markdown(index=False, floatfmt=".4g"))
