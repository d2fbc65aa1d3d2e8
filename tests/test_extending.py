"""A loss and an optimizer of a user's own, by following docs/extending.md to the letter."""

import re
import shlex

import numpy as np
import pandas as pd
import pytest

import objective
from tests.conftest import ROOT, config_of, log_of, same_weights, without_figures

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S)
COMMANDS = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if "sweep" not in block]
NEED_AN_OPTIMUM = {"NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err", "optimality_gap"}


@pytest.fixture
def own_files(tmp_path):
    """The files of the page, in the folder in which scripts run."""
    for name, text in FILES:
        (tmp_path / name).write_text(text)


def calls(block):
    """Yield (script, words) of the commands of a block of the page."""
    lines = block.replace("\\\n", " ").splitlines()
    flags = next((shlex.split(line)[0].removeprefix("flags=") for line in lines if line.startswith("flags=")), "")
    for line in lines:
        if line.startswith("python "):
            _, script, *words = shlex.split(line.replace("$flags", flags))
            yield script, words


@pytest.mark.parametrize("block", COMMANDS)
def test_the_commands_of_the_page_run(block, own_files, run_script, tmp_path):
    commands = list(calls(block))
    for script, words in commands:
        run_script(script, *words)
    (run,) = (tmp_path / "model_weights").iterdir()
    assert (commands and (run / "epoch_002.pth").exists()) or (run / "epoch_020.pth").exists()


def test_a_loss_of_a_file_says_its_name_everywhere(own_files, run_script, tmp_path):
    (train, flags), (validate, same) = calls(COMMANDS[0])
    out, _ = run_script(train, *flags)
    assert flags == same and "no optimum is known for --loss my_losses.focal" in out
    (run,) = (tmp_path / "model_weights").iterdir()
    assert "_my_losses.focal-paper_" in run.name
    config, log = config_of(run), log_of(run)
    assert config["flags"]["loss"] == "my_losses.py:focal" and config["data_column"] == "my_losses.focal"
    assert all(line["my_losses.focal"] > 0 and not line.keys() & {"ce", "mse"} for line in log)
    (tmp_path / "my_losses.py").unlink()  # validation does not need it
    out, _ = run_script(validate, *flags)
    assert "stay empty: no optimum is known for --loss my_losses.focal" in out
    row = pd.read_csv(run / "nc_metrics.csv").iloc[-1]
    assert row[[*NEED_AN_OPTIMUM]].isna().all()
    remain = ["NC0", "NC1", "NC4", "CDNV", "GNC2", "ETF_HTH", "SELI_HTH", "test_acc1", "few_acc1", "NCM_acc1"]
    assert np.isfinite(row[remain].astype(float)).all() and row["train_acc1"] > 90
    if (run / "report.html").exists():
        assert "my_losses.focal" in (run / "report.html").read_text()


def add_focal_loss():
    """Add the loss of the page under the name Focal, as the page says, in the process of a script."""
    names = {"LOSSES": objective.LOSSES, "Loss": objective.Loss}
    exec(FILES[0][1], names)
    (line,) = re.findall(r'^LOSSES\["Focal"\] = .*$', PAGE, re.M)
    exec(line, names)


def add_focal_loss_without_figures():
    add_focal_loss()
    without_figures()


def test_a_registered_loss_is_that_of_the_file(own_files, run_script, tmp_path):
    (train, flags), (validate, _) = calls(COMMANDS[0])
    run_script(train, *flags, "--save_path", "file")
    named = ["--loss", "Focal", *flags[2:], "--save_path", "named"]
    run_script(train, *named, before=add_focal_loss)
    assert same_weights(tmp_path / "file" / "epoch_020.pth", tmp_path / "named" / "epoch_020.pth")
    assert all("focal" in line for line in log_of(tmp_path / "named"))
    out, _ = run_script(validate, *named, before=add_focal_loss_without_figures)
    assert "no optimum is known for --loss Focal" in out


def test_runs_with_files_resume_exactly_and_only_with_the_same_files(own_files, train, tmp_path):
    flags = "--dataset digits --width 24 --depth_relu 2 --batch_size 50 --no-bias --lr 0.001 --save_every 1".split()
    code = ["--loss", "my_losses.py:focal", "--optimizer", "my_optimizers.py:sgd_without_decay_of_biases"]
    train(*flags, *code, "--epochs", 3, "--save_path", "whole")
    train(*flags, *code, "--epochs", 2, "--save_path", "cut")
    _, error = train("--resume", "--epochs", 3, "--save_path", "cut", status=2)
    assert "--loss my_losses.py:focal: also give this flag" in error
    text = (tmp_path / "my_losses.py").read_text()
    (tmp_path / "my_losses.py").write_text(text + "\n# a comment\n")
    _, error = train(*flags, *code, "--resume", "--epochs", 3, "--save_path", "cut", status=2)
    assert "--loss my_losses.py:focal: the file has changed since the run began" in error
    (tmp_path / "my_losses.py").write_text(text)
    train(*flags, *code, "--resume", "--epochs", 3, "--save_path", "cut")
    assert same_weights(tmp_path / "whole" / "epoch_003.pth", tmp_path / "cut" / "epoch_003.pth")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")


def test_deferred_class_weights_resume_exactly(train, tmp_path):
    flags = "--dataset digits --width 24 --depth_relu 1 --batch_size 50 --no-bias --sep_decay --class_weights 1".split()
    deferred = [*flags, "--class_weights_from", 3, "--save_every", 1]
    for folder, words in (("none", flags[:-2]), ("deferred", deferred), ("cut", deferred)):
        train(*words, "--epochs", 2, "--save_path", folder)
    assert same_weights(tmp_path / "none" / "epoch_002.pth", tmp_path / "deferred" / "epoch_002.pth")
    train(*deferred, "--epochs", 4, "--save_path", "whole")
    train(*deferred, "--epochs", 4, "--save_path", "cut", "--resume")
    assert same_weights(tmp_path / "whole" / "epoch_004.pth", tmp_path / "cut" / "epoch_004.pth")
    assert not same_weights(tmp_path / "whole" / "epoch_003.pth", tmp_path / "whole" / "epoch_002.pth")
