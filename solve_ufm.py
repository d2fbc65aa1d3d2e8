"""Solve the unconstrained features model (UFM) in closed form and by direct minimisation.

    python solve_ufm.py --class_counts 100,100,200,200,300,300,400,400,500,500 \\
        --weight_decay 0.005 --feature_decay_rate 0.00005
    python solve_ufm.py --logit_adjustment 1                               (other losses: see --help)
    python solve_ufm.py --imbalance exp:100 --n_max 500                    (counts as training has them: see --help)
    python solve_ufm.py --class_counts 20,50,100 --suggest_lambdas         (penalties for a largest margin of 5)
    python solve_ufm.py --imbalance exp:100 --n_max 500 --suggest_lambdas --collapse 3     (the 3 smallest collapse)
    python solve_ufm.py --phase_diagram figures/phase_diagram              (where the smallest class collapses)
    python solve_ufm.py --counts_file bigrams.csv                          (next-token prediction, with soft labels)

With --bias, --logit_adjustment and --logit_scaling, and with --no_relu for the cross entropy, there is no closed form.
The last line of the output then says how close to the minimum the solution is proved to be.
"""

import csv
import dataclasses
import json
import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from scipy.sparse.csgraph import connected_components

from analysis.style import COLOURS, STYLE_FILE, TEXT_WIDTH
from cli import Parser, add_count_flags, add_loss_flags, bounded, conflict_of_counts, existing_or_new_dir, real_path
from nc_theory import (
    LOSSES,
    MOST_CLASSES,
    UFM,
    LossVariant,
    closed_form,
    collapse_count,
    collapse_threshold,
    solve_numerically,
    split_optimum,
    suggest_collapse,
    suggest_lambdas,
)
from nc_theory import solve as solve_problem
from nc_theory.diagnosis import named
from utils import Progress, UserError, run_script

# Flags of the other modes; any other flag would have no effect
FLAGS_OF_COUNTS = "class_counts imbalance n_max dataset data_dir train_list test_list".split()
FLAGS_OF_PHASES = "loss grid phase_diagram".split()
FLAGS_OF_CONTEXTS = "weight_decay feature_decay_rate bias bias_decay no_relu json counts_file".split()
FLAGS_OF_SUGGESTION = "ratio suggest_lambdas".split()
VARIANTS = [field.name for field in dataclasses.fields(LossVariant)]
FLAGS_OF_COLLAPSE = ["ratio", "collapse", "loss", *VARIANTS, "bias", "no_relu", "suggest_lambdas"]
LARGEST_MARGIN = 5.0  # of --suggest_lambdas without a value
PAPER_COUNTS = [100, 100, 200, 200, 300, 300, 400, 400, 500, 500]
MERGED = 1e-3  # two contexts share a direction if the cosine of their features is at least 1 - MERGED
ZERO = 1e-6  # |h_k|^2 up to which a class has collapsed, in units of sqrt(lambda_W / (lambda_H n_k))


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.bias_decay and not args.bias:
        raise UserError("--bias_decay: only with --bias")
    if args.ratio != parser.get_default("ratio") and not args.suggest_lambdas:
        raise UserError("--ratio: only with --suggest_lambdas")
    if args.collapse and args.suggest_lambdas != LARGEST_MARGIN:
        raise UserError("--collapse: only with --suggest_lambdas, and without a margin there")
    try:
        if args.phase_diagram:
            only_flags(args, parser, "phase_diagram", FLAGS_OF_PHASES)
            args.class_counts = class_counts(args)
            for path in phase_diagram(args):
                print(path)
        elif args.suggest_lambdas:
            only_flags(args, parser, "suggest_lambdas", FLAGS_OF_COLLAPSE if args.collapse else FLAGS_OF_SUGGESTION)
            args.class_counts = class_counts(args)
            print_suggestion(args)
        elif args.counts_file:
            only_flags(args, parser, "counts_file", FLAGS_OF_CONTEXTS, counts=False)
            print_contexts(args)
        else:
            args.class_counts = class_counts(args)
            print_json(solve(args)) if args.json else print_table(args, solve(args))
    except ValueError as error:
        raise UserError(error) from None


