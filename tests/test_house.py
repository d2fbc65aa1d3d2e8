"""The structure of the repository: layered imports, scripts that load only what they need, a library on its own."""

import ast
import shutil
import subprocess
import sys

import pytest

import nc_theory
from tests.conftest import ROOT

ENTRIES = set(
    "train_1st_order_unbalanced validate_NC_unbalanced measure_model solve_ufm plot_nc summarize report".split()
)
LIBRARY = {"nc_theory", "nc_metrics", "nc_layers", "nc_torchmetrics"}
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


def test_the_wheel_holds_the_library_alone(tmp_path):
    """Installed into an empty folder, it imports from outside the checkout and solves a problem."""
    source, wheels, target = (tmp_path / name for name in ("source", "wheels", "target"))
    source.mkdir()
    modules = {f"{name}.py" for name in LIBRARY - {"nc_theory"}}
    for name in ("pyproject.toml", "README.md", "LICENSE", *modules):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nc_theory", source / "nc_theory", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    assert {path.name for path in target.iterdir() if "dist-info" not in path.name} - {"__pycache__"} == {
        "nc_theory",
        *modules,
    }
    assert (target / "nc_theory" / "py.typed").exists()
    assert f"-{nc_theory.__version__}-" in wheel.name
    code = (
        "import nc_layers, nc_metrics, nc_theory\n"
        "print(nc_metrics.__file__, nc_theory.solve(nc_theory.UFM([20, 50, 80], 5e-3, 5e-5)).method)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{target}/nc_metrics.py closed form\n"
