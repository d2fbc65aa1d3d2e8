"""The theorem on its own: the optimum of (UFM) in closed form beside the one that direct minimisation finds.

    python solve_ufm.py --class_counts 100,100,200,200,300,300,400,400,500,500 \\
        --weight_decay 0.005 --feature_decay_rate 0.00005
    python solve_ufm.py --phase_diagram figures/phase_diagram     (where the smallest class collapses)

With --bias or --no_relu there is no closed form: the table has the minimiser's side only.
"""

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from args import Help, Parser, class_counts, number
from plot_nc import BLUE, ORANGE, STYLE, TEXT_WIDTH
from theory import CLOSED_FORMS, collapse_threshold, minimise
from utils import Progress, UserError, run_script

NOT_OF_PHASES = "weight_decay feature_decay_rate bias no_relu dim level restarts json".split()
ZERO = 1e-6  # |h_k|^2 of a class at zero, in units of sqrt(lambda_W / (lambda_H n_k)): that of a margin of about one


def main():
    args = make_parser().parse_args()
    if args.bias_decay and not args.bias:
        raise UserError("--bias_decay: only with --bias")
    if args.phase_diagram:
        other = [name for name in NOT_OF_PHASES if getattr(args, name) != make_parser().get_default(name)]
        if other:
            raise UserError(f"--phase_diagram takes --class_counts, --loss, --grid and --seed, not --{other[0]}")
    try:
        if args.phase_diagram:
            for path in phase_diagram(args):
                print(path)
        elif args.json:
            print(json.dumps(solve(args), indent=2))
        else:
            print_table(args, solve(args))
    except ValueError as error:
        raise UserError(error) from None


def make_parser():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    positive = number(float, 0, above=True)
    parser.add_argument(
        "--class_counts",
        type=class_counts,
        default=[100, 100, 200, 200, 300, 300, 400, 400, 500, 500],
        metavar="N,N,...",
        help="samples of each class, n_k",
    )
    parser.add_argument("--weight_decay", type=positive, default=5e-3, metavar="X", help="lambda_W")
    parser.add_argument("--feature_decay_rate", type=positive, default=5e-5, metavar="X", help="lambda_H")
    parser.add_argument("--loss", choices=CLOSED_FORMS, default="CrossEntropy", help="loss of a sample")
    parser.add_argument("--bias", action="store_true", help="a bias in the head (default: off)")
    parser.add_argument(
        "--bias_decay", type=number(float, 0), default=0.0, metavar="X", help="lambda_b, factor of |b|^2 / 2"
    )
    parser.add_argument("--no_relu", action="store_true", help="features of any sign (default: off, H >= 0)")
    parser.add_argument("--dim", type=number(int, 1), metavar="D", help="features d (default: as many as classes)")
    parser.add_argument(
        "--level", choices=["class", "sample"], default="class", help="one feature a class, or all N of them free"
    )
    parser.add_argument("--restarts", type=number(int, 1), default=4, metavar="N", help="random starts")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of the starts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table (default: off)")
    parser.add_argument(
        "--phase_diagram",
        type=Path,
        metavar="FILE",
        help="draw FILE.pdf and FILE.png instead: exponential profiles, classes and the largest of them as "
        "in --class_counts, against lambda_W lambda_H (default: off)",
    )
    parser.add_argument(
        "--grid", type=number(int, 2), default=13, metavar="N", help="points along each side of the phase diagram"
    )
    return parser


def solve(args):
    """The closed form, where there is one, and the minimiser's result, as plain values."""
    problem = (args.class_counts, args.weight_decay, args.feature_decay_rate)
    found = minimise(
        *problem,
        loss=args.loss,
        bias=args.bias,
        bias_decay=args.bias_decay,
        relu=not args.no_relu,
        dim=args.dim,
        level=args.level,
        starts=args.restarts,
        seed=args.seed,
    )
    result = {
        "class_counts": args.class_counts,
        "minimised": plain(found.optimum),
        "losses_of_starts": found.losses,
        "projected_gradient": found.projected_gradient,
        "within_class_spread": found.within_class_spread,
    }
    if not (args.bias or args.no_relu):
        closed = CLOSED_FORMS[args.loss](*problem)
        result["closed_form"] = plain(closed)
        result["loss_gap"] = found.optimum.loss / closed.loss - 1
    return result


