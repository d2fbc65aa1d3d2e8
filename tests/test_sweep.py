"""sweep.sh and the Slurm array: assignment of jobs, failed and stopped jobs, and wrong calls."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT, wait_for

SWEEP = ROOT / "scripts" / "sweep.sh"


def environment(**changes):
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | changes


def sweep(*args, status=0, cwd=None, **changes):
    """Run sweep.sh; return (stdout, stderr)."""
    command = [SWEEP, *map(str, args)]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=600, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def write_sweep(folder, *lines, name="sweep.txt"):
    path = folder / name
    path.write_text("# a comment\n\n" + "\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------


def test_failed_jobs_are_named_and_the_others_run(tmp_path):
    (tmp_path / "bad").touch()
    path = write_sweep(
        tmp_path,
        f"echo $PWD >>{tmp_path}/first",
        f"echo $PWD >>{tmp_path}/first",  # a repeated line is one job
        f"""echo "it's this" >&2; test ! -e {tmp_path}/bad""",
        f"kill -KILL $$ # {tmp_path}/killed",
        f"echo 100% >{tmp_path}/last",
    )
    assert sweep("--count", path)[0] == "4\n"
    out, _ = sweep(path, status=1)
    logs = tmp_path / "sweep.txt.logs"
    assert f"job 2 failed with exit status 1, {logs}/2.log: it's this\n" in out
    assert f"job 3 failed with exit status 137, {logs}/3.log: " in out
    assert out.count("starts") == 4 and out.count("failed with exit status") == 2
    assert (tmp_path / "first").read_text() == f"{ROOT}\n" and (tmp_path / "last").read_text() == "100%\n"
    (tmp_path / "bad").unlink()
    out, _ = sweep(path, status=1)
    assert "job 2 failed" not in out and "job 3 failed" in out
    assert (tmp_path / "first").read_text() == f"{ROOT}\n" * 2
    assert sorted(log.name for log in logs.iterdir()) == ["1.log", "2.log", "3.log", "4.log"]
    assert (logs / "2.log").read_text().count("it's this\n") == 2  # a log holds all attempts, and their command
    assert f"  echo 100% >{tmp_path}/last\n" in (logs / "4.log").read_text()
    assert "3 of 4 done, 1 failed, 0 to go, about 0:00:00" in out
    assert out.splitlines()[-1].startswith("next: mend what failed and run the sweep again")
    started, ended, following = sweep(write_sweep(tmp_path, "true"))[0].splitlines()
    assert started.startswith("job 1 starts, log: ") and following.startswith("next: python summarize.py")
    assert re.fullmatch(r"job 1 ended: 1 of 1 done, 0 failed, 0 to go, about 0:00:00", ended)


def test_each_job_has_a_gpu_of_its_own(tmp_path):
    """With two GPUs, two jobs at a time; mkdir fails where two share one."""
    lines = [f"d={tmp_path}/$CUDA_VISIBLE_DEVICES; mkdir $d && sleep 0.2 && rmdir $d # {i}" for i in range(5)]
    sweep(write_sweep(tmp_path, *lines), CUDA_VISIBLE_DEVICES="GPU-a,3")
    assert len(list((tmp_path / "sweep.txt.logs").glob("*.log"))) == 5
    lines = [f"echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/seen; mkdir {tmp_path}/one-{i}; sleep 1" for i in range(4)]
    sweep("-j", 4, write_sweep(tmp_path, *lines), CUDA_VISIBLE_DEVICES="GPU-a,3")
    assert sorted((tmp_path / "seen").read_text().split()) == ["3", "3", "GPU-a", "GPU-a"]


@pytest.mark.parametrize("jobs, share", [(1, 1), (2, 2), (64, 2)])
def test_jobs_on_the_cpu_share_the_cores(tmp_path, jobs, share):
    """Never more jobs than lines, and at least one core each."""
    path = write_sweep(tmp_path, *(f"echo $OMP_NUM_THREADS >{tmp_path}/{i}" for i in range(2)))
    sweep("-j", jobs, path, CUDA_VISIBLE_DEVICES="")
    cores = len(os.sched_getaffinity(0))
    assert (tmp_path / "1").read_text() == f"{max(cores // share, 1)}\n"
    sweep("--line", 1, "-j", jobs, path, CUDA_VISIBLE_DEVICES="")
    assert (tmp_path / "0").read_text() == f"{cores}\n"
    sweep("-j", jobs, write_sweep(tmp_path, f"echo $OMP_NUM_THREADS >{tmp_path}/2"), OMP_NUM_THREADS="7")
    assert (tmp_path / "2").read_text() == "7\n"


@pytest.fixture
def mps_control(tmp_path):
    """Put a stand-in of NVIDIA's control program, which writes down how it is called, on the path; return that path."""
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@ ${{CUDA_VISIBLE_DEVICES:-all}} $CUDA_MPS_PIPE_DIRECTORY" >>{tmp_path}/calls\n'
        f'[ "$1" = -d ] && exec sh -c "! cat {tmp_path}/refused"\ncat >>{tmp_path}/calls\n'
    )
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_mps_serves_the_jobs_of_a_sweep_and_ends_with_it(tmp_path, mps_control):
    """It sees all GPUs, whose numbers the jobs choose from; its folder is its own, and is deleted."""
    path = write_sweep(tmp_path, *(f"echo $CUDA_MPS_PIPE_DIRECTORY >>{tmp_path}/seen # {i}" for i in range(2)))
    sweep("-j", 2, "--mps", path, PATH=mps_control, CUDA_VISIBLE_DEVICES="1")
    folder = (tmp_path / "seen").read_text().split()[0]
    assert (tmp_path / "seen").read_text() == f"{folder}\n" * 2 and not os.path.exists(folder)
    assert (tmp_path / "calls").read_text() == f"-d all {folder}\n 1 {folder}\nquit\n"


