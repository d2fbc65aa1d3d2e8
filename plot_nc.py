"""Draw the figures of runs that have been measured.

    python plot_nc.py model_weights/RUN                        (into RUN/figures/)
    python plot_nc.py model_weights/RUN ... --out figures      (overlaid; runs that differ by seed: mean and range)

Each figure is written as PDF and PNG at print size; docs/results.md says what they show.
"""

from pathlib import Path

from analysis.figures import draw_runs
from analysis.panels import NC_COLUMNS
from analysis.settings import ABSCISSAE, add_comparison_flags, read_measured_run
from cli import Parser, bounded
from utils import run_script


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was validated")
    add_comparison_flags(parser.add_argument)
    parser.add_argument(
        "--epoch", type=bounded(int, 1), metavar="E", help="epoch of all figures except the curves (default: the last)"
    )
    parser.add_argument("--x", choices=ABSCISSAE, default="epoch", help="the x axis of nc_curves and training")
    parser.add_argument("--animate", action="store_true", help="also animate the heatmaps (default: off)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN/figures of one run, figures of several)"
    )
    args = parser.parse_args()
    folders = {folder.resolve(): folder for folder in args.runs}.values()
    runs = [read_measured_run(folder, args.theory, args.bn_statistics, NC_COLUMNS) for folder in folders]
    out = args.out or (runs[0].folder if len(runs) == 1 else Path()) / "figures"
    for path in draw_runs(runs, out, args.epoch, args.x, args.animate):
        print(path)


if __name__ == "__main__":
    run_script(main)
