"""TensorBoard's event files read back, and what happens without the packages."""

import json

import pytest

from analysis.settings import read_measured_run
from tests.conftest import ROOT

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

TINY = "--dataset digits --width 24 --depth_relu 1 --batch_size 200 --no-bias --sep_decay --save_path run".split()


def events(folder):
    """Return {tag: {epoch: value}} of the scalars in a folder of event files, and the epochs with heatmaps."""
    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags["scalars"]}
    for tag, values in scalars.items():
        assert len(accumulator.Scalars(tag)) == len(values), f"{tag}: an epoch twice"
    return scalars, [image.step for tag in tags["images"] for image in accumulator.Images(tag)]


def same(values, rows, column):
    """Return True if event values equal a DataFrame's column in float32."""
    return values == {row["epoch"]: pytest.approx(row[column], rel=1e-6) for _, row in rows.iterrows()}


def test_tensorboard_has_the_log_the_metrics_and_the_heatmaps(train, measure, tmp_path):
    run = tmp_path / "run"
    train(*TINY, "--epochs", 1, "--nc_every", 1, "--tensorboard")
    scalars, heatmaps = events(run / "tensorboard" / "train")
    assert same(scalars["train/loss"], read_measured_run(run).log, "loss") and same(
        scalars["train/lr"], read_measured_run(run).log, "lr"
    )
    assert same(scalars["nc/NC2_H"], read_measured_run(run).rows, "NC2_H") and heatmaps == [1]
    assert not {tag for tag in scalars if "epoch" in tag}

    train(*TINY, "--epochs", 3, "--nc_every", 0, "--resume", "--tensorboard")  # goes on in the same curves
    scalars, _ = events(run / "tensorboard" / "train")
    assert same(scalars["train/loss"], read_measured_run(run).log, "loss") and len(read_measured_run(run).log) == 3

    for flags, epochs in (([], [3]), (["--recompute"], [1, 3])):  # the second call hides what the first one wrote
        measure("--load_path", "run", "--tensorboard", *flags)
        scalars, heatmaps = events(run / "tensorboard" / "validate")
        rows = read_measured_run(run).rows
        assert same(scalars["nc/NC1"], rows[rows["epoch"].isin(epochs)], "NC1") and heatmaps == epochs

    (run / "tensorboard" / "notes.txt").write_text("mine")
    train(*TINY, "--epochs", 1, "--force")
    assert [path.name for path in (run / "tensorboard").rglob("*") if path.is_file()] == ["notes.txt"]


def test_columns_without_a_value_are_left_out(train, measure, tmp_path):
    train(*TINY, "--epochs", 1, "--depth_linear", 2)
    measure("--load_path", "run", "--tensorboard")
    scalars, heatmaps = events(tmp_path / "run" / "tensorboard" / "validate")
    assert "nc/NC1" in scalars and "nc/NC2_H" not in scalars and heatmaps == [1]


@pytest.mark.parametrize("flags", [["--tensorboard"], ["--wandb", "True"]], ids=["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_any_work(run_script, tmp_path, flags):
    """Nothing else needs either package."""
    code = "import runpy, sys\nsys.modules.update(tensorboard=None, wandb=None)\n"
    code += f"runpy.run_path({str(ROOT / 'train_1st_order_unbalanced.py')!r}, run_name='__main__')"
    (tmp_path / "without.py").write_text(code)
    package = flags[0].removeprefix("--")
    _, error = run_script(tmp_path / "without.py", *TINY, *flags, status=2)
    assert f"pip install {package}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    run_script(tmp_path / "without.py", *TINY, "--epochs", 1)


def test_wandb_offline(train, tmp_path):
    pytest.importorskip("wandb")
    train(*TINY, "--epochs", 2, "--wandb", "True")
    folder = next((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert list(folder.glob("run-*.wandb"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["wandb"] is True
