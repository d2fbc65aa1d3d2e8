"""The benchmarks run, at a size at which their figures mean nothing: their tables have the rows that they promise."""

import subprocess
import sys

import pytest
import torch

from datasets import Data, Split
from engine.measurement import Measurement
from engine.run import Run
from models import build_model
from tests.conftest import ROOT, rows_of


def run(script, folder, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, "--fraction", "0.01", "--out", folder, *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_training(tmp_path):
    out = run("training.py", tmp_path, *"--width 16 --steps 2 --pairs 1 --batch_size 64".split())
    rows = rows_of(tmp_path / "training_MLP_cpu.csv")
    assert [row["loop"] for row in rows] == ["MLP, usual loop, fp32", "MLP, ours, fp32", "MLP, ours, bf16"]
    assert all(float(row["ms a step"]) > 0 and float(row["times the usual"]) > 0 for row in rows)
    shares = rows_of(tmp_path / "ceiling_MLP_cpu.csv")
    assert [row["epoch"] for row in shares] == ["MLP, fp32", "MLP, bf16"] and "| MLP, bf16" in out


def test_measuring(tmp_path):
    out = run("measuring.py", tmp_path, *"--width 32 --pairs 1".split())
    assert out.startswith("NC1: ours ")
    names = ["bare forward pass", "ours", "the usual way"]
    assert [row["one checkpoint"] for row in rows_of(tmp_path / "measuring_cpu.csv")] == names


def test_ranks(tmp_path):
    run("ranks.py", tmp_path, *"--width 16 --pairs 1 --batch_size 64".split())
    (row,) = rows_of(tmp_path / "ranks_MLP_cpu.csv")
    assert row["ranks"] == "2" and float(row["ratio"]) > 0


def test_the_usual_nc1_is_ours(monkeypatch, tmp_path):
    """The usual way is fp32 throughout, from images of 8 bits: these are, and their classes are far apart."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from reference import usual_nc1

    torch.manual_seed(0)
    labels, patterns = torch.arange(200) % 10, torch.randint(40, 216, (10, 3, 32, 32))
    images = (patterns[labels] + torch.randint(-40, 41, (200, 3, 32, 32))).float()
    images[0, 0, 0, :2] = torch.tensor([0.0, 255.0])
    split = Split(images, labels, torch.zeros(3))
    data, model = Data(split, split, [20] * 10), build_model("MLP", 10, depth_relu=1, width=64)
    row, parts, _ = Measurement(Run(tmp_path), model, data).measure()
    centre = torch.eye(10, dtype=torch.float64) - 0.1
    spectrum = torch.linalg.eigvalsh(centre @ parts["HTH"] @ centre)  # K times that of the between-class covariance
    rounding = 1e-5 * float(spectrum[-1] / spectrum[1])  # of fp32, times the condition number
    assert rounding < 1e-2
    assert usual_nc1(model, data, torch.device("cpu")) == pytest.approx(row["NC1"], rel=rounding)