def test_mps_that_cannot_start_is_one_line(tmp_path, mps_control):
    path = write_sweep(tmp_path, f"touch {tmp_path}/ran")
    (tmp_path / "refused").write_text("Cannot find a usable GPU\n")
    out, error = sweep("--mps", path, status=2, PATH=mps_control)
    assert error == "sweep.sh: error: --mps: the service does not start: Cannot find a usable GPU\n" and not out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["-a b.txt", 'it\'s "$HOME".txt', "--line"])
def test_odd_names_of_the_file(tmp_path, name):
    write_sweep(tmp_path, "echo ran", name=name)
    sweep("--", name, cwd=tmp_path)
    sweep(f"./{name}", cwd=tmp_path)
    assert (tmp_path / f"{name}.logs" / "1.log").read_text().count("\nran\n") == 2


def test_wrong_calls_are_one_line(tmp_path):
    path, empty = write_sweep(tmp_path, f"touch {tmp_path}/ran"), tmp_path / "empty"
    empty.write_text("# nothing\n")
    for args, words in (
        ([tmp_path / "nothing"], "nothing: no such file"),
        ([empty], "no command in it"),
        (["-j", "0", path], "-j: '0' is not a whole number >= 1"),
        (["--line"], "--line: '' is not a whole number >= 1"),
        (["--line", "2", path], "has 1 commands"),
        (["--fast", path], "unknown option --fast"),
        (["--mps", path], "nvidia-cuda-mps-control, of NVIDIA's driver, is not installed"),
        ([path, path], "give one FILE"),
        ([], "give one FILE"),
    ):
        out, error = sweep(*args, status=2)
        assert words in error and error.count("\n") == 1 and not out, error
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------


def resumable(folder):
    """A job that counts to 30 in a file, stops slowly on SIGTERM, and continues in the next call."""
    save = f"sleep 0.3; echo saved >>{folder}/run; exit 143"
    count = f"for i in $(seq $(wc -l <{folder}/run) 30); do echo $i >>{folder}/run; sleep 0.05; done"
    return f"touch {folder}/run; trap '{save}' TERM; {count}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_continues(tmp_path, number):
    """Running jobs shut down before the sweep ends; waiting ones do not start."""
    run = tmp_path / "run"
    path = write_sweep(tmp_path, f"echo x >>{tmp_path}/before", resumable(tmp_path), f"echo x >>{tmp_path}/after")
    command = ["env", "--default-signal=INT", SWEEP, path]  # a shell's background jobs, such as tests, ignore SIGINT
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for(lambda: run.exists() and run.read_text().count("\n") > 5)
    process.send_signal(number)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 128 + number and error == b"sweep.sh: stopped; run it again to continue\n"
    cut = run.read_text()
    assert cut.endswith("saved\n") and "30\n" not in cut and not (tmp_path / "after").exists()
    time.sleep(0.2)
    assert run.read_text() == cut  # no process of the job is left
    sweep(path)
    assert run.read_text().startswith(cut) and run.read_text().endswith("\n30\n")
    assert (tmp_path / "after").read_text() == "x\n"


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
    lines = f"echo 1 >{tmp_path}/1", f"echo $CUDA_VISIBLE_DEVICES >{tmp_path}/2", "exit 5"
    path = write_sweep(tmp_path, *lines, name="-it's.txt")
    assert [array_task(path, number).wait(timeout=600) for number in (2, 3)] == [0, 1]
    assert (tmp_path / "2").read_text() == "2\n" and not (tmp_path / "1").exists()
    assert sorted(log.name for log in (tmp_path / "-it's.txt.logs").iterdir()) == ["2.log", "3.log"]


@pytest.mark.parametrize("sent, requeued", [(signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, None)])
def test_a_slurm_task_that_must_stop_can_go_on(tmp_path, array_task, sent, requeued):
    """SIGUSR1: time is nearly up, so the task requeues itself; SIGTERM: cancelled or preempted."""
    line = f"trap 'echo stopped >>{tmp_path}/ran; exit 143' TERM; echo ran >>{tmp_path}/ran; "
    path = write_sweep(tmp_path, line + f"until [ -e {tmp_path}/go ]; do sleep 0.1; done")
    task = array_task(path, 1)
    wait_for((tmp_path / "ran").exists)
    task.send_signal(sent)
    assert task.wait(timeout=600) == 143
    assert (tmp_path / "ran").read_text() == "ran\nstopped\n"
    calls = tmp_path / "scontrol_calls"
    assert (calls.read_text() if calls.exists() else None) == requeued
    (tmp_path / "go").touch()
    assert array_task(path, 1).wait(timeout=600) == 0
    assert (tmp_path / "ran").read_text() == "ran\nstopped\nran\n"


def test_the_array_without_slurm_is_one_line(tmp_path):
    script, path = ROOT / "scripts" / "slurm_array.sbatch", write_sweep(tmp_path, "true")
    done = subprocess.run(["bash", script, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "slurm_array.sbatch: error: submit it with sbatch --array\n")
