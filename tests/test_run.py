"""The config, the tables and the log of a run, read back, and runs grouped by setting."""

import math
import resource

import numpy as np
import pandas as pd
import pytest

from analysis.settings import by_setting, read_measured_run
from engine.run import Run
from engine.tables import MeasuredRun, append_rows, last_epoch, read_rows, write_table
from tests.conftest import make_run
from utils import UserError


def test_runs_that_differ_by_seed_only_are_one_setting(tmp_path):
    runs = [
        make_run(tmp_path / "a", "--lr", "0.001", "--seed", "1"),
        make_run(tmp_path / "b", "--lr", "0.01", "--seed", "1", "--save_path", "elsewhere"),
        make_run(tmp_path / "c", "--lr", "0.001", "--seed", "2", "--save_every", "7"),
    ]
    groups = by_setting(runs)
    assert [(label, [run.folder.name for run in group]) for label, group in groups] == [
        ("lr 0.001", ["a", "c"]),
        ("lr 0.01", ["b"]),
    ]
    assert [run.flags["seed"] for run in groups[0][1]] == [1, 2]
    assert by_setting(runs[:1])[0][0] == ""


def test_a_flag_younger_than_the_run_counts_as_off(tmp_path):
    runs = [make_run(tmp_path / "old", drop=["clip_grad_norm"]), make_run(tmp_path / "new", "--seed", "2")]
    assert len(by_setting(runs)) == 1


def test_a_folder_without_config_stands_for_itself(tmp_path):
    (tmp_path / "released").mkdir()
    groups = by_setting([MeasuredRun(Run(tmp_path / "released")), make_run(tmp_path / "ours")])
    assert [label for label, _ in groups] == ["released", ""]


def test_run_names_are_labels(tmp_path):
    runs = [
        make_run(tmp_path / "a", "--run_name", "plain"),
        make_run(tmp_path / "b", "--run_name", "deep", "--lr", "1"),
    ]
    assert [label for label, _ in by_setting(runs)] == ["plain", "deep"]
    runs.append(make_run(tmp_path / "c", "--run_name", "deep", "--lr", "2"))
    assert [label for label, _ in by_setting(runs)] == ["plain", "deep, lr 1", "deep, lr 2"]


def test_rows_come_by_epoch_theory_and_statistics(tmp_path):
    run = make_run(tmp_path / "run")
    (run.folder / "nc_metrics_bn_nominal.csv").write_text("epoch,NC1\n11,2\n1,3\n")
    assert run.rows.empty
    other = MeasuredRun(run.run, "nominal", "training_set")
    assert other.rows["epoch"].tolist() == [1, 11] and other.geometry_file(11).parent.name == "geometry_bn_nominal"
    assert other.caption == "theory nominal, training-set BatchNorm statistics" and run.caption == ""
    with pytest.raises(UserError, match="no such folder"):
        read_measured_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nc_metrics_bn_nominal.csv: no column NC2_H"):
        read_measured_run(run.folder, "nominal", "training_set", ["NC2_H"])


def test_rows_that_were_added_are_those_of_the_file(tmp_path):
    run = make_run(tmp_path / "run")
    for epoch in (5, 1, 3, 5):
        run.add_row({"epoch": epoch, "NC1": epoch / 3}, {"class_counts": [3, 4]})
    pd.testing.assert_frame_equal(run.rows, read_rows(run.csv))
    assert run.rows["epoch"].tolist() == [1, 3, 5] and list(run.rows.index) == [0, 1, 2]


def test_tables_read_back_exactly(tmp_path):
    """Every float64, an empty cell for NaN, whole numbers and texts."""
    values = np.random.default_rng(0).standard_normal(50) * 10.0 ** np.arange(-25, 25)
    table = pd.DataFrame({"epoch": range(50), "NC1": values, "NC2_H": np.nan, "split": "test", "class": 3})
    write_table(tmp_path / "a.csv", table)
    found = read_rows(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(found, table, check_exact=True, check_dtype=False, check_column_type=False)


def test_shares_of_the_gap_that_meant_something_else_are_not_read(tmp_path):
    """Tables of development versions have gap_within and gap_means in relative units, beside gap_head."""
    (tmp_path / "a.csv").write_text("epoch,optimality_gap,gap_within,gap_head,gap_means\n1,6,1,2,3\n")
    assert read_rows(tmp_path / "a.csv").to_dict("list") == {"epoch": [1], "optimality_gap": [6.0]}


@pytest.mark.parametrize(
    "text",
    [
        "epoch,NC1\n1,x\n",
        "epoch,NC1\n1.5,2\n",
        "NC1\n1\n",
        "epoch,NC1,NC2\n1,2,3\n2,4\n",
        "",
        "\0\0",
        "epoch,NC1\n,1\n",
        pytest.param(f"epoch,NC1\n1,{10**400}\n", id="too large for a float"),
    ],
)
def test_damaged_tables_are_named(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a.csv: damaged, not a table of numbers"):
        read_rows(tmp_path / "a.csv")


def test_a_damaged_log_keeps_its_good_lines(tmp_path):
    run = make_run(tmp_path / "run")
    run.run.train_log.path.write_text(
        '{"epoch": 2, "loss": 0.5, "seconds": 1}\nhalf\n{"epoch": 1, "loss": "x"}\n{"epoch": 2, "loss": 3}'
    )
    assert run.log["epoch"].tolist() == [1, 2] and run.log["loss"].tolist()[1] == 3 and np.isnan(run.log["loss"][0])


@pytest.mark.parametrize(
    ("flags", "problem", "factor"),
    [
        (["--sep_decay"], (0.1, 0.2), 1),
        (["--sep_decay", "--objective", "released"], (0.2, 0.2), 0.5),  # two batches of an epoch share the penalty
        (["--sep_decay", "--loss", "MSE", "--objective", "released"], (0.2, 0.2), 0.5),
        (["--sep_decay", "--depth_linear", "2"], None, 1),
        ([], None, 1),
    ],
)
def test_a_config_stands_for_the_problem_of_its_flags(tmp_path, flags, problem, factor):
    """3 and 4 images, batches of 4; lambdas 0.1 and 0.2. The nominal problem has no bias."""
    lambdas = ["--weight_decay", "0.1", "--feature_decay_rate", "0.2", "--batch_size", "4"]
    run = make_run(tmp_path / "run", *flags, *lambdas)
    found = run.comparison.problem
    assert (found and (found.lambda_w, found.lambda_h)) == (problem and pytest.approx(problem))
    assert run.comparison.data_factor == factor and (run.comparison.no_optimum is None) == (problem is not None)
    nominal = MeasuredRun(run.run, "nominal").comparison.problem
    assert (nominal.lambda_w, nominal.lambda_h, nominal.bias) == (0.1, 0.2, False)
    assert nominal.class_counts == (3, 4)


def test_rows_are_appended_whole_or_not_at_all(tmp_path):
    path, rows = tmp_path / "table.csv", [{"epoch": 2, "split": "test", "accuracy": value} for value in (0.1, math.nan)]
    assert last_epoch(path) == math.inf
    table = pd.DataFrame([rows[0] | {"epoch": 1}])
    write_table(path, table)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
        with pytest.raises(OSError, match=r"table.csv"):
            append_rows(path, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and last_epoch(path) == 1
    append_rows(path, rows)
    assert last_epoch(path) == 2
    write_table(tmp_path / "whole.csv", pd.concat([table, pd.DataFrame(rows)]))
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    path.write_bytes(path.read_bytes()[:-4])
    assert last_epoch(path) == math.inf  # a row that was cut off: `read_rows` names the damage
