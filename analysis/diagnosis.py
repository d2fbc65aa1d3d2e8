"""A finished run in sentences: how far it is from the optimum and by which property, what that proves, and why.

The numbers are read from the files of the run alone; `nc_theory.gap_bounds` and `nc_theory.diagnose` judge them.
"""

import math

import numpy as np
import torch

from nc_theory import GAP_COLUMNS, SHARES, GapShares, class_margins, diagnose, gap_bounds
from nc_theory.diagnosis import named

LARGEST = 100  # percent, or degrees: nothing larger is printed as proved
LARGE = 1.0  # an NC1 above, and this many times NC1_trace or more, is explained if classes have merged
LARGE_RATIO = 100
MERGED = 0.1  # of the median distance of two class means: classes that are closer have merged
MEASURED = 3  # measurements of the gap that show its course
AT_ZERO = 1e-4  # of the largest |mu_k|^2 at the optimum: classes below are at zero, and have no direction


def explain(run, with_proof=True):
    """Return sentences on the last measured epoch of a `MeasuredRun`; on its gap only with an optimum and a gap.

    with_proof: also what the gap proves, which `proof_rows` has as a table.
    """
    if run.rows.empty:
        return []
    row = run.rows.iloc[-1]
    on_gap = gap_explained(run, row, with_proof)
    on_nc1 = nc1_lines(run, row)
    return [*on_gap, *([""] if on_gap and on_nc1 else []), *on_nc1]


def nc1_lines(run, row):
    """Return a sentence if NC1 of a row is large because class means have merged, or died."""
    values = [row.get(name, math.nan) for name in ("NC1", "NC1_trace")]
    if not values[0] > max(LARGE, LARGE_RATIO * values[1]):
        return []
    products = run.geometry(int(row["epoch"]))["HTH"]
    squares = products.diagonal()
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
    pairs = ~np.eye(len(squares), dtype=bool)
    merged = pairs & (distances < MERGED * np.median(distances[pairs]))
    if not merged.any():
        return []
    classes = named(np.flatnonzero(merged.any(1)).tolist())
    return [
        f"NC1 is {values[0]:.2g} because the means of {classes} have nearly merged: it divides by the distance between "
        f"them; see NC1_trace: {values[1]:.2g}"
    ]


def gap_of(run, row):
    """Return (GapShares, parts of the geometry) of a run at a measured epoch; None without an optimum or a gap."""
    optimum = run.comparison.optimum
    if optimum is None or math.isnan(row.get("gap_margins", math.nan)):
        return None
    parts = run.geometry(int(row["epoch"]))
    if "gap_margins" not in parts:
        return None
    shares = (torch.from_numpy(parts[name]) for name in GAP_COLUMNS[1:])
    return GapShares(optimum.lower_bound, *shares, irreducible_loss=optimum.problem.irreducible_loss), parts


def gap_explained(run, row, with_proof):
    """Return sentences on the gap of a run at a measured epoch; none without an optimum and a gap."""
    optimum, found = run.comparison.optimum, gap_of(run, row)
    if found is None:
        return []
    gap, parts = found
    lines = gap_lines(row, gap, optimum.certified or run.theory == "released")
    if with_proof and run.theory != "released":
        lines += ["", *proof_lines(optimum, gap, parts)]
    if run.theory == "objective":  # which training minimised
        diagnosis = diagnosis_of(run, optimum, gap, parts)
        lines += ["", *diagnosis.lines()]
        if diagnosis.died and run.flags.get("head_init") == "random" and run.flags["depth_linear"] == 1:
            lines.append("what may help: --head_init optimum, with which small classes stay alive (docs/recipe.md)")
    return lines


def gap_lines(row, gap, certified):
    """Return how far a row is from the optimum, and the four shares."""
    largest = max(SHARES, key=lambda name: row[f"gap_{name}"])
    without = " without the labels' entropy" if gap.irreducible_loss else ""
    above = f"{'' if certified else 'at most '}{row['optimality_gap']:.1e} above"
    return [
        f"The objective is {above} the least value that any network can reach, in relative terms{without}. In units of "
        "the loss:"
    ] + [
        f"{row[f'gap_{name}']:9.1e}  {words}{' (the largest share)' if name == largest else ''}"
        for name, (_, words) in SHARES.items()
    ]


def proof_rows(run):
    """Return what the gap of a run proves at its last measured epoch: rows (what, unit, of what, proved, measured).

    None with `--theory released`, whose margins are not those of the minimum, with which the gap is taken.
    """
    row = None if run.rows.empty else run.rows.iloc[-1]
    found = None if row is None or run.theory == "released" else gap_of(run, row)
    return [] if found is None else proofs(run.comparison.optimum, *found)


def proofs(optimum, gap, parts):
    """Return `proof_rows` of a gap; none is larger than LARGEST."""
    bounds = gap_bounds(optimum, gap.total)
    norms_sq, expected = parts["mean_norms_sq"], optimum.mean_norms_sq.numpy()
    alive = expected > AT_ZERO * expected.max()
    rows = (
        ("every margin", "%", "", *margin_errors(optimum, bounds, parts, alive)),
        ("class means", "degrees", " of orthogonal", *angles(bounds, parts["HTH"], alive)),
        ("features", "%", " of their class means", *spreads(bounds, gap, optimum, norms_sq)),
        ("the head", "%", " of its dual", *head_errors(bounds, gap, optimum, parts["WWT"])),
    )
    return [row for row in rows if row[3] < LARGEST]


