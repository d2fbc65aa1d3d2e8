"""Draw figures of runs, with the values of `analysis.panels`, which come from the files in the runs' folders.

docs/results.md says what each figure shows. A figure added to FIGURES is drawn by all scripts.
"""

import textwrap
from io import BytesIO
from itertools import chain

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation
from PIL import Image

from analysis.panels import (
    ACCURACY_PANELS,
    FRAMES,
    LAYER_PANELS,
    MATRICES,
    NC_PANELS,
    THEOREM_PANELS,
    Matrices,
    class_panels,
    collapse_threshold,
    count_ticks,
    curve_panels,
    means_at_equal_counts,
    training_panels,
)
from analysis.settings import geometry_epochs, listed, make_settings, thinned
from analysis.style import COLOURS, MARKERS, STYLE_FILE, TEXT_WIDTH, line_style_of, style_of
from engine.run import note_drawn
from utils import atomic_write, shortened

FIGURES = {  # name: the figure of settings against x, or None if there are no data for it
    "nc_curves": lambda settings, x: curves(NC_PANELS, settings, x),
    "theorem": lambda settings, x: theorem(settings),
    "class_accuracy": lambda settings, x: class_accuracy(settings),
    "training": lambda settings, x: training(settings, x),
    "layers": lambda settings, x: layers(settings),
}
VECTOR_CLASSES = 30  # number of classes above which a PDF holds heatmaps as bitmaps instead of vector graphics
NAMED_CLASSES = 12  # largest number of classes whose names are written beside axes and points
ONE_ROW = 75  # characters of a legend's entries that fit in one row
LEGEND_BELOW = 30  # points between an axis and its legend, for ticks and a label
NAME_PLACES = [(3 * dx * far, 2 * dy * far) for far in (1, 3, 6, 9) for dx in (1, -1) for dy in (1, -1)]
NAME_PLACES += [(4, 0), (-4, 0), (0, 4), (0, -4)]  # points from a class to its name, the preferred places first
MARKED = 9  # largest number of points of a curve that have a marker
FRAMES_PER_SECOND = 5  # of an animation


@matplotlib.style.context(STYLE_FILE)
def draw_runs(runs, out, epoch=None, x="epoch", animate=False):
    """Draw the figures of runs, overlaid, into the folder `out` as PDF and PNG, and return the paths of the files.

    Runs that differ only in their seed are drawn as mean and range. Figures for which there are no data are left out.

    epoch: the epoch that theorem, class_accuracy and heatmaps show; default: the last one measured. x: a key of
    ABSCISSAE. animate: also write heatmaps_animation, a frame per checkpoint. Raises UserError if a run has no rows or
    no geometry at `epoch`.
    """
    settings = make_settings(runs, epoch)
    measured = [setting for setting in settings if setting.epoch]
    figures = {name: figure for name, draw in FIGURES.items() if (figure := draw(settings, x))}
    for figure in figures.values() if runs[0].caption else []:
        figure.suptitle(runs[0].caption)
    for setting in measured:  # these have the caption in their titles
        names = setting.class_names
        figures[f"heatmaps{setting.name}"] = heatmaps(setting.geometries[0], setting.epoch, setting.note, names=names)

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
    note_drawn(out, [path.name for path in written])
    return written


# ---------------------------------------------------------------------------------------------------------
# Against the epoch, the step, or minutes of training
# ---------------------------------------------------------------------------------------------------------


