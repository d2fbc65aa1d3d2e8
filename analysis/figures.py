"""Draw figures of runs from the files in their folders: rows, geometry, log and config.

nc_curves           NC1, NC2 and NC3 against the epoch, the optimizer step, or minutes of training
training            loss, accuracy, learning rate and optimality gap against the same x axis
theorem             margins and class-mean norms against n_k, with the curve of the theorem
class_accuracy      test accuracy of each class against n_k
heatmaps            H^T H, W W^T and W H, measured and of the theorem, and their differences
heatmaps_animation  heatmaps, one frame per checkpoint
"""

import tempfile
import textwrap
from itertools import chain
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.settings import ABSCISSAE, geometry_epochs, listed, make_settings, thinned
from analysis.style import COLOURS, STYLE_FILE, TEXT_WIDTH, style_of
from engine.run import note_drawn
from nc_theory import class_curve, collapse_count
from utils import atomic_write

DISTANCE = "distance to the theorem"
NC_PANELS = [  # title, y axis, scale, and the columns with their labels
    ("NC1", "variability within classes", "log", {"NC1": r"tr$(\Sigma_W\Sigma_B^\dagger)/K$"}),
    ("NC2", DISTANCE, "log", {"NC2_H": r"$H^{\!\top}\!H$", "NC2_WWT": r"$WW^{\!\top}$", "NC2_W": r"$W$ against $H$"}),
    ("NC3", DISTANCE, "log", {"NC3_WH": r"$WH$"}),
]
TRAINING_PANELS = [
    ("loss", "", "log", {"loss": "objective", "ce": "cross entropy", "mse": "MSE"}),
    ("accuracy", "%", "linear", {"train_acc1": "training", "test_acc1": "test"}),
    ("optimizer", "", "log", {"lr": "learning rate"}),
    (
        "optimality gap",
        "relative",
        "log",
        {"gap_within": "within classes", "gap_head": "head", "gap_means": "class means"},
    ),
]
CLASS_VALUES = {"margins": r"margin $M_k$", "mean_norms_sq": r"class-mean norm $\|\mu_k\|^2$"}
MATRICES = {"HTH": r"$H^{\!\top}\!H$", "WWT": r"$WW^{\!\top}$", "WH": r"$WH$"}
WIDE = 20  # n_max / n_min above which an axis of n_k is logarithmic
VECTOR_CLASSES = 30  # number of classes above which a PDF holds heatmaps as bitmaps instead of vector graphics
FRAMES, FRAMES_PER_SECOND = 60, 5  # largest number of frames of an animation, and their rate


@matplotlib.style.context(STYLE_FILE)
def draw_runs(runs, out, epoch=None, x="epoch", animate=False):
    """Draw the figures of runs, overlaid, into the folder `out` as PDF and PNG, and return the paths of the files.

    Runs that differ only in their seed are drawn as mean and range. Figures for which there are no data are left out.

    epoch: the epoch that theorem, class_accuracy and heatmaps show; default: the last one measured. x: a key of
    ABSCISSAE. animate: also write heatmaps_animation. Raises UserError if a run has no rows or no geometry at `epoch`.
    """
    settings = make_settings(runs, epoch)
    measured = [setting for setting in settings if setting.epoch]
    with_accuracy = [setting for setting in measured if setting.test_accuracy is not None]
    figures = {"nc_curves": curves(NC_PANELS, settings, x)}
    if measured:
        figures["theorem"] = theorem(measured)
    if with_accuracy:
        figures["class_accuracy"] = class_accuracy(with_accuracy)
    for setting in measured:
        figures[f"heatmaps{setting.name}"] = heatmaps(setting.geometries[0], setting.epoch, setting.note)
    if not all(run.log.empty for run in runs):
        figures["training"] = curves(TRAINING_PANELS, settings, x)

    out.mkdir(parents=True, exist_ok=True)
    suffix, written = runs[0].suffix, []
    for name, figure in figures.items():
        if runs[0].caption and not name.startswith("heatmaps"):  # heatmaps have it in their titles
            figure.suptitle(runs[0].caption)
        for kind in ("pdf", "png"):
            written.append(out / f"{name}{suffix}.{kind}")
            with atomic_write(written[-1]) as file:
                figure.savefig(file, format=kind)
    for setting in measured if animate else []:
        written.append(out / f"heatmaps_animation{setting.name}{suffix}.gif")
        write_animation(written[-1], setting)
    note_drawn(out, [path.name for path in written])
    return written


# ---------------------------------------------------------------------------------------------------------
# Against the epoch, the step, or minutes of training
# ---------------------------------------------------------------------------------------------------------


