"""The structure of the repository: layered imports, scripts that load only what they need, a library on its own."""

import ast
import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import nc_theory
from tests.conftest import ROOT

ENTRIES = set(
    "train_1st_order_unbalanced validate_NC_unbalanced measure_model solve_ufm plot_nc summarize report".split()
)
LIBRARY = {"nc_theory", "nc_metrics", "nc_layers", "nc_torchmetrics"}  # nc_measure runs measure_model from a wheel
SCIENCE = LIBRARY | {"datasets", "image_files", "models", "objective"}
OURS = ENTRIES | SCIENCE | {"args", "cli", "analysis", "engine", "utils"}


def imports_of(path):
    """Return the top-level names of our own modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & OURS


def files_of(name):
    return sorted((ROOT / name).glob("*.py")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


@pytest.mark.parametrize(
    "names, allowed",
    [
        ({"utils"}, set()),
        ({"nc_theory"}, {"nc_theory"}),
        ({"nc_metrics"}, {"nc_theory"}),
        ({"nc_layers", "nc_torchmetrics"}, {"nc_theory", "nc_metrics"}),
        ({"image_files"}, {"utils"}),
        ({"datasets", "models", "objective"}, SCIENCE | {"utils"}),
        ({"engine"}, SCIENCE | {"engine", "utils"}),
        ({"analysis"}, {"analysis", "engine", "nc_theory", "utils"}),
        ({"cli"}, {"utils"}),
        ({"args"}, SCIENCE | {"cli", "engine", "utils"}),
        (ENTRIES, SCIENCE | {"args", "cli", "analysis", "engine", "utils"}),
    ],
    ids=[
        "utils",
        "nc_theory",
        "nc_metrics",
        "nc_layers",
        "image_files",
        "science",
        "engine",
        "analysis",
        "cli",
        "args",
        "entries",
    ],
)
def test_imports_go_down_only(names, allowed):
    for path in (path for name in names for path in files_of(name)):
        assert imports_of(path) <= allowed, path


def test_every_module_belongs_to_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == OURS - {"analysis", "engine", "models", "nc_theory"}


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("train_1st_order_unbalanced", "matplotlib torchvision"),
        ("solve_ufm", "pandas torchvision datasets image_files models engine"),
        ("summarize", "matplotlib torchvision datasets image_files models engine.training"),
        ("plot_nc", "torchvision datasets image_files models engine.training"),
        ("report", "torchvision datasets image_files models engine.training"),
    ],
)
def test_scripts_load_only_what_they_need(script, absent):
    code = f"import sys, {script}; loaded = sys.modules.keys() & {set(absent.split())}; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def top_level(distribution):
    """The paths in site-packages that an installed distribution brings along."""
    names = {path.parts[0] for path in importlib.metadata.files(distribution) or () if path.parts[0] != ".."}
    return [importlib.metadata.distribution(distribution).locate_file(name) for name in names - {"__pycache__"}]


def requirements_of(distribution, found):
    """Add to the set `found` a distribution and what it needs, as far as that is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        requirements = importlib.metadata.requires(distribution) or []
        found.add(distribution)
        for name in (re.match(r"[\w.-]+", text)[0] for text in requirements if "extra ==" not in text):
            if name not in found:
                requirements_of(name, found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, target = (folder / name for name in ("source", "wheels", "target"))
    names = ("docs", "results", "tests", "scripts", "benchmarks", "model_weights", ".*", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*names))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"neural_collapse-{nc_theory.__version__}-")
    install = [*pip, "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with torch, NumPy, SciPy and what they need, as in an empty environment."""
    folder, needed = tmp_path_factory.mktemp("bare"), set()
    for name in ("torch", "numpy", "scipy"):
        requirements_of(name, needed)
    for path in {path for name in needed for path in top_level(name)}:
        (folder / path.name).symlink_to(path)
    return folder


def python(*arguments, path, cwd):
    """Run Python with a path of folders alone, without site-packages; return the finished process."""
    command = [sys.executable, "-S", "-P", *arguments]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_takes_no_name_but_ours(wheel):
    names = {path.name for path in wheel.iterdir() if "dist-info" not in path.name}
    assert names - {"__pycache__", "bin"} == {
        *("nc_theory", "nc_measure"),
        *(f"{name}.py" for name in LIBRARY - {"nc_theory"}),
    }
    assert (wheel / "nc_theory" / "py.typed").exists()
    assert (wheel / "bin" / "nc-measure").exists()


def test_the_wheel_needs_torch_numpy_and_scipy_alone(wheel, bare, tmp_path):
    code = (
        "import nc_layers, nc_metrics, nc_theory, nc_measure, sys\n"
        "print(nc_metrics.__file__, nc_theory.solve(nc_theory.UFM([20, 50, 80], 5e-3, 5e-5)).method)\n"
        "print(sys.modules.keys() & {'pandas', 'matplotlib', 'torchvision', 'utils', 'engine', 'datasets'})"
    )
    done = python("-c", code, path=[wheel, bare], cwd=tmp_path)
    assert done.stdout == f"{wheel}/nc_metrics.py closed form\nset()\n", done.stderr
    done = python("-c", "import nc_measure; nc_measure.main()", "--help", path=[wheel, bare], cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r'nc-measure: error: it needs \w+: pip install "neural-collapse\[measure\]"\n', done.stderr)


def test_nc_measure_is_measure_model_without_a_checkout(wheel, tmp_path):
    random = np.random.default_rng(0)
    for path in (tmp_path / split / label / "0.png" for split in ("train", "test") for label in "ab"):
        path.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 2))"
    )
    flags = "--model own.py:build --data_dir . --size 8 --layers 1,head --device cpu".split()
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    for command in ([wheel / "bin" / "nc-measure"], [ROOT / "measure_model.py"]):
        done = [sys.executable, *command, *flags, "--out", command[0].name]
        done = subprocess.run(done, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / command[0].name / "layers.pdf").exists(), done.stderr
    done = [sys.executable, wheel / "bin" / "nc-measure", "--model", "own.py:none", *flags[2:]]
    done = subprocess.run(done, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "nc-measure: error: --model own.py:none: the file has no function none\n"
    )
