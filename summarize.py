"""Puts runs into a table, one row a setting: final metrics over its seeds, training time, time to collapse.

    python summarize.py model_weights/*/

Prints the table, and writes it as summary.md and, with all digits, summary.csv. Runs that have not finished, have
failed or are not measured to the end are listed below the table and count in no mean.
"""

import math
from pathlib import Path

import numpy as np

from args import THEORY_SUFFIXES, Help, Parser, folder
from runs import by_setting, read_run
from utils import UserError, atomic_write, duration, is_locked, run_script, write_csv

METRICS = "NC1 NC2_H NC2_WWT NC3_WH margin_rel_err norm_rel_err train_acc1 test_acc1".split()
COLLAPSE = "NC2_H NC2_WWT NC3_WH".split()  # the distances that are at most a threshold once a run has collapsed
THRESHOLDS = (0.05, 0.01)
UNITS = ("epoch", "step", "seconds")  # in which the time to collapse is given
METRICS_NOTE = (
    "At the last epoch, {} over the seeds; `margin_rel_err` and `norm_rel_err` relative to the optimum, accuracies in "
    "percent; time of training alone, h:mm:ss."
)
COLLAPSE_NOTE = (
    f"Time to collapse: the first measured epoch from which on {', '.join(COLLAPSE)} are all at most the threshold, to "
    "the last measurement. Median over the seeds, in brackets the slowest seed; time as above."
)


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=folder, default=".", metavar="DIR", help="folder for summary.md and summary.csv")
    parser.add_argument("--theory", choices=THEORY_SUFFIXES, default="objective", help="as validate's")
    parser.add_argument(
        "--worst", action="store_true", help="in the table, the worst seed instead of the deviation (default: off)"
    )
    args = parser.parse_args()
    groups = by_setting([read_measured(run, args.theory) for run in dict.fromkeys(args.runs)])
    settings = [summarize(label, runs) for label, runs in groups]
    text = markdown(settings, [run for _, runs in groups for run in runs], args.worst)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "summary.md", "w", encoding="utf-8") as file:
        file.write(text)
    write_csv(out / "summary.csv", settings)
    print(text)
    print(f"written: {out / 'summary.md'}, {out / 'summary.csv'}")


# ---------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------


def read_measured(folder, theory):
    """The run of a folder; stops where its rows lack a column that the table has."""
    run = read_run(folder, theory)
    missing = set(METRICS) - set(run.rows[0]) if run.rows else set()
    if missing:
        raise UserError(f"{folder}: no column {min(missing)} in its rows; measure again with --recompute")
    return run


def shortfall(run):
    """Why a run does not count, in one line; None for one that is trained and measured to its last epoch."""
    measured = int(run.rows[-1]["epoch"]) if run.rows else 0
    epoch = run.log[-1]["epoch"] if run.log else measured
    epochs = run.config["flags"]["epochs"] if run.config else epoch
    if run.log and not math.isfinite(run.log[-1]["loss"]):
        return f"failed: the loss is not finite in epoch {epoch}"
    if epoch < epochs:
        return f"{'running' if is_locked(run.folder) else 'unfinished'}: {epoch} of {epochs} epochs"
    if epoch == 0:
        return "failed: there is no epoch in it"
    if measured < epoch:
        return f"not measured at its last epoch, {epoch}: run validate_NC_unbalanced.py"
    return None


def time_to_collapse(run, threshold):
    """(epoch, steps, seconds) from which on all of COLLAPSE are at most `threshold`, to the last row; None if never.

    The epoch is one with a row; what lies between it and the row before is not known.
    """
    first = None
    for row in reversed(run.rows):
        if not all(row[name] <= threshold for name in COLLAPSE):
            break
        first = int(row["epoch"])
    if first is None:
        return None
    return first, run.steps_until(first), run.seconds_until(first)


# ---------------------------------------------------------------------------------------------------------
# One setting: {column: value}, a row of summary.csv
# ---------------------------------------------------------------------------------------------------------


