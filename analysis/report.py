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

from analysis.diagnosis import explain, proof_rows
from analysis.panels import (
    ACCURACY_PANELS,
    FRAMES,
    MATRICES,
    NC_COLUMNS,
    NC_PANELS,
    THEOREM_PANELS,
    Matrices,
    class_panels,
    collapse_threshold,
    count_ticks,
    curve_panels,
    training_panels,
)
from analysis.settings import flags_of_setting, geometry_epochs, listed, make_settings, require_columns, thinned
from analysis.style import COLOURS
from analysis.summary import COLLAPSE_NOTE, METRICS, METRICS_NOTE, not_counted, summarize, text_tables
from utils import UserError, atomic_write, shortened

COLUMNS = [*METRICS, *NC_COLUMNS]  # required in the rows of every run
POINTS = 400  # largest number of points of a curve
MARKED = 10  # largest number of points of a curve that have markers
ENTRIES = 1_400_000  # largest number of entries of all matrices together: 5 MB
NAME_WIDTH = 40  # largest number of characters of a class's name; 12 beside a matrix
CLASSES = 100  # largest number of classes whose rows and columns of the matrices are shown
SYMBOLS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "triangle-down": "▼", "cross": "✚"}
DASHES = ["solid", "dash", "dashdot"]  # the next one each time the colours repeat
FACTS = ("class_counts", "num_parameters", "device", "git_commit")
HTML = {
    r"\Sigma_W": "Σ<sub>W</sub>",
    r"\Sigma_B^\dagger": "Σ<sub>B</sub><sup>†</sup>",
    r"^{\!\top}": "ᵀ",
    r"\!": "",
    r"\|": "‖",
    r"\mu": "μ",
    "^2": "²",
    "_k": "<sub>k</sub>",
    "$": "",
}  # of mathtext


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
    measured = [setting for setting in settings if setting.epoch]
    metrics, collapse = text_tables(summarize([(setting.label, setting.runs) for setting in settings]))
    classes = class_panels(THEOREM_PANELS + ACCURACY_PANELS, settings, to_threshold=False)
    data = {
        "panels": {
            "curves": [plot(panel, curve, html_of(panel.title)) for panel in curve_panels(NC_PANELS, settings)],
            "classes": [with_thresholds(plot(panel, points, html_of(panel.title)), settings) for panel in classes],
            "training": [
                plot(panel, curve, html_of(panel.title)) for panel in curve_panels(training_panels(settings), settings)
            ],
        },
        "heatmaps": [heatmaps(setting, ENTRIES // len(measured)) for setting in measured],
        "matrices": [html_of(label) for label in MATRICES.values()],
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
        "explanations": explanations(measured),
        "legend": legend(settings),
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
    shared = folded(f"flags and facts{' in common' if len(settings) > 1 else ''}", facts.loc[0, ~differs].items())
    return table(differing) + shared + folded("folders", folders)


def folded(what, items):
    """Return pairs (name, value) as a collapsed HTML list, headed by its length and the noun `what`."""
    what = what[:-1] if len(items := list(items)) == 1 and what == "folders" else what
    entries = [f"<li><b>{escape(name)}</b> {escape(str(value))}</li>" for name, value in items]
    return f"<details><summary>{len(entries)} {what}</summary><ul>{''.join(entries)}</ul></details>"


def facts_of(run):
    """Return {name: text} of a run's flags, the FACTS and versions in its config, and a summary of the optimum."""
    facts = flags_of_setting(run) | {name: run.config[name] for name in FACTS if name in run.config}
    facts |= {"class_names": run.class_names} if run.class_names else {}
    facts |= {"optimum": run.comparison.summary()} | run.config.get("versions", {})
    texts = {list: lambda values: ", ".join(shortened(str(each), NAME_WIDTH) for each in values), float: "{:g}".format}
    return {name: texts.get(type(value), str)(value) for name, value in facts.items()}


def table(frame):
    """Return a DataFrame of texts as an HTML table, with a line break before each "± deviation"."""
    with pd.option_context("display.max_colwidth", None):
        head, end, body = frame.to_html(index=False, border=0).partition("</thead>")
    return f'<div class="table">{head.replace("_", "_<wbr>")}{end}{body.replace(" ± ", "<br>± ")}</div>'


def explanations(settings):
    """Return as HTML what the first run of each setting says about its gap; "" if no run says anything."""
    shown = []
    for setting in settings:
        if text := "\n".join(explain(setting.runs[0], with_proof=False)):
            shown += [f"<p>{escape(setting.note)}</p><pre>{escape(text)}</pre>", proof_table(setting.runs[0])]
    return "".join(["<h2>How far from the optimum, and why</h2>", *shown]) if shown else ""


def proof_table(run):
    """Return as an HTML table what the gap of a run proves, if anything, beside what was measured."""
    rows = [
        {
            "proved by the gap alone": f"{what} within {proved:.2g} {unit}{of}",
            "measured": f"{measured:.2g} {unit}",
        }
        for what, unit, of, proved, measured in proof_rows(run)
    ]
    return table(pd.DataFrame(rows)) if rows else ""


def legend(settings):
    """Return as HTML a button per setting that hides it in all figures; "" for a single setting."""
    buttons = []
    for setting in settings:
        mark, label = mark_of(setting)["marker"], escape(listed(setting.label, setting.seeds))
        symbol = f'<i style="color: {mark["color"]}">{SYMBOLS[mark["symbol"]]}</i>'
        buttons.append(f'<button value="{setting.index}">{symbol} {label}</button>')
    return "".join(buttons) if len(settings) > 1 else ""


# ---------------------------------------------------------------------------------------------------------
# Panels: {"data": Plotly's traces, "layout": title and axes}
# ---------------------------------------------------------------------------------------------------------


def mark_of(setting):
    """Return the Plotly options of all traces of a setting: group, colour, dash and symbol."""
    repeat, colour = divmod(setting.index, len(COLOURS))
    colour = f"#{COLOURS[colour].lstrip('#')}"
    return {
        "legendgroup": str(setting.index),
        "line": {"color": colour, "width": 1.5, "dash": DASHES[repeat % len(DASHES)]},
        "marker": {"color": colour, "symbol": list(SYMBOLS)[(setting.index + repeat) % len(SYMBOLS)], "size": 7},
    }


def html_of(label):
    """Return a label in Matplotlib's mathtext as HTML, as far as HTML knows its symbols."""
    for symbol, html in HTML.items():
        label = label.replace(symbol, html)
    return label


def plot(panel, traces, title):
    """Return the Plotly panel of a panel with one column; traces: a function of its series."""
    xaxis = {"title": {"text": html_of(panel.xlabel)}, "type": panel.xscale}
    yaxis = {"title": {"text": panel.ylabel}, "type": panel.yscale}
    for axis, name in ((xaxis, "x"), (yaxis, "mean")):
        values = np.concatenate([getattr(series, name) for series in panel.series])
        if axis["type"] == "log":
            axis |= power_ticks(values) if name == "mean" else {"tickvals": count_ticks(values)}
    layout = {"title": {"text": title}, "xaxis": xaxis, "yaxis": yaxis}
    return {"data": [trace for series in panel.series for trace in traces(series)], "layout": layout}


def power_ticks(values):
    """Return the Plotly options of a logarithmic axis that shows two powers of ten or more, with ticks at these."""
    logs = np.log10(values[np.isfinite(values) & (values > 0)])
    if not len(logs):
        return {}
    low, high = np.ceil(logs.min()), np.floor(logs.max())
    ends = {}
    if high <= low:  # extend the axis to the powers around the values
        low = np.floor(logs.min())
        high = max(np.ceil(logs.max()), low + 1)
        ends = {"range": [low - 0.05, high + 0.05]}
    step = max(1, round((high - low) / 6))
    return {"exponentformat": "power", "dtick": step, "tickfont": {"size": 10}} | ends  # exponents enlarge the font


def with_thresholds(panel, settings):
    """Return a Plotly panel against n_k with a dotted line at each setting's threshold of collapse, if it is near."""
    drawn = [(collapse_threshold(setting), mark_of(setting)["line"]["color"]) for setting in settings if setting.epoch]
    near = [(threshold, colour) for (threshold, is_near), colour in drawn if is_near]
    lines = [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": c, "dash": "dot", "width": 1},
        }
        for x, c in near
    ]
    panel["layout"]["shapes"] = lines
    return panel


def trace(setting, x, y, hover, **options):
    """Return a Plotly trace, by default a line; its hover text is the setting's label and `hover`."""
    label = [escape(line) for line in textwrap.wrap(setting.label, 40)]
    shown = {"hovertemplate": "<br>".join([*label, hover]) + "<extra></extra>", "mode": "lines"}
    return mark_of(setting) | shown | {"x": np.round(x, 2).tolist(), "y": compact(y)} | options


def curve(series):
    """Return the traces of a series: the mean over the seeds, a band for their range, and the least loss."""
    if not len(series.x):
        return []
    setting, line = series.setting, mark_of(series.setting)["line"]
    kept = thinned(range(len(series.x)), POINTS)
    x, mean, low, high = (values[kept] for values in (series.x, series.mean, series.low, series.high))
    marks = {"mode": "lines+markers", "marker": mark_of(setting)["marker"] | {"maxdisplayed": MARKED}}
    traces = [trace(setting, x, mean, "epoch %{x}: %{y:.3g}%{text}", text=ranges(setting, low, high), **marks)]
    if setting.seeds:
        band = {"fill": "toself", "opacity": 0.3, "hoverinfo": "skip", "line": line | {"width": 0}}
        traces.append(trace(setting, [*x, *x[::-1]], [*low, *high[::-1]], "", **band))
    if theory := series.theory:
        hover = "optimum %{y:.4g}"
        traces.append(trace(setting, theory.x, theory.y, hover, line=line | {"dash": "dot"}))
    return traces


def ranges(setting, low, high):
    """Return the hover texts (P,) with the ranges over the seeds; "" for one seed."""
    ends = zip(low, high, strict=True)
    return [f"<br>{least:.3g} to {most:.3g} over the seeds" if setting.seeds else "" for least, most in ends]


def points(series):
    """Return the traces of a series: the theory's curve, or dashes at the n_k, and points with bars for the range."""
    setting, marker, traces = series.setting, mark_of(series.setting)["marker"], []
    if theory := series.theory:
        dashes = {"mode": "markers", "marker": marker | {"symbol": "line-ew-open", "size": 14}}
        hover = "theory, n<sub>k</sub> = %{x:.0f}: %{y:.4g}"
        traces.append(trace(setting, theory.x, theory.y, hover, **{} if theory.is_curve else dashes))
    ends = {"array": compact(series.high - series.mean), "arrayminus": compact(series.mean - series.low)}
    options = {
        "mode": "markers",
        "marker": marker | {"symbol": f"{marker['symbol']}-open", "line": {"width": 1.5}},
        "error_y": {"type": "data", "symmetric": False, "thickness": 1, "visible": bool(setting.seeds)} | ends,
        "text": ranges(setting, series.low, series.high),
    }
    if setting.class_names:
        options["customdata"] = [f" ({escape(shortened(name, NAME_WIDTH))})" for name in setting.class_names]
    name = "%{customdata}" if setting.class_names else ""
    hover = f"class %{{pointNumber}}{name}, " + "n<sub>k</sub> = %{x}: %{y:.4g}%{text}"
    return [*traces, trace(setting, series.x, series.mean, hover, **options)]


def heatmaps(setting, entries):
    """Return the matrices of a setting's first run, divided by their norms, at as many epochs as `entries` allow.

    A frame holds the differences from the theory's matrices if there is a theory, else the measured matrices. Of more
    than CLASSES classes, only some are shown; limit and distances are those of the whole matrices.
    """
    run, count, names = setting.runs[0], len(setting.class_counts), setting.class_names
    classes = thinned(range(count), CLASSES)
    epochs = thinned(geometry_epochs([run]), min(FRAMES, max(2, entries // (3 * len(classes) ** 2))))
    matrices = [Matrices.of(run.geometry(epoch)) for epoch in epochs]

    def shown(row):
        return compact([matrix[np.ix_(classes, classes)] for matrix in row])

    label = setting.note or run.folder.name
    return {
        "label": label if len(classes) == count else f"{label}, {len(classes)} of {count} classes",
        "classes": classes,
        "names": names and [escape(f"{label} {shortened(names[label], 12)}") for label in classes],
        "epochs": epochs,
        "limit": compact(max(each.limits[0] for each in matrices)),
        "theory": shown(matrices[-1].rows.get("theory", [])),
        "frames": [shown(each.rows.get("difference", each.rows["measured"])) for each in matrices],
        "distances": [compact(each.distances) for each in matrices],
    }
