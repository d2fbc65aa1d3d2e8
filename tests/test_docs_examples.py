"""Every public function and class of the installed modules has an example in its docstring, and the examples run."""

import ast
import doctest
import importlib
import importlib.util

import pytest

from tests.conftest import ROOT

NEEDS_TORCHMETRICS = pytest.mark.skipif(not importlib.util.find_spec("torchmetrics"), reason="needs torchmetrics")
MODULES = [
    "nc_theory",
    "nc_metrics",
    "nc_layers",
    "nc_measure",
    pytest.param("nc_torchmetrics", marks=NEEDS_TORCHMETRICS),
]


def examples_of(module):
    """Yield (name, [DocTest]) of the module's own docstring, and of each public function or class with its methods."""
    yield module.__name__, doctest.DocTestFinder(recurse=False).find(module, globs={})
    for name in module.__all__:
        if callable(value := getattr(module, name)):
            yield name, doctest.DocTestFinder().find(value, name, globs={})


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    failed, runner = [], doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    for _, tests in examples_of(importlib.import_module(module)):
        failed += [test.name for test in tests if runner.run(test).failed]
    assert not failed


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_example(module):
    _, *public = examples_of(importlib.import_module(module))
    without = [name for name, tests in public if name not in {test.name for test in tests if test.examples}]
    assert public and not without


@pytest.mark.parametrize("module", MODULES)
def test_what_other_files_import_is_public(module):
    """`__all__` names everything that the scripts, the engine and the other modules import from a module."""
    used = set()
    for path in ROOT.rglob("*.py"):
        if "tests" in path.parts or any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == module:
                used |= {alias.name for alias in node.names}
    assert used <= {*importlib.import_module(module).__all__, "__version__"}
