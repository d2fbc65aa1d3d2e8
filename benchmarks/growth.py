"""Time how the cost of measuring grows with N, d and K, and that of an epoch with batch size and width.

    python benchmarks/growth.py
    python benchmarks/growth.py --size 100000,512,10000 --pairs 1      (N, d and K; of measuring alone)

Measuring means both passes and all columns, on features that are already in memory and not part of the peak memory,
of which the optimum that they are compared with is a part. An epoch is one of the MLP with N = 30,000.
"""

import multiprocessing
import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from common import make_parser, paper_args, random_images, report, time_in_turn
from training import OurTraining

from engine.device import keep_freed_memory, pick_device
from engine.measurement import BATCH
from nc_metrics import ClassStatistics, geometry, nc_metrics
from nc_theory import UFM, solve

SIZES = [(num, 1024, 10) for num in (3_000, 10_000, 30_000, 100_000)]  # N, d, K: each grown alone, and all three
SIZES += [(30_000, dim, 10) for dim in (256, 512, 2048, 4096)]
SIZES += [(30_000, 1024, 100), (30_000, 1024, 1000), (30_000, 4096, 1000)]
SHAPES = [(batch, 1024) for batch in (32, 64, 128, 256, 512, 1024)] + [(256, width) for width in (256, 512, 2048)]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps of a timed training run")
    parser.add_argument("--size", type=lambda text: [int(word) for word in text.split(",")], help="N,d,K: only these")
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    context = multiprocessing.get_context("spawn")  # a process for each size, because peak memory never falls
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as elsewhere:
        sizes = [options.size] if options.size else [(int(num * options.fraction), dim, k) for num, dim, k in SIZES]
        rows = list(elsewhere.map(partial(measure, device=device, repeats=options.pairs), *zip(*sizes, strict=True)))
    report("growth_measuring", rows, device, options.out)
    if options.size:
        return
    keep_freed_memory()
    data, rows = random_images(options.fraction), []
    for batch, width in SHAPES:
        training = OurTraining(paper_args("MLP", batch, width), data, device)
        times = time_in_turn({"steps": partial(training.run, options.steps)}, options.pairs, device)["steps"]
        step = statistics.median(times) / options.steps
        row = {"batch": batch, "width": width, "ms a step": 1000 * step}
        rows.append(row | {"seconds an epoch": len(training.batches.sizes) * step, "images/s": batch / step})
    report("growth_training", rows, device, options.out)


def measure(num, dim, num_classes, *, device, repeats):
    """Return a row: seconds and peak memory of all metrics of `num` features."""
    counts = (num // num_classes,) * num_classes
    labels = torch.arange(num_classes, device=device).repeat_interleave(counts[0])
    features = torch.rand(len(labels), dim, device=device)
    features[torch.arange(len(labels)), labels % dim] += 10
    weight = torch.randn(num_classes, dim, device=device)
    before, optimum = peak_memory(device), solve(UFM(counts, 1e-4, 1e-6))
    batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))

    def work():
        sums = ClassStatistics(num_classes)
        for batch in batches:
            sums.update(*batch)
        for batch in batches:
            sums.update_within(*batch, batch[1])
        nc_metrics(sums, weight, optimum)
        geometry(sums.means, weight)

    times = time_in_turn({"measuring": work}, repeats, device)["measuring"]
    row = {"N": num, "d": dim, "K": num_classes, "seconds": statistics.median(times)}
    row["peak, MB"] = (peak_memory(device) - before) / 2**20
    return row | {"features, MB": 4 * features.numel() / 2**20, "d x d, MB": 8 * dim**2 / 2**20}


def peak_memory(device):
    """Return the largest memory that this process has had so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
