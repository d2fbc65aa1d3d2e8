"""The benchmarks run at a tiny size, where timings mean nothing, and write the rows that they promise."""

import importlib
import itertools
import multiprocessing
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.run

from args import parse_args
from datasets import Data, Split
from engine.measurement import Measurement
from engine.run import Run
from engine.tables import MeasuredRun
from models import build_model
from tests.conftest import FORKED, ROOT, SERVER, TINY, as_main, nothing, rows_of, wait_for


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """run_here(name, flags) runs a benchmark here, with forks as its processes, and returns what it prints."""

    def run(name, flags):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, "--fraction", "0.01", "--out", str(tmp_path), *flags.split()])
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: SERVER)
        monkeypatch.setattr(subprocess, "run", partial(run_as_fork, folder=tmp_path))
        module.main()
        return capsys.readouterr().out

    return run


def run_as_fork(command, folder, before=nothing, **options):
    """Run [python, SCRIPT, ...] or [python, "-m", "torch.distributed.run", ...] in a process that has imported torch.

    Saves the seconds that importing takes. Stands in for subprocess.run, but returns (standard output, standard error).
    The exit status must be 0.
    """
    script, *words = map(str, command[1:])
    if script == "-m":
        script, words = torch.distributed.run.__file__, [*FORKED, *words[1:]]
    process = SERVER.Process(target=as_main, args=(script, words, folder, ".output", before))
    process.start()
    process.join(600)
    process.kill()
    process.join()
    out, error = ((folder / f".output.{name}").read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, out + error
    return out, error


def test_training(run_here, tmp_path):
    out = run_here("training", "--width 16 --steps 2 --pairs 1 --batch_size 64")
    rows = rows_of(tmp_path / "training_MLP_cpu.csv")
    assert [row["loop"] for row in rows] == ["MLP, usual loop, fp32", "MLP, ours, fp32", "MLP, ours, bf16"]
    assert all(float(row["ms a step"]) > 0 and float(row["times the usual"]) > 0 for row in rows)
    shares = rows_of(tmp_path / "ceiling_MLP_cpu.csv")
    assert [row["epoch"] for row in shares] == ["MLP, fp32", "MLP, bf16"] and "| MLP, bf16" in out


def test_kernels(run_here, tmp_path, monkeypatch):
    """Compiling, which takes a while, is left out. tests/test_step.py counts the kernels."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    out = run_here("kernels", "--width 16 --pairs 1 --batch_size 64 --device cpu")
    rows = rows_of(tmp_path / "kernels_cpu.csv")
    for precision, casts in (("fp32", 1), ("bf16", 32)):
        counts = {row["kernel"]: float(row["in a step"]) for row in rows if row["precision"] == precision}
        assert counts["aten::addmm"] == 7 and counts["aten::_to_copy"] == casts
        assert counts.pop("all") == sum(counts.values())
    assert [row["step"] for row in rows_of(tmp_path / "compiled_cpu.csv")] == ["as it is", "network compiled"] * 2
    assert "| bf16        | network compiled" in out


def test_measuring(run_here, tmp_path):
    out = run_here("measuring", "--width 32 --pairs 1")
    assert out.startswith("NC1: ours ")
    names = ["bare forward pass", "ours", "the usual way"]
    assert [row["one checkpoint"] for row in rows_of(tmp_path / "measuring_cpu.csv")] == names


def test_time_to_collapse(run_here, monkeypatch, tmp_path):
    """Both recipes are trained and compared; a bound that is never met leaves its steps empty."""
    import time_to_collapse

    small = f"--dataset digits --width 16 --depth_relu 1 {' '.join(TINY[-2:])} --epochs 2"
    recipe = "--head_init optimum --whiten 0.1"
    settings = {
        name: time_to_collapse.Setting(small, "", recipe, bound) for name, bound in (("met", 99), ("missed", 0))
    }
    monkeypatch.setattr(time_to_collapse, "SETTINGS", settings)
    run_here("time_to_collapse", f"--data_dir {tmp_path} --seeds 2 --random_seeds 1")
    met, recipe_alone, missed, _ = rows_of(tmp_path / "time_to_collapse_cpu.csv")
    assert float(met["steps, random"]) == float(met["steps, recipe"]) == 4 and float(met["steps, ratio"]) == 1
    assert (
        recipe_alone["steps, random"] == recipe_alone["steps, ratio"] == ""
        and float(recipe_alone["steps, recipe"]) == 4
    )
    assert missed["steps, random"] == missed["steps, ratio"] == "" and float(missed["end, recipe"]) > 0


def test_rare_classes(run_here, monkeypatch, tmp_path):
    import rare_classes

    monkeypatch.setattr(rare_classes, "SETTING", "--dataset digits --class_counts 9,9,9,9,9,9,9,9,9,1 --width 16")
    run_here("rare_classes", f"--data_dir {tmp_path} --seeds 2 --epochs 2")
    found = rows_of(tmp_path / "rare_classes_cpu.csv")
    assert [row["head"] for row in found] == ["random head", "recipe"]
    for row in found:
        assert (row["lost"] == "") == (row["seeds without loss"] == row["seeds"] == "2") and float(
            row["NC2_H, largest"]
        )


def test_certify(run_here, tmp_path):
    out = run_here("certify", "--small 2 --medium 1 --classes 6")
    rows = rows_of(tmp_path / "certify_cpu.csv")
    assert [row["classes"] for row in rows[3:]] == ["6"] * 8 and all(int(row["classes"]) >= 13 for row in rows[:3])
    assert {row["certified"] for row in rows} == {"True"} and "6 classes: 8 of 8 certified" in out


def test_a_class_is_lost_only_if_the_theorem_keeps_it(run_here, monkeypatch, tmp_path):
    """With all features zero every class is lost, but at penalties where zero is the optimum none is."""
    from rare_classes import read_data, train

    def zero(model, images):
        return 0 * model.intermediate_layer(model.layers(images.flatten(1)))

    monkeypatch.setattr("models.mlp.MLP.embed", zero)
    common = "--dataset digits --sep_decay --no-bias --epochs 1 --depth_relu 1 --width 10 --batch_size 9999"
    for penalty, kept in (("0.001", False), ("0.5", True)):
        words = f"{common} --weight_decay {penalty} --feature_decay_rate {penalty}".split()
        assert train(words, read_data(parse_args(argv=words)))[0] == [kept] * 10


def test_ranks(run_here, tmp_path):
    run_here("ranks", "--width 16 --pairs 1 --batch_size 64")
    (row,) = rows_of(tmp_path / "ranks_MLP_cpu.csv")
    assert row["ranks"] == "2" and float(row["ratio"]) > 0


def test_the_usual_nc1_is_ours(tmp_path):
    """The usual way is fp32 on 8-bit images; the images here are 8-bit, with classes far apart."""
    from reference import usual_nc1

    torch.manual_seed(0)
    labels, patterns = torch.arange(200) % 10, torch.randint(40, 216, (10, 3, 32, 32))
    images = (patterns[labels] + torch.randint(-40, 41, (200, 3, 32, 32))).float()
    images[0, 0, 0, :2] = torch.tensor([0.0, 255.0])
    split = Split(images, labels, torch.zeros(3))
    data, model = Data(split, split, [20] * 10), build_model("MLP", 10, depth_relu=1, width=64)
    row, parts, _ = Measurement(MeasuredRun(Run(tmp_path)), model, data).measure()
    centre = torch.eye(10, dtype=torch.float64) - 0.1
    spectrum = torch.linalg.eigvalsh(centre @ parts["HTH"] @ centre)  # K times that of the between-class covariance
    rounding = 1e-5 * float(spectrum[-1] / spectrum[1])  # of fp32, times the condition number
    assert rounding < 1e-2
    assert usual_nc1(model, data, torch.device("cpu")) == pytest.approx(row["NC1"], rel=rounding)


def check_gpu(folder, *flags):
    return [sys.executable, ROOT / "benchmarks" / "check_gpu.py", "--device", "cpu", "--out", folder, *flags]


def fork_everything():
    """Start the processes of a benchmark as forks, which is possible where no GPU is used."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: fork


def test_the_check_of_a_gpu_runs_on_the_cpu(tmp_path):
    """Every part ends, and finds equal what must be equal."""
    out, error = run_as_fork(check_gpu(tmp_path), tmp_path, before=fork_everything)
    rows = rows_of(tmp_path / "check_gpu_cpu.csv")
    assert not error
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        "machine", "collapse", "seeds", "paper", "rates", "agreement", "resume", "images",
    ]  # fmt: skip
    assert len(out.splitlines()) == len(rows) and not any("cut after" in row["what"] for row in rows)
    checked = [row["what"] for row in rows if row["value"] == "True"]
    assert len(checked) == 5 and "bit for bit" in checked[-1], "False would be a failure"
    assert {float(row["value"]) for row in rows if row["unit"] == "relative"} == {0.0}


