"""Measuring one checkpoint (train and test accuracy, all columns) against the usual way and a bare forward pass.

python benchmarks/measuring.py       (MLP, d = 1024, 30,000 + 10,000 images)
"""

import argparse
import statistics
import tempfile
from functools import partial

import torch
from common import images, in_turn, ratios, report, seconds, setting
from training import OurTraining

from models import build_model
from objective import make_objective
from utils import pick_device, set_precision
from validate_NC_unbalanced import Measurement

from reference import usual_measurement  # isort: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--data_dir", help="default: random images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--usual", type=int, default=1, help="runs of the usual way, which is slow")
    parser.add_argument("--fraction", type=float, default=1, help="of the paper's 30,000 images")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV file")
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    set_precision("fp32", device)
    data = images(options.data_dir, options.fraction)
    data.train, data.test = data.train.to(device), data.test.to(device)
    args = setting("MLP", 256, width=options.width)
    torch.manual_seed(1)
    model = build_model("MLP", 10, bias=False, depth_linear=1, depth_relu=6, width=options.width).to(device)

    with tempfile.TemporaryDirectory() as folder:
        measurement = Measurement(args, data, model, make_objective(args, data), device, folder)

        @torch.inference_mode()
        def bare():
            for split in (data.train, data.test):
                for _ in measurement.forward(split):
                    pass

        training = OurTraining(args, data, device)
        epoch = partial(training.run, -(-len(data.train) // args.batch_size))
        works = {"bare forward pass": bare, "ours": measurement.measure, "an epoch of training": epoch}
        times = in_turn(works, options.pairs, device)
        usual = [seconds(lambda: usual_measurement(model, data, device), device) for _ in range(options.usual)]
        found, expected = measurement.measure()[0]["NC1"], usual_measurement(model, data, device)[0]
    print(f"NC1: ours {found:.8g}, the usual way {expected:.8g}")
    epochs, times["the usual way"] = times.pop("an epoch of training"), usual
    bare_median, usual_median = statistics.median(times["bare forward pass"]), statistics.median(usual)
    rows = []
    for name, spent in times.items():
        median = statistics.median(spent)
        row = {"one checkpoint": name, "seconds": median, "runs": len(spent)}
        rows.append(row | {"of a bare pass": median / bare_median, "times the usual": usual_median / median})
    over, least, most = ratios(times["ours"], times["bare forward pass"])
    print(f"ours against a bare forward pass, pair by pair: median {over:.3f}, from {least:.3f} to {most:.3f}")
    every = [measured / (10 * epoch) for measured, epoch in zip(times["ours"], epochs, strict=True)]
    print(
        f"--nc_every 10 on top of training time, {statistics.median(epochs):.3f} s an epoch: median "
        f"{statistics.median(every):.1%}, from {min(every):.1%} to {max(every):.1%}"
    )
    report(f"measuring_{device.type}", rows, device, options.out)


if __name__ == "__main__":
    main()
