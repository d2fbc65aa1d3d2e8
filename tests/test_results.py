"""The tables of README.md, docs/ and benchmarks/README.md show what results/*.csv hold."""

import csv
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from engine.run import Run
from engine.tables import MeasuredRun
from scripts import update_tables
from scripts.tables import TABLES, Setting
from tests.conftest import ROOT
from tests.recorded import COUNTS, EPOCHS, geometry, recorded, save_nothing, three_seeds, write_accuracies
from utils import UserError

PAGES = update_tables.documents(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert update_tables.redraw(text, ROOT / "results") == text


def test_every_result_is_shown():
    shown = {name for page in PAGES for name, *_ in update_tables.MARKED.findall(page.read_text())}
    results = {path.stem for path in (ROOT / "results").glob("*.csv")}
    views = {name for name in update_tables.SHOWN if update_tables.summary_of(name) != name}  # of another's results
    scripts = {update_tables.CHECK, update_tables.TIMES, *update_tables.TRAINED}
    written = {*update_tables.SHOWN, *update_tables.BY_CLASS, *scripts}
    assert shown == results | views == written


def test_a_changed_result_is_noticed_and_drawn(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    path = tmp_path / "results" / "recipe.csv"
    data, text = pd.read_csv(path), PAGES[0].read_text()
    data.loc[0, "NC1"] = 0.0123
    data.to_csv(path, index=False)
    redrawn = update_tables.redraw(text, tmp_path / "results")
    assert "| 0.012 (" in redrawn and "| 0.012 (" not in text
    assert update_tables.redraw(redrawn, ROOT / "results") == text


def test_a_table_that_is_not_closed_is_an_error():
    with pytest.raises(UserError, match="not closed"):
        update_tables.redraw("<!-- table: recipe -->\n", ROOT / "results")


def test_cells_are_the_means_and_worst_seeds_of_the_row_that_the_label_names():
    with open(ROOT / "results" / "recipe.csv", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if "/mixed-1" in row["folders"])
    (line,) = (line for line in update_tables.markdown("recipe", ROOT / "results").splitlines() if "N = 2,410" in line)
    cells = [re.findall(r"[\d.,e-]+", cell.replace(",", "")) for cell in line.split(" | ")[1:]]
    expected = [
        *((float(row[name]), float(row[f"{name}_worst"])) for name in ("NC1", "NC2_H", "NC2_WWT", "NC3_WH")),
        *((100 * float(row[name]), 100 * float(row[f"{name}_worst"])) for name in ("margin_rel_err", "norm_rel_err")),
        (float(row["step_to_0.01"]), float(row["step_to_0.01_worst"])),
        (float(row["seconds"]) / 60,),
    ]
    for cell, values in zip(cells, expected, strict=True):
        tolerance = 0.05 if len(values) == 1 else 1e-12  # minutes have one digit
        assert [float(number) for number in cell] == pytest.approx(values, rel=0.05, abs=tolerance)


def test_a_table_takes_over_the_folder_of_its_runs(monkeypatch, tmp_path):
    """Its summary and its figures, which for the recipe show only the runs named readme."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
    for name in ("readme-1", "readme-2", "digits-1"):
        recorded(tmp_path / "recipe" / name, seed=name[-1])
    (tmp_path / "recipe" / "summary.csv").write_text("new")
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    update_tables.take_over(tmp_path / "recipe", tmp_path)
    assert (tmp_path / "results" / "recipe.csv").read_text() == "new"
    figures = {path.name for path in (tmp_path / "docs" / "figures").iterdir()}
    assert figures == {"theorem.png", "nc_curves.png", "heatmaps.png"}
    assert all((ROOT / "docs" / "figures" / name).exists() for name in figures)
    with pytest.raises(UserError, match="not a folder that"):
        update_tables.take_over(tmp_path / "results", tmp_path)


def test_classes_are_means_over_the_seeds_of_the_last_epoch(tmp_path):
    """Of three seeds whose measurements are 1, 2 and 4 times those of the recorded run, and with other accuracies."""
    table, runs = replace(TABLES["mnist"], settings={"la": Setting("", "LA")}), []
    for folder, percent in zip(three_seeds(tmp_path), (50, 60, 100), strict=True):
        write_accuracies(folder, [percent - k for k in range(10)])
        runs.append(MeasuredRun(Run(folder)))
    rows, last = update_tables.classes("la", runs), geometry(EPOCHS[-1])
    assert [row["n_k"] for row in rows] == COUNTS and [row["class"] for row in rows] == list(range(10))
    for k, row in enumerate(rows):
        assert row["margins_theory"] == pytest.approx(last["margins_theory"][k])
        assert row["margins"] == pytest.approx(7 / 3 * last["margins"][k])
        assert row["norms"] == pytest.approx((1 + 2**0.5 + 2) / 3 * last["mean_norms_sq"][k] ** 0.5)
        assert row["test"] == pytest.approx(70 - k) and row["test_std"] == pytest.approx(700**0.5)
    table = update_tables.classes_markdown(table, pd.DataFrame(rows).astype({"class": str}))
    assert table.splitlines()[2].split(" | ")[0].strip("| ") == "8" and "62.0 ± 26.5" in table.splitlines()[2]
