"""Count, over many seeds, the classes that training loses although the theorem keeps them, for both recipes.

    python benchmarks/rare_classes.py --data_dir DIR             (DIR with CIFAR-10; --seeds 50 takes minutes)

The setting has 242 images in the profile exp:100, whose last classes have a single image. A class is lost if its class
mean is zero, and not at the optimum. Each line says in how many seeds a class was lost, and the largest NC2_H.
"""

import tempfile

import torch
from common import make_parser, report
from training import OurTraining

from args import parse_args
from engine.measurement import Measurement
from engine.run import Run
from engine.tables import MeasuredRun
from engine.training import read_data

SETTING = (
    "--imbalance exp:100 --n_max 100 --width 128 --depth_relu 3 --batch_size 110 --weight_decay 0.02 "
    "--feature_decay_rate 0.002"
)
RECIPES = {"random head": "@scripts/random_head.flags", "recipe": "@scripts/collapse.flags"}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="with CIFAR-10")
    parser.add_argument("--epochs", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, recipe in RECIPES.items():
        words = [*recipe.split(), *SETTING.split(), "--epochs", str(options.epochs), "--data_dir", options.data_dir]
        data = read_data(parse_args(argv=words))
        found = [train([*words, "--seed", str(seed)], data) for seed in range(1, options.seeds + 1)]
        counts, kept, distances = data.class_counts, *zip(*found, strict=True)
        lost = {k: sum(not there[k] for there in kept) for k in range(len(counts)) if not all(t[k] for t in kept)}
        rows.append(
            {
                "head": name,
                "seeds": options.seeds,
                "seeds without loss": sum(all(there) for there in kept),
                "lost": ", ".join(f"class {k} (n_k = {counts[k]}) in {times}" for k, times in lost.items()),
                "NC2_H, largest": max(distances),
            }
        )
        print(rows[-1], flush=True)
    report("rare_classes", rows, torch.device("cpu"), options.out)


def train(words, data):
    """Train a run; return whether each class has features or has none at the optimum either, and NC2_H."""
    args = parse_args(argv=words)
    training = OurTraining(args, data, torch.device("cpu"))
    for epoch in range(1, args.epochs + 1):
        training.set_epoch(epoch)
        training.model.train()
        for indices in training.batches.draw(epoch):
            training.step(indices)
    with tempfile.TemporaryDirectory() as folder:
        measured = MeasuredRun(Run(folder), problems=training.objective.problems())
        row, parts, _ = Measurement(measured, training.model, training.data).measure()
    alive, optimal = parts["HTH"].diagonal() > 0, torch.as_tensor(parts["HTH_theory"]).diagonal() > 0
    return (alive | ~optimal).tolist(), row["NC2_H"]


if __name__ == "__main__":
    main()
