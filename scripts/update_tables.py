"""Redraw the tables and figures of README.md, docs/ and benchmarks/README.md.

    python scripts/update_tables.py                                             (tables, from results/)
    python scripts/update_tables.py model_weights/recipe model_weights/small    (also results/ and figures of these)

results/TABLE.csv is the summary.csv that `scripts/table.sh TABLE` writes. A document shows a table between the lines
`<!-- table: TABLE -->` and `<!-- end of table -->`. If the folder of a table's runs is given, the script also replaces
results/TABLE.csv and the table's figures in docs/figures/. results/check_gpu_cuda.csv is what scripts/check_gpu.sh
writes on a GPU.
"""

import argparse
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.figures import draw_runs
from analysis.summary import written
from engine.run import Run
from engine.tables import MeasuredRun
from utils import UserError, atomic_write, run_script

ROOT = Path(__file__).resolve().parent.parent
CHECK = "check_gpu_cuda"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.S)


def number(value):
    return written("", value)


def percent(value):
    return f"{100 * value:.{2 if value < 1 else 3}g} %"


def minutes(seconds):
    return f"{seconds / 60:.1f}"


COLUMNS = {  # head: the column of summary.csv, and how its values are written
    "seeds": ("seeds", "{:.0f}".format),
    "NC1": ("NC1", number),
    "NC2_H": ("NC2_H", number),
    "NC2_WWT": ("NC2_WWT", number),
    "NC3_WH": ("NC3_WH", number),
    "optimality gap": ("optimality_gap", number),
    "margins": ("margin_rel_err", percent),
    "norms": ("norm_rel_err", percent),
    "train": ("train_acc1", "{:.4g} %".format),
    "test": ("test_acc1", "{:.1f} %".format),
    "test, few": ("few_acc1", "{:.1f} %".format),
    "steps to 0.01": ("step_to_0.01", "{:,.0f}".format),
    "minutes": ("seconds", minutes),
    "minutes to 0.05": ("seconds_to_0.05", minutes),
    "minutes to 0.01": ("seconds_to_0.01", minutes),
}
GEOMETRY = ["NC1", "NC2_H", "NC2_WWT", "NC3_WH", "margins", "norms"]


@dataclass
class Table:
    """A table of the documents: its rows in order, and the figures drawn from its runs."""

    title: str  # of the first column
    rows: dict  # name of a run in scripts/tables.txt: label
    heads: list  # of the other columns, in COLUMNS
    worst: tuple = ()  # heads of columns that also show the worst seed, in brackets
    figures: dict = None  # file name in docs/figures: figure of plot_nc.py
    drawn: tuple = ()  # rows whose runs are in the figures; default: all
    x: str = "epoch"  # the x axis of the figures
    bn_statistics: str = "running"


