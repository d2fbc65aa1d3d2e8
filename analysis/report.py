"""Write the report of runs: one HTML file that contains its data and Plotly's script, so that it opens offline.

It shows the flags of the runs, the final metrics over the seeds, the NC curves, margins, class-mean norms and test
accuracies against n_k, the matrices at measured epochs, and the training curves. `report.html` is the template.

The data and the script are compressed, since Plotly's script alone takes 4.8 MB; the browser decompresses them. To
keep a report of ten runs below 8 MB, curves have at most POINTS points, and the matrices are shown at fewer epochs the
more classes there are.
"""

import base64
import gzip
import json
import math
import textwrap
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

from analysis.figures import (
    FRAMES,
    NC_PANELS,
    TRAINING_PANELS,
    count_scale,
    heatmap_limits,
    heatmap_rows,
    mean_over_seeds,
    theory_values,
)
from analysis.settings import flags_of_setting, geometry_epochs, listed, make_settings, require_columns, thinned
from analysis.style import COLOURS
from analysis.summary import COLLAPSE_NOTE, METRICS, METRICS_NOTE, not_counted, summarize, text_tables
from utils import UserError, atomic_write

COLUMNS = [*METRICS, *(column for *_, panel in NC_PANELS for column in panel)]  # required in the rows of every run
POINTS = 400  # largest number of points of a curve
MARKED = 30  # largest number of points at which a curve has markers
ENTRIES = 1_400_000  # largest number of entries of all matrices together: 5 MB
CLASSES = 100  # largest number of classes whose rows and columns of the matrices are shown
SYMBOLS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "triangle-down": "▼", "cross": "✚"}
DASHES = ["solid", "dash", "dashdot"]  # the next one each time the colours repeat
FACTS = ("class_counts", "num_parameters", "device", "git_commit")
CLASS_LABELS = {"margins": "margin M<sub>k</sub>", "mean_norms_sq": "class-mean norm ‖μ<sub>k</sub>‖²"}


class Page(Template):
    delimiter = "%%"


