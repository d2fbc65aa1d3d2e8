"""Steps of our loop against the usual one (reference.py), in turn, in each precision.

    python benchmarks/training.py --model MLP          (width 1024, batch 256, N = 30,000)
    python benchmarks/training.py --model ResNet18     (batch 32)

Also, for the MLP, the rate of a whole epoch of ours against the machine's measured matrix products.
"""

import argparse
import statistics
from functools import partial

import torch
from common import Elsewhere, copy_rate, images, in_turn, matmul_rate, ratios, report, setting, synchronise

from datasets import epoch_order
from models import build_model
from objective import make_objective
from train_1st_order_unbalanced import Record, make_optimizer, make_step
from utils import keep_freed_memory, pick_device, set_precision

from reference import UsualTraining  # isort: skip


class OurTraining:
    """run(steps) of the repository's own step."""

    def __init__(self, args, data, device):
        set_precision(args.precision, device)
        torch.manual_seed(1)
        memory_format = torch.contiguous_format if args.model == "MLP" else torch.channels_last
        self.split = data.train.to(device, memory_format)
        model = build_model(args.model, data.num_classes, bias=False, depth_linear=1, depth_relu=6, width=args.width)
        model.to(device, memory_format=memory_format).train()
        objective = make_objective(args, data)
        optimizer = make_optimizer(args, model, objective, device)
        self.record = Record(-(-len(self.split) // args.batch_size), device)
        self.step = make_step(args, self.split, model, objective, optimizer, self.record)
        self.args, self.epoch, self.rows, self.device = args, 0, iter(()), device

    def run(self, steps):
        for _ in range(steps):
            rows = next(self.rows, None)
            if rows is None:
                self.epoch += 1
                self.record.take()
                order = epoch_order(len(self.split), epoch=self.epoch, seed=1).to(self.device)
                self.rows = iter(order.split(self.args.batch_size))
                rows = next(self.rows)
            self.step(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="MLP")
    parser.add_argument("--batch_size", type=int, help="default: 256 for the MLP, else 32")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--data_dir", help="default: random images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="of a timed run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=1, help="of the paper's 30,000 images")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV file")
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    data = images(options.data_dir, options.fraction)
    batch_size = options.batch_size or (256 if options.model == "MLP" else 32)

    precisions = ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    steps = options.steps
    keep_freed_memory()
    works = {"usual loop, fp32": None}
    for precision in precisions:
        args = setting(options.model, batch_size, width=options.width, precision=precision)
        works[f"ours, {precision}"] = timed(OurTraining(args, data, device), steps, precision, device)
    with Elsewhere(partial(usual_work, options, batch_size, device)) as usual:
        works["usual loop, fp32"] = usual
        times = in_turn(works, options.pairs, device)
    usual_times = times["usual loop, fp32"]
    rows = []
    for name, spent in times.items():
        median, least, most = ratios(usual_times, spent)
        rows.append(
            {
                "loop": f"{options.model}, {name}",
                "batch": batch_size,
                "ms a step": 1000 * statistics.median(spent) / steps,
                "times the usual": median,
                "least": least,
                "most": most,
                "pairs": options.pairs,
            }
        )
    report(f"training_{options.model}_{device.type}", rows, device, options.out)
    if options.model == "MLP":
        share_of_ceiling(options, batch_size, data, device, precisions)


def usual_work(options, batch_size, device):
    """The reference's steps, for a process of their own."""
    args = setting(options.model, batch_size, width=options.width)
    torch.manual_seed(1)
    model = build_model(options.model, 10, bias=False, depth_linear=1, depth_relu=6, width=options.width).to(device)
    usual = UsualTraining(args, images(options.data_dir, options.fraction).train, model, device)

    def work():
        usual.run(options.steps)
        synchronise(device)

    return work


def timed(training, steps, precision, device):
    """A function for `in_turn`: steps under the precision's switches."""

    def work():
        set_precision(precision, device)
        training.run(steps)

    return work


def share_of_ceiling(options, batch_size, data, device, precisions):
    """Arithmetic and memory traffic of whole epochs against a large matrix product and a large copy.

    Counted are the matrix products of the layers, and what a step of Adam cannot do without: the weights are read
    forward and backward, the gradient is written and read, two moments and the weights are read and written.
    """
    rows, width, count = [], options.width, len(data.train)
    weights = 3072 * width + 6 * width**2 + 10 * width
    steps = -(-count // batch_size)
    flops = count * 2 * (3 * weights - 3072 * width)  # forward, two products backward, but none to the images
    traffic = steps * 4 * 10 * weights
    for precision in precisions:
        args = setting(options.model, batch_size, width=width, precision=precision)
        training = OurTraining(args, data, device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        ceiling, copies, epochs = [], [], []
        for _ in range(3):
            ceiling.append(matmul_rate(device, dtype))
            copies.append(copy_rate(device))
            epochs += in_turn({"epoch": partial(training.run, steps)}, 1, device)["epoch"]
        epoch, ceiling, copies = (statistics.median(values) for values in (epochs, ceiling, copies))
        rows.append(
            {
                "epoch": f"{options.model}, {precision}",
                "seconds": epoch,
                "GFLOP/s": flops / epoch / 1e9,
                "matrix product, GFLOP/s": ceiling / 1e9,
                "share": flops / epoch / ceiling,
                "GB/s": traffic / epoch / 1e9,
                "copy, GB/s": copies / 1e9,
                "share of copy": traffic / epoch / copies,
            }
        )
    report(f"ceiling_{options.model}_{device.type}", rows, device, options.out)


if __name__ == "__main__":
    main()
