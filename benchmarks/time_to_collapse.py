"""Compare how soon networks collapse with heads that start at the optimum, and with heads that start at random.

    python benchmarks/time_to_collapse.py --data_dir DIR                       (all settings: hours)
    python benchmarks/time_to_collapse.py --data_dir DIR --settings cifar10 --seeds 5

DIR is a --data_dir with CIFAR-10. A run has collapsed once NC2_H, NC2_WWT, NC3_WH and the relative errors of margins
and norms are all at most a bound, and stay there up to the last measurement. Each line says after how many steps, and
seconds of training on one core, that was, for both recipes and as a ratio; a seed's two runs follow one another.
`random` is the recipe that this repository had before the head started at the optimum, with its own number of epochs.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, make_parser, report

from analysis.settings import read_measured_run

COLLAPSE = ["NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"]
RANDOM = (  # the recipe for heads that start at random
    "--model MLP --no-bias --sep_decay --adam_beta2 0.99 --clip_grad_norm 0.5 --lr 0.002 --decay_type cosine "
    "--epochs 250 --patience 36% --penalty_warmup_epochs 20% --stratified --revive"
)
RANDOM_SMALL = (
    f"{RANDOM} --epochs 900 --patience 33% --penalty_warmup_epochs 6% --penalty_start 5 --penalty_hold_epochs 28% "
    "--penalty_fall_epochs 33%"
)
SMALL_COUNTS = "--class_counts 100,100,200,200,300,300,400,400,500,500"


@dataclass(frozen=True)
class Setting:
    """What is trained, the flags of both recipes, and the bound that both must reach."""

    flags: str
    random: str
    optimum: str
    bound: float = 1e-2
    every: int = 2  # epochs between measurements


MLP = f"--dataset cifar10 {SMALL_COUNTS} --width 512 --depth_relu 6 --batch_size 256"
RECIPE = f"{MLP} --weight_decay 0.005 --feature_decay_rate 0.00005"
SETTINGS = {
    "cifar10": Setting(RECIPE, RANDOM, "@scripts/optimum_head.flags --epochs 40"),
    "digits": Setting(
        "--dataset digits --depth_relu 3 --width 256 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005",
        RANDOM,
        "@scripts/optimum_head.flags --epochs 60",
        bound=1e-3,
    ),
    "small_lambda": Setting(
        f"{MLP} --weight_decay 0.0001 --feature_decay_rate 0.0001",
        RANDOM_SMALL,
        "@scripts/optimum_head.flags --epochs 200",
        bound=5e-3,
        every=5,
    ),
}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="with CIFAR-10")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name in options.settings.split(","):
        setting = SETTINGS[name]
        for seed in range(1, options.seeds + 1):
            row = {"setting": name, "bound": setting.bound, "seed": seed}
            for kind in ("random", "optimum"):
                steps, seconds, end = train(setting, getattr(setting, kind), seed, options)
                row |= {f"steps, {kind}": steps, f"seconds, {kind}": seconds, f"end, {kind}": end}
            row["steps, ratio"] = row["steps, random"] / row["steps, optimum"]
            row["seconds, ratio"] = row["seconds, random"] / row["seconds, optimum"]
            rows.append(row)
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                ),
                flush=True,
            )
        ratios = [row["steps, ratio"] for row in rows if row["setting"] == name]
        print(f"{name}: {statistics.median(ratios):.2f} times fewer steps (median of {len(ratios)} seeds)", flush=True)
        report("time_to_collapse", rows, torch.device("cpu"), options.out)


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
