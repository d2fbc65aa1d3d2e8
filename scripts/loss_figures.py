"""Draw what the optimum of each loss looks like, from the solver alone: docs/figures/losses.png and merging.png.

    python scripts/loss_figures.py [--grid 25]

losses   margins and class-mean norms of eight losses against n_k
merging  cosines between the class means of LA and VS, and where merging begins as TAU and the imbalance grow
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.panels import THEOREM_PANELS
from analysis.style import COLOURS, MARKERS, STYLE_FILE, TEXT_WIDTH
from nc_theory import UFM, LossVariant, solve, suggest_lambdas

ROOT = Path(__file__).resolve().parent.parent
COUNTS = [100, 100, 200, 200, 300, 300, 400, 400, 500, 500]
LAMBDAS = 5e-3, 5e-5
LOSSES = {
    "CE": {},
    "weighted 0.5": {"class_weights": 0.5},
    "weighted 1": {"class_weights": 1.0},
    "LA 1": {"logit_adjustment": 1.0},
    "CDT 0.2": {"logit_scaling": 0.2},
    "VS 1, 0.3": {"logit_adjustment": 1.0, "logit_scaling": 0.3},
    "LDAM 0.5": {"ldam_margin": 0.5},
    "smoothing 0.1": {"label_smoothing": 0.1},
}
LARGEST, CLASSES, MARGIN = 5000, 10, 8.0  # of the profiles in merging.png; MARGIN is the largest one of CE
MERGED = 1e-3  # a cosine above which two class means count as merging


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", type=int, default=25, metavar="N", help="points along each side of the phase diagram")
    grid = parser.parse_args().grid
    with style.context(STYLE_FILE):
        for name, figure in (("losses", losses()), ("merging", merging(grid))):
            path = ROOT / "docs" / "figures" / f"{name}.png"
            figure.savefig(path)
            print(path)


def losses():
    """Return the figure of margins and norms against n_k, a line for each of LOSSES."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.9))
    axes = figure.subplots(1, 2)
    for colour, marker, (label, numbers) in zip([*COLOURS, "grey"], MARKERS, LOSSES.items(), strict=True):
        optimum = solve(UFM(COUNTS, *LAMBDAS, variant=LossVariant(**numbers)))
        for axis, panel in zip(axes, THEOREM_PANELS, strict=True):
            axis.plot(COUNTS, getattr(optimum, panel.name), marker=marker, label=label, color=colour)
            axis.set(xlabel=r"training images of the class $n_k$", ylabel=panel.title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def merging(grid):
    """Return the figure of cosines between class means at imbalance 100, and of the largest cosine over TAU and R."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.3))
    axes = figure.subplots(1, 3)
    for axis, label in zip(axes, ("LA 1", "VS 1, 0.3"), strict=False):
        axis.imshow(cosines(exponential_problem(100, **LOSSES[label])), vmin=0, vmax=0.5)
        axis.set(
            title=f"{label}, imbalance 100", xlabel="class", xticks=range(0, CLASSES, 3), yticks=range(0, CLASSES, 3)
        )
        axis.grid(False)
    axes[0].set_ylabel("class")

    strengths, ratios = np.linspace(0, 2, grid), np.geomspace(1, 1000, grid)
    largest = [[cosines(exponential_problem(r, logit_adjustment=t)).max() for r in ratios] for t in strengths]
    mesh = axes[2].pcolormesh(ratios, strengths, largest, shading="gouraud", vmin=0, vmax=0.5)
    axes[2].contour(ratios, strengths, largest, [MERGED], colors="white")
    axes[2].set(
        xscale="log",
        xlabel=r"imbalance $n_{\max}/n_{\min}$",
        ylabel=r"$\tau$ of LA",
        title="largest cosine",
        box_aspect=1,
    )
    figure.colorbar(mesh, ax=axes, label=r"$\cos(h_k, h_l)$, $k \neq l$", aspect=15)
    return figure


def exponential_problem(ratio, **numbers):
    """Return the UFM of an exponential profile of imbalance `ratio`, at penalties that give CE a margin of MARGIN."""
    counts = [round(LARGEST * ratio ** (-k / (CLASSES - 1))) for k in range(CLASSES)]
    return UFM(counts, *suggest_lambdas(counts, MARGIN), variant=LossVariant(**numbers))


def cosines(problem):
    """Return the cosines between the optimum's class means (K, K), with zeros on the diagonal."""
    gram = solve(problem).HTH.numpy()
    norms = np.sqrt(gram.diagonal())
    return np.divide(gram, np.outer(norms, norms), out=np.zeros_like(gram), where=np.outer(norms, norms) > 0) * (
        1 - np.eye(len(gram))
    )


if __name__ == "__main__":
    main()
