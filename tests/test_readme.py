"""The commands, examples and links of the documents work as written, and some of their numbers are computed again."""

import math
import re
import shlex
import subprocess

import pytest
import torch

import nc_theory
from args import make_parser, parse_args, run_folder
from engine.measurement import features, load_run
from engine.training import make_objective
from models import build_model
from nc_layers import head_weight
from scripts.loss_figures import MERGED, cosines, exponential_problem
from tests.conftest import PAPER, ROOT, TINY, python_examples, rows_of

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = r"(?<![\w-])--[a-z0-9_]+(?:-[a-z]+)?"
OTHERS = set(  # of pip, sbatch and torchrun
    "--array --index-url --nodes --ntasks-per --gpus-per --cpus-per --time --requeue --signal --nnodes "
    "--nproc_per_node --max-restarts --rdzv_backend --rdzv_id --rdzv_endpoint".split()
)
FOLDERS = "scripts|docs|results|benchmarks|engine|nc_theory|tests|models"


def run_example(code, run_script, folder):
    (folder / "example.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    return run_script(folder / "example.py")[0]


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {nc_theory.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{nc_theory.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_caption_of_the_first_figure_says_what_its_runs_reached():
    (row,) = (row for row in rows_of(ROOT / "results" / "recipe.csv") if "/readme-1" in row["folders"])
    worst = 100 * max(float(row["margin_rel_err_worst"]), float(row["norm_rel_err_worst"]))
    text = README.replace("\n", " ")
    assert f"every seed is within {worst:.1g} % of the theorem" in text
    assert 20 < float(row["seconds"]) < 40 and "After 60 epochs, half a minute on one core" in text


def test_the_headline_is_the_papers_mlp_of_the_results():
    (row,) = (row for row in rows_of(ROOT / "results" / "paper.csv") if "paper/paper-1" in row["folders"])
    worst = 100 * max(float(row["margin_rel_err_worst"]), float(row["norm_rel_err_worst"]))
    text = README.replace("\n", " ")
    assert f"at the theorem after {float(row['seconds']) / 60:.0f} minutes of training on one core**" in text
    assert f"every margin and norm is within {worst:.1g} % after {25 * 118:,} steps (three seeds" in text


def test_the_times_on_a_gpu_follow_from_its_check():
    rate = {row["what"]: row["value"] for row in rows_of(ROOT / "results" / "check_gpu_cuda.csv")}
    minutes = 4000 * math.ceil(30_000 / 256) / float(rate["MLP, fp32, ours"]) / 60
    hours = [4000 * 30_000 / float(rate[f"ResNet18, {name}, deterministic"]) / 3600 for name in ("fp32", "tf32")]
    text = README.replace("\n", " ")
    assert f"the MLP takes 13 hours on 2 cores of an AMD EPYC and {minutes:.0f} minutes on an H100;" in text
    assert f"and {hours[0]:.0f} hours on an H100 ({hours[1]:.1f} with `--precision tf32`)" in text


def test_the_times_on_a_cpu_follow_from_the_benchmarks():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    steps = {"MLP": 4000 * math.ceil(30_000 / 256), "ResNet18": 4000 * math.ceil(30_000 / 32)}
    hours = {
        model: count * float(re.search(rf"^\| {model}, ours, fp32 \| \d+ \| (\d+) \|", page, re.M)[1]) / 3.6e6
        for model, count in steps.items()
    }
    text = README.replace("\n", " ")
    assert f"the MLP takes {hours['MLP']:.0f} hours on 2 cores of an AMD EPYC" in text
    assert f"ResNet18 takes {hours['ResNet18'] / 24:.0f} days on those cores" in text


def test_the_sizes_of_the_papers_models():
    """The checkpoints of the README, and the table of docs/scale.md."""
    sizes = {}
    for name in ("MLP", "ResNet18", "ResNet50"):
        with torch.device("meta"):
            model = build_model(name, 10, bias=False)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    gigabytes = {name: 401 * 4 * count / 1e9 for name, count in sizes.items()}
    text = README.replace("\n", " ")
    assert f"checkpoints take {gigabytes['MLP']:.0f} GB (ResNet18: {gigabytes['ResNet18']:.0f})" in text
    rows = [
        ("P, million", 1e-6, ".1f", ""),
        ("message with the gradients, 4 P bytes", 4e-6, ".0f", " MB"),
        ("weights, gradients and Adam's moments on each GPU, 16 P bytes", 16e-9, ".2f", " GB"),
    ]
    scale = (ROOT / "docs" / "scale.md").read_text()
    for head, factor, form, unit in rows:
        assert f"| {head} | {' | '.join(f'{factor * count:{form}}{unit}' for count in sizes.values())} |" in scale


def test_the_two_objectives_of_the_papers_mlp():
    args = parse_args(argv=[*PAPER.split(), "--objective", "released"])
    head, features = make_objective(args, [1000, 2000, 3000, 4000, 5000] * 2, 1024).effective_decays()
    assert head / args.weight_decay == 2 and f"{args.feature_decay_rate / features:.0f}" == "59"
    assert "its feature penalty is 59 times smaller and its head penalty twice as large" in README.replace("\n", " ")


def test_class_means_of_logit_adjustment_merge_where_the_losses_page_says():
    text = (ROOT / "docs" / "losses.md").read_text().replace("\n", " ")
    assert "orthogonal at an imbalance of 6.95; the largest cosine is 0.0002 at 7, exceeds 0.001 from 7.07 on," in text
    largest = [cosines(exponential_problem(ratio, logit_adjustment=1.0)).max() for ratio in (6.95, 7, 7.06, 7.07)]
    assert largest[0] == 0 and f"{largest[1]:.4f}" == "0.0002" and largest[2] < MERGED < largest[3]


def test_the_focal_loss_of_the_losses_page_is_certified(run_script, tmp_path):
    (example,) = (code for code in python_examples("docs/losses.md") if "FocalLoss" in code)
    printed = run_example(example, run_script, tmp_path).strip()
    assert f'It prints "{printed}".' in (ROOT / "docs" / "losses.md").read_text()


def test_the_layers_of_the_readme_are_measured(run_script, tmp_path):
    (layers,) = python_examples("README.md")
    out = run_example(layers, run_script, tmp_path)
    assert re.fullmatch(r"layer3 \d\S+\nfc \d\S+\n", out)


def test_the_loop_of_extending_runs(run_script, tmp_path):
    *_, loop = python_examples("docs/extending.md")
    printed = run_example(loop, run_script, tmp_path)
    assert printed.count("nan") == ("'NC1_corrected': nan" in printed)  # where the class means are mostly noise


def test_the_sweep_of_extending_gives_commands(tmp_path):
    (block,) = re.findall(r"```bash\n(for .*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    loop, rest = block.split("scripts/sweep.sh")
    subprocess.run(["bash", "-ec", loop], cwd=tmp_path, check=True)
    assert rest.startswith(" -j 2 sweep.txt\n")
    commands = [line.split(" && ") for line in (tmp_path / "sweep.txt").read_text().splitlines()]
    folders = set()
    for train, validate in commands:
        flags = [parse_args(argv=from_root(command)) for command in (train, validate)]
        assert flags[0] == flags[1] and flags[0].resume
        folders.add(run_folder(flags[0]))
    assert len(commands) == len(folders) == 6


def from_root(command):
    """Return the flags of `python SCRIPT FLAGS`, with @FILE relative to the repository."""
    return [word.replace("@", f"@{ROOT}/") for word in shlex.split(command)[2:]]


def test_the_model_of_extending_is_one():
    model, *_ = python_examples("docs/extending.md")
    namespace = {}
    exec(model, namespace)
    net = namespace["SmallNet"](num_classes=7, bias=False, depth_linear=1, revive=True, planes=12)
    logits, features = net(torch.rand(5, 3, 32, 32))
    assert logits.shape == (5, 7) and features.shape == (5, 12) and (features >= 0).all()


def test_the_theory_example_runs(run_script, tmp_path):
    (example,) = python_examples("docs/theory.md")
    assert "closed form" in run_example(example, run_script, tmp_path)


def test_the_tutorial_runs(train, measure, run_script, tmp_path):
    flags = [*TINY, "--save_path", "model_weights/quickstart"]
    train(*flags)
    measure(*flags)
    (code,) = python_examples("docs/tutorial.md")
    ours, csv = re.search(r"NC1: (\S+), in nc_metrics.csv: (\S+)", run_example(code, run_script, tmp_path)).groups()
    assert float(ours) == pytest.approx(float(csv), rel=1e-4)
    assert (tmp_path / "distances.png").stat().st_size > 1000


def test_the_logits_of_the_tutorial_are_those_of_the_model(train, tmp_path):
    """As it says, the head's matrix and the features have the same type, float64, and need no conversion."""
    assert "`h @ W.T`" in (ROOT / "docs" / "tutorial.md").read_text()
    train(*TINY, "--save_path", "run")
    _, data, model = load_run(tmp_path / "run")
    h, _ = features(model, data.train)
    logits = h @ head_weight(model.fc).T
    with torch.no_grad():
        torch.testing.assert_close(logits, model(data.train.images)[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page):
    known = {option for action in make_parser()._actions for option in action.option_strings} | OTHERS
    for script in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*"), *ROOT.glob("benchmarks/*.py")):
        if script.is_file():
            known |= set(re.findall(FLAG, script.read_text()))
    assert set(re.findall(FLAG, page.read_text())) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    joined = page.read_text().replace("\\\n", " ")
    pattern = r"^(?:CUDA_VISIBLE_DEVICES=0 )?python train_1st_order_unbalanced.py ([@-].*)$"
    commands = re.findall(pattern, joined, re.M)
    assert commands or page.name not in ("README.md", "recipe.md", "results.md")
    for command in commands:
        make_parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_headings_exist(page):
    text = page.read_text()
    for link in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
        if link.startswith(("http:", "https:")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}, link
    for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text):
        assert (page.parent / path).exists() or (ROOT / path).exists() or path.startswith("docs/figures/"), path
