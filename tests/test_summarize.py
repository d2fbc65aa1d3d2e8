"""summarize.py on hand-made and on real run folders, against numbers computed independently."""

import csv
import json
import math
import statistics

import pandas as pd
import pytest

from analysis.settings import by_setting, read_measured_run
from analysis.summary import METRICS, markdown, shortfall, summarize, time_to_collapse
from engine.tables import write_table
from tests.conftest import make_run
from tests.recorded import ROWS, geometry, three_seeds

TINY = "--dataset digits --width 24 --depth_relu 1 --epochs 1 --batch_size 200 --no-bias --sep_decay".split()


def write_run(folder, *flags, distances, epochs=9, every=4, seconds=2.0):
    """A run of 7 images and batches of 4, measured at epochs 1, 5, ...: there all metrics are `distances`."""
    run = make_run(folder, "--batch_size", "4", "--epochs", "9", *flags)
    for epoch in range(1, epochs + 1):
        run.run.train_log.append({"epoch": epoch, "loss": 1 / epoch, "seconds": seconds})
    if distances:
        rows = [{"epoch": 1 + every * i, **dict.fromkeys(METRICS, value)} for i, value in enumerate(distances)]
        write_table(folder / "nc_metrics.csv", pd.DataFrame(rows))
    return read_measured_run(run.folder, columns=METRICS)


def cells(text):
    """The tables of a Markdown text as lists of {head: cell}."""
    tables = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[0] == "|"]
        if lines:
            tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def test_mean_and_standard_deviation_over_the_seeds(tmp_path):
    values = {1: 8.1e-4, 2: 8.4e-4, 3: 8.9e-4}
    runs = [
        write_run(tmp_path / f"{seed}", "--seed", f"{seed}", distances=[2, 1, value], seconds=float(seed))
        for seed, value in values.items()
    ]
    table = summarize([("", runs)])
    row = table.iloc[0]
    assert row["seeds"] == row["runs"] == 3 and row["setting"] == "all runs"
    assert row["NC1"] == pytest.approx(statistics.mean(values.values()))
    assert row["NC1_std"] == pytest.approx(statistics.stdev(values.values()))
    assert (row["seconds"], row["seconds_std"]) == (18.0, 9.0)
    line = cells(markdown(table, runs))[0][0]
    assert (line["seeds"], line["NC2_H"], line["time"]) == ("3", "8.5e-4 ± 4e-5", "0:00:18 ± 0:00:09")
    line = cells(markdown(table, runs, worst=True))[0][0]
    assert (line["NC2_H"], line["time"]) == ("8.5e-4 (8.9e-4)", "0:00:18 (0:00:27)")
    assert row["train_acc1_worst"] == 8.1e-4  # of an accuracy, the lowest is the worst


def test_one_seed_has_no_deviation_and_large_numbers_no_tail(tmp_path):
    text = markdown(summarize([("x", [write_run(tmp_path / "a", distances=[2, 2, 36.279])])]), [])
    assert cells(text)[0][0]["NC1"] == "36" and cells(text)[0][0]["test_acc1"] == "36.28"


def test_an_infinite_value_is_shown_as_one(tmp_path):
    text = markdown(summarize([("x", [write_run(tmp_path / "a", distances=[2, 2, math.inf])])]), [])
    assert cells(text)[0][0]["NC1"] == "inf"


@pytest.mark.parametrize(
    "distances, expected",
    [
        ([0.9, 0.9, 0.9], None),
        ([0.9, 0.04, 0.9], None),  # did not stay
        ([0.9, 0.9, 0.05], (9, 18, 18.0)),
        ([0.9, 0.04, 0.03], (5, 10, 10.0)),
        ([0.01, 0.9, 0.01], (9, 18, 18.0)),
        ([0.01, 0.01, 0.01], (1, 2, 2.0)),
    ],
)
def test_time_to_collapse_is_when_the_distances_become_small_for_good(tmp_path, distances, expected):
    """An epoch has ceil(7/4) = 2 steps and takes 2 seconds."""
    found = time_to_collapse(write_run(tmp_path / "a", distances=distances), 0.05)
    assert found == expected or (expected is None and all(map(math.isnan, found)))


@pytest.mark.parametrize("name", ["NC2_H", "NC2_WWT", "NC3_WH"])
def test_time_to_collapse_needs_all_three_distances(tmp_path, name):
    run = write_run(tmp_path / "a", distances=[0.9, 0.04, 0.04])
    run.rows.loc[1, name] = 0.06
    assert time_to_collapse(run, 0.05)[0] == 9
    run.rows.loc[2, name] = float("nan")
    assert math.isnan(time_to_collapse(run, 0.05)[0])


