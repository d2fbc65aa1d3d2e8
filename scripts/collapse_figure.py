"""Draw the class-mean norms of finished runs, and those of the theorem, against the imbalance R and against lambda.

    scripts/table.sh collapse DIR          (trains the runs: digits, four R and five lambda, three seeds each)
    python scripts/collapse_figure.py model_weights/collapse/*/ --out docs/figures/collapse

The left panel has the runs whose lambdas are those of most runs, the right panel those whose R is that of most runs.
Points are means over the seeds with bars from the least to the largest, lines the theorem. Values at zero are minority
collapse. `summary_runs.csv` of summarize.py has the same numbers, a row a run.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.settings import read_measured_run
from analysis.style import STYLE_FILE, TEXT_WIDTH, style_of
from analysis.summary import last_measured, shortfall
from cli import Parser
from utils import UserError, atomic_write, run_script

SHOWN = 4  # classes, from the largest to the smallest
AXES = {"R": r"imbalance $R = n_{\max}/n_{\min}$", "lambda": r"$\sqrt{\lambda_W \lambda_H}$"}


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was validated")
    parser.add_argument("--out", type=Path, default="collapse", metavar="FILE", help="writes FILE.pdf and FILE.png")
    args = parser.parse_args()
    table = pd.concat([norms(read_measured_run(folder, columns=["NC2_H"])) for folder in args.runs])
    with style.context(STYLE_FILE):
        figure = draw(table)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("pdf", "png"):
            path = args.out.with_name(f"{args.out.name}.{kind}")
            with atomic_write(path) as file:
                figure.savefig(file, format=kind)
            print(path)


def norms(run):
    """Return a row for each class of a run: R, lambda, rank (0: the largest class), measured and theory, |mu_k|^2."""
    if reason := shortfall(run):
        raise UserError(f"{run.folder}: {reason}")
    parts = run.geometry(last_measured(run))
    if "mean_norms_sq_theory" not in parts:
        raise UserError(f"{run.folder}: {run.comparison.no_optimum}")
    problem, counts = run.comparison.problem, parts["class_counts"]
    order = np.argsort(-counts, kind="stable")
    columns = {"measured": parts["mean_norms_sq"][order], "theory": parts["mean_norms_sq_theory"][order]}
    root = float(f"{np.sqrt(problem.lambda_w * problem.lambda_h):.6g}")
    return pd.DataFrame({"R": counts.max() / counts.min(), "lambda": root, "rank": range(len(counts)), **columns})


def draw(table):
    """Return the figure of a table of `norms` of all runs."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.6))
    most = table["rank"].max()
    ranks = np.unique(np.linspace(0, most, SHOWN).round().astype(int))
    for axis, (x, label), other in zip(figure.subplots(1, 2, sharey=True), AXES.items(), ("lambda", "R"), strict=True):
        chosen = table[table[other] == table[other].mode()[0]]
        for index, rank in enumerate(ranks):
            groups = chosen[chosen["rank"] == rank].groupby(x)
            measured, theory = groups["measured"].agg(["mean", "min", "max"]), groups["theory"].mean()
            bars = np.abs(measured[["min", "max"]].sub(measured["mean"], axis=0).to_numpy().T)
            name = {0: "largest class", most: "smallest class"}.get(rank, f"class of rank {rank + 1}")
            drawn = style_of(index)
            axis.plot(theory.index, theory, color=drawn["color"])
            axis.errorbar(measured.index, measured["mean"], bars, linestyle="none", label=name, **drawn)
        axis.set(xscale="log", xlabel=label)
        axis.set_xticks(chosen[x].unique(), labels=[f"{value:.3g}" for value in chosen[x].unique()])
        axis.minorticks_off()
    figure.axes[0].set_ylabel(r"class-mean norm $\|\mu_k\|^2$")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ranks))
    return figure


if __name__ == "__main__":
    run_script(main)