def curves(panels, settings, x="epoch"):
    """Draw columns of the rows or the log against `x`: mean (geometric on a log axis) and range over the seeds.

    For a single setting there is one axis per panel with data, which shows all columns of the panel; for several
    settings there is one axis per column with data.
    """
    several, run = len(settings) > 1, settings[0].runs[0]
    if not several:
        panels = [panel for panel in panels if not panel[3].keys().isdisjoint([*run.rows, *run.log])]
    if several:
        panels = [
            (f"{title}, {label}", ylabel, scale, {column: None})
            for title, ylabel, scale, columns in panels
            for column, label in columns.items()
            if any(len(setting.series(column, x)[0]) for setting in settings)
        ]
    num_columns = 2 if len(panels) == 4 else 3
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(TEXT_WIDTH, 2.2 * num_rows))
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, (title, ylabel, scale, columns) in zip(axes, panels, strict=False):
        axis.set(title=title, xlabel=ABSCISSAE[x], ylabel=ylabel, yscale=scale)
        axis.xaxis.set_major_locator(MaxNLocator(4))  # step numbers are wide
        for position, (column, label) in enumerate(columns.items()):
            for setting in settings:
                plot_series(
                    axis, *setting.series(column, x), label, style_of(setting.index) if several else style_of(position)
                )
        for setting in settings if "loss" in columns else []:
            if setting.least_loss is not None:
                label = f"optimum, {setting.least_loss:.4g}"
                axis.axhline(setting.least_loss, color=style_of(setting.index)["color"], linestyle="--", label=label)
        if not axis.lines:
            axis.text(0.5, 0.5, "no optimum known", transform=axis.transAxes, ha="center")
        elif not several:
            axis.legend()
    for axis in axes[len(panels) :]:
        axis.axis("off")

    spread = "mean over seeds (geometric on log axes) and range"
    if several:
        seeds, with_loss = [setting.seeds for setting in settings], any("loss" in columns for *_, columns in panels)
        least = [setting.least_loss if with_loss else None for setting in settings]
        optima = [f"dashed: optimum {loss:.4g}" if loss is not None else "" for loss in least]
        shared, labels = in_common(settings, seeds, optima)
        handles = [Line2D([], [], **style_of(setting.index)) for setting in settings]
        legend_below(figure, handles, labels, listed(spread if any(seeds) else "", shared))
    elif settings[0].seeds:
        figure.legend([Patch(color="grey", alpha=0.4)], [f"{settings[0].seeds}: {spread}"], loc="outside lower center")
    return figure


def plot_series(axis, ends, values, label, style):
    """Plot the mean over the seeds of values (E, S) against `ends` (E,), with a band for their range."""
    if not len(ends):
        return
    mean = mean_over_seeds(values, axis.get_yscale())
    axis.plot(ends, mean, markevery=-(-len(ends) // 8), label=label, **style)
    if values.shape[1] > 1:
        axis.fill_between(ends, values.min(1), values.max(1), color=style["color"], alpha=0.25, linewidth=0)


def mean_over_seeds(values, scale):
    """Return the mean (E,) of values (E, S), the geometric mean if the scale of the axis is "log"."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(values).mean(1)) if scale == "log" else values.mean(1)


def in_common(settings, *columns):
    """Return what columns of texts, one per setting, have in common, and each setting's label with its other texts."""
    shared = [texts[0] for texts in columns if len(set(texts)) == 1]
    others = [texts for texts in columns if len(set(texts)) > 1]
    labels = [setting.label for setting in settings]
    return listed(*shared), [listed(*texts) for texts in zip(labels, *others, strict=True)]


def legend_below(figure, handles, labels, title, **options):
    """Add a legend below a figure, with a row for each handle, and make the figure taller by its height."""
    labels = [textwrap.fill(label, 115) for label in labels]
    figure.set_figheight(figure.get_figheight() + 0.15 * (1 + sum(label.count("\n") + 1 for label in labels)))
    figure.legend(handles, labels, title=title, loc="outside lower center", **options)


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def theorem(settings):
    """Draw margins and squared class-mean norms against n_k: mean and range over the seeds, and the theory."""
    several = len(settings) > 1
    figure = Figure(figsize=(TEXT_WIDTH, 2.45))
    axes = figure.subplots(1, 2)
    for axis, label in zip(axes, CLASS_VALUES.values(), strict=True):
        set_count_axis(axis, settings, label)
    drawn = []
    for setting in settings:  # hollow markers: points that coincide stay visible
        style = style_of(setting.index) | {"markerfacecolor": "none"} if several else style_of(setting.index)
        drawn.append(plot_theorem(axes, setting, style, style["color"] if several else COLOURS[1]))
    if several:
        shared, labels = in_common(settings, *measured_texts(settings))
        labels = [listed(label, *list(marks)[2:]) for label, marks in zip(labels, drawn, strict=True)]
        options = {"handlelength": 6, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.5)}}
        title = f"{shared or 'measured'}; theory; collapse threshold"
        legend_below(figure, [tuple(marks.values()) for marks in drawn], labels, title, **options)
    else:
        figure.legend(drawn[0].values(), drawn[0].keys(), ncols=3, loc="outside lower center")
    return figure


