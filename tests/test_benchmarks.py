"""The benchmarks run, at a size at which their figures mean nothing: their tables have the rows that they promise."""

import csv
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(script, folder, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, "--fraction", "0.01", "--out", folder, *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_training(tmp_path):
    out = run("training.py", tmp_path, *"--width 16 --steps 2 --pairs 1 --batch_size 64".split())
    rows = rows_of(tmp_path / "training_MLP_cpu.csv")
    assert [row["loop"] for row in rows] == ["MLP, usual loop, fp32", "MLP, ours, fp32", "MLP, ours, bf16"]
    assert all(float(row["ms a step"]) > 0 and float(row["times the usual"]) > 0 for row in rows)
    shares = rows_of(tmp_path / "ceiling_MLP_cpu.csv")
    assert [row["epoch"] for row in shares] == ["MLP, fp32", "MLP, bf16"] and "| MLP, bf16" in out


def test_measuring(tmp_path):
    """Ours and the usual way, which is fp32 throughout, print the same NC1."""
    out = run("measuring.py", tmp_path, *"--width 128 --pairs 1".split())
    ours, usual = (float(words.split()[-1]) for words in out.splitlines()[0].split(","))
    assert ours == pytest.approx(usual, rel=0.02)
    assert len(rows_of(tmp_path / "measuring_cpu.csv")) == 3