def test_time_to_collapse_over_seeds(tmp_path):
    """Median and slowest seed; "not reached" if a seed misses it; a dash without an optimum."""
    ends = {"a": [0.9, 0.9, 0.04], "b": [0.9, 0.04, 0.04], "c": [0.04, 0.04, 0.009]}
    runs = [write_run(tmp_path / name, "--seed", f"{i}", distances=end) for i, (name, end) in enumerate(ends.items())]
    table = summarize([("x", runs)])
    line = cells(markdown(table, runs))[1][0]
    assert [line[f"{unit} to 0.05"] for unit in ("epochs", "steps", "time")] == [
        "5 (9)",
        "10 (18)",
        "0:00:10 (0:00:18)",
    ]
    assert line["epochs to 0.01"] == "not reached by 2 of 3" and line["steps to 0.01"] == "-"
    run = write_run(tmp_path / "d", distances=[float("nan")] * 3)
    assert set(cells(markdown(summarize([("x", [run])]), [run]))[1][0].values()) == {"x", "1", "-"}


def test_runs_that_do_not_count_are_listed(tmp_path):
    done = write_run(tmp_path / "done", distances=[0.9, 0.9, 0.3])
    cut = write_run(tmp_path / "cut", "--seed", "2", distances=[0.9, 0.8], epochs=6)
    failed = write_run(tmp_path / "failed", "--seed", "3", distances=[0.9], epochs=4)
    failed.run.train_log.append({"epoch": 5, "loss": float("nan"), "seconds": 1.0})
    failed = read_measured_run(failed.folder, columns=METRICS)
    unmeasured = write_run(tmp_path / "unmeasured", "--seed", "4", distances=[0.9, 0.8])
    empty = make_run(tmp_path / "empty", "--seed", "5", "--batch_size", "4", "--epochs", "9")
    runs = [done, cut, failed, unmeasured, empty]
    assert [shortfall(run) for run in runs] == [
        None,
        "unfinished: 6 of 9 epochs",
        "failed: the loss is not finite in epoch 5",
        "not measured at its last epoch, 9: run validate_NC_unbalanced.py",
        "unfinished: 0 of 9 epochs",
    ]
    table = summarize([("x", runs)])
    row = table.iloc[0]
    assert (row["seeds"], row["runs"], row["NC1"]) == (1, 5, 0.3)
    text = markdown(table, runs)
    assert cells(text)[0][0]["seeds"] == "1 of 5" and f"- {cut.folder}: unfinished: 6 of 9 epochs\n" in text
    text = markdown(summarize([("x", [cut])]), [cut])
    assert cells(text)[0][0]["seeds"] == "0 of 1" and cells(text)[0][0]["NC1"] == "-"


def test_long_labels_are_listed_once_above_the_tables(tmp_path):
    """Only flags that differ are named; short labels stay in the tables."""
    profiles = {"a": "500,450,400,350,300,250,200,60,50,40", "b": "100,100,200,200,300,300,400,400,500,500"}
    runs = [
        write_run(tmp_path / name, "--class_counts", counts, "--lr", lr, distances=[0.9, 0.9, 0.3])
        for (name, counts), lr in zip(profiles.items(), ("0.001", "0.002"), strict=True)
    ]
    text = markdown(summarize(by_setting(runs)), runs)
    first, second = "500,450,40...0,60,50,40", "100,100,20...00,500,500"
    assert text.startswith(f"1. class_counts {first}, lr 0.001\n2. class_counts {second}, lr 0.002\n\n| setting")
    assert [[line["setting"] for line in table] for table in cells(text)] == [["1", "2"], ["1", "2"]]
    runs = [write_run(tmp_path / lr, "--lr", lr, distances=[0.9, 0.9, 0.3]) for lr in ("0.001", "0.002")]
    text = markdown(summarize(by_setting(runs)), runs)
    assert text.startswith("| setting") and [line["setting"] for line in cells(text)[0]] == ["lr 0.001", "lr 0.002"]


def test_accuracies_by_frequency_are_shown_if_there_are_any(tmp_path):
    runs = [write_run(tmp_path / f"{seed}", "--seed", f"{seed}", distances=[2, 2, seed]) for seed in (1, 3)]
    assert "few_acc1" not in cells(markdown(summarize([("", runs)]), runs))[0][0]
    for run in runs:
        run.rows = run.rows.assign(balanced_acc1=run.rows["NC1"], few_acc1=10 * run.rows["NC1"])
    table = summarize([("", runs)])
    line = cells(markdown(table, runs, worst=True))[0][0]
    assert (line["balanced_acc1"], line["few_acc1"]) == ("2.00 (1.00)", "20.00 (10.00)") and "many_acc1" not in line
    assert table.loc[0, "few_acc1_std"] == pytest.approx(10 * 2**0.5)


