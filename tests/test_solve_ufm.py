"""The solver as a user runs it."""

import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest

import solve_ufm
from datasets import load_data
from nc_theory import LOSSES, UFM, LossVariant, collapse_threshold
from nc_theory import solve as solve_problem
from tests.conftest import ROOT, write_folder


@pytest.fixture
def solve(run_script):
    return lambda *flags, **options: run_script("solve_ufm.py", *flags, **options)


def test_a_reader_that_ends_early_gets_no_traceback():
    command = [sys.executable, "solve_ufm.py", "--class_counts", "10,20", "--suggest_lambdas"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `head` does after its last line
    assert process.stderr.read() == "" and process.wait() == 1


def test_table(solve):
    out, _ = solve("--class_counts", "10,20,40", "--weight_decay", 0.01, "--feature_decay_rate", 0.001)
    optimum = solve_problem(UFM([10, 20, 40], 0.01, 0.001))
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[1] for row in rows] == ["10", "20", "40"]
    for k, row in enumerate(rows):
        assert float(row[2]) == pytest.approx(optimum.margins[k].item(), rel=1e-6)
        assert float(row[3]) == pytest.approx(optimum.margins[k].item(), rel=1e-6)
        assert float(row[5]) == pytest.approx(optimum.mean_norms_sq[k].item(), rel=1e-6)
        assert abs(float(row[4])) < 1e-6 and abs(float(row[7])) < 1e-6
    assert "relative gap" in out


@pytest.mark.parametrize(
    "flags", [["--bias"], ["--no_relu"], ["--bias", "--bias_decay", 0.1], ["--loss", "MSE", "--bias"]]
)
def test_problems_without_a_closed_form(solve, flags):
    out, _ = solve("--class_counts", "10,20,40", *flags)
    assert "minimised" in out and "closed form" not in out
    assert ("bias" in out.splitlines()[0]) == ("--bias" in flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "certified: the closed form is the minimum"),
        (["--class_weights", 1, "--label_smoothing", 0.1, "--ldam_margin", 0.5], "certified: the closed form is the"),
        (["--logit_adjustment", 1, "--logit_scaling", 0.2], "certified: no other solution is better by more than"),
        (["--no_relu", "--label_smoothing", 0.1], "certified: no other solution is better by more than"),
    ],
)
def test_losses_and_what_is_proved(solve, flags, words):
    out, _ = solve("--class_counts", "10,20,400", *flags)
    assert words in out.splitlines()[-1]


def test_json_of_a_loss(solve):
    values = [0.5, 1.0, 0.2, 0.3, 0.1]
    names = "class_weights logit_adjustment logit_scaling ldam_margin label_smoothing".split()
    flags = [word for name, value in zip(names, values, strict=True) for word in (f"--{name}", value)]
    out, _ = solve("--json", "--class_counts", "10,20,400", *flags)
    result = json.loads(out)
    expected = solve_problem(UFM([10, 20, 400], 5e-3, 5e-5, variant=LossVariant(*values)))
    for name in ("margins", "mean_norms_sq", "HTH", "WWT", "WH"):
        np.testing.assert_allclose(result[name], getattr(expected, name), rtol=1e-9)
    assert result["class_counts"] == [10, 20, 400] and result["certified"] is True
    assert result["loss"] == pytest.approx(expected.loss, rel=1e-12)
    assert result["gap"] == pytest.approx(result["loss"] / result["lower_bound"] - 1, abs=1e-13)


def test_many_classes(solve):
    problem = ["--class_counts", ",".join(map(str, range(100, 401)))]
    problem += ["--weight_decay", 1e-5, "--feature_decay_rate", 1e-7]
    out, _ = solve(*problem, "--class_weights", 1)
    assert len(out.splitlines()) == 301 + 5 and "minimised" not in out
    out, _ = solve(*problem, "--logit_adjustment", 2, "--level", "sample")
    assert "not certified: another solution may be better by up to" in out