def only_flags(args, parser, mode, names, counts=True):
    """Raise UserError if a flag is set that `mode` does not use; counts: it also takes the class counts."""
    taken = names + FLAGS_OF_COUNTS * counts
    other = [name for name, value in vars(args).items() if name not in taken and value != parser.get_default(name)]
    if other:
        takes = ", ".join(f"--{name}" for name in names if name != mode) + " and class counts" * counts
        raise UserError(f"--{mode} takes {takes}, not --{other[0]}")


def class_counts(args):
    """Return n_k (K,) as training has them with the same flags; without any of them, a tenth of the paper's CIFAR-10.

    Images are read only where the counts depend on how many there are.
    """
    if message := conflict_of_counts(args):
        raise UserError(message)
    if args.class_counts and not args.dataset:
        return args.class_counts
    if not (args.dataset or args.imbalance):
        return PAPER_COUNTS
    from args import data_set  # here, since these modules and torchvision take seconds to load
    from datasets import load_data, profile_counts, source_of

    try:
        dataset = data_set(args.dataset or "cifar10")
    except ArgumentTypeError as error:
        raise UserError(f"--dataset: {error}") from None
    source = source_of(dataset)
    if args.imbalance == "paper" and not source.paper_counts:
        raise UserError(f"--imbalance paper: the paper has no profile for {dataset}; give balanced, exp:R or step:R")
    if not args.class_counts and args.imbalance in (None, "paper") and source.paper_counts:
        return list(source.paper_counts)
    if args.n_max and source.num_classes:
        counts = profile_counts(args.imbalance, [args.n_max] * source.num_classes, args.n_max)
        if min(counts) < 1:
            raise UserError(f"--imbalance {args.imbalance} leaves classes without images; raise --n_max")
        return counts
    lists = {"train_list": args.train_list, "test_list": args.test_list}
    counts = {"imbalance": args.imbalance, "n_max": args.n_max, "class_counts": args.class_counts}
    return load_data(dataset, args.data_dir, **counts, **lists, download=False).class_counts


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    positive, not_negative = bounded(float, 0, above=True), bounded(float, 0)
    add_count_flags(add)
    add("--dataset", metavar="NAME", help="as in training, whose class counts are then taken (default: cifar10)")
    add(
        "--data_dir",
        type=existing_or_new_dir,
        default=existing_or_new_dir("~/data"),
        metavar="DIR",
        help="as in training; read where the class counts depend on the images that are there",
    )
    for split in ("train", "test"):
        add(f"--{split}_list", type=real_path, metavar="FILE", help="as in training (default: class folders)")
    add("--weight_decay", type=positive, default=5e-3, metavar="X", help="lambda_W")
    add("--feature_decay_rate", type=positive, default=5e-5, metavar="X", help="lambda_H")
    add("--loss", choices=LOSSES, default="CrossEntropy", help="loss of a sample")
    add_loss_flags(add)
    add("--bias", action="store_true", help="a bias in the head (default: off)")
    add("--bias_decay", type=not_negative, default=0.0, metavar="X", help="lambda_b, factor of |b|^2 / 2")
    add("--no_relu", "--no-feature_relu", action="store_true", help="features of any sign (default: off, H >= 0)")
    add(
        "--dim",
        type=bounded(int, 1),
        metavar="D",
        help="largest number of features d of direct minimisation (default: as many as the optimum needs)",
    )
    add("--level", choices=["class", "sample"], default="class", help="one feature per class, or all N features")
    add(
        "--restarts",
        type=bounded(int, 1),
        default=1,
        metavar="N",
        help="number of starts of direct minimisation: the first at zero features, the others random",
    )
    add("--seed", type=bounded(int, 0), default=0, metavar="N", help="seed of the random starts")
    add("--json", action="store_true", help="print JSON instead of a table (default: off)")
    add(
        "--counts_file",
        type=Path,
        metavar="FILE",
        help="instead, solve a next-token problem: a CSV file with a row for each context and a column for each token, "
        "how often the token follows the context; the first row and the first column are names (default: off)",
    )
    add(
        "--suggest_lambdas",
        type=positive,
        nargs="?",
        const=LARGEST_MARGIN,
        metavar="M",
        help="instead, print lambda_W and lambda_H for which no class collapses and the largest margin is M "
        "(default: off; M = 5 if left out)",
    )
    add(
        "--collapse",
        type=bounded(int, 1),
        metavar="N",
        help="with --suggest_lambdas: those for which exactly the N smallest classes collapse (default: none)",
    )
    add("--ratio", type=positive, default=100.0, metavar="X", help="lambda_W / lambda_H for --suggest_lambdas")
    add(
        "--phase_diagram",
        type=Path,
        metavar="FILE",
        help="instead, draw FILE.pdf and FILE.png: the imbalance of exponential profiles, with K and n_max of "
        "the class counts, against lambda_W lambda_H (default: off)",
    )
    add("--grid", type=bounded(int, 2), default=13, metavar="N", help="points along each side of the phase diagram")
    return parser


