"""The shell scripts: their help, wrong calls, odd paths, and the commands of the published tables."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from args import TRAINING_FLAGS, parse_args
from tests.conftest import ROOT
from tests.test_args import PAPER

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.s*") if path.name != "environment.sh")


@pytest.fixture
def checkout(tmp_path):
    """A copy of scripts/ in a checkout where nothing can be installed, downloaded or trained: PYTHON is a stub."""
    folder = tmp_path / 'it\'s a "check out"'
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (folder / name).touch()
    stub = tmp_path / "python stub"
    stub.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >>"{tmp_path}/calls"\n')
    stub.chmod(0o755)
    return folder, stub


def call(script, *args, stub=None, status=0, **variables):
    env = os.environ | ({"PYTHON": str(stub)} if stub else {}) | variables
    done = subprocess.run([script, *map(str, args)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_there_are_few_of_them():
    assert len(SCRIPTS) + 1 <= 9
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "scripts").glob("*.s*")) <= 250


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_prints_the_header_and_runs_nothing(checkout, tmp_path, name, word):
    folder, stub = checkout
    before = sorted(tmp_path.rglob("*"))
    (folder / "scripts" / name).chmod(0o755)
    out, error = call(folder / "scripts" / name, word, stub=stub, SLURM_SUBMIT_DIR=str(folder))
    header = [line for line in (folder / "scripts" / name).read_text().splitlines()[1:6] if line.startswith("# ")]
    assert out.startswith("Usage: ") and all(line[2:] in out for line in header) and not error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("quickstart.sh", ["--fast"], "unknown option --fast"),
        ("quickstart.sh", ["a", "b"], "give one FOLDER at most"),
        ("table.sh", [], "give TABLE and DIR"),
        ("table.sh", ["nothing", "x"], "there is no table 'nothing'"),
        ("table.sh", ["recipe", "x", "--fast"], "unknown option --fast"),
        ("reproduce.sh", ["imagenet"], "'imagenet' is not a data set of the paper"),
        ("reproduce.sh", [], "'' is not a data set of the paper"),
        ("reproduce.sh", ["svhn", "-j", "0"], "-j: '0' is not a whole number >= 1"),
        ("reproduce_small.sh", [], "give TABLE and DIR"),
    ],
)
def test_a_wrong_call_is_one_line(checkout, tmp_path, name, args, words):
    folder, stub = checkout
    _, error = call(folder / "scripts" / name, *args, stub=stub, status=2)
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "calls").exists()


def test_an_old_python_is_named(checkout, tmp_path):
    folder, stub = checkout
    stub.write_text("#!/bin/sh\nexit 1\n")
    _, error = call(folder / "scripts" / "quickstart.sh", stub=stub, status=2)
    assert "is not Python 3.11 or later" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["-run", 'it\'s a "run" $HOME', "plain"])
def test_quickstart_takes_odd_folders(checkout, tmp_path, name):
    folder, stub = checkout
    call(folder / "scripts" / "quickstart.sh", "--", tmp_path / name, stub=stub)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count(str(tmp_path / name)) == 2  # train and validate
    assert "train_1st_order_unbalanced.py" in calls and "validate_NC_unbalanced.py" in calls


def commands_of(path):
    """[flags of a run, parsed] of a commands.txt; training and validation have the same."""
    found = []
    for command in path.read_text().splitlines():
        train, validate = (shlex.split(part) for part in command.split(" && "))
        assert (train[1], validate[1]) == ("train_1st_order_unbalanced.py", "validate_NC_unbalanced.py")
        assert train[2:] == validate[2:] and train[0] == validate[0]
        args = parse_args(argv=[word.replace("@scripts", f"@{ROOT}/scripts") for word in train[2:]])
        assert args.resume
        found.append(args)
    return found


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn"])
def test_the_papers_experiments(checkout, dataset):
    """Four models, the paper's flags, folders of their own."""
    folder, stub = checkout
    variables = {"OBJECTIVE": "released", "FLAGS": "--save_every 100 --data_dir 'else where'"}
    out, _ = call(folder / "scripts" / "reproduce.sh", dataset, "--count", stub=stub, **variables)
    assert out == "4\n"
    settings = commands_of(folder / "model_weights" / f"{dataset}_released" / "commands.txt")
    paper = parse_args(argv=shlex.split(PAPER))
    for args in settings:
        assert (args.dataset, args.objective, args.save_every) == (dataset, "released", 100)
        assert args.data_dir == "else where" and args.batch_size == (256 if args.model == "MLP" else 32)
        free = {"model", "batch_size", "dataset", "objective"}
        assert {name for name in TRAINING_FLAGS if getattr(args, name) != getattr(paper, name)} <= free
        assert (args.epochs, args.patience) == (paper.epochs, paper.patience)
    assert [args.model for args in settings] == ["MLP", "ResNet18", "VGG11", "densenet_cifar"]
    assert len({args.save_path for args in settings}) == 4


@pytest.mark.parametrize(
    "table, runs", [("recipe", 25), ("small", 15), ("small_digits", 15), ("paper_counts", 2), ("plain", 4)]
)
def test_the_runs_of_a_table(checkout, tmp_path, table, runs):
    folder, stub = checkout
    data = tmp_path / "-it's data"
    (data / "cifar10" / "train").mkdir(parents=True)
    out, _ = call(folder / "scripts" / "table.sh", table, data, "--count", stub=stub)
    settings = commands_of(folder / "model_weights" / table / "commands.txt")
    assert out == f"{runs}\n" and len({args.save_path for args in settings}) == len(settings) == runs
    assert {args.data_dir for args in settings} == {str(data)} and all(args.sep_decay for args in settings)


def test_the_papers_command_is_compared_with_the_recipe(checkout):
    folder, stub = checkout
    call(folder / "scripts" / "table.sh", "paper_lambdas", "x", "--count", stub=stub)
    settings = {Path(a.save_path).name: a for a in commands_of(folder / "model_weights/paper_lambdas/commands.txt")}
    paper = parse_args(argv=shlex.split(PAPER))
    for objective in ("paper", "released"):
        plain, recipe = settings[f"plain_{objective}"], settings[f"recipe_{objective}"]
        assert {n for n in TRAINING_FLAGS if getattr(plain, n) != getattr(paper, n)} <= {"objective"}
        assert plain.objective == recipe.objective == objective and plain.epochs == 4000 and recipe.revive
        for args in (plain, recipe):
            assert (args.weight_decay, args.feature_decay_rate) == (paper.weight_decay, paper.feature_decay_rate)
