"""sweep.sh, the Slurm array and the paper's experiments: what runs, what is skipped, what a kill leaves."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from args import TRAINING_FLAGS, parse_args
from tests.conftest import ROOT
from tests.test_args import PAPER
from tests.test_scripts import log_of, same_weights
from utils import read_csv, read_log

SWEEP = ROOT / "scripts" / "sweep.sh"
FLAGS = "--dataset digits --width 24 --depth_relu 1 --batch_size 200 --no-bias --sep_decay --save_every 80".split()


def environment(**changes):
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | changes


def sweep(*args, status=0, **changes):
    """Runs sweep.sh; returns (stdout, stderr)."""
    command = [SWEEP, *map(str, args)]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def write_sweep(folder, *lines):
    path = folder / "sweep.txt"
    path.write_text("# a comment\n\n" + "\n".join(lines) + "\n")
    return path


def training(folder, epochs):
    """A line that trains and validates."""
    flags = shlex.join([*FLAGS, "--epochs", str(epochs), "--save_path", str(folder), "--resume"])
    scripts = ("train_1st_order_unbalanced.py", "validate_NC_unbalanced.py")
    return " && ".join(f"{sys.executable} {script} {flags}" for script in scripts)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------


def test_complete_jobs_are_skipped_and_failed_ones_run_again(tmp_path):
    (tmp_path / "bad").touch()
    ran = f"echo $PWD >>{tmp_path}"
    path = write_sweep(
        tmp_path,
        f"{ran}/first",
        f"{ran}/first",  # the same line twice is one job
        f"""{ran}/second; echo "it's this" >&2; test ! -e {tmp_path}/bad""",
        f"{ran}/third",
    )
    assert sweep("--count", path)[0] == "3\n"
    out, _ = sweep(path, status=1)
    assert "exit status 1: it's this\n" in out and "2 of 3 complete\n" in out
    (tmp_path / "bad").unlink()
    out, _ = sweep(path)
    assert "3 of 3 complete\n" in out and out.count("begins") == 1
    counts = {name: (tmp_path / name).read_text() for name in ("first", "second", "third")}
    assert counts == {"first": f"{ROOT}\n", "second": f"{ROOT}\n" * 2, "third": f"{ROOT}\n"}
    logs = [log.read_text() for log in (tmp_path / "sweep.txt.jobs").glob("*.log")]
    assert len(logs) == 3 and sum(log.count("it's this\n") for log in logs) == 2
    write_sweep(tmp_path, f"{ran}/first", f"{ran}/third; true")
    assert sweep(path)[0].count("begins") == 1  # a changed line is another job


def test_each_job_has_a_gpu_of_its_own(tmp_path):
    """With two GPUs, two jobs at a time; mkdir fails where two share one."""
    lines = [f"d={tmp_path}/$CUDA_VISIBLE_DEVICES; mkdir $d && sleep 0.2 && rmdir $d # {i}" for i in range(5)]
    sweep(write_sweep(tmp_path, *lines), CUDA_VISIBLE_DEVICES="GPU-a,3")
    logs = [log.read_text() for log in (tmp_path / "sweep.txt.jobs").glob("*.log")]
    assert len(logs) == 5
    lines = [f"echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/seen; mkdir {tmp_path}/one-{i}; sleep 1" for i in range(4)]
    sweep("-j", 4, write_sweep(tmp_path, *lines), CUDA_VISIBLE_DEVICES="GPU-a,3")
    assert sorted((tmp_path / "seen").read_text().split()) == ["3", "3", "GPU-a", "GPU-a"]


@pytest.mark.parametrize("jobs, share", [(1, 1), (2, 2), (64, 2)])
def test_jobs_on_the_cpu_share_the_cores(tmp_path, jobs, share):
    """As many jobs as there are lines count, at most; each has a core at least."""
    path = write_sweep(tmp_path, *(f"echo $OMP_NUM_THREADS >{tmp_path}/{i}" for i in range(2)))
    sweep("-j", jobs, path, CUDA_VISIBLE_DEVICES="")
    cores = len(os.sched_getaffinity(0))
    assert (tmp_path / "1").read_text() == f"{max(cores // share, 1)}\n"
    sweep("-j", jobs, write_sweep(tmp_path, f"echo $OMP_NUM_THREADS >{tmp_path}/2"), OMP_NUM_THREADS="7")
    assert (tmp_path / "2").read_text() == "7\n"


def test_wrong_calls_are_one_line(tmp_path):
    path, empty = write_sweep(tmp_path, "true"), tmp_path / "empty"
    empty.write_text("# nothing\n")
    for args, words in (
        ([tmp_path / "nothing"], "nothing: no such file"),
        ([empty], "no command in it"),
        (["-j", "0", path], "-j: '0' is not a whole number >= 1"),
        (["--line", "2", path], "has 1 commands"),
        (["--fast", path], "unknown option --fast"),
        ([], "one FILE is needed"),
    ):
        _, error = sweep(*args, status=2)
        assert words in error and error.count("\n") == 1, error


# ---------------------------------------------------------------------------------------------------------
# What a kill leaves
# ---------------------------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on(train, tmp_path):
    """Ended by SIGTERM in the midst of training, with one job done and one waiting; it ends as if never cut."""
    run, epochs = tmp_path / "run", 100
    path = write_sweep(tmp_path, f"echo x >>{tmp_path}/before", training(run, epochs), f"echo x >>{tmp_path}/after")
    process = subprocess.Popen([SWEEP, path], env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE)
    wait_for(lambda: len(read_log(run)) > 5)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 143 and b"the same call goes on" in error
    cut = read_log(run)
    assert len(cut) < epochs and not (tmp_path / "after").exists()
    time.sleep(0.5)
    assert read_log(run) == cut  # nobody trains there any more

    out, _ = sweep(path, OMP_NUM_THREADS="1")
    assert "3 of 3 complete\n" in out and out.count("begins") == 2
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text() == "x\n"
    assert [int(row["epoch"]) for row in read_csv(run / "nc_metrics.csv")] == [1, 81, epochs]
    train(*FLAGS, "--epochs", epochs, "--save_path", "whole")
    assert log_of(run) == log_of(tmp_path / "whole")
    assert same_weights(run / f"epoch_{epochs}.pth", tmp_path / "whole" / f"epoch_{epochs}.pth")


def test_a_job_that_is_shot_has_failed_and_the_others_run(tmp_path):
    path = write_sweep(tmp_path, "kill -KILL $$", f"touch {tmp_path}/after")
    assert "exit status 137" in sweep(path, status=1)[0] and (tmp_path / "after").exists()


def test_a_job_that_runs_is_not_begun_a_second_time(tmp_path):
    path = write_sweep(tmp_path, f"echo x >>{tmp_path}/ran; until [ -e {tmp_path}/go ]; do sleep 0.1; done")
    first = subprocess.Popen([SWEEP, path], env=environment(), stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "ran").exists)
    out, _ = sweep(path, status=1)
    assert "busy" in out and "0 of 1 complete" in out
    (tmp_path / "go").touch()
    assert first.wait(timeout=30) == 0
    assert "1 of 1 complete" in sweep(path)[0] and (tmp_path / "ran").read_text() == "x\n"


# ---------------------------------------------------------------------------------------------------------
# Slurm
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def array_task(tmp_path):
    """array_task(path, number) starts the batch script as Slurm does: a copy elsewhere, with the array's variables."""
    body, scontrol = tmp_path / "spool" / "slurm_script", tmp_path / "bin" / "scontrol"
    for file in (body, scontrol):
        file.parent.mkdir()
    body.write_text((ROOT / "scripts" / "slurm_array.sbatch").read_text())
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/scontrol_calls\n')
    scontrol.chmod(0o755)

    def start(path, number):
        variables = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(ROOT)}
        variables |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "2"}
        return subprocess.Popen(["bash", body, path], env=environment(**variables), stdout=subprocess.DEVNULL)

    return start