def plain(optimum):
    names = ("margins", "mean_norms_sq", "bias", "HTH", "WWT", "WH")
    return {"loss": optimum.loss, **{name: getattr(optimum, name).tolist() for name in names}}


def print_table(args, result):
    """Class by class: closed form, minimised, relative error."""
    found, closed = result["minimised"], result.get("closed_form")
    columns = (
        ["margin M_k", "minimised", "rel. error", "|h_k|^2", "minimised", "rel. error"]
        if closed
        else ["margin", "|h_k|^2"]
    )
    print(f"{'class':>5} {'n_k':>7}" + "".join(f" {column:>13}" for column in columns + ["bias"] * args.bias))
    for label, count in enumerate(args.class_counts):
        cells = []
        for name in ("margins", "mean_norms_sq"):
            value = found[name][label]
            if closed:
                expected = closed[name][label]
                error = f"{value / expected - 1:.1e}" if expected else "-"
                cells += [f"{expected:.8g}", f"{value:.8g}", error]
            else:
                cells += [f"{value:.8g}"]
        if args.bias:
            cells.append(f"{found['bias'][label]:.8g}")
        print(f"{label:>5} {count:>7}" + "".join(f" {cell:>13}" for cell in cells))
    losses = result["losses_of_starts"]
    print()
    if closed:
        print(f"loss, closed form           {closed['loss']:.15g}")
    print(f"loss, minimised             {found['loss']:.15g}")
    if closed:
        print(f"relative gap                {result['loss_gap']:.1e}")
    print(f"worst of {len(losses)} starts           {losses[-1] / losses[0] - 1:.1e} above the best")
    print(f"projected gradient          {result['projected_gradient']:.1e}, in scaled variables")
    if args.level == "sample":
        print(f"spread within classes       {result['within_class_spread']:.1e} of the largest feature")


# ---------------------------------------------------------------------------------------------------------
# Phase diagram
# ---------------------------------------------------------------------------------------------------------


def phase_diagram(args):
    """Draws where the smallest class collapses; returns the paths written."""
    num_classes, n_max = len(args.class_counts), max(args.class_counts)
    ratios = np.geomspace(1, n_max, args.grid)
    profiles = [n_max * ratio ** -np.linspace(0, 1, num_classes) for ratio in ratios]
    edges = np.array([collapse_threshold(counts, args.loss) for counts in profiles])
    products = np.geomspace(edges.min() / 10, edges.max() * 10, args.grid)
    collapsed = np.zeros((args.grid, args.grid), bool)
    with Progress(collapsed.size, "problem") as progress:
        for column, counts in enumerate(profiles):
            for row, product in enumerate(products):
                root = math.sqrt(product)
                found = minimise(counts, root, root, loss=args.loss, starts=1, seed=args.seed)
                collapsed[row, column] = found.optimum.mean_norms_sq[-1] <= ZERO / math.sqrt(counts[-1])
                progress.step(f"imbalance {ratios[column]:.0f}  lambda_W lambda_H {product:.1e}")
    figure = draw_phases(ratios, products, collapsed, edges, num_classes, n_max)
    args.phase_diagram.parent.mkdir(parents=True, exist_ok=True)
    paths = [args.phase_diagram.with_name(f"{args.phase_diagram.name}.{kind}") for kind in ("pdf", "png")]
    with matplotlib.rc_context(STYLE):
        for path in paths:
            figure.savefig(path)
    return paths


@matplotlib.rc_context(STYLE)
def draw_phases(ratios, products, collapsed, edges, num_classes, n_max):
    """collapsed (P, R) bool over products (P,) and ratios (R,), with the closed-form threshold edges (R,)."""
    figure = Figure(figsize=(TEXT_WIDTH / 2, 2.9))
    axis = figure.subplots()
    x, y = np.meshgrid(ratios, products)
    axis.plot(x[collapsed], y[collapsed], "o", color=BLUE, markersize=3, label=r"minimiser: $h_K = 0$")
    axis.plot(x[~collapsed], y[~collapsed], "o", color=BLUE, mfc="none", markersize=3, label=r"minimiser: $h_K \neq 0$")
    axis.plot(ratios, edges, color=ORANGE, label="closed-form threshold")
    axis.set(xscale="log", yscale="log", xlabel=r"imbalance $n_{\max}/n_{\min}$", ylabel=r"$\lambda_W \lambda_H$")
    axis.set_title(rf"$K = {num_classes}$, $n_{{\max}} = {n_max}$, exponential profile")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    run_script(main)