def test_json_of_every_sample(solve):
    out, _ = solve("--class_counts", "4,8", "--level", "sample", "--json", "--restarts", 2, "--dim", 3)
    result = json.loads(out)
    assert len(result["losses_of_starts"]) == 2 and abs(result["loss_gap"]) < 1e-9
    assert result["within_class_spread"] < 1e-4
    assert np.shape(result["minimised"]["HTH"]) == np.shape(result["closed_form"]["WWT"]) == (2, 2)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--class_counts", "5"], "two or more whole numbers"),
        (["--weight_decay", 0], "not a number > 0"),
        (["--class_weights", "nan"], "--class_weights: 'nan' is not a number >= 0"),
        (["--logit_adjustment", -1], "--logit_adjustment: '-1' is not a number >= 0"),
        (["--label_smoothing", 1], "--label_smoothing: '1' is not a number >= 0 and < 1"),
        (["--loss", "MSE", "--ldam_margin", 1], "are for the cross entropy, not for MSE"),
        (["--bias_decay", 1], "--bias_decay: only with --bias"),
        (["--level", "batch"], "invalid choice"),
        (
            ["--phase_diagram", "x", "--bias"],
            "--phase_diagram takes --loss, --grid and class counts, not --bias",
        ),
        (["--suggest_lambdas", "--loss", "MSE"], "--suggest_lambdas takes --ratio and class counts, not --loss"),
        (["--suggest_lambdas", 0.5], "the largest margin must be above"),
        (["--counts_file", "none.csv"], "--counts_file: no file none.csv"),
        (["--counts_file", "none.csv", "--loss", "MSE"], "--counts_file takes --weight_decay, --feature_decay_rate"),
        (["--ratio", 1], "--ratio: only with --suggest_lambdas"),
        (["--collapse", 1], "--collapse: only with --suggest_lambdas"),
        (["--suggest_lambdas", 7, "--collapse", 1], "and without a margin there"),
        (["--suggest_lambdas", "--collapse", 1], "2 classes of 100 samples collapse together: exactly 2 can, not 1"),
        (["--suggest_lambdas", "--collapse", 10], "of 10 classes, 1 to 9 can collapse, not 10"),
        (["--suggest_lambdas", "--collapse", 2, "--bias"], "no threshold of collapse is known in closed form"),
        (["--suggest_lambdas", "--collapse", 2, "--class_weights", 1], "are not the first to collapse"),
        (["--imbalance", "exp:10", "--class_counts", "1,2"], "--class_counts and --imbalance: give one of them"),
        (["--imbalance", "exp:100", "--n_max", 50], "leaves classes without images; raise --n_max"),
        (["--imbalance", "paper", "--dataset", "imagefolder"], "the paper has no profile for imagefolder"),
        (["--dataset", "digit"], "did you mean digits?"),
    ],
)
def test_wrong_input_is_one_line(solve, flags, words):
    _, error = solve(*flags, status=2)
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, margin", [([], 5), ([7, "--ratio", 1], 7)])
def test_suggested_lambdas_are_flags_of_the_solver(solve, flags, margin):
    out, _ = solve("--class_counts", "10,20,40", "--suggest_lambdas", *flags)
    suggested, words = out.splitlines()
    assert "no class collapses" in words
    out, _ = solve("--class_counts", "10,20,40", "--json", *suggested.split())
    assert json.loads(out)["closed_form"]["margins"][-1] == pytest.approx(margin, rel=1e-4)


@pytest.mark.parametrize(
    "flags, counts",
    [
        (["--imbalance", "exp:100", "--n_max", 500], [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]),
        (["--imbalance", "paper"], [n for n in range(1000, 5001, 1000) for _ in range(2)]),
        (["--dataset", "digits", "--imbalance", "step:5"], None),
        (["--dataset", "digits", "--class_counts", "9,8,7,6,5,4,3,2,2,1"], [9, 8, 7, 6, 5, 4, 3, 2, 2, 1]),
    ],
)
def test_counts_are_those_of_training(solve, flags, counts):
    result = json.loads(solve(*flags, "--json")[0])
    assert result["class_counts"] == (counts or load_data("digits", "none", imbalance="step:5").class_counts)


