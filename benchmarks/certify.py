"""Solve problems whose features share directions, and tell for each how long it takes and whether it is certified.

    python benchmarks/certify.py

The random problems have 13 to 21 (61 of them) and 22 to 30 classes: any loss of the family, with and without ReLU and
bias, of which those are kept that neither have a closed form nor split by class. With 100 classes: logit adjustment and
VS for the counts of long-tailed CIFAR-100, with penalties at which the largest margin of the cross entropy is 8 or 10.
Seconds are those of the process, on one core.
"""

import math
import time

import numpy as np
import torch
from common import make_parser, report

from nc_theory import UFM, LossVariant, solve_numerically, split_optimum, suggest_lambdas

LONG_TAILED = {"LA": LossVariant(logit_adjustment=1), "VS": LossVariant(logit_adjustment=1, logit_scaling=0.3)}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--small", type=int, default=61, help="problems with 13 to 21 classes")
    parser.add_argument("--medium", type=int, default=15, help="problems with 22 to 30 classes")
    parser.add_argument("--classes", type=int, default=100, help="of the long-tailed problems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = {
        "13 to 21 classes": random_problems(options.small, 13, 21),
        "22 to 30 classes": random_problems(options.medium, 22, 30),
        f"{options.classes} classes": long_tailed(options.classes),
    }
    rows = []
    for group, problems in groups.items():
        for name, problem in problems:
            rows.append(solved(group, name, problem))
            print(rows[-1], flush=True)
    report("certify", rows, torch.device("cpu"), options.out)
    for group in groups:
        found = [row for row in rows if row["group"] == group]
        certified = sum(row["certified"] for row in found)
        seconds = [row["seconds"] for row in found] or [math.nan]
        worst = max((row["gap"] for row in found), default=math.nan)
        print(
            f"{group}: {certified} of {len(found)} certified, worst gap {worst:.1e}, "
            f"{np.median(seconds):.2f} s (at most {max(seconds):.1f} s)"
        )


def solved(group, name, problem):
    """Return the row of a problem: what it takes to solve and certify it."""
    start = time.process_time()
    optimum = solve_numerically(problem).optimum
    seconds = time.process_time() - start
    row = {"group": group, "problem": name, "classes": problem.num_classes, "directions": optimum.directions}
    return row | {"seconds": round(seconds, 3), "gap": optimum.gap, "certified": optimum.certified}


def random_problem(random, least, most, relu):
    """Return a random UFM of `least` to `most` classes, of which none, some or all collapse, with or without a bias.

    Its loss is any variant of the cross entropy. random: a NumPy generator. relu: how often its features have a ReLU.
    """
    num_classes = int(random.integers(least, most + 1))
    counts = random.integers(1, 300, num_classes)
    values = [random.random() * limit * (random.random() < 0.5) for limit in (1.5, 2.0, 0.6, 2.0, 0.3)]
    product = 10 ** random.uniform(-4, 0.2) * counts.max() / counts.sum() ** 2 * (num_classes - 1) / num_classes
    ratio = 10 ** random.uniform(-3, 3)
    return UFM(
        counts,
        math.sqrt(product * ratio),
        math.sqrt(product / ratio),
        relu=random.random() < relu,
        bias=random.random() < 0.3,
        variant=LossVariant(*values),
    )


def random_problems(count, least, most):
    """Yield (name, UFM) of the first `count` random problems with `least` to `most` classes that need minimisation."""
    seed = 0
    while count:
        problem = random_problem(np.random.default_rng([most, seed]), least, most, relu=0.8)
        if split_optimum(problem) is None:
            yield f"seed {seed}", problem
            count -= 1
        seed += 1


def long_tailed(num_classes):
    """Yield (name, UFM) of LA and VS for exponential profiles from 500 images, as in long-tailed CIFAR-100."""
    for imbalance in (10, 100):
        counts = [int(500 * imbalance ** (-label / (num_classes - 1))) for label in range(num_classes)]
        for margin in (8.0, 10.0):
            lambda_w, lambda_h = suggest_lambdas(counts, margin=margin)
            for name, variant in LONG_TAILED.items():
                problem = UFM(counts, lambda_w, lambda_h, variant=variant)
                yield f"{name}, exp:{imbalance}, margin {margin:g}", problem


if __name__ == "__main__":
    main()
