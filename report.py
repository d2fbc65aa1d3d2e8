"""Write a report of runs that have been measured: one HTML file that opens offline in a browser.

    python report.py model_weights/RUN                            (writes report.html)
    python report.py model_weights/*/ --out report.html           (compared; runs that differ by seed: mean and range)

It needs Plotly: pip install ".[report]". `analysis/report.py` says what the report shows.
"""

from pathlib import Path

from analysis.report import write_report
from analysis.settings import add_comparison_flags, read_measured_run
from cli import Parser
from utils import run_script


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was validated")
    add_comparison_flags(parser.add_argument)
    parser.add_argument("--out", type=Path, default="report.html", metavar="FILE", help="the file to write")
    args = parser.parse_args()
    folders = {folder.resolve(): folder for folder in args.runs}.values()
    runs = [read_measured_run(folder, args.theory, args.bn_statistics) for folder in folders]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(write_report(runs, args.out))


if __name__ == "__main__":
    run_script(main)
