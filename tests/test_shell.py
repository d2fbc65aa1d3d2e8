"""The shell scripts: their help, wrong calls, odd paths, and the commands of the published tables."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from args import NAMES_RUN, flags_with, parse_args
from scripts.tables import TABLES
from tests.conftest import PAPER, ROOT, wait_for

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.s*") if path.name != "environment.sh")

# The start of a stub of Python: the real one runs scripts/tables.py and `python -c`, which asks for the version.
# If $NOTES names a file, tables.py reads no data but adds a line "load_data" to that file.
REAL = f"""#!/usr/bin/env bash
case $1 in
    -c) exec {shlex.quote(sys.executable)} "$@" ;;
    scripts/tables.py) exec {shlex.quote(sys.executable)} - "$@" <<'END' ;;
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
del sys.argv[0]
if "NOTES" in os.environ and "--check" not in sys.argv:
    import datasets
    def note(*args, **kwargs):
        with open(os.environ["NOTES"], "a") as file:
            file.write("load_data\\n")
    datasets.load_data = note
runpy.run_path("scripts/tables.py", run_name="__main__")
END
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of scripts/ in a checkout where nothing can be installed, downloaded or trained: PYTHON is a stub."""
    folder = tmp_path / 'it\'s a "check out"'
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (folder / name).touch()
    stub = tmp_path / "python stub"
    stub.write_text(f'{REAL}for word; do printf "%s\\n" "$word"; done >>"{tmp_path}/calls"\n')
    stub.chmod(0o755)
    return folder, stub


def call(script, *args, stub=None, status=0, **variables):
    env = os.environ | ({"PYTHON": str(stub)} if stub else {}) | variables
    done = subprocess.run([script, *map(str, args)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


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


def test_the_help_lists_the_tables_with_their_times(checkout):
    folder, stub = checkout
    out = " ".join(call(folder / "scripts" / "table.sh", "--help", stub=stub)[0].split())
    for name, table in TABLES.items():
        assert (f" {name} {table.what}. {f'Time: {table.time}.' if table.time else ''}" in out) != bool(table.part_of)


def test_arguments_are_checked_without_packages():
    """-S: the interpreter finds none."""
    for arguments in (["--list"], ["--check", "run", "recipe", "x"], ["--check", "reproduce", "svhn"]):
        subprocess.run([sys.executable, "-I", "-S", ROOT / "scripts" / "tables.py", *arguments], check=True)


@pytest.mark.parametrize("table", [name for name, table in TABLES.items() if not table.part_of])
def test_every_table_has_commands_that_parse(checkout, table):
    """One for each run, in a folder of its own; a table that measures twice has a third command."""
    folder, stub = checkout
    data = folder / "data" / "cifar10" / "train"
    data.mkdir(parents=True)
    out, _ = call(folder / "scripts" / "table.sh", table, folder / "data", "--count", stub=stub)
    lines = (folder / "model_weights" / table / "commands.txt").read_text().splitlines()
    folders = set()
    for line in lines:
        for command in line.split(" && "):
            flags = [word.replace("@scripts", f"@{ROOT}/scripts") for word in shlex.split(command)[2:]]
            folders.add(parse_args(argv=flags).save_path)
    assert int(out) == len(lines) == len(folders)
    assert {line.count(" && ") for line in lines} == {2 if TABLES[table].bn_statistics == "training_set" else 1}


def test_a_line_break_in_a_folder_is_one_line(checkout):
    folder, stub = checkout
    _, error = call(folder / "scripts" / "table.sh", "plain", "a\nb", "--count", stub=stub, status=2)
    assert error.startswith("table.sh: error: ") and "line break" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("quickstart.sh", ["--fast"], "unknown option --fast"),
        ("quickstart.sh", ["a", "b"], "give one FOLDER at most"),
        ("table.sh", [], "give TABLE and DIR"),
        ("table.sh", ["nothing", "x"], "there is no table 'nothing'"),
        ("table.sh", ["zoo_running", "x"], "there is no table 'zoo_running'"),
        ("table.sh", ["recipe", "-x"], "give TABLE and DIR"),
        ("table.sh", ["recipe", "x", "--fast"], "unknown option --fast"),
        ("reproduce.sh", ["imagenet"], "'imagenet' is not a data set of the paper"),
        ("reproduce.sh", [], "'' is not a data set of the paper"),
        ("reproduce.sh", ["svhn", "-j", "0"], "-j: '0' is not a whole number >= 1"),
        ("check_gpu.sh", ["a", "b"], "give one DIR at most"),
    ],
)
def test_a_wrong_call_is_one_line(checkout, tmp_path, name, args, words):
    folder, stub = checkout
    _, error = call(folder / "scripts" / name, *args, stub=stub, status=2)
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "calls").exists()


def test_an_old_python_is_named(checkout):
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
    """Four models with batches of 256, and on CIFAR-10 ResNet18 with 32 as well; folders of their own."""
    folder, stub = checkout
    variables = {"OBJECTIVE": "released", "FLAGS": "--save_every 100 --data_dir 'else where'"}
    out, _ = call(folder / "scripts" / "reproduce.sh", dataset, "--count", stub=stub, **variables)
    settings = commands_of(folder / "model_weights" / f"{dataset}_released" / "commands.txt")
    assert out == f"{len(settings)}\n"
    paper = parse_args(argv=shlex.split(PAPER))
    for args in settings:
        assert (args.dataset, args.objective, args.save_every) == (dataset, "released", 100)
        assert args.data_dir == "else where"
        free = {"model", "batch_size", "dataset", "objective"}
        assert {name for name in flags_with(NAMES_RUN) if getattr(args, name) != getattr(paper, name)} <= free
        assert (args.epochs, args.patience) == (paper.epochs, paper.patience)
    models = [(model, 256) for model in ("MLP", "ResNet18", "VGG11", "densenet_cifar")]
    models += [("ResNet18", 32)] * (dataset == "cifar10")
    assert [(args.model, args.batch_size) for args in settings] == models
    assert len({args.save_path for args in settings}) == len(models)


@pytest.mark.parametrize(
    "table, runs",
    [("recipe", 30), ("small", 15), ("small_digits", 15), ("paper", 6), ("plain", 4)],
)
def test_the_runs_of_a_table(checkout, tmp_path, table, runs):
    folder, stub = checkout
    data = tmp_path / "-it's data"
    (data / "cifar10" / "train").mkdir(parents=True)
    out, _ = call(folder / "scripts" / "table.sh", table, data, "--count", stub=stub)
    settings = commands_of(folder / "model_weights" / table / "commands.txt")
    assert all(Path(args.save_path).parent == Path("model_weights", table) for args in settings)
    assert out == f"{runs}\n" and len({args.save_path for args in settings}) == len(settings) == runs
    assert {args.data_dir for args in settings} == {str(data)} and all(args.sep_decay for args in settings)


def test_the_paper_and_the_recipe_solve_the_same_problem(checkout):
    folder, stub = checkout
    paper = parse_args(argv=shlex.split(PAPER))
    recipe = {"seed", "lr", "decay_type", "patience", "adam_beta2", "stratified", "epochs"}
    for table, runs, free in (("paper_command", 4, {"precision"}), ("paper", 6, recipe)):
        call(folder / "scripts" / "table.sh", table, "x", "--count", stub=stub)
        settings = commands_of(folder / f"model_weights/{table}/commands.txt")
        for args in settings:
            differ = {name for name in flags_with(NAMES_RUN) if getattr(args, name) != getattr(paper, name)}
            assert differ <= {"objective", *free}
        assert len(settings) == runs and {args.objective for args in settings} == {"paper", "released"}


def test_the_table_of_plain_adam(checkout):
    """In fp32 and bf16, with a bias, and with MSE: the flags of the published runs."""
    folder, stub = checkout
    call(folder / "scripts" / "table.sh", "plain", "x", "--count", stub=stub)
    adam = (
        "--no-bias --class_counts 100,100,200,200,300,300,400,400,500,500 --depth_relu 6 --width 512 --batch_size 256 "
        "--weight_decay 0.005 --feature_decay_rate 0.00005 --epochs 1000 --patience 500"
    )
    digits = (
        "--dataset digits --depth_relu 3 --width 256 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005 "
        "--clip_grad_norm 1"
    )
    wanted = {
        "adam": adam,
        "adam_bf16": f"{adam} --precision bf16",
        "bias": f"{digits} --bias --epochs 1000 --patience 800",
        "mse": f"{digits} --no-bias --loss MSE --epochs 500 --patience 400",
    }
    for args in commands_of(folder / "model_weights" / "plain" / "commands.txt"):
        flags = wanted.pop(Path(args.save_path).name)
        other = parse_args(argv=shlex.split(f"--model MLP --sep_decay --lr 0.001 --save_every 100 {flags}"))
        changed = {name for name in vars(other) if getattr(args, name) != getattr(other, name)}
        assert changed <= {"data_dir", "save_path", "resume", "given"}
    assert not wanted


def test_the_small_table_takes_digits_where_there_is_no_cifar10(checkout, tmp_path):
    folder, stub = checkout
    assert call(folder / "scripts" / "table.sh", "small", tmp_path / "nothing", "--count", stub=stub)[0] == "15\n"
    settings = commands_of(folder / "model_weights" / "small_digits" / "commands.txt")
    assert {args.dataset for args in settings} == {"digits"}


# ---------------------------------------------------------------------------------------------------------
# Running a table
# ---------------------------------------------------------------------------------------------------------

# Notes each call in a line. Validating leaves a CSV; training fails in the run $BROKEN, and hangs if $SLOW is set.
STUB = (
    REAL
    + """echo "${*//$'\\n'/ }" >>"${0%/*}/calls"