def test_a_slurm_task_runs_its_line(tmp_path, array_task):
    path = write_sweep(tmp_path, f"echo 1 >{tmp_path}/1", f"echo $CUDA_VISIBLE_DEVICES >{tmp_path}/2", "exit 5")
    assert [array_task(path, number).wait(timeout=30) for number in (2, 3)] == [0, 1]
    assert (tmp_path / "2").read_text() == "2\n" and not (tmp_path / "1").exists()
    assert "2 of 3 complete" in sweep(path, status=1)[0]  # the same marks


@pytest.mark.parametrize("sent, requeued", [(signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, None)])
def test_a_slurm_task_that_must_stop_can_go_on(tmp_path, array_task, sent, requeued):
    """SIGUSR1: its time is nearly up, so it puts itself back; SIGTERM: cancelled, or preempted."""
    line = f"trap 'echo stopped >>{tmp_path}/ran; exit 143' TERM; echo ran >>{tmp_path}/ran; "
    path = write_sweep(tmp_path, line + f"until [ -e {tmp_path}/go ]; do sleep 0.1; done")
    task = array_task(path, 1)
    wait_for((tmp_path / "ran").exists)
    task.send_signal(sent)
    assert task.wait(timeout=30) == 143
    assert (tmp_path / "ran").read_text() == "ran\nstopped\n"
    calls = tmp_path / "scontrol_calls"
    assert (calls.read_text() if calls.exists() else None) == requeued
    (tmp_path / "go").touch()
    assert array_task(path, 1).wait(timeout=30) == 0
    assert (tmp_path / "ran").read_text() == "ran\nstopped\nran\n"