def test_counts_of_a_list_of_images(solve, tmp_path):
    write_folder(tmp_path / "images", train=4)
    lines = [f"train/{name}/{n:04d}.png {label}" for label, name in enumerate(("ant", "bee")) for n in range(3 - label)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    lists = ["--train_list", tmp_path / "list.txt", "--test_list", tmp_path / "list.txt"]
    out, _ = solve("--dataset", "imagefolder", "--data_dir", tmp_path / "images", *lists, "--json")
    assert json.loads(out)["class_counts"] == [3, 2]


@pytest.mark.parametrize(
    "flags, number",
    [
        (["--imbalance", "exp:100", "--n_max", 500], 3),
        (["--class_counts", "10,20,40", "--loss", "MSE", "--no_relu"], 2),
        (["--class_counts", "10,20,40", "--class_weights", 0.3, "--label_smoothing", 0.1, "--ldam_margin", 0.2], 1),
    ],
)
def test_lambdas_at_which_the_smallest_classes_collapse(solve, flags, number):
    """Also by direct minimisation, which knows no threshold."""
    out, _ = solve(*flags, "--suggest_lambdas", "--collapse", number)
    suggested, words = out.splitlines()
    result = json.loads(solve(*flags, "--json", *suggested.split())[0])
    smallest = np.argsort(result["class_counts"])[:number]
    assert result["collapsed"] == sorted(smallest.tolist()) and words.endswith(" collapse" + "s" * (number == 1))
    norms = np.array(result["minimised"]["mean_norms_sq"]) * np.sqrt(result["class_counts"])
    assert (np.flatnonzero(norms < 1e-6) == np.sort(smallest)).all()
    out, _ = solve(*flags, *suggested.split())
    assert f"{words.split(', ', 1)[1]}\n" in out and "threshold of collapse" in out


BIGRAMS = "context,a,b,c\nx,30,10,0\ny,28,12,0\nz,0,5,40\nw,1,1,1\n"


def test_next_token_problem(solve, tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text(BIGRAMS)
    out, _ = solve("--counts_file", path, "--weight_decay", 0.05)
    assert "certified: no other" in out.splitlines()[-1] and "features at zero            w" in out
    out, _ = solve("--counts_file", path, "--weight_decay", 0.05, "--json")
    result, labels = json.loads(out), [[30, 10, 0], [28, 12, 0], [0, 5, 40], [1, 1, 1]]
    expected = solve_problem(UFM(labels=labels, lambda_w=0.05, lambda_h=5e-5))
    np.testing.assert_allclose(result["WH"], expected.WH, atol=1e-9)
    assert result["contexts"] == list("xyzw") and result["collapsed"] == ["w"] and result["certified"]


def test_contexts_with_the_same_next_tokens_are_merged(solve, tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("context,a,b,c\nx,30,10,0\nz,0,5,40\ny,60,20,0\n")
    out, _ = solve("--counts_file", path)
    assert "share a direction           x, y\n" in out


def test_the_example_of_the_docs_is_what_the_solver_prints(solve):
    words = (ROOT / "docs" / "losses.md").read_text().split("```text\n")[1].split("```")[0].splitlines()
    flags = ["--weight_decay", 5e-4, "--feature_decay_rate", 5e-4]
    out, _ = solve("--counts_file", ROOT / "results" / "texts" / "austen_bigrams.csv", *flags)
    *lines, last = out.splitlines()[-5:]
    assert lines == words[:-1]
    assert last.startswith("certified: no other solution is better by more than ") and words[-1].startswith(last[:52])


def test_bigrams_of_a_text_are_a_counts_file(solve, run_script, tmp_path):
    (tmp_path / "one.txt").write_text("It's a cat. A\ncat's")
    (tmp_path / "two.txt").write_text("a cat, a dog!")
    out, _ = run_script("scripts/count_bigrams.py", "one.txt", "two.txt", "--words", 3)
    assert out == "context,a,cat,it's\na,0,2,0\ncat,2,0,0\nit's,1,0,0\n"
    (tmp_path / "counts.csv").write_text(out)
    assert "context" in solve("--counts_file", tmp_path / "counts.csv")[0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("context,a,b\nx,1,2,3\n", "the row of 'x' has 4 cells, the first row 3"),
        ("context,a,b\nx,1,two\ny,1,2\n", "counts.csv: could not convert"),
        ("context,a,b\nx,1,-2\ny,1,2\n", "must be >= 0"),
        ("", "wanted (contexts, K)"),
    ],
)
def test_a_wrong_counts_file_is_one_line(solve, tmp_path, text, words):
    (tmp_path / "counts.csv").write_text(text)
    _, error = solve("--counts_file", tmp_path / "counts.csv", status=2)
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_phase_diagram(tmp_path, loss, monkeypatch):
    """The minimiser's zero class means lie above the closed-form threshold, the others below."""
    drawn = {}
    real = solve_ufm.draw_phases

    def keep(ratios, products, collapsed, edges, *rest):
        drawn.update(ratios=ratios, products=products, collapsed=collapsed, edges=edges)
        return real(ratios, products, collapsed, edges, *rest)

    monkeypatch.setattr(solve_ufm, "draw_phases", keep)
    args = Namespace(class_counts=[50, 50, 50, 50], grid=6, loss=loss, phase_diagram=tmp_path / "new" / "phases")
    paths = solve_ufm.phase_diagram(args)
    assert [path.name for path in paths] == ["phases.pdf", "phases.png"] and all(p.stat().st_size > 1000 for p in paths)
    above = drawn["products"][:, None] > drawn["edges"]
    assert np.array_equal(drawn["collapsed"], above)
    assert above.any() and not above.all()
    assert drawn["edges"][0] == pytest.approx(50 / (200**2 * (4 / 3 if loss == "CrossEntropy" else 1)))
    assert collapse_threshold([50, 50, 50, 50], loss) == drawn["edges"][0]