def descendants(pid):
    """Return the process numbers of the children of a process, of their children, and so on."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        found = []
    return [*found, *itertools.chain(*map(descendants, found))]


def test_a_check_that_is_stopped_keeps_its_rows_and_leaves_no_process(tmp_path):
    """Nor those that the part has started, such as the usual loop and its loader. A part alone keeps earlier rows."""
    table = tmp_path / "check_gpu_cpu.csv"
    table.write_text("part,what,value,unit\nimages,earlier,1,\n")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(check_gpu(tmp_path, "--part", "rates"), **streams) as process:
        wait_for(lambda: len(descendants(process.pid)) >= 5)
        found = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT and error.count("\n") == 1 and "stopped by SIGINT" in error
    assert [row["part"] for row in rows_of(table)] == ["images", "machine"]
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in found))


def endless_part(*setting):
    time.sleep(100)


def test_a_part_that_takes_too_long_is_cut(tmp_path):
    import check_gpu

    table, size = tmp_path / "table.csv", check_gpu.SimpleNamespace(fraction=0.01)
    table.write_text("part,what,value,unit\n")
    assert check_gpu.run_elsewhere(endless_part, 0.2, table, "cpu", size, "") == 1
    assert rows_of(table) == [{"part": "endless_part", "what": "cut after", "value": "0.2", "unit": "s"}]