# ---------------------------------------------------------------------------------------------------------
# The paper's experiments
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn"])
def test_the_papers_experiments(tmp_path, dataset):
    """Their commands, without running them: four models, the paper's flags, folders of their own."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text("")
    variables = environment(PYTHON="python", OBJECTIVE="released", FLAGS="--save_every 100 --data_dir elsewhere")
    script = tmp_path / "scripts" / f"reproduce_{dataset}.sh"
    done = subprocess.run([script, "--count"], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"
    commands = (tmp_path / "model_weights" / f"{dataset}_released" / "commands.txt").read_text().splitlines()
    settings = {}
    for command in commands:
        train, validate = (shlex.split(part, comments=True) for part in command.split(" && "))
        assert train[:2] == ["python", "train_1st_order_unbalanced.py"] and validate[1] == "validate_NC_unbalanced.py"
        assert train[2:] == validate[2:]
        args = parse_args(argv=train[2:])
        settings[args.model] = args
        assert (args.dataset, args.objective, args.save_every, args.data_dir) == (dataset, "released", 100, "elsewhere")
        assert args.batch_size == (256 if args.model == "MLP" else 32) and args.resume
        paper = parse_args(argv=shlex.split(PAPER))
        free = {"model", "batch_size", "dataset", "objective"}
        assert {name for name in TRAINING_FLAGS if getattr(args, name) != getattr(paper, name)} <= free
        assert (args.epochs, args.patience) == (paper.epochs, paper.patience)
    assert list(settings) == ["MLP", "ResNet18", "VGG11", "densenet_cifar"]
    assert len({args.save_path for args in settings.values()}) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_recipe_on_the_papers_counts(tmp_path, device):
    """Its commands, without running them: on a GPU the paper's own among them, with both objectives."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text("")
    call = [tmp_path / "scripts" / "collapse_paper.sh", "elsewhere", "--count"]
    variables = environment(PYTHON="python", DEVICE=device)
    done = subprocess.run(call, env=variables, capture_output=True, text=True, check=True)
    path = tmp_path / "model_weights" / f"collapse_paper_{device}" / "commands.txt"
    settings = {}
    for command in path.read_text().splitlines():
        train, validate = (shlex.split(part, comments=True) for part in command.split(" && "))
        assert train[2:] == validate[2:]
        args = parse_args(argv=[word.replace("@scripts", f"@{ROOT}/scripts") for word in train[2:]])
        assert args.resume and args.device == device and args.dataset == "cifar10" and not args.class_counts
        settings[Path(args.save_path).name] = args
    assert done.stdout == f"{len(settings)}\n"
    if device == "cpu":
        assert {args.precision for args in settings.values()} == {"fp32", "bf16"}
        return
    assert len(settings) == 4
    paper = parse_args(argv=shlex.split(PAPER))
    for objective in ("paper", "released"):
        plain, recipe = settings[f"plain_{objective}"], settings[f"recipe_{objective}"]
        assert {n for n in TRAINING_FLAGS if getattr(plain, n) != getattr(paper, n)} <= {"objective"}
        assert plain.objective == recipe.objective == objective and plain.epochs == 4000 and recipe.revive
        decays = {(args.weight_decay, args.feature_decay_rate) for args in (plain, recipe)}
        assert decays == {(paper.weight_decay, paper.feature_decay_rate)}