def proof_lines(optimum, gap, parts):
    """Return what the gap alone proves, with the measured values in brackets."""
    statements = [
        f"{what} within {proved:.2g} {unit} ({measured:.2g}){of}"
        for what, unit, of, proved, measured in proofs(optimum, gap, parts)
    ]
    if not statements:
        return ["The gap is too large to prove anything about margins, angles, spread and head."]
    lines = [", ".join(statements[:2]), ", ".join(statements[2:])]
    return ["Proved by the gap alone (and measured):", *filter(None, lines)]


def margin_errors(optimum, bounds, parts, alive):
    """Return the largest relative error of a margin that is possible, and that is measured, in percent."""
    logits = torch.from_numpy(parts["WH"] + parts.get("bias", np.zeros(len(alive)))[:, None])
    if optimum.problem.loss != "MSE":
        logits = logits * torch.from_numpy(optimum.problem.loss_parameters.scales)[:, None]
    wanted = bounds.optimal_margins[alive]
    errors = [
        100 * float((margins[alive] / wanted - 1).abs().max()) if alive.any() else math.nan
        for margins in (*bounds.margins.T, class_margins(logits))
    ]
    return max(errors[:2]), errors[2]


def angles(bounds, gram, alive):
    """Return by how many degrees two class means may be from orthogonal, and are; infinity where nothing is proved."""
    pairs = np.outer(alive, alive) & ~np.eye(len(alive), dtype=bool)
    lengths = np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
    with np.errstate(all="ignore"):
        proved, measured = (products[pairs] / lengths[pairs] for products in (bounds.inner_products.numpy(), gram))
    if not pairs.any() or not (proved <= 1).all():
        return math.inf, math.nan
    return tuple(math.degrees(math.asin(np.clip(cosines.max(), 0, 1))) for cosines in (proved, measured))


def spreads(bounds, gap, optimum, norms_sq):
    """Return the distance of features from their class means, as a root mean square, in percent of the means' own."""
    total = float(optimum.problem.counts.numpy() @ norms_sq) or math.nan
    measured = 2 * float(gap.within.sum()) / optimum.problem.lambda_h
    return tuple(100 * math.sqrt(max(value, 0.0) / total) for value in (bounds.within_sum, measured))


def head_errors(bounds, gap, optimum, gram):
    """Return the distance of W from its dual in percent of |W|."""
    measured = math.sqrt(max(2 * float(gap.duality.sum()) / optimum.problem.lambda_w, 0.0))
    length = math.sqrt(np.trace(gram)) or math.nan
    return 100 * bounds.head_distance / length, 100 * measured / length


def diagnosis_of(run, optimum, gap, parts):
    """Return the `nc_theory.Diagnosis` of a run at its last measured epoch, from its rows, log, config and geometry."""
    rows, log, flags = run.rows, run.log, run.flags
    last = int(rows["epoch"].iloc[-1])
    log = log[log["epoch"] <= last] if len(log) else log
    facts = {"epochs": rows["epoch"].to_numpy(), "gaps": rows["optimality_gap"].to_numpy()}
    facts["NC0"] = rows["NC0"].iloc[-1] if "NC0" in rows else math.nan
    if len(log):
        facts["learning_rates"] = np.interp(rows["epoch"], log["epoch"], log["lr"])
        if "penalty_scale" in log and flags["sep_decay"]:
            changing = log["penalty_scale"] != log["penalty_scale"].iloc[-1]
            settled = log["lr"][~changing[::-1].cummax()[::-1]]  # since the last epoch in which they still changed
            facts |= {"penalty_scale": log["penalty_scale"].iloc[-1], "penalty_lr": settled.iloc[0] / log["lr"].max()}
    if flags:
        counts = run.config["class_counts"]
        facts["steps"] = int(run.steps_until(last))
        facts["batch_norm"] = flags["model"] != "MLP"
        facts["least_images"] = min(counts) * min(1, flags["batch_size"] / sum(counts))
        facts["precision"] = flags["precision"]
    if len(log) and run.comparison.least_loss and run.bn_statistics == "running":
        above = log["loss"] / run.comparison.least_loss - 1
        of_training = (above / (1 - optimum.problem.irreducible_loss / optimum.loss)).to_numpy()
        facts["training_gap"] = of_training[-1]
        constant = "penalty_scale" not in log or (log["penalty_scale"] == 1).all()
        if len(rows) < MEASURED and constant:  # the course of the objective as seen while training
            facts |= {"epochs": log["epoch"].to_numpy(), "gaps": of_training, "learning_rates": log["lr"].to_numpy()}
    if len(accuracies := run.class_accuracy(last, "train")):
        facts["accuracies"] = accuracies
    return diagnose(optimum, gap, parts["mean_norms_sq"], zero_samples=parts.get("zero_samples"), **facts)
