"""Redraw the tables and figures of README.md, docs/ and benchmarks/README.md.

    python scripts/update_tables.py                                             (tables, from results/)
    python scripts/update_tables.py model_weights/recipe model_weights/small    (also results/ and figures of these)

scripts/tables.py defines the tables, and results/TABLE.csv is the summary.csv that `scripts/table.sh TABLE` writes. A
document shows a table between the lines `<!-- table: TABLE -->` and `<!-- end of table -->`. If the folder of a table's
runs is given, the script also replaces results/TABLE.csv and the table's figures in docs/figures/. A table with
`by_class` also has results/TABLE_classes.csv: margins, norms and test accuracies of each class, over the seeds.
results/check_gpu_cuda.csv is what scripts/check_gpu.sh writes on a GPU, results/trained_heads.csv and
results/trained_features.csv what scripts/trained_heads.py writes.
"""

import argparse
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.figures import draw_runs
from analysis.summary import written
from engine.run import Run
from engine.tables import MeasuredRun, write_table
from scripts.tables import TABLES, summary_of
from utils import UserError, atomic_write, run_script

ROOT = Path(__file__).resolve().parent.parent
CHECK, TIMES = "check_gpu_cuda", "time_to_collapse"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.S)


def number(value):
    return written("", value)


def percent(value):
    return f"{100 * value:.{2 if value < 1 else 3}g} %"


def minutes(seconds):
    return f"{seconds / 60:.1f}"


COLUMNS = {  # head: the column of summary.csv, and how its values are written
    "seeds": ("seeds", "{:.0f}".format),
    "NC0": ("NC0", number),
    "NC1": ("NC1", number),
    "NC2_H": ("NC2_H", number),
    "NC2_WWT": ("NC2_WWT", number),
    "NC3_WH": ("NC3_WH", number),
    "optimality gap": ("optimality_gap", number),
    "margins": ("margin_rel_err", percent),
    "norms": ("norm_rel_err", percent),
    "train": ("train_acc1", "{:.4g} %".format),
    "test": ("test_acc1", "{:.1f} %".format),
    "test, balanced": ("balanced_acc1", "{:.1f} %".format),
    "test, few": ("few_acc1", "{:.1f} %".format),
    "steps to 0.01": ("step_to_0.01", "{:,.0f}".format),
    "minutes": ("seconds", minutes),
    "minutes to 0.05": ("seconds_to_0.05", minutes),
    "minutes to 0.01": ("seconds_to_0.01", minutes),
}
HEADS_COLUMNS = {  # of results/trained_heads.csv, and how they are written
    "head": str,
    "classes": "{:,.0f}".format,
    "d": "{:,.0f}".format,
    "NC0": number,
    "common": "{:.1%}".format,
    "equiangularity_classifier": number,
    "ETF_WWT": number,
    "ETF_centred": number,
    "optimum_WWT": number,
    "optimum_WWT_large": number,
    "norm_exponent": "{:+.2f}".format,
    "longest": number,
    "untrained": "{:,.0f}".format,
    "norms_rank": "{:+.2f}".format,
    "biases_rank": "{:+.2f}".format,
    "majority": number,
    "rarest_cosine": "{:+.2f}".format,
}
FEATURES_COLUMNS = {  # of results/trained_features.csv
    "head": str,
    "classes_seen": "{:,.0f}".format,
    "samples": "{:,.0f}".format,
    "acc1": "{:.1f} %".format,
    "NCM_acc1": "{:.1f} %".format,
    "NC4": "{:.1%}".format,
    "NC1": number,
    "NC1_corrected": number,
    "NC1_trace": number,
    "CDNV": number,
    "noise_share": number,
    "self_duality": number,
    "alignment": "{:+.2f}".format,
}
TRAINED = {"trained_heads": HEADS_COLUMNS, "trained_features": FEATURES_COLUMNS}
KINDS = ("random", "recipe")  # of benchmarks/time_to_collapse.py
SHOWN = {name: table for name, table in TABLES.items() if table.heads}
BY_CLASS = {f"{name}_classes": table for name, table in TABLES.items() if table.by_class}


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


def setting_of(folder):
    """Return the name of the setting of a run in a folder NAME or NAME-SEED."""
    return re.sub(r"-\d+$", "", Path(folder).name)


def documents(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]


def take_over(folder, root):
    """Copy the summary of a table's runs to results/, and draw the table's figures into docs/figures/."""
    table = SHOWN.get(folder.resolve().name)
    if table is None or not (folder / "summary.csv").exists():
        raise UserError(f"{folder}: not a folder that scripts/table.sh has written for {', '.join(SHOWN)}")
    shutil.copyfile(folder / "summary.csv", root / "results" / f"{folder.resolve().name}.csv")
    measured = {name: [] for name in table.settings}
    for path in sorted(folder.glob("*/nc_metrics.csv")):
        label = table.settings[setting_of(path.parent)].label.replace("`", "")  # legends as in the table
        run = MeasuredRun(Run(path.parent), bn_statistics=table.bn_statistics, run_name=label)
        measured[setting_of(path.parent)].append(run)
    if table.by_class:
        rows = [row for name, runs in measured.items() for row in classes(name, runs)]
        write_table(root / "results" / f"{folder.resolve().name}_classes.csv", pd.DataFrame(rows))
    runs = [run for name in table.drawn or table.settings for run in measured[name]]
    with tempfile.TemporaryDirectory() as drawn:
        for name, figure in table.figures.items():
            draw_runs(runs, Path(drawn), x=table.x)
            shutil.copyfile(Path(drawn) / f"{figure}{runs[0].suffix}.png", root / "docs" / "figures" / f"{name}.png")


