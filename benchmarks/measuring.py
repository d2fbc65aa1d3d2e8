"""Time the measurement of one checkpoint against the usual way (reference.py) and a bare forward pass.

python benchmarks/measuring.py       (all columns; MLP, d = 1024, 30,000 + 10,000 images)
"""

import statistics
import tempfile
from functools import partial

import torch
from common import make_parser, paper_args, random_images, ratios, report, time_in_turn
from reference import usual_nc1
from training import OurTraining

from engine.device import pick_device
from engine.measurement import Measurement
from engine.run import Run
from engine.tables import MeasuredRun


@torch.inference_mode()
def bare_pass(measurement):
    """Run the model over the images that are measured, and do nothing with the result."""
    measurement.model.eval()
    for split in (measurement.data.train, measurement.data.test):
        for _ in measurement.forward(split):
            pass


def main():
    options = make_parser(__doc__).parse_args()
    device = pick_device(options.device, 0)
    data = random_images(options.fraction).to(device)
    training = OurTraining(paper_args("MLP", 256, options.width), data, device)
    with tempfile.TemporaryDirectory() as folder:
        run = MeasuredRun(Run(folder), problems=training.objective.problems())
        measurement = Measurement(run, training.model, data)
        works = {"bare forward pass": partial(bare_pass, measurement), "ours": measurement.measure}
        works["epoch"] = partial(training.run, len(training.batches.sizes))
        times = time_in_turn(works, options.pairs, device)
        nc1, usual, epochs = measurement.measure()[0]["NC1"], [], times.pop("epoch")
    works = {"the usual way": lambda: usual.append(usual_nc1(training.model, data, device))}
    times |= time_in_turn(works, 1, device)  # it is slow
    print(f"NC1: ours {nc1:.8g}, the usual way {usual[0]:.8g}")
    over, least, most = ratios(times["ours"], times["bare forward pass"])
    print(f"ours against a bare forward pass, pair by pair: median {over:.3f}, from {least:.3f} to {most:.3f}")
    share, least, most = (value / 10 for value in ratios(times["ours"], epochs))
    epoch = statistics.median(epochs)
    print(f"--nc_every 10 on top of {epoch:.3f} s an epoch: {share:.1%} ({least:.1%} to {most:.1%})")
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    rows = [{"one checkpoint": name, "seconds": median, "runs": len(times[name])} for name, median in medians.items()]
    for row in rows:
        row["of a bare pass"] = row["seconds"] / medians["bare forward pass"]
        row["times the usual"] = medians["the usual way"] / row["seconds"]
    report("measuring", rows, device, options.out)


if __name__ == "__main__":
    main()
