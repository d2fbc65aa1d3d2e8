"""Time steps of our loop against the usual one (reference.py), in turn, in each precision.

    python benchmarks/training.py --model MLP          (width 1024, batch 256, N = 30,000)
    python benchmarks/training.py --model ResNet18     (batch 32)

For the MLP, also compare the rate of whole epochs with the machine's own matrix products.
"""

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, count

import torch
from common import make_parser, paper_args, random_images, ratios, report, time_in_turn
from reference import run_usual_training

from engine.device import keep_freed_memory, pick_device, set_precision
from engine.training import Training, make_model
from models import to_device


class OurTraining(Training):
    """The training of the flags `args`, without files, ready to step.

    choose: sets the precision on a device. prepare: changes the model in place, before it is captured.
    """

    def __init__(self, args, data, device, choose=set_precision, prepare=lambda model: None):
        self.choose = choose
        choose(args.precision, device)
        torch.manual_seed(args.seed)
        model, data = to_device(make_model(args, data.num_classes), data, device)
        prepare(model)
        super().__init__(args, data, model, device)
        self.initialise_head(args.head_init, args.seed)
        self.capture()
        self.args, self.endless = args, chain.from_iterable(map(self.batches.draw, count(1)))

    def run(self, steps):
        """Make the next `steps` steps, in the precision of the flags."""
        self.choose(self.args.precision, self.device)
        self.model.train()
        for _ in range(steps):
            self.step(next(self.endless))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="MLP")
    parser.add_argument("--batch_size", type=int, help="default: 256 for the MLP, else 32")
    parser.add_argument("--steps", type=int, default=20, help="steps of a timed run")
    options = parser.parse_args()
    device, data = pick_device(options.device, 0), random_images(options.fraction)
    keep_freed_memory()
    setting = options.model, options.batch_size or (256 if options.model == "MLP" else 32), options.width
    precisions = ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    ours = {precision: OurTraining(paper_args(*setting, precision), data, device) for precision in precisions}

    # The usual loop has its own process, so that our allocator and precision settings do not affect it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
        usual = partial(elsewhere.submit, run_usual_training, options.steps, *setting, options.fraction, device)
        works = {"usual loop, fp32": lambda: usual().result()}
        works |= {f"ours, {name}": partial(training.run, options.steps) for name, training in ours.items()}
        times = time_in_turn(works, options.pairs, device)
    rows = []
    for name, spent in times.items():
        row = {"loop": f"{options.model}, {name}", "batch": setting[1]}
        row["ms a step"] = 1000 * statistics.median(spent) / options.steps
        row["times the usual"], row["least"], row["most"] = ratios(times["usual loop, fp32"], spent)
        rows.append(row | {"pairs": options.pairs})
    report(f"training_{options.model}", rows, device, options.out)
    if options.model == "MLP":
        report("ceiling_MLP", [share_of_ceiling(training) for training in ours.values()], device, options.out)


def share_of_ceiling(training):
    """Return a row: the FLOP/s of a whole epoch of the MLP, compared with those of a large matrix product.

    Only the matrix products of the layers count: one forward, and two backward, but none to the images.
    """
    args, device, samples = training.args, training.device, len(training.data.train)
    flops = 2 * samples * (2 * 3072 * args.width + 3 * (args.depth_relu * args.width**2 + 10 * args.width))
    size = args.width * (4 if device.type == "cuda" else 2)
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    works = {"epoch": partial(training.run, len(training.batches.sizes)), "product": lambda: a @ b}
    times = {name: statistics.median(spent) for name, spent in time_in_turn(works, 3, device).items()}
    rate, ceiling = flops / times["epoch"], 2 * size**3 / times["product"]
    row = {"epoch": f"MLP, {args.precision}", "seconds": times["epoch"], "GFLOP/s": rate / 1e9}
    return row | {"matrix product, GFLOP/s": ceiling / 1e9, "share": rate / ceiling}


if __name__ == "__main__":
    main()