def classes(setting, runs):
    """Return a row (dict) for each class of runs that differ by their seed, at their last measured epochs."""
    epochs = [run.rows["epoch"].iloc[-1] for run in runs]
    arrays = [run.geometry(epoch) for run, epoch in zip(runs, epochs, strict=True)]
    accuracies = np.array([run.class_accuracy(epoch) for run, epoch in zip(runs, epochs, strict=True)])
    names = runs[0].class_names or range(len(arrays[0]["class_counts"]))
    return [
        {"setting": setting, "class": name, "n_k": int(arrays[0]["class_counts"][k])}
        | {column: np.mean([array[column][k] for array in arrays]) for column in ("margins_theory", "margins")}
        | {
            column: np.mean([math.sqrt(array[f"mean_norms_sq{end}"][k]) for array in arrays])
            for column, end in (("norms_theory", "_theory"), ("norms", ""))
        }
        | {"test": accuracies[:, k].mean(), "test_std": accuracies[:, k].std(ddof=1) if len(runs) > 1 else 0.0}
        for k, name in enumerate(names)
    ]


def redraw(text, results):
    """Return a document with its tables as results/ has them."""
    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        raise UserError("a table is not closed: write <!-- table: NAME -->, and <!-- end of table --> after it")
    return MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{markdown(match[1], results)}\n\n", text)


def markdown(name, results):
    """Return a table of SHOWN, that of the check of a GPU, or one of TRAINED, as Markdown."""
    if name == TIMES:
        return collapse_times(pd.read_csv(results / f"{name}.csv"))
    if name == CHECK:
        return measurements(pd.read_csv(results / f"{name}.csv", dtype=str, keep_default_na=False))
    if name in BY_CLASS:
        return classes_markdown(BY_CLASS[name], pd.read_csv(results / f"{name}.csv", converters={"class": str}))
    if name in TRAINED:
        rows = pd.read_csv(results / f"{name}.csv")[[*TRAINED[name]]]
        for head, form in TRAINED[name].items():
            rows[head] = ["-" if pd.isna(value) else form(value) for value in rows[head]]
        return rows.to_markdown(index=False, disable_numparse=True)
    table, summary = SHOWN[name], pd.read_csv(results / f"{summary_of(name)}.csv")
    summary.index = [setting_of(folders.split()[0]) for folders in summary["folders"]]
    lines = [["", table.title, *table.heads, ""], ["", *["---"] * (1 + len(table.heads)), ""]]
    for row in table.shown or table.settings:
        cells = []
        for head in table.heads:
            column, form = COLUMNS[head]
            several = head in table.worst and summary.loc[row, "seeds"] > 1
            worst = f" ({form(summary.loc[row, f'{column}_worst'])})" if several else ""
            spread = f" ± {summary.loc[row, f'{column}_std']:.1f}" if head in table.spread else ""
            value = summary.loc[row, column]
            cells.append("-" if pd.isna(value) else f"{form(value)}{worst}{spread}")
        lines.append(["", table.settings[row].label, *cells, ""])
    return "\n".join(" | ".join(line).strip() for line in lines)


def classes_markdown(table, rows):
    """Return the classes of a table as Markdown, from the most images to the fewest.

    Margins and norms are those of the first setting; test accuracies are those of all settings, with the standard
    deviation over the seeds.
    """
    rows = rows.sort_values("n_k", ascending=False, kind="stable")
    first = rows[rows["setting"] == next(iter(table.settings))]
    shown = {"class": first["class"], "n_k": first["n_k"].map("{:,}".format)}
    for name in ("margin", "norm"):
        shown |= {f"{name}, theorem": first[f"{name}s_theory"].map("{:.4f}".format)}
        shown |= {f"{name}, measured": first[f"{name}s"].map("{:.4f}".format)}
    for name, setting in table.settings.items():
        own = rows[rows["setting"] == name]
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(own["test"], own["test_std"], strict=True)]
        shown[f"test: {setting.label}"] = cells
    return pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True)


def collapse_times(rows):
    """Return the steps and seconds to collapse of each setting as Markdown: medians, and ranges of the ratios."""
    shown = []
    for (setting, bound), of_setting in rows.groupby(["setting", "bound"], sort=False):
        row = {"setting": setting, "to": f"{bound:g}", "seeds": len(of_setting)}
        for unit, form in (("steps", "{:,.0f}"), ("seconds", "{:,.1f}")):
            row |= {f"{unit}, {kind}": form.format(of_setting[f"{unit}, {kind}"].median()) for kind in KINDS}
            low, middle, high = of_setting[f"{unit}, ratio"].quantile([0, 0.5, 1])
            row[f"{unit}, ratio"] = f"{middle:.1f}" + (f" ({low:.1f} to {high:.1f})" if len(of_setting) > 1 else "")
        shown.append(row)
    return pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True)


def measurements(rows):
    """Return the rows of a check of a GPU as Markdown, with values of four digits, or whole ones from 1,000 on."""
    numbers = pd.to_numeric(rows["value"], errors="coerce")
    digits = numbers.map(lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    rows["value"] = rows["value"].replace("True", "yes").where(numbers.isna(), digits)
    return rows.to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    run_script(main)
