"""Interrupted runs, full disks, damaged and hostile files: nothing is lost, and every error is one line.

The table in docs/faults.md says which test shows what.
"""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analysis.report
import engine.checkpoints
import engine.training
import train_1st_order_unbalanced as training
import utils
import validate_NC_unbalanced as validation
from engine.checkpoints import load_torch
from engine.run import Run
from engine.tables import MeasuredRun
from engine.training import Training
from models import build_model
from nc_theory import UFM
from tests.conftest import ROOT, TINY, TRAIN, VALIDATE, log_of, rows_of, same_weights, weights, without_figures
from utils import Interrupted, UserError

LONG = [*TINY, "--epochs", 100_000, "--save_every", 2, "--save_path", "run"]


def same_runs(a, b):
    """Return True if two runs have the same files and content, except wall times, --save_path and --resume."""
    contents = []
    for folder in (a, b):
        content = {}
        for path in folder.rglob("[!.]*"):
            name = str(path.relative_to(folder))
            if name == "config.json":
                content[name] = json.loads(path.read_text())
                content[name]["flags"] |= {"save_path": None, "resume": None, "epochs": None}
                content[name]["epochs_of_shares"] = None
            elif name == "train_log.jsonl":
                content[name] = log_of(folder)
            elif name == "last.pt":
                content[name] = repr(load_torch(path) | {"seconds": None})
            elif name.startswith("geometry/"):
                content[name] = {key: array.tolist() for key, array in np.load(path).items()}
            elif path.is_file():
                content[name] = path.read_bytes()
        contents.append(content)
    assert contents[0].keys() == contents[1].keys()
    return [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def temporaries(folder):
    return list(folder.rglob("*.tmp"))


def test_every_test_in_the_docs_is_there():
    known = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def test_(\w+)", path.read_text())
    }
    named = set(re.findall(r"`([a-z0-9]+_[a-z0-9]+_\w+)`", (ROOT / "docs" / "faults.md").read_text())) - {
        "images_per_second"
    }
    assert len(named) > 20 and named <= known


# ---------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------


def save_often():
    """Have last.pt written all the time."""
    engine.checkpoints.RESUME_SECONDS = 0.02


def end_slowly():
    time.sleep(0.3)


