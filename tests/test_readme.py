"""What the README shows works as it stands there."""

import re
import shlex

from args import make_parser
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(run_script, tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert sum(map(bool, code.splitlines())) <= 12
    (tmp_path / "example.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    out, _ = run_script(tmp_path / "example.py")
    assert "'NC1': " in out and re.findall(r"'(\w+)': nan", out) == ["NC4"]  # no predictions were given


def test_every_flag_in_it_exists():
    flag = r"(?<![\w-])--[a-z0-9_]+(?:-[a-z]+)?"
    known = {option for action in make_parser()._actions for option in action.option_strings} | {"--array"}  # sbatch's
    for script in ("plot_nc.py", "summarize.py", "solve_ufm.py", "scripts/sweep.sh"):
        known |= set(re.findall(flag, (ROOT / script).read_text()))
    assert set(re.findall(flag, README)) <= known


def test_commands_parse():
    joined = README.replace("\\\n", " ")
    commands = re.findall(
        r"^(?:CUDA_VISIBLE_DEVICES=0 )?python train_1st_order_unbalanced.py (--model.*)$", joined, re.M
    )
    assert len(commands) >= 2
    for command in commands:
        make_parser().parse_args(shlex.split(command, comments=True))


def test_files_in_it_exist():
    for path in re.findall(r"(?:\]\(|src=\")((?:docs|scripts)/[^)\"]+)", README):
        assert (ROOT / path).exists(), path
