"""Draws the figures of runs from their nc_metrics.csv and geometry/ alone.

    python plot_nc.py model_weights/RUN [RUN ...]

Writes figures/nc_curves and figures/theorem, each as PDF and PNG, into every run's folder.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from args import THEORY_SUFFIXES, Help, Parser
from utils import UserError, read_csv, run_script

TEXT_WIDTH = 6.75  # inches: the width of a two-column page
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito: safe for colour-blind readers
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
FIGURES, KINDS = ("nc_curves", "theorem"), ("pdf", "png")
CURVES = [  # a panel each: title, and its columns with label, colour and marker
    ("NC1", [("NC1", r"tr$(\Sigma_W\Sigma_B^\dagger)/K$", BLUE, "o")]),
    (
        "NC2",
        [
            ("NC2_H", r"$H^\top H$", BLUE, "o"),
            ("NC2_WWT", r"$WW^\top$", ORANGE, "s"),
            ("NC2_W", r"$W$ against $H$", GREEN, "^"),
        ],
    ),
    ("NC3", [("NC3_WH", r"$WH$", BLUE, "o")]),
]


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was validated")
    parser.add_argument("--theory", choices=THEORY_SUFFIXES, default="objective", help="as validate's")
    args = parser.parse_args()
    for folder in args.runs:
        for path in draw(folder, THEORY_SUFFIXES[args.theory]):
            print(path)


@matplotlib.rc_context(STYLE)
def draw(folder, suffix=""):
    """Draws a run's figures; `suffix` is that of its CSV: "", "_nominal" or "_released". Returns their paths."""
    folder = Path(folder)
    rows = read_csv(folder / f"nc_metrics{suffix}.csv")
    if not rows:
        raise UserError(f"{folder}: no rows in nc_metrics{suffix}.csv; run validate_NC_unbalanced.py first")
    missing = {column for _, columns in CURVES for column, *_ in columns} - set(rows[0])
    if missing:
        raise UserError(f"{folder}/nc_metrics{suffix}.csv: no column {min(missing)}; measure again with --recompute")
    figures = {"nc_curves": nc_curves(rows)}
    geometry_file = folder / f"geometry{suffix}" / f"epoch_{int(rows[-1]['epoch']):03d}.npz"
    if geometry_file.exists():
        with np.load(geometry_file) as stored:
            geometry = dict(stored)
        if "margins_theory" in geometry:
            figures["theorem"] = theorem(geometry, int(rows[-1]["epoch"]))
    written = []
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        for kind in KINDS:
            written.append(folder / "figures" / f"{name}{suffix}.{kind}")
            figure.savefig(written[-1])
    return written


def nc_curves(rows):
    """NC1, NC2 and NC3 against the epoch, a panel each; columns without a value are left out."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.0))
    axes = figure.subplots(1, len(CURVES))
    epochs = [row["epoch"] for row in rows]
    for axis, (title, columns) in zip(axes, CURVES, strict=True):
        for column, label, colour, marker in columns:
            values = np.array([row[column] for row in rows])
            if np.isfinite(values).any():
                axis.plot(epochs, values, color=colour, marker=marker, markersize=2.5, markevery=0.12, label=label)
        axis.set(title=title, xlabel="epoch", yscale="log")
        if axis.lines:
            axis.legend(frameon=False, loc="upper right", handlelength=1.5, labelspacing=0.2)
        else:
            axis.text(0.5, 0.5, "no optimum known", transform=axis.transAxes, ha="center")
    return figure


def theorem(geometry, epoch):
    """Margins and squared class-mean norms against n_k: measured, and by the theorem."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.2))
    axes = figure.subplots(1, 2)
    counts = geometry["class_counts"]
    order = np.argsort(counts, kind="stable")
    panels = (("margins", r"margin $M_k$"), ("mean_norms_sq", r"class-mean norm $\|\mu_k\|^2$"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        axis.plot(counts[order], geometry[f"{name}_theory"][order], color=ORANGE, label="theorem")
        axis.plot(counts, geometry[name], "o", color=BLUE, markersize=4, label=f"measured, epoch {epoch}")
        axis.set(xlabel=r"training images of the class $n_k$", ylabel=label)
        axis.legend(frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def heatmaps(geometry, epoch):
    """H^T H, W W^T and W H, measured above the theorem's where it is known, on one colour scale."""
    rows = [suffix for suffix in ("", "_theory") if f"HTH{suffix}" in geometry]
    figure = Figure(figsize=(TEXT_WIDTH, 2.2 * len(rows)))
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for column, (name, title) in enumerate([("HTH", r"$H^\top H$"), ("WWT", r"$WW^\top$"), ("WH", r"$WH$")]):
        limit = max(np.abs(geometry[name + suffix]).max() for suffix in rows)
        for axis, suffix in zip(axes[:, column], rows, strict=True):
            image = axis.imshow(geometry[name + suffix], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(title=f"{title}, theorem" if suffix else f"{title}, epoch {epoch}")
            axis.grid(False)
        figure.colorbar(image, ax=axes[:, column], shrink=0.6)
    return figure


if __name__ == "__main__":
    run_script(main)
