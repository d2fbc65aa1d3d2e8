"""Draws the figures of runs from their nc_metrics.csv, geometry/, train_log.jsonl and config.json alone.

    python plot_nc.py model_weights/RUN                        (into RUN/figures/)
    python plot_nc.py model_weights/RUN ... --out figures      (overlaid; runs that differ by seed: mean and range)

nc_curves: NC1, NC2, NC3 against the epoch, or as --x says. theorem: margins and class-mean norms against n_k. heatmaps:
H^T H, W W^T and W H beside their closed forms. training: loss, accuracy, learning rate. Each as PDF and PNG at print
size; with --animate also heatmaps_animation.gif.
"""

import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from args import THEORY_SUFFIXES, Help, Parser, number
from runs import by_setting, read_run
from theory import CLOSED_FORMS, collapse_threshold, released_formula
from utils import UserError, atomic_write, run_script

TEXT_WIDTH = 6.75  # inches: the width of a two-column page
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito: safe for colour-blind readers
COLOURS, MARKERS = [BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000"], "os^Dv<>P"
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
FIGURES = ("nc_curves", "theorem", "heatmaps", "training", "heatmaps_animation")  # of one run
KINDS = ("pdf", "png", "gif")  # that a figure may have
NC_PANELS = [  # title, scale, and the columns with their labels
    ("NC1", "log", [("NC1", r"tr$(\Sigma_W\Sigma_B^\dagger)/K$")]),
    ("NC2", "log", [("NC2_H", r"$H^{\!\top}\!H$"), ("NC2_WWT", r"$WW^{\!\top}$"), ("NC2_W", r"$W$ against $H$")]),
    ("NC3", "log", [("NC3_WH", r"$WH$")]),
]
TRAINING_PANELS = [
    ("loss", "log", [("loss", "objective"), ("ce", "cross entropy"), ("mse", "MSE")]),
    ("accuracy (%)", "linear", [("train_acc1", "training"), ("test_acc1", "test")]),
    ("optimizer", "log", [("lr", "learning rate")]),
]
WIDE = 20  # largest n_k / smallest n_k above which their axis is logarithmic
ABSCISSAE = {"epoch": "epoch", "step": "optimizer step", "minutes": "minutes of training"}
CLASS_VALUES = ("margins", "mean_norms_sq")
MATRICES = {"HTH": r"$H^{\!\top}\!H$", "WWT": r"$WW^{\!\top}$", "WH": r"$WH$"}
HEATMAPS_WIDTH, COLOUR_MAP = 5.0, "RdBu_r"  # inches; white is zero
VECTOR_CLASSES = 30  # up to which heatmaps are vectors, cell by cell, in a PDF; above, an image
FRAMES, FRAME_SECONDS = 60, 0.2  # of an animation: the most, and how long each is seen


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was validated")
    parser.add_argument("--theory", choices=THEORY_SUFFIXES, default="objective", help="as validate's")
    parser.add_argument(
        "--epoch", type=number(int, 1), metavar="E", help="of theorem and heatmaps (default: the last one measured)"
    )
    parser.add_argument("--x", choices=ABSCISSAE, default="epoch", help="what nc_curves and training are drawn against")
    parser.add_argument("--animate", action="store_true", help="the heatmaps over the checkpoints (default: off)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN/figures of one run, figures of several)"
    )
    args = parser.parse_args()
    folders = {folder.resolve(): folder for folder in args.runs}.values()
    runs = [read_run(folder, args.theory) for folder in folders]
    out = args.out or (runs[0].folder if len(runs) == 1 else Path()) / "figures"
    for path in draw_runs(runs, out, args.epoch, args.x, args.animate):
        print(path)


@matplotlib.rc_context(STYLE)
def draw_runs(runs, out, epoch=None, x="epoch", animate=False):
    """Draws runs, overlaid, into the folder `out`; returns the paths written. What there is no data for is left out."""
    settings = make_settings(runs, epoch)
    measured = [setting for setting in settings if setting.epoch]
    figures = {"nc_curves": curves(NC_PANELS, settings, x)}
    if measured:
        figures["theorem"] = theorem(measured)
    for setting in measured:
        figures[f"heatmaps{setting.name}"] = heatmaps(setting.geometries[0], setting.epoch, setting.note)
    if any(run.log for run in runs):
        figures["training"] = curves(TRAINING_PANELS, settings, x)

    out.mkdir(parents=True, exist_ok=True)
    suffix, written = runs[0].suffix, []
    for name, figure in figures.items():
        for kind in ("pdf", "png"):
            written.append(out / f"{name}{suffix}.{kind}")
            with atomic_write(written[-1]) as file:
                figure.savefig(file, format=kind)
    for setting in measured if animate else []:
        written.append(out / f"heatmaps_animation{setting.name}{suffix}.gif")
        write_animation(written[-1], setting)
    return written


# ---------------------------------------------------------------------------------------------------------
# What the runs are
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """Runs that differ by their seed only, with their geometries at one epoch."""

    label: str  # how the setting differs from the others of a figure
    name: str  # the same in a file's name, "" for one setting
    runs: list
    epoch: int | None  # the one to look at; None where no epoch has a geometry in all runs
    geometries: list  # of the runs, at that epoch

    @property
    def seeds(self):
        """How many seeds, "" for one."""
        return f"{len(self.runs)} seeds" if len(self.runs) > 1 else ""

    @property
    def note(self):
        """What there is to say of a figure of the first run alone."""
        theory = self.runs[0].suffix.replace("_", "theory ")
        return listed(self.label, theory, f"seed {self.runs[0].seed}, one of {len(self.runs)}" if self.seeds else "")


def listed(*texts):
    """The texts that are not empty, with commas."""
    return ", ".join(filter(None, texts))


def make_settings(runs, epoch):
    """Runs grouped by setting; `epoch` is the one to look at, None the last that all runs of a setting have."""
    for run in runs:
        check_columns(run)
    groups, settings = by_setting(runs), []
    for position, (label, group) in enumerate(groups, 1):
        name = ""
        if len(groups) > 1:
            label = label or group[0].folder.name
            name = f"_{position}_{re.sub(r'[^A-Za-z0-9.]+', '-', label)[:60].strip('-')}"
        chosen = choose_epoch(group, epoch)
        settings.append(Setting(label, name, group, chosen, [run.geometry(chosen) for run in group if chosen]))
    return settings


def check_columns(run):
    name = f"nc_metrics{run.suffix}.csv"
    if not run.rows:
        raise UserError(f"{run.folder}: no rows in {name}; run validate_NC_unbalanced.py first")
    missing = {column for *_, columns in NC_PANELS for column, _ in columns} - set(run.rows[0])
    if missing:
        raise UserError(f"{run.folder}/{name}: no column {min(missing)}; measure again with --recompute")


def geometry_epochs(runs):
    """The epochs of which all runs have a row and a geometry, in order."""
    epochs = [{int(row["epoch"]) for row in run.rows if run.geometry_file(int(row["epoch"])).exists()} for run in runs]
    return sorted(set.intersection(*epochs))


def choose_epoch(runs, epoch):
    """`epoch`, or the last one if None, among those with a geometry; None where there are none."""
    epochs = geometry_epochs(runs)
    if epoch is None:
        return epochs[-1] if epochs else None
    if epoch not in epochs:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{folders}: no geometry of epoch {epoch}, there are {', '.join(map(str, epochs)) or 'none'}")
    return epoch


# ---------------------------------------------------------------------------------------------------------
# Against the epoch, the step, or minutes of training
# ---------------------------------------------------------------------------------------------------------


def curves(panels, settings, x="epoch"):
    """Columns of the CSV or the log against one of ABSCISSAE; over seeds mean (geometric on a log axis) and range.

    One setting: a panel for each of `panels`. Several: a panel for each column that any of them has.
    """
    several = len(settings) > 1
    if several:
        panels = [
            (f"{title}, {label}", scale, [(column, None)])
            for title, scale, columns in panels
            for column, label in columns
            if any(len(series(setting.runs, column, x)[0]) for setting in settings)
        ]
    num_rows = -(-len(panels) // 3)
    figure = Figure(figsize=(TEXT_WIDTH, 2.2 * num_rows))
    axes = figure.subplots(num_rows, 3, squeeze=False).ravel()
    for axis, (title, scale, columns) in zip(axes, panels, strict=False):
        axis.set(xlabel=ABSCISSAE[x], yscale=scale)
        axis.set_title(title, pad=6 if several else 20)
        for position, (column, label) in enumerate(columns):
            for index, setting in enumerate(settings):
                plot_series(axis, *series(setting.runs, column, x), label, style_of(index if several else position))
        if not axis.lines:
            axis.text(0.5, 0.5, "no optimum known", transform=axis.transAxes, ha="center")
        elif not several:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1)
    for axis in axes[len(panels) :]:
        axis.axis("off")

    seeds = "mean over seeds (geometric on log axes) and range"
    if several:
        handles = [Line2D([], [], **style_of(index)) for index in range(len(settings))]
        labels = [textwrap.fill(listed(setting.label, setting.seeds), 100) for setting in settings]
        title = seeds if any(setting.seeds for setting in settings) else None
        figure.set_figheight(2.2 * num_rows + 0.15 * (1 + sum(label.count("\n") + 1 for label in labels)))
        figure.legend(handles, labels, title=title, loc="outside lower center")
    elif settings[0].seeds:
        handle = Patch(color="grey", alpha=0.4, label=f"{settings[0].seeds}: {seeds}")
        figure.legend(handles=[handle], loc="outside lower center")
    return figure


def series(runs, column, x):
    """Where all runs have a value (E,), over runs the mean, and the values (S, E); the log goes before the CSV."""
    tables = []
    for run in runs:
        lines = run.log if any(column in line for line in run.log) else run.rows
        values = {int(line["epoch"]): line.get(column, np.nan) for line in lines}
        tables.append({epoch: value for epoch, value in values.items() if np.isfinite(value)})
    epochs = sorted(set.intersection(*map(set, tables)))
    values = np.array([[table[epoch] for epoch in epochs] for table in tables])
    return np.mean([abscissa(run, epochs, x) for run in runs], axis=0), values


def abscissa(run, epochs, x):
    """The ends of the epochs (E,) of a run on an axis of ABSCISSAE."""
    ends = {"epoch": np.array, "step": run.steps_until, "minutes": lambda e: run.seconds_until(e) / 60}[x](epochs)
    if np.isnan(ends).any():
        raise UserError(f"{run.folder}: no {'config.json' if x == 'step' else 'train_log.jsonl'}: --x {x} is not known")
    return ends


def plot_series(axis, ends, values, label, style):
    """A line of the mean over the seeds, values (S, E), at `ends` (E,), in a band of their range."""
    if not len(ends):
        return
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(values).mean(0)) if axis.get_yscale() == "log" else values.mean(0)
    axis.plot(ends, mean, markevery=-(-len(ends) // 8), label=label, **style)
    if len(values) > 1:
        axis.fill_between(ends, values.min(0), values.max(0), color=style["color"], alpha=0.25, linewidth=0)


def style_of(index):
    """Colour and marker of the index-th curve of a panel."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def theorem(settings):
    """Margins and squared class-mean norms against n_k: measured, over seeds the mean and range, and by the theory."""
    several = len(settings) > 1
    figure = Figure(figsize=(TEXT_WIDTH, 2.45))
    axes = figure.subplots(1, 2)
    counts = np.concatenate([setting.geometries[0]["class_counts"] for setting in settings])
    scale = "log" if max(counts) > WIDE * min(counts) else "linear"
    for axis, label in zip(axes, (r"margin $M_k$", r"class-mean norm $\|\mu_k\|^2$"), strict=True):
        axis.set(xlabel=r"training images of the class $n_k$", ylabel=label, xscale=scale)
    drawn = []
    for index, setting in enumerate(settings):
        style = style_of(index)
        drawn.append(plot_theorem(axes, setting, style, style["color"] if several else ORANGE))

    if several:
        texts = [
            textwrap.fill(listed(setting.label, f"at epoch {setting.epoch}", setting.seeds, *list(marks)[2:]), 90)
            for setting, marks in zip(settings, drawn, strict=True)
        ]
        figure.set_figheight(2.45 + 0.15 * sum(text.count("\n") + 1 for text in texts))
        figure.legend(
            [tuple(marks.values()) for marks in drawn],
            texts,
            title="measured (over seeds: mean and range), theory, collapse threshold",
            loc="outside lower center",
            handlelength=6,
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0.5)},
        )
    else:
        figure.legend(drawn[0].values(), drawn[0].keys(), ncols=3, loc="outside lower center")
    return figure


def plot_theorem(axes, setting, style, colour):
    """Draws a setting into the axes of `theorem`; returns {text: mark} of what it drew: measured, theory, collapse."""
    geometry = setting.geometries[0]
    counts = geometry["class_counts"]
    for axis, name in zip(axes, CLASS_VALUES, strict=True):
        values = np.array([geometry[name] for geometry in setting.geometries])
        spread = np.abs([values.min(0), values.max(0)] - values.mean(0)) if setting.seeds else None
        axis.errorbar(counts, values.mean(0), spread, linestyle="none", capsize=2, **style)
    seeds = f"mean and range over {setting.seeds}" if setting.seeds else ""
    drawn = {listed(f"measured at epoch {setting.epoch}", seeds): Line2D([], [], linestyle="none", **style)}
    if "margins_theory" not in geometry:
        return drawn

    threshold = collapse_count(setting.runs[0], counts)
    near = threshold is not None and min(counts) / 10 < threshold < 2 * max(counts)
    sizes, theory = theory_curve(setting, [*counts, threshold] if near else counts)
    for axis, name in zip(axes, CLASS_VALUES, strict=True):
        axis.plot(sizes, theory[name], color=colour)
        if near:
            axis.axvline(threshold, color=colour, linestyle=":")
    drawn["theory" + setting.runs[0].suffix.replace("_", ", ")] = Line2D([], [], color=colour)
    if threshold is not None:
        largest = np.format_float_positional(threshold, precision=3, fractional=False, trim="-")
        drawn[rf"collapse: $n_k\leq{largest}$"] = Line2D([], [], color=colour, linestyle=":" if near else "none")
    return drawn


def theory_curve(setting, span):
    """Sizes n (P,) of a class, over those in `span` and a little more, and the theory's {margins, mean_norms_sq} (P,).

    A closed form's values of a class depend on the other classes by K and N alone: they are evaluated for any n, at
    the setting's K and N. Where there is no closed form, as with a bias, those of the classes themselves.
    """
    geometry, form = setting.geometries[0], closed_form(setting.runs[0])
    counts = geometry["class_counts"]
    if form is None:
        order = np.argsort(counts, kind="stable")
        return counts[order], {name: geometry[f"{name}_theory"][order] for name in CLASS_VALUES}
    total, others = counts.sum(), len(counts) - 1
    sizes = np.geomspace(max(1, 0.9 * min(span)), min(1.05 * max(span), total - others), 100)
    optima = [form([size, *[(total - size) / others] * others]) for size in sizes]
    return sizes, {name: np.array([getattr(optimum, name)[0] for optimum in optima]) for name in CLASS_VALUES}


def penalties(run):
    """(lambda_W, lambda_H) of the closed form that the run is compared with, or None where there is none."""
    if not run.config or (run.setting["bias"] and not run.suffix):
        return None
    if run.suffix:
        decays = run.setting["weight_decay"], run.setting["feature_decay_rate"]
    else:
        decays = run.config.get("effective_weight_decay"), run.config.get("effective_feature_decay")
    return decays if all(decays) else None


def closed_form(run):
    """class counts -> Optimum, as the run's theory columns were computed; None where they are not of a closed form."""
    decays = penalties(run)
    if decays is None:
        return None
    formula = released_formula if run.suffix == THEORY_SUFFIXES["released"] else CLOSED_FORMS[run.setting["loss"]]
    return lambda counts: formula(counts, *decays)


def collapse_count(run, counts):
    """The n_k up to which the class means collapse to zero, or None where no closed form says it."""
    decays = penalties(run)
    if decays is None or run.suffix == THEORY_SUFFIXES["released"]:
        return None
    return min(counts) * decays[0] * decays[1] / collapse_threshold(counts, run.setting["loss"])


# ---------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def heatmaps(geometry, epoch, note="", limits=None):
    """H^T H, W W^T and W H, each divided by its Frobenius norm, beside the theory's, and the differences.

    geometry: HTH, WWT, WH (K, K) and, where there is a theory, the same with suffix _theory. The norm of a
    difference is the distance NC2_H, NC2_WWT or NC3_WH. note: for the title. limits: largest absolute values of
    the two colour scales, of the matrices and of the differences; by default those that occur.
    """
    rows = heatmap_rows(geometry)
    limits = limits or heatmap_limits(rows)
    figure = Figure(figsize=(HEATMAPS_WIDTH, 0.9 + 1.35 * len(rows)))
    figure.suptitle("\n".join([*textwrap.wrap(listed(f"epoch {epoch}", note), 80), "matrices / their Frobenius norms"]))
    axes = figure.subplots(len(rows), 3, squeeze=False, sharex=True, sharey=True)
    for position, (title, matrices) in enumerate(rows.items()):
        difference = title == "difference"
        for axis, matrix in zip(axes[position], matrices, strict=True):
            edges = np.arange(len(matrix) + 1) - 0.5
            scale = {"cmap": COLOUR_MAP, "vmin": -limits[difference], "vmax": limits[difference]}
            mesh = axis.pcolormesh(edges, edges, matrix, rasterized=len(matrix) > VECTOR_CLASSES, **scale)
            if difference:
                axis.set_title(f"distance {np.linalg.norm(matrix):.1e}")
        axes[position, 0].set_ylabel(f"{title}\nclass")
        if difference or position == 0:
            figure.colorbar(mesh, ax=axes[position] if difference else axes[:2], aspect=12 if difference else 25)
    for axis in axes.flat:
        axis.set(aspect="equal")
        axis.grid(False)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0, 0].invert_yaxis()
    for top, bottom, symbol in zip(axes[0], axes[-1], MATRICES.values(), strict=True):
        top.set_title(symbol)
        bottom.set_xlabel("class")
    return figure


def heatmap_rows(geometry):
    """{row: its three matrices}, divided by their norms; a matrix of zeros stays as it is."""
    rows = {}
    for title, suffix in (("measured", ""), ("theory", "_theory")):
        if f"HTH{suffix}" in geometry:
            matrices = [geometry[name + suffix] for name in MATRICES]
            rows[title] = [matrix / (np.linalg.norm(matrix) or 1) for matrix in matrices]
    if "theory" in rows:
        rows["difference"] = [a - b for a, b in zip(*rows.values(), strict=True)]
    return rows


def heatmap_limits(rows):
    """The largest absolute values of the matrices, and of the differences."""
    largest = {title: np.abs(matrices).max() for title, matrices in rows.items()}
    return max(largest["measured"], largest.get("theory", 0)) or 1, largest.get("difference", 0) or 1


def write_animation(path, setting):
    """The heatmaps of a setting's first run over its checkpoints, as a GIF on colour scales that stay."""
    run = setting.runs[0]
    epochs = geometry_epochs([run])
    epochs = [epochs[i] for i in np.unique(np.linspace(0, len(epochs) - 1, FRAMES).round().astype(int))]
    geometries = [run.geometry(epoch) for epoch in epochs]
    limits = np.max([heatmap_limits(heatmap_rows(geometry)) for geometry in geometries], axis=0)
    palette, frames = gif_palette(), []
    for epoch, geometry in zip(epochs, geometries, strict=True):
        buffer = io.BytesIO()
        heatmaps(geometry, epoch, setting.note, tuple(limits)).savefig(buffer, format="png", dpi=110)
        frames.append(Image.open(buffer).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE))
    with atomic_write(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_SECONDS * 1000, loop=0)


def gif_palette():
    """An image whose palette has the heatmaps' colours, and greys for text."""
    colours = np.vstack([colormaps[COLOUR_MAP](np.linspace(0, 1, 224)), colormaps["gray"](np.linspace(0, 1, 32))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colours[:, :3]).round().astype(np.uint8).tobytes())
    return palette


if __name__ == "__main__":
    run_script(main)