def plot_theorem(axes, setting, style, colour):
    """Plot a setting into the axes of `theorem`, and return its legend {text: handle}."""
    geometry, counts, run = setting.geometries[0], setting.class_counts, setting.runs[0]
    for axis, name in zip(axes, CLASS_VALUES, strict=True):
        plot_classes(axis, counts, np.array([geometry[name] for geometry in setting.geometries]), style)
    drawn = {listed(*chain(*measured_texts([setting]))): Line2D([], [], linestyle="none", **style)}
    if "margins_theory" not in geometry:
        return drawn

    problem = run.comparison.problem
    threshold = collapse_count(problem) if problem and run.theory != "released" else None
    near = threshold is not None and min(counts) / 10 < threshold < 2 * max(counts)
    sizes, theory, line = theory_values(setting, [*counts, threshold] if near else counts)
    for axis, values in zip(axes, theory, strict=True):
        axis.plot(sizes, values, color=colour, **line)
        if near:
            axis.axvline(threshold, color=colour, linestyle=":")
    drawn["theory"] = Line2D([], [], color=colour, **line)
    if threshold is not None:
        largest = np.format_float_positional(threshold, precision=3, fractional=False, trim="-")
        drawn[rf"collapse: $n_k\leq{largest}$"] = Line2D([], [], color=colour, linestyle=":" if near else "none")
    return drawn


def theory_values(setting, span):
    """Return class sizes n (P,), the theory's margins and squared norms (2, P) at these sizes, and plot options.

    A closed form gives a curve over the class sizes in `span`, because a class depends on the others only through K
    and N. Without a closed form, for example with a bias, the theory is known only at the n_k and is drawn as points.
    """
    geometry, counts, run = setting.geometries[0], setting.class_counts, setting.runs[0]
    sizes = np.geomspace(max(1, 0.9 * min(span)), min(1.05 * max(span), counts.sum()), 100)
    formula, problem = "released" if run.theory == "released" else "exact", run.comparison.problem
    curve = class_curve(problem, sizes, formula) if problem else None
    if curve is not None:
        return sizes, curve, {}
    points = {"linestyle": "none", "marker": "_", "markersize": 10, "zorder": 1}
    return counts, [geometry[f"{name}_theory"] for name in CLASS_VALUES], points


def class_accuracy(settings):
    """Draw each class's test accuracy against n_k: mean and range over seeds, and a line through means at equal n_k."""
    figure = Figure(figsize=(TEXT_WIDTH if len(settings) > 1 else TEXT_WIDTH / 2, 2.45))
    axis = figure.subplots()
    set_count_axis(axis, settings, "test accuracy of the class (%)")
    for setting in settings:
        values = setting.test_accuracy
        plot_classes(axis, setting.class_counts, values, style_of(setting.index))
        means = pd.Series(values.mean(0)).groupby(setting.class_counts).mean()
        axis.plot(means.index, means, color=style_of(setting.index)["color"], alpha=0.5)
    shared, labels = in_common(settings, *measured_texts(settings))
    handles, line = [Line2D([], [], **style_of(setting.index)) for setting in settings], "line: mean at equal $n_k$"
    legend_below(figure, handles, [label or line for label in labels], listed(shared, line if labels[0] else ""))
    return figure


def set_count_axis(axis, settings, label):
    axis.set(xlabel=r"training images of the class $n_k$", ylabel=label, xscale=count_scale(settings))


def count_scale(settings):
    """Return the scale of an axis of n_k: "log" if n_max / n_min is above WIDE, else "linear"."""
    counts = np.concatenate([setting.class_counts for setting in settings])
    return "log" if max(counts) > WIDE * min(counts) else "linear"


def plot_classes(axis, counts, values, style):
    """Plot values (S, K) of S seeds against the class counts (K,): the mean, with bars from least to largest."""
    mean = values.mean(0)
    spread = np.abs([values.min(0) - mean, values.max(0) - mean]) if len(values) > 1 else None  # abs: rounding errors
    axis.errorbar(counts, mean, spread, linestyle="none", **style)


