"""Run folders read back, and grouped by setting."""

import json

import pytest

from args import config_flags, parse_args
from runs import by_setting, read_run
from utils import UserError


def make_run(folder, *flags, drop=()):
    """A folder with the config.json that training would write for these flags."""
    folder.mkdir()
    typed = config_flags(parse_args(argv=[*flags]))
    config = {"flags": {name: value for name, value in typed.items() if name not in drop}, "class_counts": [3, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    return read_run(folder)


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
    assert [run.seed for run in groups[0][1]] == [1, 2]
    assert by_setting(runs[:1])[0][0] == ""


def test_a_flag_younger_than_the_run_counts_as_its_default(tmp_path):
    runs = [make_run(tmp_path / "old", drop=["clip_grad_norm"]), make_run(tmp_path / "new", "--seed", "2")]
    assert len(by_setting(runs)) == 1


def test_a_folder_without_config_stands_for_itself(tmp_path):
    (tmp_path / "released").mkdir()
    groups = by_setting([read_run(tmp_path / "released"), make_run(tmp_path / "ours")])
    assert [label for label, _ in groups] == ["released", ""]


def test_rows_come_by_epoch_and_by_theory(tmp_path):
    run = make_run(tmp_path / "run")
    (run.folder / "nc_metrics_nominal.csv").write_text("epoch,NC1\n11,2\n1,3\n")
    assert run.rows == [] and [row["epoch"] for row in read_run(run.folder, "nominal").rows] == [1, 11]
    assert read_run(run.folder, "nominal").geometry_file(11).name == "epoch_011.npz"
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nothing")