def problem_of(args, lambda_w, lambda_h):
    """Return the `UFM` of the flags at given penalties."""
    return UFM(
        args.class_counts,
        lambda_w,
        lambda_h,
        loss=args.loss,
        relu=not args.no_relu,
        bias=args.bias,
        bias_decay=args.bias_decay,
        variant=LossVariant(**{name: getattr(args, name) for name in VARIANTS}),
    )


def solve(args):
    """Return the solution of the problem that the flags describe, and how it was found, as plain values.

    "closed_form" is the solution found without search: in closed form, or class by class. "minimised" is the result of
    direct minimisation, which is left out for more than MOST_CLASSES classes if there is a solution without search.
    """
    problem = problem_of(args, args.weight_decay, args.feature_decay_rate)
    split, result = split_optimum(problem), {}
    if split is None or problem.num_classes <= MOST_CLASSES:
        with Progress(None, "round") as progress:
            found = solve_numerically(
                problem,
                dim=args.dim,
                level=args.level,
                starts=args.restarts,
                seed=args.seed,
                report=progress.step if sys.stderr.isatty() else None,  # elsewhere it would write to the output
            )
        result = {
            "minimised": plain(found.optimum),
            "losses_of_starts": found.losses,
            "projected_gradient": found.optimum.projected_gradient,
            "within_class_spread": found.within_class_spread,
        }
    if split:
        result["closed_form"] = plain(split)
        if "minimised" in result:
            result["loss_gap"] = found.optimum.loss / split.loss - 1
    optimum = split or found.optimum
    collapse = {"threshold": collapse_count(problem), "collapsed": optimum.collapsed.nonzero().flatten().tolist()}
    return {"class_counts": args.class_counts, **plain(optimum), **certificate(optimum), **collapse, **result}


def certificate(optimum):
    """Return how an Optimum was found, and what is proved about it, as plain values."""
    return {
        "method": optimum.method,
        "lower_bound": optimum.lower_bound if math.isfinite(optimum.lower_bound) else None,
        "gap": optimum.gap if math.isfinite(optimum.gap) else None,
        "certified": optimum.certified,
        "directions": optimum.directions,
        "unique": optimum.problem.unique,
    }


def plain(optimum):
    """Return an Optimum as numbers and lists."""
    names = ("margins", "mean_norms_sq", "bias", "HTH", "WWT", "WH")
    return {"loss": optimum.loss, **{name: getattr(optimum, name).tolist() for name in names}}


def print_suggestion(args):
    """Print the penalties of --suggest_lambdas as flags, and the margins that they lead to."""
    if args.collapse:
        lambda_w, lambda_h = suggest_collapse(problem_of(args, 1, 1), args.collapse, args.ratio)
    else:
        lambda_w, lambda_h = suggest_lambdas(args.class_counts, args.suggest_lambdas, args.ratio)
    optimum = closed_form(problem_of(args, lambda_w, lambda_h))
    living, zero = optimum.margins[~optimum.collapsed], optimum.collapsed.nonzero().flatten().tolist()
    print(f"--weight_decay {lambda_w:.6g} --feature_decay_rate {lambda_h:.6g}")
    print(f"lambda_W and lambda_H for margins from {living.min():.3g} to {living.max():.3g}, {collapsing(zero)}")