def test_without_runs_it_lists_them_with_their_state(run_script, tmp_path):
    (tmp_path / "model_weights" / "table").mkdir(parents=True)
    write_run(tmp_path / "model_weights" / "table" / "done", distances=[0.9, 0.9, 0.3])
    write_run(tmp_path / "model_weights" / "cut", distances=[0.9, 0.25], epochs=6)
    failed = write_run(tmp_path / "model_weights" / "failed", distances=[0.9], epochs=2)
    failed.run.train_log.append({"epoch": 3, "loss": float("inf"), "seconds": 1.0})
    make_run(tmp_path / "model_weights" / "new", "--epochs", "9")
    (tmp_path / "model_weights" / "torn").mkdir()
    (tmp_path / "model_weights" / "torn" / "config.json").write_text("{")
    out, _ = run_script("summarize.py")
    lines = [tuple(line.values()) for line in cells(out)[0]]
    assert lines == [
        ("model_weights/cut", "unfinished: 6 of 9 epochs", "5", "0.25"),
        ("model_weights/failed", "failed: the loss is not finite in epoch 3", "1", "0.9"),
        ("model_weights/new", "unfinished: 0 of 9 epochs", "0", "-"),
        ("model_weights/table/done", "finished", "9", "0.3"),
        ("model_weights/torn", "failed: model_weights/torn/config.json: damaged, not a run's config", "-", "-"),
    ]
    assert not (tmp_path / "summary.csv").exists()


def test_the_script_on_real_runs(run_script, train, tmp_path):
    """A setting of one good run, one that failed, bare checkpoints; the same folder twice counts once."""
    train(*TINY, "--nc_every", 1, "--save_path", "good")
    train(*TINY, "--lr", 1e30, "--epochs", 2, "--save_path", "bad", status=1)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "nc_metrics.csv").write_bytes((tmp_path / "good" / "nc_metrics.csv").read_bytes())
    out, _ = run_script("summarize.py", "good", "bad", "bare", "good", "--out", "tables")
    text = (tmp_path / "tables" / "summary.md").read_text(encoding="utf-8")
    assert text in out and "- bad: failed: the loss is not finite in epoch 1\n" in text
    settings = [(line["setting"], line["seeds"]) for line in cells(text)[0]]
    assert settings == [("lr 0.0001, epochs 1", "1"), ("lr 1e+30, epochs 2", "0 of 1"), ("bare", "1")]
    with open(tmp_path / "tables" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(tmp_path / "good" / "nc_metrics.csv", newline="") as file:
        assert next(csv.DictReader(file))["NC1"] == rows[0]["NC1"] == rows[2]["NC1"] != ""
    log = json.loads((tmp_path / "good" / "train_log.jsonl").read_text())
    assert float(rows[0]["seconds"]) == log["seconds"] and rows[1]["NC1"] == rows[2]["seconds"] == ""


def test_wrong_input_is_one_line(run_script, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "nc_metrics.csv").write_text("epoch,NC1\n1,2\n")
    for runs, words in (
        (["nowhere"], "nowhere: no such folder"),
        (["old"], "old/nc_metrics.csv: no column NC2_H"),
        ([], "no run below model_weights/"),
    ):
        _, error = run_script("summarize.py", *runs, status=2)
        assert words in error and error.count("\n") == 1, error


def test_a_row_a_run_and_a_column_a_flag(run_script, tmp_path):
    folders = three_seeds(tmp_path)
    run_script("summarize.py", *folders, "--out", "out")
    table = pd.read_csv(tmp_path / "out" / "summary_runs.csv")
    assert table["seed"].tolist() == [1, 2, 3] and (table["R"] == 5).all() and (table["weight_decay"] == 0.01).all()
    assert table["NC2_H"].tolist() == pytest.approx([factor * ROWS["NC2_H"][-1] for factor in (1, 2, 4)])
    assert table["threshold"][0] == pytest.approx(1020**2 * 0.01 * 0.0005 * 10 / 9)
    assert table["norm_sq_smallest"][0] == pytest.approx(geometry(80)["mean_norms_sq"][:2].mean())
    assert (table["classes_at_zero_theory"] == 0).all()


def test_a_folder_of_runs_is_not_a_run(run_script, tmp_path):
    three_seeds(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, words in ((".", "a folder of runs, not a run: give"), ("empty", "empty: no run in it")):
        _, error = run_script("summarize.py", folder, status=2)
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "summary.csv").exists()


def test_the_figure_of_minority_collapse(run_script, tmp_path):
    folders = three_seeds(tmp_path)
    out, _ = run_script("scripts/collapse_figure.py", *folders, "--out", tmp_path / "new" / "collapse")
    assert out.split() == [str(tmp_path / "new" / f"collapse.{kind}") for kind in ("pdf", "png")]
    assert (tmp_path / "new" / "collapse.png").stat().st_size > 10_000