for word; do [ "$last" != --save_path ] || run=$word; last=$word; done
case $1 in
    train*) [ -z "$SLOW" ] || exec sleep 600; [[ -z $BROKEN || $run != *"$BROKEN" ]] ;;
    validate*) touch "$run/nc_metrics.csv" ;;
esac
"""
)


def test_a_table_is_run_summarised_and_drawn(checkout, tmp_path):
    """In this order; a failed run is listed in the table but not drawn."""
    folder, stub = checkout
    stub.write_text(STUB)
    arguments, variables = ("plain", tmp_path / "my data", "-j", "1"), {"BROKEN": "bf16", "NOTES": f"{tmp_path}/calls"}
    out, _ = call(folder / "scripts" / "table.sh", *arguments, stub=stub, status=1, **variables)
    log = folder / "model_weights" / "plain" / "commands.txt.logs" / "2.log"
    assert f"job 2 failed with exit status 1, {log}: {log.read_text().splitlines()[-1]}\n" in out
    calls = (tmp_path / "calls").read_text().splitlines()
    kinds = [
        kind for line in calls for kind in ("load_data", "train_", "validate_", "summarize", "plot") if kind in line
    ]
    pair = ["train_", "validate_"]
    assert kinds == ["load_data", *pair, "train_", *pair, *pair, "summarize", "plot"]
    runs = [f"model_weights/plain/{name}" for name in ("adam", "adam_bf16", "bias", "mse")]
    assert calls[-2] == f"summarize.py {' '.join(runs)} --worst --out model_weights/plain"
    assert calls[-1] == f"plot_nc.py {' '.join([runs[0], *runs[2:]])} --out model_weights/plain/figures"


def test_one_line_of_a_table_lists_the_runs_that_have_begun(checkout, tmp_path):
    """As in a Slurm array: the runs of other tasks, which may not have begun, have not failed."""
    folder, stub = checkout
    stub.write_text(STUB.replace("train*)", 'train*) echo "{}" >"$run/config.json";'))
    arguments = ("plain", tmp_path / "data", "--line", "3")
    call(folder / "scripts" / "table.sh", *arguments, stub=stub, NOTES=f"{tmp_path}/calls")
    *_, summarised, drawn = (tmp_path / "calls").read_text().splitlines()
    assert summarised == "summarize.py model_weights/plain/bias --worst --out model_weights/plain"
    assert drawn == "plot_nc.py model_weights/plain/bias --out model_weights/plain/figures"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_table_stops_its_jobs(checkout, tmp_path, number):
    """On SIGTERM to the script alone; on SIGINT and SIGHUP to its process group, as a terminal sends them."""
    folder, stub = checkout
    stub.write_text(STUB)
    command = [folder / "scripts" / "table.sh", "plain", "x", "-j", "2"]
    calls = tmp_path / "calls"
    env = os.environ | {"PYTHON": str(stub), "SLOW": "1", "NOTES": str(calls)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["env", "--default-signal", *command], env=env, process_group=0, **pipes)
    wait_for(lambda: calls.exists() and calls.read_text().count("train") == 2)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    _, error = process.communicate(timeout=600)  # ends once no process holds the pipes
    assert process.returncode == 128 + number and error == "sweep.sh: stopped; run it again to continue\n"
    assert "summarize" not in calls.read_text()


def test_missing_data_stop_a_table_before_its_jobs(checkout, tmp_path):
    """With one line from datasets.py, because the real Python reads the data."""
    folder, stub = checkout
    stub.write_text(f"{REAL}echo $1 >>{shlex.quote(str(tmp_path / 'calls'))}\n")
    flags = "--data_dir nowhere --no-download"
    _, error = call(folder / "scripts" / "reproduce.sh", "mnist", stub=stub, status=2, FLAGS=flags)
    assert error.startswith("reproduce.sh: error: mnist: ") and error.count("\n") == 1
    assert "train" not in (tmp_path / "calls").read_text()


def test_missing_packages_go_into_a_virtual_environment(checkout, tmp_path):
    """Made once; the commands are those of its interpreter."""
    folder, stub = checkout
    stub.write_text(
        f'{REAL}echo "$*" >>"{tmp_path}/calls"\ncase "$*" in\n*--dry-run*) echo Would install torch ;;\n'
        '"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;\nesac\n'
    )
    for _ in range(2):
        out, error = call(folder / "scripts" / "table.sh", "plain", "x", "--count", stub=stub)
        assert out == "4\n" and ".venv" in error and error.count("\n") == 1
    line = (folder / "model_weights" / "plain" / "commands.txt").read_text().splitlines()[0]
    assert shlex.split(line)[0] == str(folder / ".venv" / "bin" / "python")
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-m venv .venv") == 1 and calls.count("-m pip install --quiet") == 2