def collapsing(labels):
    """Return in words which classes collapse."""
    return f"{named(labels)} collapse{'' if len(labels) > 1 else 's'}"


def print_json(result):
    print(json.dumps(result, indent=2))


def print_table(args, result):
    """Print the result class by class: closed form, minimised, relative error; then the losses and what they prove."""
    solutions = [result[name] for name in ("closed_form", "minimised") if name in result]
    compared = len(solutions) == 2
    columns = ["margin M_k", "minimised", "rel. error", "|h_k|^2", "minimised", "rel. error"]
    if not compared:
        columns = ["margin", "|h_k|^2"]
    print(f"{'class':>5} {'n_k':>7}" + "".join(f" {column:>13}" for column in columns + ["bias"] * args.bias))
    for label, count in enumerate(args.class_counts):
        cells = []
        for name in ("margins", "mean_norms_sq"):
            values = [solution[name][label] for solution in solutions]
            cells += [f"{value + 0.0:.8g}" for value in values]  # no -0
            if compared:
                cells.append(f"{values[1] / values[0] - 1:.1e}" if values[0] else "-")
        if args.bias:
            cells.append(f"{result['bias'][label]:.8g}")
        print(f"{label:>5} {count:>7}" + "".join(f" {cell:>13}" for cell in cells))
    print()
    if result["threshold"] is not None:
        print(f"{'threshold of collapse':<27} n_k = {result['threshold']:.4g}: {collapsing(result['collapsed'])}")
    else:
        print(f"{'threshold of collapse':<27} not known: {collapsing(result['collapsed'])}")
    if "closed_form" in result:
        print(f"{'loss, ' + result['method']:<27} {result['closed_form']['loss']:.15g}")
    if "minimised" in result:
        print(f"loss, minimised             {result['minimised']['loss']:.15g}")
    if compared:
        print(f"relative gap                {result['loss_gap']:.1e}")
    if "minimised" in result:
        losses = result["losses_of_starts"]
        if len(losses) > 1:
            print(f"{f'worst of {len(losses)} starts':<27} {losses[-1] / losses[0] - 1:.1e} above the best")
        print(f"projected gradient          {result['projected_gradient']:.1e}, in scaled variables")
        if args.level == "sample":
            print(f"spread within classes       {result['within_class_spread']:.1e} of the largest feature")
    print(proved(result))
    if not result["unique"]:
        print("not unique: the minimisers form a line, along which W H + b is constant")
    if args.dim is not None and args.dim < result["directions"]:
        print(f"not reached with d = {args.dim}: this optimum has features in {result['directions']} directions")


def proved(result):
    """Return what the lower bound proves about the solution, in plain words."""
    if result["method"] == "closed form":
        return "certified: the closed form is the minimum"
    if result["gap"] is None:
        return "not certified: no lower bound of the loss is known"
    gap = f"{max(result['gap'], 1e-15):.1g}"
    if result["certified"]:
        return f"certified: no other solution is better by more than {gap}, relative"
    return f"not certified: another solution may be better by up to {gap}, relative"


# ---------------------------------------------------------------------------------------------------------
# Next-token problems
# ---------------------------------------------------------------------------------------------------------


