"""Helpers of all tests: the real scripts in processes of their own, and real images where they are at hand."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
UNPACK = ROOT.parent / "shared" / "tools" / "unpack-cifar10"  # beside a development checkout only

torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}

# Scripts run in children of a process that has imported torch and the rest already: seconds saved in each test.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_1st_order_unbalanced", "sklearn.datasets", "torchvision"])


def as_main(script, flags, folder):
    """Runs a script in this process as `python script flags` does, in `folder`, with its output in files."""
    os.chdir(folder)
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *flags, status=0) runs an entry script in a folder of its own; returns (stdout, stderr)."""

    def run(name, *flags, status=0):
        process = SERVER.Process(target=as_main, args=(ROOT / name, [str(flag) for flag in flags], tmp_path))
        process.start()
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{name} {flags} hangs")
        out, error = ((tmp_path / file).read_text() for file in (".stdout", ".stderr"))
        assert process.exitcode == status, f"{name} {flags}: exit {process.exitcode}\n{out}\n{error}"
        assert "Traceback" not in error
        return out, error

    return run


@pytest.fixture
def train(run_script):
    return lambda *flags, **options: run_script("train_1st_order_unbalanced.py", *flags, **options)


@pytest.fixture
def validate(run_script):
    return lambda *flags, **options: run_script("validate_NC_unbalanced.py", *flags, **options)


@pytest.fixture(scope="session")
def real_images(tmp_path_factory):
    """A --data_dir with real CIFAR-10 images, a few of each class."""
    if not UNPACK.exists():
        pytest.skip("real CIFAR-10 images are not at hand")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([UNPACK, folder, "--class_counts", "9,9,9,9,9,9,9,9,9,9"], check=True)
    for path in folder.glob("cifar10/test/*/*"):
        if int(path.stem) >= 20:
            path.unlink()
    return folder
