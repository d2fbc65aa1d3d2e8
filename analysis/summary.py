"""Tables of runs: final metrics over the seeds of a setting, training time, and time to collapse."""

import math

import pandas as pd

from analysis.diagnosis import AT_ZERO
from nc_theory import collapse_count
from utils import duration

METRICS = "NC1 NC2_H NC2_WWT NC3_WH margin_rel_err norm_rel_err train_acc1 test_acc1".split()
FURTHER = "balanced_acc1 many_acc1 medium_acc1 few_acc1 optimality_gap".split()  # shown if the rows have them
STORED = "NC0 gap_margins gap_duality gap_within gap_means".split()  # likewise, but in the CSV only
COLLAPSE = ["NC2_H", "NC2_WWT", "NC3_WH"]  # a run has collapsed once all of these are at most the threshold
THRESHOLDS = (0.05, 0.01)
DIVERGED = 100  # times the loss of a network of zeros, above which a run has diverged
UNITS = {"epoch": "epochs", "step": "steps", "seconds": "time"}  # unit of the time to collapse: head of its column
LONG = 40  # length of a label above which the tables number the settings
METRICS_NOTE = (
    "At the last epoch, {} over the seeds. `margin_rel_err` and `norm_rel_err` are relative to the optimum, accuracies "
    "in percent; time of training alone, h:mm:ss."
)
COLLAPSE_NOTE = (
    f"Time to collapse: the first measured epoch from which on {', '.join(COLLAPSE)} are all at most the threshold, up "
    "to the last measurement. Median over the seeds, and in brackets the slowest seed; time as above."
)

# ---------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------


def divergence(run):
    """Return why a `MeasuredRun` at its end has diverged; None if it has not."""
    zero, loss = run.config.get("loss_at_zero", 0), run.log["loss"].iloc[-1] if len(run.log) else 0
    if not loss > DIVERGED * zero > 0:
        return None
    return f"the loss is {loss:.2g}, that of a network of zeros {zero:.2g}: lower --lr or give --clip_grad_norm 1"


def state(run):
    """Return "finished", "unfinished: k of n epochs", "diverged: why" or "failed: why" for a run."""
    epoch = run.log["epoch"].iloc[-1] if len(run.log) else last_measured(run)
    epochs = run.config.get("ended_at_epoch", run.flags.get("epochs", epoch))
    if len(run.log) and not math.isfinite(run.log["loss"].iloc[-1]):
        return f"failed: the loss is not finite in epoch {epoch}"
    if epoch < epochs:
        return f"unfinished: {epoch} of {epochs} epochs"
    if reason := divergence(run):
        return f"diverged: {reason}"
    return "finished" if epoch else "failed: no epoch in it"


def shortfall(run):
    """Return in one line why a run is excluded from the means; None if it is trained and measured to its last epoch."""
    if (text := state(run)) != "finished":
        return text
    if len(run.log) and last_measured(run) < (epoch := run.log["epoch"].iloc[-1]):
        return f"not measured at its last epoch, {epoch}: run validate_NC_unbalanced.py"
    return None


def last_measured(run):
    return run.rows["epoch"].iloc[-1] if len(run.rows) else 0


def result(run):
    """Return {column: value} of a run: the metrics of its last row, seconds of training, and times to collapse."""
    last = run.rows.iloc[-1].to_dict() | {"seconds": run.seconds_until(math.inf)}
    for threshold in THRESHOLDS:
        times = time_to_collapse(run, threshold)
        last |= {f"{unit}_to_{threshold}": time for unit, time in zip(UNITS, times, strict=True)}
    return last


def time_to_collapse(run, threshold):
    """Return the (epoch, steps, seconds) after which all of COLLAPSE stay at most `threshold`; NaN if there is none.

    Only measured epochs are considered: the collapse may have begun any time after the preceding one.
    """
    below = (run.rows[COLLAPSE] <= threshold).all(axis=1)
    stays = run.rows["epoch"][below[::-1].cummin()]
    if stays.empty:
        return math.nan, math.nan, math.nan
    epoch = stays.min()
    return epoch, run.steps_until(epoch), run.seconds_until(epoch)


def table_of_runs(runs):
    """Return a DataFrame with a row for each run: its state, flags, class counts, classes, and last measured row.

    n_min, n_max and R = n_max/n_min are of its classes, threshold the n_k up to which they collapse at the optimum, if
    known in closed form. classes_at_zero and the mean |mu_k|^2 of the smallest and the largest classes are measured at
    the last epoch, and with suffix _theory those of the optimum.
    """
    return pd.DataFrame([facts_of_run(run) for run in runs])


def facts_of_run(run):
    """Return {column: value} of a run, as `table_of_runs` has them."""
    facts = {"folder": str(run.folder), "state": state(run)}
    texts = {list: lambda values: ",".join(map(str, values))}
    facts |= {name: texts.get(type(value), lambda same: same)(value) for name, value in run.flags.items()}
    counts = run.config.get("class_counts")
    if counts:
        facts |= {"class_counts": texts[list](counts), "n_min": min(counts), "n_max": max(counts)}
        facts["R"] = max(counts) / min(counts)
    if (problem := run.comparison.problem) is not None:
        facts |= {"lambda_W": problem.lambda_w, "lambda_H": problem.lambda_h, "threshold": collapse_count(problem)}
    if not len(run.rows):
        return facts
    facts |= run.rows.iloc[-1].to_dict()
    if not run.geometry_file(epoch := last_measured(run)).exists():
        return facts
    parts = run.geometry(epoch)
    counts, optimal = parts["class_counts"], parts.get("mean_norms_sq_theory", parts["mean_norms_sq"])
    for suffix in ("", "_theory") if "mean_norms_sq_theory" in parts else ("",):
        norms = parts[f"mean_norms_sq{suffix}"]
        facts[f"classes_at_zero{suffix}"] = int((norms <= AT_ZERO * optimal.max()).sum())
        facts[f"norm_sq_smallest{suffix}"] = norms[counts == counts.min()].mean()
        facts[f"norm_sq_largest{suffix}"] = norms[counts == counts.max()].mean()
    return facts


