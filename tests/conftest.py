"""Helpers of all tests: the real scripts as subprocesses, and real images where they are at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
UNPACK = ROOT.parent / "shared" / "tools" / "unpack-cifar10"  # beside a development checkout only

torch.set_num_threads(1)


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *flags, status=0) runs an entry script in a folder of its own; returns (stdout, stderr)."""

    def run(name, *flags, status=0, cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, flags)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"},
        )
        assert done.returncode == status, f"{name} {flags}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture
def train(run_script):
    return lambda *flags, **options: run_script("train_1st_order_unbalanced.py", *flags, **options)


@pytest.fixture
def validate(run_script):
    return lambda *flags, **options: run_script("validate_NC_unbalanced.py", *flags, **options)


@pytest.fixture(scope="session")
def real_images(tmp_path_factory):
    """A --data_dir with real CIFAR-10 images, a few of each class; all test images."""
    if not UNPACK.exists():
        pytest.skip("real CIFAR-10 images are not at hand")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([UNPACK, folder, "--class_counts", "20,20,30,30,40,40,50,50,60,60"], check=True)
    return folder
