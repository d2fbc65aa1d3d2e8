"""Compare how soon networks collapse with the recipe, and with heads that start at random.

    python benchmarks/time_to_collapse.py --data_dir DIR                                (all settings: hours)
    python benchmarks/time_to_collapse.py --data_dir DIR --settings cifar10 --seeds 5

DIR is a --data_dir with CIFAR-10. A run has collapsed once NC2_H, NC2_WWT, NC3_WH and the relative errors of margins
and norms are all at most a bound, and stay there up to the last measurement. Each line says after how many steps, and
seconds of training on one core, that was, for both recipes and as a ratio; a seed's two runs follow one another.
`random` is scripts/random_head.flags, with its own number of epochs; `recipe` is scripts/collapse.flags, whose seconds
include the whitening of the images. The last seeds may be trained with the recipe alone (--random_seeds).
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, make_parser, report, write_table

from analysis.settings import read_measured_run
from args import parse_args
from engine.training import load_images, read_data
from scripts.tables import RANDOM_HEAD_RESNET

COLLAPSE = ["NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"]
SMALL_COUNTS = "--class_counts 100,100,200,200,300,300,400,400,500,500"


@dataclass(frozen=True)
class Setting:
    """What is trained, the flags of both recipes, and the bound that both must reach."""

    flags: str
    random: str = "@scripts/random_head.flags"
    recipe: str = "@scripts/collapse.flags"
    bound: float = 1e-2
    every: int = 2  # epochs between measurements


MLP = f"--dataset cifar10 {SMALL_COUNTS} --width 512 --depth_relu 6 --batch_size 256"
README = f"{MLP} --weight_decay 0.005 --feature_decay_rate 0.00005"
PAPER = (
    "--dataset cifar10 --width 1024 --depth_relu 6 --batch_size 256 --weight_decay 0.0001 --feature_decay_rate 0.00001"
)
FALLING = (  # small penalties need a schedule if the head starts at random
    "@scripts/random_head.flags --patience 33% --penalty_warmup_epochs 6% --penalty_hold_epochs 28% "
    "--penalty_fall_epochs 33%"
)
SETTINGS = {
    "cifar10": Setting(README, recipe="@scripts/collapse.flags --epochs 40"),
    "cifar10_to_4e-4": Setting(README, bound=4e-4),
    "digits": Setting(
        "--dataset digits --depth_relu 3 --width 256 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005",
        bound=1e-3,
    ),
    "small_lambda": Setting(
        f"{MLP} --weight_decay 0.0001 --feature_decay_rate 0.0001",
        random=f"{FALLING} --penalty_start 5 --epochs 900",
        bound=5e-3,
    ),
    "resnet18": Setting(
        "--model ResNet18 --planes 16 --dataset cifar10 --class_counts 10,10,20,20,30,30,40,40,50,50 "
        "--weight_decay 0.005 --feature_decay_rate 0.0005 --bn_statistics training_set",
        random=RANDOM_HEAD_RESNET,
        recipe="@scripts/collapse_resnet.flags --batch_size 300",
        every=5,
    ),
    "paper": Setting(
        PAPER,
        random=f"{FALLING} --penalty_start 5 --lr 0.001 --epochs 120",
        recipe="@scripts/collapse.flags --lr 0.0005 --epochs 25",
        every=1,
    ),
    "paper_released": Setting(
        f"{PAPER} --objective released",
        random=f"{FALLING} --penalty_start 27 --lr 0.001 --epochs 120",
        recipe="@scripts/collapse.flags --lr 0.0005 --epochs 25",
        every=1,
    ),
}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="with CIFAR-10")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--random_seeds", type=int, help="seeds also trained with random heads (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.settings.split(","):
        setting = SETTINGS[name]
        whitening = seconds_to_whiten(setting, options)
        for seed in range(1, options.seeds + 1):
            row = {"setting": name, "bound": setting.bound, "seed": seed}
            for kind in ("random", "recipe"):
                steps, seconds, end = math.nan, math.nan, math.nan
                if kind == "recipe" or options.random_seeds is None or seed <= options.random_seeds:
                    steps, seconds, end = train(setting, getattr(setting, kind), seed, options)
                seconds += whitening * (kind == "recipe")
                row |= {f"steps, {kind}": steps, f"seconds, {kind}": seconds, f"end, {kind}": end}
            row["steps, ratio"] = row["steps, random"] / row["steps, recipe"]
            row["seconds, ratio"] = row["seconds, random"] / row["seconds, recipe"]
            rows.append(row)
            write_table("time_to_collapse_cpu", rows, options.out)
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                ),
                flush=True,
            )
        ratios = [row["steps, ratio"] for row in rows if row["setting"] == name and not math.isnan(row["steps, ratio"])]
        if ratios:
            print(f"{name}: {statistics.median(ratios):.2f} times fewer steps (median of {len(ratios)})", flush=True)
        report("time_to_collapse", rows, torch.device("cpu"), options.out)


def seconds_to_whiten(setting, options):
    """Return the time that whitening the images of a setting's recipe takes on one core."""
    words = [*setting.recipe.split(), *setting.flags.split(), "--data_dir", options.data_dir]
    args = parse_args(argv=words)
    images = load_images(args)
    start = time.perf_counter()
    read_data(args, images)
    return time.perf_counter() - start


def train(setting, recipe, seed, options):
    """Train and measure a run on one core; return steps and seconds to its collapse, NaN if missed, and its end."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*recipe.split(), *setting.flags.split(), "--seed", str(seed), "--nc_every", str(setting.every)]
        files = ["--data_dir", options.data_dir, "--save_path", folder, "--save_every", "1000000"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / "train_1st_order_unbalanced.py", *words, *files]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=env)
        run = read_measured_run(Path(folder), bn_statistics=bn_statistics(setting), columns=COLLAPSE)
        worst = run.rows[COLLAPSE].max(axis=1)
        stays = run.rows["epoch"][(worst <= setting.bound)[::-1].cummin()]
        epoch = stays.min() if len(stays) else math.nan
        if math.isnan(epoch):
            return math.nan, math.nan, float(worst.iloc[-1])
        return int(run.steps_until(epoch)), float(run.seconds_until(epoch)), float(worst.iloc[-1])


def bn_statistics(setting):
    return "training_set" if "--bn_statistics training_set" in setting.flags else "running"


if __name__ == "__main__":
    main()
