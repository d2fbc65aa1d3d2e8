"""What Adam does late in training, and what the recipe of collapse.sh changes: the figure of docs/collapse.md.

    python benchmarks/terminal_phase.py --data_dir ~/data        (CIFAR-10, 2,410 images)

Trains one MLP twice, plainly and by the recipe, and follows images with the wrong class, images whose features are all
zero, the largest gradient and the largest step of each epoch, and Adam's second moments. Draws terminal_phase.png into
--figures, and writes a CSV of each run into --out.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from common import ROOT
from matplotlib.figure import Figure

from args import parse_args
from datasets import epoch_batches, epoch_order
from objective import make_objective
from plot_nc import BLUE, ORANGE, STYLE, TEXT_WIDTH
from train_1st_order_unbalanced import (
    Record,
    learning_rate,
    make_optimizer,
    make_step,
    penalty_strength,
    set_learning_rate,
)
from utils import Progress, write_csv
from validate_NC_unbalanced import set_up

SETTING = (
    "--class_counts 420,60,350,120,280,90,500,240,150,200 --width 512 --depth_relu 4 --batch_size 200 --no-bias "
    "--sep_decay --weight_decay 0.004 --feature_decay_rate 0.0001"
)
PANELS = {  # a column of the rows each, with its title
    "wrong": "images with a wrong class",
    "dead": "images with all features zero",
    "grad_norm_max": "largest gradient norm",
    "step_max": r"largest step $\|\Delta\theta\|$ / lr",
    "second_moment": r"median $\sqrt{v}$ of the body",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    setting = [*SETTING.split(), "--data_dir", options.data_dir]
    plain, recipe = ["--lr", "0.001", "--epochs", "400"], [f"@{ROOT}/scripts/collapse.flags"]
    rows = {"plain Adam": follow([*setting, *plain]), "recipe": follow([*recipe, *setting])}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        write_csv(options.out / f"terminal_phase_{name.replace(' ', '_')}.csv", found)
    draw(rows, options.figures / "terminal_phase.png")


def follow(words):
    """Trains with the flags `words`; returns a row an epoch."""
    args = parse_args(argv=words)
    device, data, model = set_up(args)
    objective = make_objective(args, data)
    optimizer = make_optimizer(args, model, objective, device)
    record, strength = Record(-(-len(data.train) // args.batch_size), device), torch.ones((), device=device)
    step = make_step(args, data.train, model, objective, optimizer, record, strength=strength)
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc.")]
    strata = data.train.labels.cpu() if args.stratified else None
    rows = []
    with Progress(args.epochs, "epoch") as progress:
        for epoch in range(1, args.epochs + 1):
            lr = set_learning_rate(optimizer, learning_rate(args, epoch))
            strength.fill_(penalty_strength(args, epoch))
            model.train()
            steps = []
            order = epoch_order(len(data.train), epoch=epoch, seed=args.seed, labels=strata)
            for batch in epoch_batches(order, args.batch_size, even=args.stratified):
                before = [parameter.detach().clone() for parameter in body]
                step(batch.to(device))
                moved = sum((new.detach() - old).square().sum() for new, old in zip(body, before, strict=True))
                steps.append(math.sqrt(moved) / lr)
            columns = record.take()
            moments = torch.cat([optimizer.state[parameter]["exp_avg_sq"].flatten() for parameter in body])
            wrong, dead = misplaced(model, data.train)
            rows.append(
                {
                    "epoch": epoch,
                    "wrong": wrong,
                    "dead": dead,
                    "grad_norm_max": float(columns["grad_norm"].max()),
                    "step_max": max(steps),
                    "second_moment": float(moments.sqrt().median()),
                }
            )
            progress.step(f"{wrong} wrong, {dead} dead")
    return rows


@torch.inference_mode()
def misplaced(model, split):
    """How many images get a wrong class, and how many have no feature above zero."""
    model.eval()
    logits, features = model(split.images)
    return int((logits.argmax(1) != split.labels).sum()), int((features == 0).all(1).sum())


@matplotlib.rc_context(STYLE)
def draw(rows, path):
    """A panel a column of `rows` {run: [row an epoch]}."""
    figure = Figure(figsize=(TEXT_WIDTH, 3.6))
    panels = figure.subplots(2, 3).flatten()
    for axis, (column, title) in zip(panels, PANELS.items(), strict=False):
        for (name, found), colour in zip(rows.items(), (ORANGE, BLUE), strict=True):
            epochs, values = [row["epoch"] for row in found], [row[column] for row in found]
            axis.plot(epochs, values, color=colour, label=name, linewidth=0.8)
        axis.set(title=title, xlabel="epoch", yscale="symlog" if column in ("wrong", "dead") else "log")
        if column in ("wrong", "dead"):
            axis.set_ylim(bottom=0)
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
