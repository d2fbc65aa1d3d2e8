"""Summarize runs in a table, one row per setting: final metrics over its seeds, training time, time to collapse.

    python summarize.py model_weights/*/       (print the table; write summary.md, summary.csv and summary_runs.csv)
    python summarize.py                        (list the runs below model_weights/ and their progress)

summary.csv has the table with all digits, summary_runs.csv a row a run and a column a flag, for your own plots.
Runs that have not finished, have failed, or are not measured at their last epoch are listed below the table and
excluded from the means.
"""

import math
from pathlib import Path

import pandas as pd

from analysis.settings import add_comparison_flags, by_setting, read_measured_run
from analysis.summary import METRICS, last_measured, markdown, plain_table, state, summarize, table_of_runs, written
from cli import Parser
from engine.run import Run
from engine.tables import MeasuredRun, write_table
from utils import UserError, atomic_write, run_script

WRITTEN = ["summary.md", "summary.csv", "summary_runs.csv"]


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a run (default: list the runs below model_weights/)",
    )
    parser.add_argument("--out", type=Path, default=".", metavar="DIR", help="folder for the files")
    add_comparison_flags(parser.add_argument)
    parser.add_argument(
        "--worst", action="store_true", help="show the worst seed instead of the deviation in the table (default: off)"
    )
    args = parser.parse_args()
    if not args.runs:
        print(overview("model_weights", args.theory, args.bn_statistics))
        return
    runs = [read_measured_run(folder, args.theory, args.bn_statistics, METRICS) for folder in dict.fromkeys(args.runs)]
    if not any(run.config or run.run.holds_results() for run in runs):
        raise UserError(f"{runs[0].folder}: no run in it")
    table = summarize(by_setting(runs))
    text = markdown(table, runs, args.worst)
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "summary.md", "w", encoding="utf-8") as file:
        file.write(text)
    write_table(args.out / "summary.csv", table)
    write_table(args.out / "summary_runs.csv", table_of_runs(runs))
    print(f"{text}\nwritten: {', '.join(str(args.out / name) for name in WRITTEN)}")


def overview(folder, theory="objective", bn_statistics="running"):
    """Return a table of all runs below a folder: state, last measured epoch and NC2_H there."""
    lines = []
    for path in sorted(
        {file.parent for name in ("config.json", "nc_metrics*.csv") for file in Path(folder).rglob(name)}
    ):
        try:
            run = MeasuredRun(Run(path), theory, bn_statistics)
            distance = run.rows["NC2_H"].iloc[-1] if "NC2_H" in run.rows else math.nan
            lines.append([path, state(run), last_measured(run), written("NC2_H", distance)])
        except UserError as error:
            lines.append([path, f"failed: {error}", "-", "-"])
    if not lines:
        raise UserError(f"no run below {folder}/; give the folders of runs")
    return plain_table(pd.DataFrame(lines, columns=["run", "state", "measured to epoch", "NC2_H"]))


if __name__ == "__main__":
    run_script(main)