SCHEDULE = {"heads": ["train", *GEOMETRY, "optimality gap", "minutes"], "x": "step"}  # tables of small penalties
ZOO = {
    "resnet18": "ResNet18, 10 to 50 of a class, N = 300",
    "resnet18_exp10": "ResNet18, `exp:10`, n_max 60, N = 240",
    "resnet18_3000": "ResNet18, 100 to 500 of a class, N = 3,000",
    "vgg11": "VGG11, N = 300",
    "densenet_cifar": "DenseNet, 12 channels, N = 300",
    "resnet50": "ResNet50, N = 300, batches of 60",
    "resnet50_full": "ResNet50, then 160 epochs with batches of 300",
    "resnet18_64": "ResNet18, 64 channels, N = 300, 400 epochs",
    "resnet18_64_full": "the same, then 90 epochs with batches of 300",
}
TABLES = {
    "recipe": Table(
        "five seeds each",
        {
            "readme": "CIFAR-10, 100 to 500 of a class, N = 3,000",
            "mixed": "CIFAR-10, 60 to 500 of a class, N = 2,410",
            "exp10": "CIFAR-10, `exp:10`, n_max 500, N = 2,043",
            "step10": "CIFAR-10, `step:10`, n_max 500, N = 2,750",
            "digits": "digits, 34 to 170 of a class, N = 1,020",
        },
        [*GEOMETRY, "steps to 0.01", "minutes"],
        worst=(*GEOMETRY, "steps to 0.01"),
        figures={"theorem": "theorem", "nc_curves": "nc_curves", "heatmaps": "heatmaps"},
        drawn=("readme",),
    ),
    "small": Table(
        "three seeds each, mean",
        {
            "imbalanced": "imbalanced, 100 to 500 of a class",
            "balanced": "balanced, 300 of a class",
            "exp10": "`exp:10`, 500 to 50",
            "step10": "`step:10`, 500 and 50",
            "collapsed": "collapsed, 500 to 200 and 60, 50, 40",
        },
        [*GEOMETRY, "train", "test"],
        figures={"small_theorem": "theorem", "small_nc_curves": "nc_curves"},
    ),
    "plain": Table(
        "one seed each",
        {
            "adam": "(a) CIFAR-10, N = 3,000, plain Adam, 1,000 epochs",
            "adam_bf16": "(a) with `--precision bf16`",
            "bias": "(b) digits, with bias",
            "mse": "(c) digits, MSE",
        },
        [*GEOMETRY, "train", "test"],
    ),
    "losses": Table(
        "three seeds each",
        {
            "ce": "cross entropy",
            "weighted_half": "`--class_weights 0.5`",
            "weighted": "`--class_weights 1`",
            "la": "`--logit_adjustment 1`, 500 epochs",
            "cdt": "`--logit_scaling 0.2`",
            "vs": "`--logit_adjustment 1 --logit_scaling 0.3`, 500 epochs",
            "ldam": "`--ldam_margin 0.5`",
            "smoothing": "`--label_smoothing 0.1`",
            "free": "cross entropy, `--no-feature_relu`",
        },
        ["optimality gap", "NC1", "NC2_H", "NC3_WH", "margins", "norms", "test", "test, few"],
        worst=("optimality gap", "NC3_WH"),
        figures={"free_features": "theorem"},
        drawn=("ce", "free"),
    ),
    "zoo": Table(
        "statistics of the training set",
        ZOO,
        ["seeds", *GEOMETRY, "optimality gap", "minutes"],
        worst=GEOMETRY,
        figures={"zoo_theorem": "theorem"},
        drawn=("resnet18", "vgg11", "densenet_cifar", "resnet50_full"),
        bn_statistics="training_set",
    ),
    "zoo_running": Table("running statistics", ZOO, ["seeds", *GEOMETRY, "optimality gap"], worst=GEOMETRY),
    "small_lambda": Table(
        "three seeds",
        {"schedule": "`@scripts/small_lambda.flags`"},
        worst=(*GEOMETRY, "optimality gap"),
        figures={"small_lambda": "training"},
        **SCHEDULE,
    ),
    "small_lambda_without": Table(
        "one seed",
        {
            "schedule": "`@scripts/small_lambda.flags`",
            "recipe": "`@scripts/collapse.flags --epochs 900`",
            "plain": "the paper's flags, 900 epochs",
        },
        figures={"small_lambda_without": "training"},
        **SCHEDULE,
    ),
    "paper_schedule": Table(
        "one seed",
        {"paper": "`@scripts/small_lambda.flags --lr 0.001 --epochs 120`"},
        figures={"paper_schedule": "training"},
        **SCHEDULE,
    ),
    "paper_released": Table(
        "one seed",
        {"released": "the same with `--objective released --penalty_start 27`"},
        figures={"paper_released": "training"},
        **SCHEDULE,
    ),
    "paper_counts": Table(
        "one seed each",
        {"fp32": "fp32, 150 epochs", "bf16": "bf16, 260 epochs"},
        ["train", *GEOMETRY, "minutes", "minutes to 0.05", "minutes to 0.01"],
        figures={"paper_counts": "nc_curves"},
        x="minutes",
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="folder of a table's runs")
    for folder in parser.parse_args().folders:
        take_over(folder, ROOT)
    for path in documents(ROOT):
        text = path.read_text()
        if (redrawn := redraw(text, ROOT / "results")) != text:
            with atomic_write(path, "w") as file:
                file.write(redrawn)
            print(path)


def run_name(folder):
    """Return the name in scripts/tables.txt of a run in a folder NAME or NAME-SEED."""
    return re.sub(r"-\d+$", "", Path(folder).name)


def documents(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]


def take_over(folder, root):
    """Copy the summary of a table's runs to results/, and draw the table's figures into docs/figures/."""
    table = TABLES.get(folder.resolve().name)
    if table is None or not (folder / "summary.csv").exists():
        raise UserError(f"{folder}: not a folder that scripts/table.sh has written for {', '.join(TABLES)}")
    shutil.copyfile(folder / "summary.csv", root / "results" / f"{folder.resolve().name}.csv")
    measured, runs = [path.parent for path in sorted(folder.glob("*/nc_metrics.csv"))], []
    for name in table.drawn or table.rows:
        for path in measured:
            if run_name(path) == name:
                label = table.rows[name].replace("`", "")  # legends as in the table
                runs.append(MeasuredRun(Run(path), bn_statistics=table.bn_statistics, run_name=label))
    with tempfile.TemporaryDirectory() as drawn:
        for name, figure in (table.figures or {}).items():
            draw_runs(runs, Path(drawn), x=table.x)
            shutil.copyfile(Path(drawn) / f"{figure}{runs[0].suffix}.png", root / "docs" / "figures" / f"{name}.png")


def redraw(text, results):
    """Return a document with its tables as results/ has them."""
    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        raise UserError("a table is not closed: write <!-- table: NAME -->, and <!-- end of table --> after it")
    return MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{markdown(match[1], results)}\n\n", text)


def markdown(name, results):
    """Return a table of TABLES, or that of the check of a GPU, as Markdown."""
    if name == CHECK:
        return measurements(pd.read_csv(results / f"{name}.csv", dtype=str, keep_default_na=False))
    table, summary = TABLES[name], pd.read_csv(results / f"{name}.csv")
    summary.index = [run_name(folders.split()[0]) for folders in summary["folders"]]
    lines = [["", table.title, *table.heads, ""], ["", *["---"] * (1 + len(table.heads)), ""]]
    for run, label in table.rows.items():
        cells = []
        for head in table.heads:
            column, form = COLUMNS[head]
            several = head in table.worst and summary.loc[run, "seeds"] > 1
            worst = f" ({form(summary.loc[run, f'{column}_worst'])})" if several else ""
            cells.append(f"{form(summary.loc[run, column])}{worst}")
        lines.append(["", label, *cells, ""])
    return "\n".join(" | ".join(line).strip() for line in lines)


def measurements(rows):
    """Return the rows of a check of a GPU as Markdown, with values of four digits, or whole ones from 1,000 on."""
    numbers = pd.to_numeric(rows["value"], errors="coerce")
    digits = numbers.map(lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    rows["value"] = rows["value"].replace("True", "yes").where(numbers.isna(), digits)
    return rows.to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    run_script(main)