@pytest.mark.parametrize(
    "number, flags",
    [
        (1, ["--data_augmentation", "--stratified", "--nc_every", 4, "--patience", 5]),
        (2, ["--optimizer", "SGD", "--clip_grad_norm", 1, "--keep", 2, "--decay_type", "step_3_8"]),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_an_uncut_one(start, tmp_path, number, flags):
    """Thirteen kills each, mostly SIGKILL; so many writes of last.pt, and so slow an end, that many kills hit them."""
    flags = [*TINY, "--epochs", 12, "--save_every", 3, *flags]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(TRAIN, *flags, "--save_path", whole).wait()
    seconds = (whole / "last.pt").stat().st_mtime - (whole / "config.json").stat().st_mtime
    moments, kills = random.Random(number), 0
    while kills < 13:
        run = start(TRAIN, *flags, "--save_path", cut, "--resume", before=save_often, after=end_slowly)
        if kills % 4:  # the others also before the first step
            # A kill between the last epoch and the end of the process leaves a run that is complete.
            run.wait_for(lambda run=run: re.search(r"^disk|are done", run.text("stdout"), re.M))
        run.process.join(moments.uniform(0, seconds))
        if run.process.is_alive():
            kills += 1
            run.signal(moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            run.process.join()
            assert run.process.exitcode in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0)
        if run.process.exitcode == 0:
            assert same_runs(whole, cut)
            shutil.rmtree(cut)
    start(TRAIN, *flags, "--save_path", cut, "--resume").wait()
    assert same_runs(whole, cut)
    assert not temporaries(tmp_path)


def stop_at(monkeypatch, call):
    """Send this process a signal at the given call of `check`, after a step or a batch of a measurement."""
    calls = iter(range(1, 10**9))

    def check(signals):
        if next(calls) == call:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(utils.StopFlag, "check", check)


def train_here(monkeypatch, *flags):
    """Run training in this process."""
    monkeypatch.setattr("sys.argv", [TRAIN, *map(str, flags)])
    training.main()


@pytest.mark.parametrize("call", [1, 5, 21, 22, 25, 26, 31, 32, 62])  # of 21 steps an epoch, and 10 measured batches
def test_a_run_stopped_at_any_step_ends_as_an_uncut_one(monkeypatch, tmp_path, call):
    """In the middle of an epoch, after its last step, and in the first and last batch of its two measurements."""
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--epochs", 3, "--save_every", 1, "--nc_every", 1, "--penalty_start", 4, "--penalty_fall_epochs", 2]
    flags += ["--nc_layers", "layers.1,head"]
    train_here(monkeypatch, *flags, "--save_path", "whole")
    assert [line["penalty_scale"] for line in log_of(tmp_path / "whole")] == [4, 2, 1]
    stop_at(monkeypatch, call)
    with pytest.raises(Interrupted):
        train_here(monkeypatch, *flags, "--save_path", "cut")
    state = load_torch("cut/last.pt")
    steps = 21 * ((call - 1) // 31) + min((call - 1) % 31 + 1, 21)
    assert 21 * state["epoch"] + state["steps"] == steps, "every step before the signal is kept"
    train_here(monkeypatch, *flags, "--save_path", "cut", "--resume")
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "VGG11", "densenet_cifar"])
def test_20_steps_of_a_convolutional_model_are_the_same_in_two_parts(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    flags = f"--dataset digits --class_counts {','.join('4' * 10)} --batch_size 8 --epochs 4 --save_every 4 --sep_decay"
    flags = [*flags.split(), "--model", name, "--planes", 4, "--no-bias"]
    train_here(monkeypatch, *flags, "--save_path", "whole")
    stop_at(monkeypatch, 8)  # the third of five steps of the second epoch
    with pytest.raises(Interrupted):
        train_here(monkeypatch, *flags, "--save_path", "cut")
    train_here(monkeypatch, *flags, "--save_path", "cut", "--resume")
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


def heed_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    "number, flags",
    [
        *[(number, []) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)],
        (signal.SIGINT, ["--nc_every", 1]),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(start, train, tmp_path, number, flags):
    run = start(TRAIN, *LONG, *flags, before=heed_hangups)
    run.wait_for(lambda: len(epochs(tmp_path)) >= 2)
    run.signal(number)
    run.signal(number)  # a second signal is ignored
    _, error = run.wait(128 + number)
    assert error == f"{TRAIN}: stopped by {number.name}; to continue, run the same command with --resume\n"
    last = max(line["epoch"] for line in log_of(tmp_path / "run")) + 2
    flags = [*TINY, "--save_every", 2, *flags, "--epochs", last]
    train(*flags, "--save_path", "run", "--resume")
    train(*flags, "--save_path", "whole")
    assert same_runs(tmp_path / "run", tmp_path / "whole") and not temporaries(tmp_path)


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_hangup_is_ignored(start, tmp_path):
    run = start(TRAIN, *LONG, before=ignore_hangups)
    run.wait_for(lambda: len(epochs(tmp_path)) >= 1)
    run.signal(signal.SIGHUP)
    seen = len(epochs(tmp_path))
    run.wait_for(lambda: len(epochs(tmp_path)) >= seen + 2)
    run.signal(signal.SIGTERM)
    run.wait(128 + signal.SIGTERM)


def epochs(folder):
    return list(Run(folder / "run").checkpoints())


def test_validate_stops_at_a_signal_and_keeps_its_rows(start, train, measure, tmp_path):
    train(*TINY, "--epochs", 40, "--save_every", 1, "--save_path", "run")
    run = start(VALIDATE, "--load_path", "run", before=without_figures)
    run.wait_for((tmp_path / "run" / "nc_metrics.csv").exists)
    run.signal(signal.SIGTERM)
    _, error = run.wait(128 + signal.SIGTERM)
    assert error == f"{VALIDATE}: stopped by SIGTERM; to continue, run the same command again\n"
    assert 1 <= len(rows_of(tmp_path / "run" / "nc_metrics.csv")) < 40 and not temporaries(tmp_path)
    measure("--load_path", "run")
    assert len(rows_of(tmp_path / "run" / "nc_metrics.csv")) == 40


def test_resume_with_nothing_there_starts(train, tmp_path):
    train(*TINY, "--save_path", "run", "--resume")
    assert epochs(tmp_path) == [1, 2]


def test_damaged_and_duplicate_log_lines_are_mended(train, tmp_path):
    train(*TINY, "--save_path", "run")
    before = log_of(tmp_path / "run")
    path = tmp_path / "run" / "train_log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(['{"epoch": 1, "loss": 0}', lines[0], '{"epo', "5", '{"epoch": "2"}', lines[1], lines[1][:9]])
    )
    train(*TINY, "--epochs", 3, "--save_path", "run", "--resume")
    assert log_of(tmp_path / "run")[:2] == before and len(log_of(tmp_path / "run")) == 3


def test_what_a_kill_leaves_half_written_is_deleted(train, tmp_path):
    train(*TINY, "--nc_every", 1, "--save_path", "run")
    left = [".epoch_001.pth.12.tmp", ".last.pt.12.tmp", ".nc_metrics.csv.12.tmp", "geometry/.epoch_001.npz.12.tmp"]
    for name in [*left, ".mine.tmp"]:
        (tmp_path / "run" / name).write_text("half")
    train(*TINY, "--nc_every", 1, "--epochs", 3, "--save_path", "run", "--resume")
    assert [path.name for path in temporaries(tmp_path)] == [".mine.tmp"]


# ---------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------


def test_two_processes_in_one_folder(start, train, tmp_path):
    """The second stops. The lock is freed when its holder dies, and validation ignores it."""
    run = start(TRAIN, *LONG)
    run.wait_for(lambda: epochs(tmp_path))
    _, error = train(*LONG, "--resume", status=2)
    assert "run: another process is training there" in error and error.count("\n") == 1
    run.signal(signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    train(*TINY, "--epochs", 1, "--save_path", "run", "--resume")


def without_flock():
    """Make flock fail as on file systems that have none, such as some network ones."""

    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    fcntl.flock = flock


def test_two_processes_without_flock(start, train, tmp_path):
    """The lock is then a file that names its holder, and is free if that process no longer exists."""
    run = start(TRAIN, *LONG, before=without_flock)
    run.wait_for(lambda: epochs(tmp_path))
    _, error = train(*LONG, "--resume", status=2, before=without_flock)
    assert "run: another process is training there" in error
    run.signal(signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    assert "flock not supported" in run.text("stderr")
    train(*TINY, "--epochs", 1, "--save_path", "run", "--resume", before=without_flock)


def test_watch_follows_a_run_that_is_killed_and_resumed(start, train, tmp_path):
    flags = [*TINY, "--epochs", 60, "--save_every", 15, "--save_path", "run"]
    run = start(TRAIN, *flags)
    watch = start(VALIDATE, "--load_path", "run", "--watch", before=without_figures)
    csv = tmp_path / "run" / "nc_metrics.csv"
    run.wait_for(lambda: epochs(tmp_path))
    run.signal(signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    watch.wait_for(lambda: csv.exists())
    train(*flags, "--resume")
    watch.wait()
    assert [int(row["epoch"]) for row in rows_of(csv)] == [1, 16, 31, 46, 60]


def test_watch_ends_with_a_run_that_finishes(start, tmp_path):
    """Also if it starts before the folder exists, and if --keep deletes checkpoints."""
    watch = start(VALIDATE, "--load_path", "run", "--watch", before=without_figures)
    watch.wait_for(lambda: "waiting for a training run in run; Ctrl-C stops waiting" in watch.text("stdout"))
    start(TRAIN, *TINY, "--epochs", 40, "--save_every", 1, "--keep", 3, "--nc_every", 3, "--save_path", "run").wait()
    watch.wait()
    rows = [int(row["epoch"]) for row in rows_of(tmp_path / "run" / "nc_metrics.csv")]
    assert set(rows) >= {*range(1, 41, 3), 2, 4, 8, 16, 32, 38, 39, 40}


def test_watch_waits_until_a_signal(start, train):
    """For a run that has not begun, and for checkpoints of one that failed."""
    watch = start(VALIDATE, "--load_path", "run", "--watch", before=without_figures)
    watch.wait_for(lambda: "waiting for a training run" in watch.text("stdout"))
    train(*TINY, "--lr", 1e30, "--save_path", "run", status=1)
    time.sleep(3)
    watch.signal(signal.SIGINT)
    _, error = watch.wait(128 + signal.SIGINT)
    assert error == f"{VALIDATE}: stopped by SIGINT; to continue, run the same command again\n"


# ---------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts, or mounts again, a small file system in memory; returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


ON_DISK = [*TINY, "--epochs", 8, "--save_every", 1, "--save_path", "disk/run"]


def test_a_full_disk_stops_the_run_and_loses_nothing(disk, train, tmp_path):
    """3 MB hold only some of the checkpoints of 300 kB. With more room the run continues."""
    folder = disk("size=3m")
    out, error = train(*ON_DISK, status=1)
    assert "warning: the disk of disk/run is too small; raise --save_every or give --keep" in out
    assert (
        "No space left on device: 'disk/run/" in error
        and "once this is fixed, run the same command with --resume" in error
    )
    assert error.count("\n") == 1 and not temporaries(folder)
    checkpoints = Run(folder / "run").checkpoints()
    assert checkpoints and all(load_torch(path) for path in checkpoints.values())
    disk("size=50m")
    train(*ON_DISK, "--resume")
    train(*ON_DISK[:-1], "whole")
    assert same_runs(folder / "run", tmp_path / "whole")


def test_a_full_disk_stops_validate_and_keeps_its_rows(disk, train, measure):
    folder = disk("size=50m")
    train(*ON_DISK)
    used = shutil.disk_usage(folder).used
    disk(f"size={used + 20_000}")
    _, error = measure("--load_path", "disk/run", status=1)
    assert "No space left on device" in error and error.count("\n") == 1 and not temporaries(folder)
    kept = rows_of(folder / "run" / "nc_metrics.csv")
    disk("size=50m")
    measure("--load_path", "disk/run")
    assert rows_of(folder / "run" / "nc_metrics.csv")[: len(kept)] == kept


def test_a_file_size_limit_stops_the_run(train, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, error = train(*TINY, "--save_path", "run", before=limit, status=1)
    assert "File too large: 'run/epoch_001.pth'" in error and error.count("\n") == 1
    assert not temporaries(tmp_path) and not epochs(tmp_path)
    train(*TINY, "--save_path", "run", "--resume")
    train(*TINY, "--save_path", "whole")
    assert same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_read_only_folder_is_named(disk, train, measure):
    folder = disk("size=50m")
    train(*ON_DISK, "--epochs", 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    disk("ro")
    for script, flags in ((train, [*ON_DISK, "--resume"]), (measure, ["--load_path", "disk/run"])):
        _, error = script(*flags, status=1)
        assert re.search("Read-only file system: '.*disk/run/", error) and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_error_while_writing_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"), utils.atomic_write(path, "w") as file:
        file.write("new")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and not temporaries(tmp_path)


def test_keep_limits_the_checkpoints(train, tmp_path):
    """The last three and the powers of two; after a resume with another --keep, that many."""
    flags = [*TINY, "--save_every", 2, "--save_path", "run"]
    out, _ = train(*flags, "--epochs", 20, "--keep", 3)
    assert epochs(tmp_path) == [1, 2, 4, 8, 16, 17, 19, 20]
    assert "disk       8 checkpoints and last.pt" in out
    train(*flags, "--epochs", 21, "--keep", 1, "--resume")
    assert epochs(tmp_path) == [1, 2, 4, 8, 16, 21]


# ---------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def other_model(path, **options):
    torch.save(
        build_model("MLP", **{"num_classes": 10, "bias": False, "depth_relu": 1, "width": 24} | options).state_dict(),
        path,
    )


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16  # in the middle of the weights
    path.write_bytes(content)


def spoil(path, value):
    state = weights(path)
    state["fc.0.weight"][3, 3] = value
    torch.save(state, path)


DAMAGES = {  # what is done to a checkpoint, and the reason that is given
    "truncated": (lambda path: os.truncate(path, 100_000), "truncated or damaged"),
    "empty": (lambda path: os.truncate(path, 0), "truncated or damaged"),
    "bit_flipped": (flip_a_bit, "truncated or damaged, cannot be read: archive/data/"),
    "no_checkpoint": (lambda path: path.write_text("hello"), "truncated or damaged"),
    "malicious": (lambda path: torch.save({"w": Malicious()}, path), "not a plain checkpoint"),
    "other_width": (
        lambda path: other_model(path, width=25),
        "does not fit the model: size mismatch for layers.0.weight",
    ),
    "other_depth": (
        lambda path: other_model(path, depth_relu=2),
        'does not fit the model: Unexpected key(s) in state_dict: "layers.2.weight"',
    ),
    "wrong_k": (
        lambda path: other_model(path, num_classes=7),
        "does not fit the model: size mismatch for fc.0.weight",
    ),
    "nan": (lambda path: spoil(path, float("nan")), "holds weights that are not finite"),
    "infinite": (lambda path: spoil(path, float("inf")), "holds weights that are not finite"),
    "a_list": (lambda path: torch.save([1, 2], path), "holds no state_dict"),
    "a_pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a file"),
    "a_folder": (lambda path: (path.unlink(), path.mkdir()), "not a file"),
}


def test_damaged_checkpoints_are_named_one_by_one_and_the_others_measured(train, measure, tmp_path):
    train(*TINY, "--epochs", len(DAMAGES) + 1, "--save_every", 1, "--save_path", "run")
    paths = Run(tmp_path / "run").checkpoints()
    for epoch, (damage, _) in enumerate(DAMAGES.values(), 1):
        damage(paths[epoch])
    _, error = measure("--load_path", "run", status=1)
    lines = error.splitlines()
    assert len(lines) == len(DAMAGES)
    for epoch, (line, (_, reason)) in enumerate(zip(lines, DAMAGES.values(), strict=True), 1):
        assert line.startswith(f"skipped: epoch {epoch}: run/epoch_{epoch:03d}.pth: ") and reason in line
    assert [row["epoch"] for row in rows_of(tmp_path / "run" / "nc_metrics.csv")] == [str(len(DAMAGES) + 1)]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("a_pipe", "a_folder")])
def test_a_damaged_last_pt_is_named_and_nothing_is_lost(monkeypatch, tmp_path, damage):
    monkeypatch.chdir(tmp_path)
    train_here(monkeypatch, *TINY, "--save_path", "run")
    if DAMAGES[damage][1].startswith(("truncated", "not")):
        DAMAGES[damage][0](tmp_path / "run" / "last.pt")
    else:  # a normal state, except for its weights
        DAMAGES[damage][0](tmp_path / "run" / "epoch_002.pth")
        model = torch.load("run/epoch_002.pth", weights_only=True)
        torch.save(load_torch("run/last.pt") | {"model": model}, "run/last.pt")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(UserError) as stop:
        train_here(monkeypatch, *TINY, "--epochs", 3, "--save_path", "run", "--resume")
    assert str(stop.value).startswith("run/last.pt: ") and DAMAGES[damage][1].split(":")[0] in str(stop.value)
    assert stop.value.status == 1 and not Path("harm").exists()
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_a_checkpoint_of_a_gpu_loads_on_a_machine_without(train, measure, tmp_path):
    """The file is written as on a GPU: the same storages, tagged cuda:0."""
    train(*TINY, "--save_path", "run")
    path = tmp_path / "run" / "epoch_002.pth"
    expected = weights(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    cpu, cuda = (b"X" + len(name).to_bytes(4, "little") + name for name in (b"cpu", b"cuda:0"))
    assert cpu in content["archive/data.pkl"]
    content["archive/data.pkl"] = content["archive/data.pkl"].replace(cpu, cuda)
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in load_torch(path).items())
    measure("--load_path", "run")


def test_without_last_pt_training_goes_on_from_the_newest_whole_checkpoint(train, tmp_path):
    run = tmp_path / "run"
    train(*TINY, "--epochs", 4, "--save_every", 1, "--save_path", "run")
    (run / "last.pt").unlink()
    (run / "epoch_004.pth").write_bytes((run / "epoch_004.pth").read_bytes()[:1000])
    before = {number: (run / f"epoch_{number:03d}.pth").read_bytes() for number in (1, 2, 3)}
    lines = log_of(run)
    _, error = train(*TINY, "--epochs", 4, "--save_path", "run", status=2)
    assert "give --resume to continue it, --force to delete it" in error
    out, _ = train(*TINY, "--epochs", 5, "--save_every", 1, "--save_path", "run", "--resume")
    assert "resumes run after epoch 3, from epoch_003.pth: last.pt is missing, so the optimizer starts afresh" in out
    assert all((run / f"epoch_{number:03d}.pth").read_bytes() == content for number, content in before.items())
    assert [line["epoch"] for line in log_of(run)] == [1, 2, 3, 4, 5] and log_of(run)[:3] == lines[:3]
    load_torch(run / "epoch_004.pth"), load_torch(run / "last.pt")


def test_without_last_pt_and_a_whole_checkpoint_nothing_is_lost(train, tmp_path):
    run = tmp_path / "run"
    train(*TINY, "--save_every", 1, "--save_path", "run")
    (run / "last.pt").unlink()
    for path in run.glob("epoch_*"):
        path.write_bytes(path.read_bytes()[:1000])
    log = (run / "train_log.jsonl").read_text()
    _, error = train(*TINY, "--save_path", "run", "--resume", status=1)
    assert "epoch_002.pth: truncated or damaged" in error and "last.pt is missing, and no checkpoint is whole" in error
    for path in run.glob("epoch_*"):
        path.unlink()
    _, error = train(*TINY, "--save_path", "run", "--resume", status=2)
    assert "last.pt and all checkpoints are missing, and the log has 2 epochs: give --force" in error
    train(*TINY, "--save_path", "run", status=2)
    assert (run / "train_log.jsonl").read_text() == log
    train(*TINY, "--save_path", "run", "--force")


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, tmp_path):
    """The last good checkpoint and last.pt stay, also if the loss is still finite."""
    monkeypatch.chdir(tmp_path)
    train_here(monkeypatch, *TINY, "--save_every", 1, "--save_path", "run")
    before = {path: path.read_bytes() for path in Path("run").glob("*.p*")}
    real, calls = Training.make_step, iter(range(1, 10**9))

    def make_step(self, indices):
        row = real(self, indices)
        if next(calls) == 21 + 21:  # the last step of the fourth epoch: no loss after it
            self.model.fc[0].weight.data[0, 0] = float("nan")
        return row

    monkeypatch.setattr(Training, "make_step", make_step)
    with pytest.raises(UserError, match="the weights are not finite in epoch 4, step 21") as stop:
        train_here(monkeypatch, *TINY, "--save_every", 1, "--epochs", 9, "--save_path", "run", "--resume")
    assert stop.value.status == 1
    assert epochs(tmp_path) == [1, 2, 3] and all(path.read_bytes() == before[path] for path in before)


PROBLEM = dataclasses.asdict(UFM([3, 4], 0.1, 0.2))


@pytest.mark.parametrize(
    "entries",
    [
        {"flags": 5}, {"class_counts": "34"}, {"class_counts": [3, 5]}, {"training_flags": [1]}, {"data_factor": "1"},
        {"data_factor": None}, {"problems": []}, {"problems": {"objective": None}}, {"problems": {"objective": {}}},
        {"problems": {"objective": PROBLEM | {"variant": None}}}, {"problems": {"objective": PROBLEM | {"loss": 5}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_entry_of_a_config_is_named(tmp_path, entries):
    config = {"flags": {}, "class_counts": [3, 4], "training_flags": {}, "data_factor": 1}
    config["problems"] = {"objective": PROBLEM, "nominal": "none"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert MeasuredRun(Run(tmp_path)).comparison.problem == UFM([3, 4], 0.1, 0.2)
    path.write_text(json.dumps(config | entries))
    with pytest.raises(UserError, match=r"config\.json: damaged, not a run's config"):
        Run(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Fuzz: files of a run with arbitrary damage
# ---------------------------------------------------------------------------------------------------------

FUZZED = "--dataset digits --width 8 --depth_relu 1 --batch_size 200 --no-bias --sep_decay --save_every 1".split()
FILES = ["epoch_001.pth", "last.pt", "config.json", "nc_metrics.csv", "train_log.jsonl"]
JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 2**21, 10**400, 0.5, 1e30, float("nan"), float("inf"), "", "5", "paper", "MSE"]),
    st.sampled_from([[], [1], [1] * 10, ["x"], {}, {"a": 1}, "VGG11", "exp:4", "imagefolder", "\0", "\ud800"]),
)
TENSORS = st.sampled_from(
    [
        torch.zeros(0), torch.zeros(3), torch.full((8, 3072), float("nan")), torch.zeros(8, 3072, dtype=torch.int64),
        torch.zeros(8, 3072).to_sparse(), torch.zeros(8, 3072, dtype=torch.complex64), [], {}, None, 5, "x", -1, 0.5,
    ]
)  # fmt: skip


@st.composite
def damage(draw):
    """Draw (file, function of its bytes) that changes, removes or inserts bytes, or replaces a value."""
    name = draw(st.sampled_from(FILES))
    if draw(st.booleans()):
        where, length = draw(st.floats(0, 1)), draw(st.sampled_from([0, 1, 5, 1000, 10**9]))
        inserted = draw(st.one_of(st.binary(max_size=9), st.sampled_from([b"\n", b",", b"}", b"9", b"[" * 9000])))
        bit = draw(st.integers(0, 7))

        def change(content):
            at = min(int(where * len(content)), len(content) - 1)
            if not (length or inserted):
                return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            return content[:at] + inserted + content[at + length :]

        return name, change
    if name.endswith((".pth", ".pt")):
        return name, functools.partial(replace_in_state, draw(st.randoms(use_true_random=False)), draw(TENSORS))
    return name, functools.partial(replace_in_text, draw(st.randoms(use_true_random=False)), draw(JSON))


def replace_in_state(choose, value, content):
    """Replace a value of a nested state dict at any depth or, with [], remove it."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    at = state
    while isinstance(at[key := choose.choice(list(at))], dict) and at[key] and choose.random() < 0.8:
        at = at[key]
    at[key] = value
    if value == []:
        del at[key]
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def replace_in_text(choose, value, content):
    """Replace a value of a JSON file, or a cell of a CSV file."""
    lines = content.decode().splitlines()
    if lines[0] == "{":
        at = config = json.loads(content)
        if choose.random() < 0.8:
            at = config["flags"]
        at[choose.choice(list(at))] = value
        return json.dumps(config).encode()
    number = choose.randrange(len(lines))
    if lines[number].startswith("{"):
        line = json.loads(lines[number])
        lines[number] = json.dumps(line | {choose.choice(list(line)): value})
    else:
        cells = lines[number].split(",")
        cells[choose.randrange(len(cells))] = str(value)
        lines[number] = ",".join(cells)
    return "\n".join(lines).encode("utf8", "surrogatepass")


def run_here(monkeypatch, module, *flags):
    """Run an entry script in this process, with a time limit; return (exit status, lines on standard error)."""
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, flags)])
    error = io.StringIO()

    def hangs(number, frame):
        raise AssertionError("hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            utils.run_script(module.main)
    except SystemExit as stop:
        return stop.code, error.getvalue().splitlines()
    finally:
        signal.alarm(0)


SCRIPTS = {  # which scripts read the file
    "epoch_001.pth": [validation],
    "last.pt": [training],
    "config.json": [validation, training],
    "nc_metrics.csv": [validation, training],
    "train_log.jsonl": [training],
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_damaged_files_of_a_run_are_clean_errors(monkeypatch, tmp_path):
    """500 cases: a script succeeds or prints one line, and files that it does not write stay unchanged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "draw_runs", lambda runs, out: [out / "x"])  # seconds each time
    monkeypatch.setattr(analysis.report, "packed", functools.cache(analysis.report.packed))  # Plotly, each time
    known, real = {}, engine.training.load_data

    @functools.wraps(real)
    def load_data(*args, **flags):
        if repr((args, flags)) not in known:
            known[repr((args, flags))] = real(*args, **flags)
        return known[repr((args, flags))]

    monkeypatch.setattr(engine.training, "load_data", load_data)
    assert run_here(monkeypatch, training, *FUZZED, "--epochs", 2, "--save_path", "whole") == (0, [])
    assert run_here(monkeypatch, validation, "--load_path", "whole") == (0, [])
    run, statuses = tmp_path / "run", []

    @settings(max_examples=500, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damage(), st.integers(0, 1))
    def check(damaged, number):
        name, change = damaged
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree("whole", run)
        (run / name).write_bytes(change((run / name).read_bytes()))
        (run / "nc_metrics.csv").write_bytes(b"") if name == "epoch_001.pth" else None  # to be measured
        before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".pth", ".pt", ".json")}
        script = SCRIPTS[name][number % len(SCRIPTS[name])]
        flags = ["--epochs", 2, "--resume", "--save_path", "run"] if script is training else ["--load_path", "run"]
        status, lines = run_here(monkeypatch, script, *flags, "--no-download", "--data_dir", "nowhere")
        statuses.append(status)
        assert status in (0, 1, 2) and len(lines) == (status != 0), (status, lines)
        assert all(re.match(r"skipped: epoch 1: run/epoch_001.pth: |\w+: error: ", line) for line in lines), lines
        assert before == {path: path.read_bytes() for path in before} and not temporaries(run)
        if name == "epoch_001.pth" and status == 0:  # the damage lies between the values
            assert same_weights(run / name, Path("whole") / name)

    check()
    assert len(statuses) >= 500 and set(statuses) == {0, 1, 2}