# ---------------------------------------------------------------------------------------------------------
# Over seeds
# ---------------------------------------------------------------------------------------------------------


def summarize(groups):
    """Return a DataFrame with a row for each (label, runs) of `by_setting`, over the runs without a `shortfall`."""
    counted = [(number, run) for number, (_, runs) in enumerate(groups) for run in runs if not shortfall(run)]
    results = pd.DataFrame([result(run) | {"setting": number} for number, run in counted])
    finals = [*METRICS, *results.columns.intersection([*FURTHER, *STORED]), "seconds"]
    times = [f"{unit}_to_{threshold}" for threshold in THRESHOLDS for unit in UNITS]
    seeds = results.reindex(columns=["setting", *finals, *times]).astype(float).groupby("setting")
    mean, std, low, high, median = (getattr(seeds, f)(skipna=False) for f in ("mean", "std", "min", "max", "median"))
    columns = {"seeds": seeds.size()}
    for name in finals:
        worst = low if name.endswith("_acc1") else high
        columns |= {name: mean[name], f"{name}_std": std[name], f"{name}_worst": worst[name]}
    for threshold in THRESHOLDS:
        columns[f"reached_{threshold}"] = seeds[f"epoch_to_{threshold}"].count()
        for name in (f"{unit}_to_{threshold}" for unit in UNITS):
            columns |= {name: median[name], f"{name}_worst": high[name]}
    table = pd.DataFrame(columns).reindex(range(len(groups)))
    counts = ["seeds", *(f"reached_{threshold}" for threshold in THRESHOLDS)]
    table[counts] = table[counts].fillna(0).astype(int)
    table.insert(0, "setting", [label or "all runs" for label, _ in groups])
    table.insert(2, "runs", [len(runs) for _, runs in groups])
    return table.assign(folders=[" ".join(str(run.folder) for run in runs) for _, runs in groups])


def markdown(table, runs, worst=False):
    """Return both tables as Markdown, with the seeds' standard deviation or their worst, and the excluded runs.

    If a label is longer than LONG, the settings are numbered, and their labels are listed above the tables.
    """
    parts, names = [], table["setting"].tolist()
    if max(map(len, names)) > LONG:
        parts = ["\n".join(f"{number}. {name}" for number, name in enumerate(names, 1))]
        table = table.assign(setting=[str(number) for number, _ in enumerate(names, 1)])
    metrics, collapse = text_tables(table, worst)
    parts += [plain_table(metrics)]
    parts += [METRICS_NOTE.format("mean and in brackets the worst" if worst else "mean ± standard deviation")]
    parts += [plain_table(collapse), COLLAPSE_NOTE]
    if lines := not_counted(runs):
        parts.append("\n".join(["Not counted:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def text_tables(table, worst=False):
    """Return a table of `summarize` as two DataFrames of texts: the final metrics and the times to collapse."""
    rows = [row for _, row in table.iterrows()]
    seeds = [f"{row['seeds']}" if row["seeds"] == row["runs"] else f"{row['seeds']} of {row['runs']}" for row in rows]
    metrics, collapse = ({"setting": table["setting"], "seeds": seeds} for _ in range(2))
    for name in [*table.columns.intersection([*METRICS, *FURTHER]), "seconds"]:
        metrics[UNITS.get(name, name)] = [cell(row, name, "worst" if worst else "std") for row in rows]
    for threshold in THRESHOLDS:
        for unit, head in UNITS.items():
            collapse[f"{head} to {threshold}"] = [collapse_cell(row, unit, threshold) for row in rows]
    return pd.DataFrame(metrics), pd.DataFrame(collapse)


def not_counted(runs):
    """Return a line for each run that is excluded from the means: its folder and the reason."""
    return [f"{run.folder}: {reason}" for run in runs if (reason := shortfall(run))]


def plain_table(table):
    """Return a DataFrame of texts as a Markdown table with aligned columns."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def cell(row, name, other):
    """Format a value and, for several seeds, their standard deviation (other="std") or worst value ("worst")."""
    text = written(name, row[name])
    if text == "-" or row["seeds"] == 1:
        return text
    if other == "std":
        return f"{text} ± {written(name, row[f'{name}_std'], 1)}"
    return f"{text} ({written(name, row[f'{name}_worst'])})"


def collapse_cell(row, unit, threshold):
    missed = row["seeds"] - row[f"reached_{threshold}"]
    if unit == "epoch" and missed and not math.isnan(row["NC2_H"]):
        return f"not reached by {missed} of {row['seeds']}"
    return cell(row, f"{unit}_to_{threshold}", "worst")


def written(name, value, digits=2):
    """Format a value of the column `name`: a time, a count, an accuracy, or a number to `digits` digits."""
    if math.isnan(value):
        return "-"
    if name.startswith("seconds"):
        return duration(value)
    if name.startswith(("epoch", "step")):
        return f"{value:,.0f}"
    if name.endswith("_acc1"):
        return f"{value:.2f}"
    if value in (0, math.inf) or 0.01 <= abs(value) < 100:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
