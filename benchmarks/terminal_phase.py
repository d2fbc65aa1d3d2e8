"""Train an MLP with plain Adam and scripts/random_head.flags, and draw terminal_phase.png for docs/recipe.md.

    python benchmarks/terminal_phase.py --data_dir ~/data        (CIFAR-10, 2,410 images)

The rows of the epochs (see PANELS) are written to --out, a CSV for each run.
"""

import argparse
from pathlib import Path

import matplotlib.style
import torch
from common import ROOT, write_table
from matplotlib.figure import Figure
from training import OurTraining

from analysis.style import COLOURS, STYLE_FILE, TEXT_WIDTH
from args import parse_args
from engine.device import pick_device
from engine.step_log import MEASURED
from engine.training import read_data
from utils import Progress

SETTING = (
    "--class_counts 420,60,350,120,280,90,500,240,150,200 --width 512 --depth_relu 4 --batch_size 200 --no-bias "
    "--sep_decay --weight_decay 0.004 --feature_decay_rate 0.0001"
)
PANELS = {  # columns of the rows, with their titles and scales
    "wrong": ("images with a wrong class", "symlog"),
    "dead": ("images with all features zero", "symlog"),
    "grad_norm_max": ("largest gradient norm", "log"),
    "step_max": (r"largest step $\|\Delta\theta\|$ / lr", "log"),
    "second_moment": (r"median $\sqrt{v}$ of the body", "log"),
}


@matplotlib.style.context(STYLE_FILE)
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    recipe, setting = f"@{ROOT}/scripts/random_head.flags", [*SETTING.split(), "--data_dir", options.data_dir]
    runs = {"plain Adam": [*setting, "--lr", "0.001", "--epochs", "400"], "recipe": [recipe, *setting]}
    figure = Figure(figsize=(TEXT_WIDTH, 3.6))
    *axes, empty = figure.subplots(2, 3).flatten()
    for (name, words), colour in zip(runs.items(), (COLOURS[1], COLOURS[0]), strict=True):
        table = write_table(f"terminal_phase_{name.replace(' ', '_')}", follow(words), options.out)
        for axis, (column, (title, scale)) in zip(axes, PANELS.items(), strict=True):
            axis.plot(table["epoch"], table[column], color=colour, label=name, linewidth=0.8)
            axis.set(title=title, xlabel="epoch", yscale=scale)
    for axis in axes[:2]:  # numbers of images
        axis.set_ylim(bottom=0)
    empty.axis("off")
    empty.legend(*axes[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.savefig(options.figures / "terminal_phase.png")


def follow(words):
    """Train with the flags `words`; return a row for each epoch."""
    args = parse_args(argv=words)
    training = OurTraining(args, read_data(args), pick_device(args.device, args.gpu_id))
    model, optimizer = training.model, training.optimizer
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc.")]
    rows = []
    with Progress(args.epochs, "epoch") as progress:
        for epoch in range(1, args.epochs + 1):
            lr, _ = training.set_epoch(epoch)
            model.train()
            norms, moved = [], []
            for batch in training.batches.draw(epoch):
                before = [parameter.detach().clone() for parameter in body]
                norms.append(float(training.step(batch)[MEASURED.index("grad_norm")]))
                change = [new.detach() - old for new, old in zip(body, before, strict=True)]
                moved.append(float(torch.nn.utils.get_total_norm(change)) / lr)
            moments = torch.cat([optimizer.state[parameter]["exp_avg_sq"].flatten() for parameter in body])
            row = {"epoch": epoch, **misplaced_images(model, training.data.train), "grad_norm_max": max(norms)}
            rows.append(row | {"step_max": max(moved), "second_moment": float(moments.sqrt().median())})
            progress.step(f"{row['wrong']} wrong, {row['dead']} dead")
    return rows


@torch.inference_mode()
def misplaced_images(model, split):
    """Return how many images get a wrong class, and how many have no feature above zero."""
    model.eval()
    logits, features = model(split.images)
    return {"wrong": int((logits.argmax(1) != split.labels).sum()), "dead": int((features == 0).all(1).sum())}


if __name__ == "__main__":
    main()