def write_report(runs, path):
    """Write the report of runs to `path`, and return the path. Runs that differ by seed are shown as mean and range.

    Raises UserError if Plotly is not installed, or if a run has no rows or lacks one of COLUMNS.
    """
    for run in runs:
        require_columns(run, COLUMNS)
    script, settings = plotly_script(), make_settings(runs)
    for number, setting in enumerate(settings, 1):
        setting.label = f"{number}: {setting.label}" if setting.label else ""
    marked = [(mark_of(index), setting) for index, setting in enumerate(settings)]
    measured = [(mark, setting) for mark, setting in marked if setting.epoch]
    metrics, collapse = text_tables(summarize([(setting.label, setting.runs) for setting in settings]))
    data = {
        "panels": {
            "curves": curve_panels(NC_PANELS, marked),
            "classes": class_panels(measured),
            "training": curve_panels(TRAINING_PANELS, marked),
        },
        "heatmaps": [heatmaps(setting, ENTRIES // len(measured)) for _, setting in measured],
    }
    content = {
        "title": escape(f"{len(runs)} runs" if len(runs) > 1 else runs[0].folder.name),
        "comparison": escape(runs[0].caption),
        "runs": runs_table(settings),
        "metrics": table(metrics),
        "metrics_note": METRICS_NOTE.format("mean ± standard deviation").replace("`", ""),
        "not_counted": "".join(f"<p>Not counted: {escape(line)}</p>" for line in not_counted(runs)),
        "collapse": table(collapse),
        "collapse_note": COLLAPSE_NOTE,
        "legend": legend(marked),
        "plotly": packed(script),
        "data": packed(json.dumps(data, separators=(",", ":"))),
    }
    page = Page(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(page.substitute(content))
    return path


def plotly_script():
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the report needs Plotly; install it with: pip install plotly") from None
    return get_plotlyjs()


def packed(text):
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def compact(values):
    """Return an array as nested lists of numbers with four significant digits; None for NaN and infinities."""
    rounded = [float(f"{value:.4g}") if math.isfinite(value) else None for value in np.ravel(values).tolist()]
    return np.reshape(np.array(rounded, object), np.shape(values)).tolist()


# ---------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------


def runs_table(settings):
    """Return as HTML a table of the flags and facts that differ between settings, those in common, and the folders."""
    facts = pd.DataFrame([facts_of(setting.runs[0]) for setting in settings]).fillna("-")
    differs = facts.nunique() > 1
    differing = facts.loc[:, differs].assign(
        seed=[", ".join(str(run.flags.get("seed")) for run in s.runs) for s in settings]
    )
    differing.insert(0, "setting", range(1, len(settings) + 1))
    folders = [
        (listed(setting.label, f"seed {run.flags.get('seed')}"), run.folder)
        for setting in settings
        for run in setting.runs
    ]
    shared = folded("flags and facts in common", facts.loc[0, ~differs].items())
    return table(differing) + shared + folded("folders", folders)


def folded(what, items):
    """Return pairs (name, value) as a collapsed HTML list, headed by its length and the noun `what`."""
    entries = [f"<li><b>{escape(name)}</b> {escape(str(value))}</li>" for name, value in items]
    return f"<details><summary>{len(entries)} {what}</summary><ul>{''.join(entries)}</ul></details>"


def facts_of(run):
    """Return {name: text} of a run's flags, the FACTS and versions in its config, and a summary of the optimum."""
    facts = flags_of_setting(run) | {name: run.config[name] for name in FACTS if name in run.config}
    facts |= {"optimum": run.comparison.summary()} | run.config.get("versions", {})
    texts = {list: lambda values: ", ".join(map(str, values)), float: "{:g}".format}
    return {name: texts.get(type(value), str)(value) for name, value in facts.items()}


def table(frame):
    """Return a DataFrame of texts as an HTML table, with a line break before each "± deviation"."""
    with pd.option_context("display.max_colwidth", None):
        head, end, body = frame.to_html(index=False, border=0).partition("</thead>")
    return f'<div class="table">{head.replace("_", "_<wbr>")}{end}{body.replace(" ± ", "<br>± ")}</div>'


def legend(marked):
    """Return as HTML a button per setting that hides it in all figures; "" for a single setting."""
    buttons = [
        f'<button value="{mark["legendgroup"]}"><i style="color: {mark["marker"]["color"]}">'
        f"{SYMBOLS[mark['marker']['symbol']]}</i> {escape(listed(setting.label, setting.seeds))}</button>"
        for mark, setting in marked
    ]
    return "".join(buttons) if len(marked) > 1 else ""


# ---------------------------------------------------------------------------------------------------------
# Panels: {"data": Plotly's traces, "layout": title and axes}
# ---------------------------------------------------------------------------------------------------------


def mark_of(index):
    """Return the Plotly options of all traces of the setting number `index`: group, colour, dash and symbol."""
    repeat, colour = divmod(index, len(COLOURS))
    colour = f"#{COLOURS[colour].lstrip('#')}"
    return {
        "legendgroup": str(index),
        "line": {"color": colour, "width": 1.5, "dash": DASHES[repeat % len(DASHES)]},
        "marker": {"color": colour, "symbol": list(SYMBOLS)[(index + repeat) % len(SYMBOLS)], "size": 7},
    }


def panel(title, traces, xtitle, ytitle, xscale="linear", yscale="linear"):
    xaxis, yaxis = {"title": {"text": xtitle}, "type": xscale}, {"title": {"text": ytitle}, "type": yscale}
    return {"data": traces, "layout": {"title": {"text": title}, "xaxis": xaxis, "yaxis": yaxis}}


def trace(mark, setting, x, y, hover, **options):
    """Return a Plotly trace, by default a line; its hover text is the setting's label and `hover`."""
    label = [escape(line) for line in textwrap.wrap(setting.label, 40)]
    shown = {"hovertemplate": "<br>".join([*label, hover]) + "<extra></extra>", "mode": "lines"}
    return mark | shown | {"x": np.round(x, 2).tolist(), "y": compact(y)} | options


def curve_panels(panels, marked):
    """Return a panel for each column for which any setting has data."""
    drawn = []
    for _, unit, scale, columns in panels:
        for column, label in columns.items():
            if traces := [trace for mark, setting in marked for trace in curve(mark, setting, column, scale)]:
                drawn.append(
                    panel(column, traces, "epoch", unit if "$" in label else listed(label, unit), yscale=scale)
                )
    return drawn


def curve(mark, setting, column, scale):
    """Return the traces of a column: mean (geometric on a log axis) and range over the seeds, and the least loss."""
    epochs, values = setting.series(column, "epoch")
    if not len(epochs):
        return []
    kept = thinned(range(len(epochs)), POINTS)
    x, values = epochs[kept], values[kept]
    mean, hover = mean_over_seeds(values, scale), "epoch %{x}: %{y:.3g}%{text}"
    mode = "lines+markers" if len(x) <= MARKED else "lines"
    traces = [trace(mark, setting, x, mean, hover, text=ranges(values), mode=mode)]
    if setting.seeds:
        ends = [*values.min(1), *values.max(1)[::-1]]
        band = {"fill": "toself", "opacity": 0.3, "hoverinfo": "skip", "line": mark["line"] | {"width": 0}}
        traces.append(trace(mark, setting, [*x, *x[::-1]], ends, "", **band))
    if column == "loss" and setting.least_loss is not None:
        line, hover = mark["line"] | {"dash": "dot"}, f"optimum {setting.least_loss:.4g}"
        traces.append(trace(mark, setting, x[[0, -1]], [setting.least_loss] * 2, hover, line=line))
    return traces


def ranges(values):
    """Return the hover texts (P,) with the ranges of values (P, S) over S seeds; "" for one seed."""
    ends = zip(values.min(1), values.max(1), strict=True)
    return [f"<br>{low:.3g} to {high:.3g} over the seeds" if values.shape[1] > 1 else "" for low, high in ends]


def class_panels(marked):
    """Return the panels against n_k: margins and class-mean norms with the theorem's curves, and test accuracy."""
    if not marked:
        return []
    xaxis = {"xtitle": "training images of the class n<sub>k</sub>"}
    xaxis["xscale"] = count_scale([setting for _, setting in marked])
    drawn = []
    for position, (name, label) in enumerate(CLASS_LABELS.items()):
        traces = []
        for mark, setting in marked:
            if f"{name}_theory" in setting.geometries[0]:
                sizes, theory, is_points = theory_values(setting, setting.class_counts)
                hover = "theory, n<sub>k</sub> = %{x:.0f}: %{y:.4g}"
                dashes = {"mode": "markers", "marker": mark["marker"] | {"symbol": "line-ew-open", "size": 14}}
                traces.append(trace(mark, setting, sizes, theory[position], hover, **dashes if is_points else {}))
            traces.append(points(mark, setting, np.array([geometry[name] for geometry in setting.geometries])))
        drawn.append(panel(label, traces, ytitle="", **xaxis))
    accurate = [(mark, setting) for mark, setting in marked if setting.test_accuracy is not None]
    traces = [points(mark, setting, setting.test_accuracy) for mark, setting in accurate]
    return drawn + [panel("test accuracy", traces, ytitle="%", **xaxis)] * bool(traces)


def points(mark, setting, values):
    """Return the trace of values (S, K) against the n_k of K classes: mean over S seeds, bars from least to largest."""
    mean = values.mean(0)
    ends = {"array": compact(values.max(0) - mean), "arrayminus": compact(mean - values.min(0))}
    bars = {"type": "data", "symmetric": False, "thickness": 1, "visible": bool(setting.seeds)} | ends
    hover = "class %{pointNumber}, n<sub>k</sub> = %{x}: %{y:.4g}%{text}"
    marker = mark["marker"] | {"symbol": f"{mark['marker']['symbol']}-open", "line": {"width": 1.5}}
    options = {"mode": "markers", "marker": marker, "error_y": bars, "text": ranges(values.T)}
    return trace(mark, setting, setting.class_counts, mean, hover, **options)


def heatmaps(setting, entries):
    """Return the matrices of a setting's first run, divided by their norms, at as many epochs as `entries` allow.

    A frame holds the differences from the theory's matrices if there is a theory, else the measured matrices. Of more
    than CLASSES classes, only some are shown; limit and distances are those of the whole matrices.
    """
    run, count = setting.runs[0], len(setting.class_counts)
    classes = thinned(range(count), CLASSES)
    epochs = thinned(geometry_epochs([run]), min(FRAMES, max(2, entries // (3 * len(classes) ** 2))))
    rows = [heatmap_rows(run.geometry(epoch)) for epoch in epochs]
    frames = [row.get("difference", row["measured"]) for row in rows]

    def shown(matrices):
        return compact([matrix[np.ix_(classes, classes)] for matrix in matrices])

    label = setting.note or run.folder.name
    return {
        "label": label if len(classes) == count else f"{label}, {len(classes)} of {count} classes",
        "classes": classes,
        "epochs": epochs,
        "limit": compact(max(heatmap_limits(row)[0] for row in rows)),
        "theory": shown(rows[-1].get("theory", [])),
        "frames": [shown(frame) for frame in frames],
        "distances": [compact([np.linalg.norm(matrix) for matrix in frame]) for frame in frames],
    }