def measured_texts(settings):
    """Return two lists of legend texts for measured points, epochs and seeds, with one text per setting."""
    return (
        [f"measured at epoch {setting.epoch}" for setting in settings],
        [f"mean and range over {setting.seeds}" if setting.seeds else "" for setting in settings],
    )


# ---------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------


@matplotlib.style.context(STYLE_FILE)
def heatmaps(geometry, epoch, note="", limits=None):
    """Draw H^T H, W W^T and W H, measured and of the theory, each divided by its Frobenius norm, and the differences.

    The Frobenius norms of the differences are the distances NC2_H, NC2_WWT and NC3_WH.

    geometry: HTH, WWT, WH (K, K) and, if there is a theory, the same with suffix _theory. note: text for the title.
    limits: the largest absolute values on the two colour scales, of the matrices and of the differences; default: the
    largest values that occur.
    """
    figure = Figure(figsize=(5.0, 0.9 + 1.35 * len(heatmap_rows(geometry))))
    draw_heatmaps(figure, geometry, epoch, note, limits)
    return figure


def draw_heatmaps(figure, geometry, epoch, note, limits):
    rows = heatmap_rows(geometry)
    limits = limits or heatmap_limits(rows)
    figure.suptitle("\n".join([*textwrap.wrap(listed(f"epoch {epoch}", note), 80), "matrices / their Frobenius norms"]))
    axes = figure.subplots(len(rows), 3, squeeze=False, sharex=True, sharey=True)
    for position, (title, matrices) in enumerate(rows.items()):
        difference = title == "difference"
        for axis, matrix in zip(axes[position], matrices, strict=True):
            edges = np.arange(len(matrix) + 1) - 0.5
            scale = {"cmap": "RdBu_r", "vmin": -limits[difference], "vmax": limits[difference]}  # white is zero
            if len(matrix) <= VECTOR_CLASSES:
                mesh = axis.pcolormesh(edges, edges, matrix, **scale)
            else:
                mesh = axis.imshow(matrix, origin="lower", extent=2 * (edges[0], edges[-1]), **scale)
            if difference:
                axis.set_title(f"distance {np.linalg.norm(matrix):.1e}")
        axes[position, 0].set_ylabel(f"{title}\nclass")
        if difference or position == 0:
            figure.colorbar(mesh, ax=axes[position] if difference else axes[:2], aspect=12 if difference else 25)
    for axis in axes.flat:
        axis.set(aspect="equal")
        axis.grid(False)
        axis.xaxis.set_major_locator(MaxNLocator(5 if axis.get_xlim()[1] < 500 else 2, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0, 0].invert_yaxis()
    for top, bottom, symbol in zip(axes[0], axes[-1], MATRICES.values(), strict=True):
        top.set_title(symbol)
        bottom.set_xlabel("class")


def heatmap_rows(geometry):
    """Return {title of a row: its three matrices, divided by their Frobenius norms}; a zero matrix stays zero."""
    rows = {}
    for title, suffix in (("measured", ""), ("theory", "_theory")):
        if f"HTH{suffix}" in geometry:
            matrices = [geometry[name + suffix] for name in MATRICES]
            rows[title] = [matrix / (np.linalg.norm(matrix) or 1) for matrix in matrices]
    if "theory" in rows:
        rows["difference"] = [a - b for a, b in zip(*rows.values(), strict=True)]
    return rows


def heatmap_limits(rows):
    """Return the largest absolute values of the matrices and of the differences."""
    largest = {title: np.abs(matrices).max() for title, matrices in rows.items()}
    return max(largest["measured"], largest.get("theory", 0)) or 1, largest.get("difference", 0) or 1


def write_animation(path, setting):
    """Write the heatmaps of a setting's first run as a GIF over its measured epochs, with fixed colour scales."""
    run = setting.runs[0]
    epochs = geometry_epochs([run])
    epochs = thinned(epochs, FRAMES)
    limits = tuple(np.max([heatmap_limits(heatmap_rows(run.geometry(epoch))) for epoch in epochs], axis=0))
    figure = heatmaps(run.geometry(epochs[0]), epochs[0], setting.note, limits)

    def show(epoch):
        figure.clear()
        draw_heatmaps(figure, run.geometry(epoch), epoch, setting.note, limits)

    animation = FuncAnimation(figure, show, epochs, init_func=lambda: None)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        whole = Path(folder) / "whole.gif"
        animation.save(whole, writer="pillow", fps=FRAMES_PER_SECOND, dpi=110)
        file.write(whole.read_bytes())