def read_counts(path):
    """Return (names of the contexts, counts (C, K)) of the CSV file of --counts_file."""
    if not path.is_file():
        raise UserError(f"--counts_file: no file {path}")
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    for row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}: the row of {row[0]!r} has {len(row)} cells, the first row {len(header)}")
    try:
        counts = np.array([[float(cell) for cell in row[1:]] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return [row[0] for row in rows], counts


def print_contexts(args):
    """Solve the next-token problem of --counts_file, and print it context by context, or as JSON."""
    names, counts = read_counts(args.counts_file)
    problem = UFM(
        labels=counts,
        lambda_w=args.weight_decay,
        lambda_h=args.feature_decay_rate,
        relu=not args.no_relu,
        bias=args.bias,
        bias_decay=args.bias_decay,
    )
    optimum = solve_problem(problem)
    groups = [[names[number] for number in group] for group in merged_contexts(optimum)]
    collapsed = [name for name, zero in zip(names, optimum.collapsed.tolist(), strict=True) if zero]
    result = {"contexts": names, "merged": groups, "collapsed": collapsed, "entropy": problem.irreducible_loss}
    result |= plain(optimum) | certificate(optimum)
    if args.json:
        print_json(result)
        return
    print(f"{'n_k':>9} {'|h_k|^2':>13}  context")
    for name, count, norm in zip(names, problem.class_counts, result["mean_norms_sq"], strict=True):
        print(f"{count:>9g} {norm:>13.8g}  {name}")
    print()
    print(f"loss, {optimum.method:<21} {optimum.loss:.15g}")
    print(f"entropy of the labels       {problem.irreducible_loss:.15g}, the least loss without penalties")
    print(f"directions                  {optimum.directions}")
    for group in groups:
        print(f"share a direction           {', '.join(group)}")
    print(f"features at zero            {', '.join(collapsed) or 'none'}")
    print(proved(result))


def merged_contexts(optimum):
    """Return the groups of two or more contexts, by number, whose features share a direction, up to MERGED."""
    norms = optimum.mean_norms_sq.sqrt()
    cosines = optimum.HTH / (norms * norms[:, None]).where(norms * norms[:, None] > 0, math.inf)
    number, labels = connected_components(cosines.numpy() >= 1 - MERGED)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(number)]
    return [group for group in groups if len(group) > 1]


# ---------------------------------------------------------------------------------------------------------
# Phase diagram
# ---------------------------------------------------------------------------------------------------------


def phase_diagram(args):
    """Draw where the smallest class collapses, and return the paths written."""
    num_classes, n_max = len(args.class_counts), max(args.class_counts)
    ratios = np.geomspace(1, n_max, args.grid)
    profiles = [n_max * ratio ** -np.linspace(0, 1, num_classes) for ratio in ratios]
    edges = np.array([collapse_threshold(counts, args.loss) for counts in profiles])
    products = np.geomspace(edges.min() / 10, edges.max() * 10, args.grid)
    collapsed = np.zeros((args.grid, args.grid), bool)
    with Progress(collapsed.size, "problem") as progress:
        for column, counts in enumerate(profiles):
            for row, product in enumerate(products):
                problem = UFM(counts, math.sqrt(product), math.sqrt(product), loss=args.loss)
                found = solve_numerically(problem).optimum
                collapsed[row, column] = found.mean_norms_sq[-1] <= ZERO / math.sqrt(counts[-1])
                progress.step(f"imbalance {ratios[column]:.0f}  lambda_W lambda_H {product:.1e}")
    with style.context(STYLE_FILE):
        figure = draw_phases(ratios, products, collapsed, edges, num_classes, n_max)
        args.phase_diagram.parent.mkdir(parents=True, exist_ok=True)
        paths = [args.phase_diagram.with_name(f"{args.phase_diagram.name}.{kind}") for kind in ("pdf", "png")]
        for path in paths:
            figure.savefig(path)
    return paths


def draw_phases(ratios, products, collapsed, edges, num_classes, n_max):
    """Return the figure of collapsed (P, R) bool over products (P,) and ratios (R,), with the thresholds edges (R,)."""
    figure = Figure(figsize=(TEXT_WIDTH / 2, 2.9))
    axis = figure.subplots()
    x, y = np.meshgrid(ratios, products)
    found, threshold = COLOURS[:2]
    axis.plot(x[collapsed], y[collapsed], "o", color=found, markersize=3, label=r"minimiser: $h_K = 0$")
    axis.plot(
        x[~collapsed], y[~collapsed], "o", color=found, mfc="none", markersize=3, label=r"minimiser: $h_K \neq 0$"
    )
    axis.plot(ratios, edges, color=threshold, label="closed-form threshold")
    axis.set(xscale="log", yscale="log", xlabel=r"imbalance $n_{\max}/n_{\min}$", ylabel=r"$\lambda_W \lambda_H$")
    axis.set_title(rf"$K = {num_classes}$, $n_{{\max}} = {n_max}$, exponential profile")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    run_script(main)