def summarize(label, runs):
    """The row of the runs of one setting, over those that count."""
    counted = [run for run in runs if shortfall(run) is None]
    row = {"setting": label or "all runs", "seeds": len(counted), "runs": len(runs)}
    for name in METRICS:
        row |= over_seeds(name, [run.rows[-1][name] for run in counted])
    row |= over_seeds("seconds", [run.seconds_until(math.inf) for run in counted])
    for threshold in THRESHOLDS:
        times = [time for run in counted if (time := time_to_collapse(run, threshold))]
        row[f"reached_{threshold}"] = len(times)
        for number, unit in enumerate(UNITS):
            values = [time[number] for time in times] if times and len(times) == len(counted) else [math.nan]
            row |= {f"{unit}_to_{threshold}": float(np.median(values)), f"{unit}_to_{threshold}_worst": max(values)}
    return row | {"folders": " ".join(str(run.folder) for run in runs)}


def over_seeds(name, values):
    """{name: mean, name_std: standard deviation with n - 1, name_worst}; NaN where there are too few values."""
    worst = min if name.endswith("_acc1") else max
    return {
        name: float(np.mean(values)) if values else math.nan,
        f"{name}_std": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        f"{name}_worst": worst(values) if values else math.nan,
    }


# ---------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------


def markdown(settings, runs, worst=False):
    """Both tables, the first with the seeds' standard deviation or their worst, and the runs that do not count."""
    over_seeds = mean_and_worst if worst else plus_minus
    metrics, collapse = [], []
    for row in settings:
        head = [
            row["setting"],
            str(row["seeds"]) if row["seeds"] == row["runs"] else f"{row['seeds']} of {row['runs']}",
        ]
        metrics.append([*head, *(over_seeds(row, name) for name in METRICS), over_seeds(row, "seconds")])
        collapse.append([*head, *(cell for threshold in THRESHOLDS for cell in collapse_cells(row, threshold))])
    times = [f"{name} to {threshold}" for threshold in THRESHOLDS for name in ("epochs", "steps", "time")]
    parts = [
        table(["setting", "seeds", *METRICS, "time"], metrics),
        METRICS_NOTE.format("mean and in brackets the worst" if worst else "mean ± standard deviation"),
        table(["setting", "seeds", *times], collapse),
        COLLAPSE_NOTE,
    ]
    left_out = [f"- {run.folder}: {reason}" for run in runs if (reason := shortfall(run))]
    if left_out:
        parts.append("\n".join(["Not counted:", "", *left_out]))
    return "\n\n".join(parts) + "\n"


def table(heads, rows):
    """A Markdown table whose columns also line up as plain text."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def plus_minus(row, name):
    """A cell: mean ± standard deviation, or the only value."""
    mean, std = row[name], row[f"{name}_std"]
    if math.isnan(mean):
        return "-"
    return written(name, mean, 2) + (f" ± {written(name, std, 1)}" if not math.isnan(std) else "")


def mean_and_worst(row, name):
    """A cell: mean, and in brackets the worst of several seeds."""
    mean, worst = row[name], row[f"{name}_worst"]
    if math.isnan(mean):
        return "-"
    return written(name, mean, 2) + (f" ({written(name, worst, 2)})" if row["seeds"] > 1 else "")


def written(name, value, digits):
    """A column's value: a time, an accuracy with two decimals, anything else to so many digits."""
    if name == "seconds":
        return duration(value)
    if name.endswith("_acc1"):
        return f"{value:.2f}"
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def collapse_cells(row, threshold):
    """Epoch, step and time of a threshold, as cells."""
    if row["seeds"] == 0 or math.isnan(row["NC2_H"]):
        return ["-"] * len(UNITS)
    missed = row["seeds"] - row[f"reached_{threshold}"]
    if missed:
        return [f"not reached by {missed} of {row['seeds']}", *["-"] * (len(UNITS) - 1)]
    return [median_and_worst(row, f"{unit}_to_{threshold}", unit) for unit in UNITS]


def median_and_worst(row, name, unit):
    """A cell: the median, and in brackets the slowest of several seeds."""
    if math.isnan(row[name]):
        return "-"
    form = duration if unit == "seconds" else "{:,.0f}".format
    return form(row[name]) + (f" ({form(row[f'{name}_worst'])})" if row["seeds"] > 1 else "")


if __name__ == "__main__":
    run_script(main)