def curves(panels, settings, x="epoch"):
    """Return the figure of panels against `x`: means over the seeds and their ranges.

    For a single setting there is an axis for each panel, which shows all its columns; for several settings there is
    one for each column.
    """
    several = len(settings) > 1
    panels = curve_panels(panels, settings, x, split=several)
    num_columns = 2 if len(panels) == 4 else 3
    num_rows = -(-len(panels) // num_columns)
    entries = 0 if several else max(len(panel.series) + any(s.theory for s in panel.series) for panel in panels)
    legend_columns = 2 if num_columns == 2 else 1
    figure = Figure(figsize=(TEXT_WIDTH, (2.2 + 0.18 * -(-entries // legend_columns)) * num_rows))
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        draw_curves(axis, panel, several, legend_columns)
    for axis in axes[len(panels) :]:
        axis.axis("off")

    spread, seeds = "mean over seeds (geometric on log axes) and range", [setting.seeds for setting in settings]
    if several:
        least = {
            series.setting.index: series.setting.least_loss for p in panels for series in p.series if series.theory
        }
        optima = [f"dashed: optimum {least[s.index]:.4g}" if s.index in least else "" for s in settings]
        shared, labels = in_common(settings, seeds, optima)
        legend_below(figure, handles_of(settings), labels, listed(spread if any(seeds) else "", shared))
    elif seeds[0]:
        figure.legend([Patch(color="grey", alpha=0.4)], [f"{seeds[0]}: {spread}"], loc="outside lower center")
    return figure


def training(settings, x):
    """Return the figure of TRAINING_PANELS, or None if no run has a log."""
    has_log = any(len(run.log) for setting in settings for run in setting.runs)
    return curves(training_panels(settings), settings, x) if has_log else None


def layers(settings):
    """Return the figure of LAYER_PANELS against the epoch, of the first run of each setting; None without --nc_layers.

    It has a row of panels for each setting.
    """
    rows = [(setting, table) for setting in settings if len(table := setting.runs[0].layers)]
    if not rows:
        return None
    figure = Figure(figsize=(TEXT_WIDTH, 2.4 if len(rows) == 1 else 1.9 * len(rows)))
    axes = figure.subplots(len(rows), len(LAYER_PANELS), squeeze=False)
    names = list(dict.fromkeys(name for _, table in rows for name in table["layer"]))
    for of_setting, (setting, table) in zip(axes, rows, strict=True):
        draw_layers(of_setting, table, names)
        of_setting[0].set_ylabel(textwrap.fill(plain(setting.note), 26))
    add_layer_legend(figure)
    return figure


def draw_layers(axes, table, names=None):
    """Draw LAYER_PANELS of a table of layers against depth, or, if it has several epochs, against the epoch.

    Against the epoch there is a colour for each layer, by its position in `names`, and a marker for each split.
    names: of layers; default: those of the table.
    """
    names = names or table["layer"].unique().tolist()
    x, columns = ("epoch", ["layer", "split"]) if "epoch" in table else ("layer", ["split"])
    splits = table["split"].unique().tolist()
    for axis, (column, (title, scale)) in zip(axes, LAYER_PANELS.items(), strict=True):
        for key, rows in table.groupby(columns, sort=False):
            split = splits.index(key[-1])
            style = line_style_of(names.index(key[0]) if x == "epoch" else split) | {"marker": MARKERS[split]}
            axis.plot(rows[x], rows[column], label=plain(", ".join(key)), **style)
        axis.set(yscale=scale, title=title, xlabel="epoch" if x == "epoch" else "")
        if x == "layer":
            axis.set_xticks(
                range(table[x].nunique()), labels=table[x].unique(), rotation=45, ha="right", rotation_mode="anchor"
            )
        if scale == "log":
            show_two_powers(axis)


def add_layer_legend(figure):
    """Add one legend for all axes of `draw_layers` below a figure, because curves may be anywhere in the axes."""
    handles = {}
    for axis in figure.axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    columns = min(len(handles), 3)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(handles) // columns))
    figure.legend(handles.values(), handles.keys(), ncols=columns, loc="outside lower center")


def draw_curves(axis, panel, several, legend_columns=1):
    """Draw a panel of curves: colours and markers tell the settings apart if there are several, else the columns."""
    set_axis(axis, panel, panel.ylabel, title=panel.title)
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))  # step numbers are wide
    for position, series in enumerate(panel.series):
        if len(series.x):
            style = line_style_of(series.setting.index) if several else style_of(position)
            marked = thinned(range(len(series.x)), MARKED)  # also the last point
            axis.plot(series.x, series.mean, markevery=marked, label=series.label, **style)
            if series.setting.seeds:
                axis.fill_between(series.x, series.low, series.high, color=style["color"], alpha=0.25, linewidth=0)
    for series in panel.series:
        if series.theory:
            line = {"color": style_of(series.setting.index)["color"] if several else COLOURS[-1], "linestyle": "--"}
            label = f"optimum, {series.setting.least_loss:.4g}"
            axis.plot(series.theory.x, series.theory.y, label=label, **line)
    if not axis.lines:
        axis.text(0.5, 0.5, "no optimum known", transform=axis.transAxes, ha="center")
    elif not several and any(panel.columns.values()):  # below the axis: curves may be anywhere in it
        below = axis.transAxes + ScaledTranslation(0, -LEGEND_BELOW / 72, axis.figure.dpi_scale_trans)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below, "borderaxespad": 0}
        axis.legend(**place, ncols=legend_columns)
    if panel.yscale == "log":
        show_two_powers(axis)


def show_two_powers(axis):
    """Extend a logarithmic y axis to two powers of ten, of which ticks are labelled; those between them are not."""
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = np.log10(axis.get_ylim())
    if np.floor(high) - np.ceil(low) < 1:
        down, up = low - np.floor(low), np.ceil(high) - high
        both = np.floor(high) < np.ceil(low)  # no power of ten in between
        axis.set_ylim(
            10 ** np.floor(low) if both or down <= up else None, 10 ** np.ceil(high) if both or up < down else None
        )


def set_axis(axis, panel, ylabel, title=""):
    axis.set(title=title, xlabel=panel.xlabel, ylabel=ylabel, xscale=panel.xscale, yscale=panel.yscale)
    if panel.xscale == "log":
        axis.set_xticks(ticks := count_ticks(np.concatenate([series.x for series in panel.series])), labels=ticks)
        axis.xaxis.set_minor_locator(NullLocator())


def handles_of(settings):
    return [Line2D([], [], **line_style_of(setting.index)) for setting in settings]


def in_common(settings, *columns):
    """Return what columns of texts, one per setting, have in common, and each setting's label with its other texts."""
    shared = [texts[0] for texts in columns if len(set(texts)) == 1]
    others = [texts for texts in columns if len(set(texts)) > 1]
    labels = [plain(setting.label) for setting in settings]
    return listed(*shared), [listed(*texts) for texts in zip(labels, *others, strict=True)]


def plain(text):
    """Return a text of the user's as Matplotlib shows it unchanged, also with dollar signs in it."""
    return text.replace("$", r"\$")


def legend_below(figure, handles, labels, title, **options):
    """Add a legend below a figure, with a row for each handle, and make the figure taller by its height."""
    labels, title = [textwrap.fill(label, 88) for label in labels], textwrap.fill(title, 100)
    lines = sum(text.count("\n") + 1 for text in (title, *labels))
    figure.set_figheight(figure.get_figheight() + 0.16 * lines)
    figure.legend(handles, labels, title=title, loc="outside lower center", **options)


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def theorem(settings):
    """Return the figure of margins and squared class-mean norms against n_k, with the theory; None without geometry."""
    if not (panels := class_panels(THEOREM_PANELS, settings)):
        return None
    figure, settings = Figure(figsize=(TEXT_WIDTH, 2.45)), [series.setting for series in panels[0].series]
    axes, several = figure.subplots(1, len(panels)), len(settings) > 1
    for axis, panel in zip(axes, panels, strict=True):
        set_axis(axis, panel, panel.title)
        legends = [draw_theorem(axis, series, several) for series in panel.series]
    add_class_legend(figure, settings, legends, "theory")
    return figure


def draw_theorem(axis, series, several):
    """Draw a series, its theory and the threshold of collapse, and return their legend {text: handle}."""
    setting, theory, style = series.setting, series.theory, style_of(series.setting.index)
    colour = style["color"] if several else COLOURS[1]
    style |= {"markerfacecolor": "none"} if several else {}  # points that coincide stay visible
    draw_points(axis, series, style)
    legend = {listed(*chain(*measured_texts([setting]))): Line2D([], [], linestyle="none", **style)}
    if theory:
        points = {"linestyle": "none", "marker": "_", "markersize": 10, "zorder": 1}
        line = {"color": colour} | ({} if theory.is_curve else points)
        axis.plot(theory.x, theory.y, **line)
        legend["theory"] = Line2D([], [], **line)
        legend |= draw_threshold(axis, setting, colour)
    return legend


def draw_threshold(axis, setting, colour):
    """Draw the threshold of collapse if it is near the class sizes; return {text: handle}, empty if there is none."""
    threshold, is_near = collapse_threshold(setting)
    if threshold is None:
        return {}
    if is_near:
        axis.axvline(threshold, color=colour, linestyle=":")
    number = np.format_float_positional(threshold, precision=3, fractional=False, trim="-")
    where = " (below all classes)" if threshold < min(setting.class_counts) else ""
    handle = Line2D([], [], color=colour, linestyle=":" if is_near else "none")
    return {f"collapse threshold {number}{where}": handle}


def class_accuracy(settings):
    """Return the figure of each class's test accuracy against n_k, with a line through the means at equal n_k.

    A vertical line is the threshold up to which classes collapse. None if no setting has test accuracies.
    """
    if not (panels := class_panels(ACCURACY_PANELS, settings)):
        return None
    (panel,) = panels
    settings = [series.setting for series in panel.series]
    figure, several, legends = Figure(figsize=(TEXT_WIDTH, 2.45)), len(settings) > 1, []
    axis = figure.subplots()
    set_axis(axis, panel, f"{panel.title} of the class ({panel.ylabel})")
    for series in panel.series:
        style = style_of(series.setting.index)
        draw_points(axis, series, style)
        (line,) = axis.plot(*means_at_equal_counts(series), color=style["color"], alpha=0.5)
        points = Line2D([], [], linestyle="none", **style)
        handles = {listed(*chain(*measured_texts([series.setting]))): points, "mean at equal $n_k$": line}
        legends.append(handles | draw_threshold(axis, series.setting, style["color"] if several else COLOURS[1]))
    add_class_legend(figure, settings, legends, "mean at equal $n_k$")
    names = None if several else settings[0].class_names
    if names and len(names) <= NAMED_CLASSES:
        write_names(axis, names, panel.series[0].x, panel.series[0].mean, line)
    return figure


def write_names(axis, names, xs, ys, line):
    """Write names (P,) beside points (P,), clear of the axis's edges, the points, a line and other names."""
    axis.margins(x=0.06, y=0.15)  # room for names of the outermost points
    axis.figure.draw_without_rendering()  # places the axis
    path = axis.transData.transform_path(line.get_path())
    taken = [
        Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in axis.transData.transform(np.column_stack([xs, ys]))
    ]
    for name, x, y in zip(names, xs, ys, strict=True):
        side = 1 if y >= np.mean(ys[xs == x]) else -1  # of two points above each other, the name of the upper is above
        for dx, dy in sorted(NAME_PLACES, key=lambda offset: offset[1] * side < 0):
            place = {
                "ha": ("right", "center", "left")[np.sign(dx) + 1],
                "va": ("top", "center", "bottom")[np.sign(dy) + 1],
            }
            text = axis.annotate(
                shortened(name, 16), (x, y), (dx, dy), textcoords="offset points", parse_math=False, **place
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = np.all([axis.bbox.contains(*corner) for corner in box.corners()])
            if inside and not path.intersects_bbox(box, filled=False) and not box.count_overlaps(taken):
                break
            text.remove()
        else:
            axis.add_artist(text)  # a crowd: there is no free place
        taken.append(box)


def add_class_legend(figure, settings, legends, line):
    """Add a legend below a figure against n_k: of one setting an entry for each handle, of several a row for each.

    legends: {text: handle} of each setting: of its points, of the line, and of the threshold if there is one.
    """
    if len(settings) == 1:
        columns = 3 if len("".join(legends[0])) <= ONE_ROW else 1
        figure.set_figheight(figure.get_figheight() + 0.16 * (len(legends[0]) if columns == 1 else 0))
        figure.legend(legends[0].values(), legends[0].keys(), ncols=columns, loc="outside lower center")
        return
    shared, labels = in_common(settings, *measured_texts(settings))
    thresholds, dotted = [listed(*list(handles)[2:]) for handles in legends], draws_threshold(legends)
    threshold = thresholds[0] if len({*thresholds}) == 1 else "collapse threshold" if dotted else ""
    if threshold != thresholds[0]:
        labels = [listed(*texts) for texts in zip(labels, thresholds, strict=True)]
    none = Line2D([], [], linestyle="none")  # where a setting has no threshold
    handles = [(*handles.values(), none)[: 2 + dotted] for handles in legends]
    options = {"handlelength": 4 + 2 * dotted, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.5)}}
    title = "; ".join(filter(None, [shared or "measured", line, threshold]))
    legend_below(figure, handles, labels, title, **options)


def draws_threshold(legends):
    """Return whether any setting's threshold is a line in the figure."""
    return any(handle.get_linestyle() == ":" for handles in legends for handle in handles.values())


def draw_points(axis, series, style):
    """Draw the means of a series as points, with bars from the least to the largest value over the seeds."""
    ends = [series.low - series.mean, series.high - series.mean]
    bars = np.abs(ends) if series.setting.seeds else None  # abs: rounding errors
    axis.errorbar(series.x, series.mean, bars, linestyle="none", **style)


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
def heatmaps(geometry, epoch, note="", limits=None, names=None):
    """Return the figure of `Matrices` of a geometry. The norms of the differences are NC2_H, NC2_WWT and NC3_WH.

    note: text for the title. limits: the ends of the two colour scales; default: `Matrices.limits`. names: of the
    classes (K,), which are shown instead of their numbers if there are few.
    """
    matrices = Matrices.of(geometry)
    rows, limits = matrices.rows, limits or matrices.limits
    named = names and len(names) <= NAMED_CLASSES
    figure = Figure(figsize=(TEXT_WIDTH, 1.6 + 1.6 * len(rows)) if named else (5.0, 0.9 + 1.35 * len(rows)))
    title = [*textwrap.wrap(listed(f"epoch {epoch}", plain(note)), 80), "matrices / their Frobenius norms"]
    figure.suptitle("\n".join(title))
    axes = figure.subplots(len(rows), len(MATRICES), squeeze=False, sharex=True, sharey=True)
    for position, (title, row) in enumerate(rows.items()):
        difference = title == "difference"
        meshes = [draw_matrix(*pair, limits[difference]) for pair in zip(axes[position], row, strict=True)]
        axes[position, 0].set_ylabel(f"{title}\nclass")
        if difference or position == 0:
            figure.colorbar(meshes[-1], ax=axes[position] if difference else axes[:2], aspect=12 if difference else 25)
    axes[0, 0].invert_yaxis()
    for top, bottom, symbol in zip(axes[0], axes[-1], MATRICES.values(), strict=True):
        top.set_title(symbol)
        bottom.set_xlabel("class")
    if named:
        for axis in axes.ravel():
            labels = {"labels": [shortened(name, 12) for name in names], "parse_math": False}
            axis.set_xticks(range(len(names)), **labels, rotation=90)
            axis.set_yticks(range(len(names)), **labels)
    for axis, distance in zip(axes[-1], matrices.distances, strict=False):
        axis.set_title(f"distance {distance:.2g}")
    return figure


def draw_matrix(axis, matrix, limit):
    edges = np.arange(len(matrix) + 1) - 0.5
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}  # white is zero
    if len(matrix) <= VECTOR_CLASSES:
        mesh = axis.pcolormesh(edges, edges, matrix, **scale)
    else:
        mesh = axis.imshow(matrix, origin="lower", extent=2 * (edges[0], edges[-1]), **scale)
    axis.set(aspect="equal")
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(5 if len(matrix) < 500 else 2, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return mesh


def write_animation(path, setting):
    """Write the heatmaps of a setting's first run as a GIF over its measured epochs, with fixed colour scales."""
    run, frames = setting.runs[0], []
    epochs = thinned(geometry_epochs([run]), FRAMES)
    limits = tuple(np.max([Matrices.of(run.geometry(epoch)).limits for epoch in epochs], axis=0))
    for epoch in epochs:
        frames.append(BytesIO())
        figure = heatmaps(run.geometry(epoch), epoch, setting.note, limits, setting.class_names)
        figure.savefig(frames[-1], format="png", dpi=110)
    first, *others = [Image.open(frame).convert("RGB") for frame in frames]
    with atomic_write(path) as file:
        first.save(file, "gif", save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)
