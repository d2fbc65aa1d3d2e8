"""How the cost grows: of measuring with N, d and K, and of an epoch with batch size and width.

    python benchmarks/growth.py

Measuring: both passes and all columns, on features that lie in memory, and its peak memory on top of them; each size
in a process of its own. An epoch: the MLP's step, for N = 30,000.
"""

import argparse
import multiprocessing
import resource
import statistics

import torch
from common import images, in_turn, report, setting
from training import OurTraining

from nc_metrics import ClassStatistics, geometry, nc_metrics
from theory import cross_entropy_optimum
from utils import keep_freed_memory, pick_device, set_precision

BATCH = 512  # as validate's
SIZES = [  # N, d, K: each grown alone, and all three large
    *((num, 1024, 10) for num in (3_000, 10_000, 30_000, 100_000)),
    *((30_000, dim, 10) for dim in (256, 512, 2048, 4096)),
    *((30_000, 1024, num_classes) for num_classes in (100, 1000)),
    (30_000, 4096, 1000),
]
BATCHES, WIDTHS = (32, 64, 128, 256, 512, 1024), (256, 512, 1024, 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of a timed run of training")
    parser.add_argument("--fraction", type=float, default=1, help="of the numbers of images below")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV files")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for num, dim, num_classes in SIZES:
        size = int(num * options.fraction), dim, num_classes
        with context.Pool(1) as pool:  # a process's peak memory never falls: one for each size
            rows.append(pool.apply(measure, (*size, options.device, options.repeats)))
    device = pick_device(options.device, 0)
    report(f"growth_measuring_{device.type}", rows, device, options.out)

    keep_freed_memory()
    data = images(fraction=options.fraction)
    sizes = [(batch, 1024) for batch in BATCHES] + [(256, width) for width in WIDTHS if width != 1024]
    rows = [epoch(data, *size, device, options) for size in sizes]
    report(f"growth_training_{device.type}", rows, device, options.out)


def measure(num, dim, num_classes, device, repeats):
    """A row: seconds and peak memory of all metrics of `num` features."""
    device = pick_device(device, 0)
    torch.manual_seed(0)
    counts = [num // num_classes] * num_classes
    labels = torch.arange(num_classes, device=device).repeat_interleave(num // num_classes)
    features = torch.rand(len(labels), dim, device=device)
    features[torch.arange(len(labels)), labels % dim] += 10
    weight = torch.randn(num_classes, dim, device=device)
    optimum = cross_entropy_optimum(counts, 1e-4, 1e-6)
    before = peak_memory(device)

    def work():
        gathered = ClassStatistics(num_classes)
        for batch in zip(features.split(BATCH), labels.split(BATCH), strict=True):
            gathered.update(*batch)
        for batch in zip(features.split(BATCH), labels.split(BATCH), strict=True):
            gathered.update_within(*batch, batch[1])
        nc_metrics(gathered, weight, optimum)
        geometry(gathered.means, weight)

    times = in_turn({"measuring": work}, repeats, device)["measuring"]
    return {
        "N": num,
        "d": dim,
        "K": num_classes,
        "seconds": statistics.median(times),
        "peak, MB": (peak_memory(device) - before) / 2**20,
        "features, MB": 4 * features.numel() / 2**20,
        "d x d, MB": 8 * dim**2 / 2**20,
    }


def peak_memory(device):
    """The largest memory that this process has had so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def epoch(data, batch, width, device, options):
    """A row: seconds of an epoch of the MLP, from the median step."""
    args = setting("MLP", batch, width=width)
    set_precision(args.precision, device)
    training = OurTraining(args, data, device)
    times = in_turn({"steps": lambda: training.run(options.steps)}, options.repeats, device)["steps"]
    step = statistics.median(times) / options.steps
    steps = -(-len(data.train) // batch)
    return {
        "batch": batch,
        "width": width,
        "ms a step": 1000 * step,
        "seconds an epoch": steps * step,
        "images/s": batch / step,
    }


if __name__ == "__main__":
    main()
