"""Why a network is not at the optimum: the cause that was built in is the one that is named."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.diagnosis import explain, nc1_lines
from analysis.report import proof_table
from engine.run import Run
from engine.tables import MeasuredRun
from nc_theory import UFM, LossVariant, closed_form, convergence, diagnose, gap_bounds, gap_shares, solve
from tests.recorded import change_geometry, change_rows

PROBLEM = UFM([10, 20, 200, 300], 5e-3, 5e-5)
EPOCHS = np.arange(1, 252, 10)
FALLING = 10.0 ** (-EPOCHS / 40)
LATE_FLAT = np.maximum(FALLING, 10.0**-5)  # from epoch 201 on
COSINE = np.where(EPOCHS > 90, (1 + np.cos(np.pi * (EPOCHS - 90) / 160)) / 2, 1)


def network(dead=(), within=0.0, turn=0.0, head=1.0, optimum=None):
    """(optimum, the gap, |mu_k|^2) of the optimum's own network, with something wrong."""
    optimum = optimum or solve(PROBLEM)
    weight, means = optimum.head(8) * head, optimum.features(8)
    means[list(dead)] = 0.0
    means[1] += turn * means[0]
    count = len(means)
    losses = torch.nn.functional.cross_entropy(means @ weight.T, torch.arange(count), reduction="none")
    return optimum, gap_shares(optimum, weight, means, losses, [within] * count), means.square().sum(1)


def test_classes_that_died_are_told_from_those_that_collapse():
    optimum = solve(UFM([1, 20, 200, 300], 1e-2, 1e-3))
    assert optimum.collapsed.tolist() == [True, False, False, False]
    found = diagnose(*network(dead=[1], optimum=optimum))
    assert (found.zero, found.died, found.cause) == ((0, 1), (1,), "class 1 died")
    lines = found.lines()
    assert lines[0] == "at zero at the optimum: class 0; in the network: classes 0 and 1"
    assert lines[1].startswith("class 1 (n_k = 20) died: at the optimum |mu_k|^2 = ")
    assert diagnose(*network(optimum=optimum)).died == ()


@pytest.mark.parametrize(
    ("wrong", "share", "classes"),
    [
        ({"dead": [2]}, "margins", (2,)),
        ({"within": 100.0}, "within", None),
        ({"turn": 0.05}, "means", (0, 1)),
    ],
)
def test_the_largest_share_and_its_classes(wrong, share, classes):
    found = diagnose(*network(**wrong))
    assert found.share == share and classes in (None, found.classes)


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"penalty_scale": 0.4}, "the penalties are at 0.4 times their final strength"),
        ({"zero_samples": [0, 3, 0, 1]}, "4 training images have features that are all zero, most in class 1"),
        ({"accuracies": [100, 100, 99, 100]}, "2 training images are misclassified, most in class 2"),
        ({"gaps": FALLING}, "too few epochs so far"),
        (
            {"gaps": FALLING, "learning_rates": COSINE, "steps": 750},
            "too few steps: the learning rate",
        ),
        (
            {"gaps": FALLING, "learning_rates": COSINE, "penalty_lr": 0.02},
            "the penalties reached their final strength too late, when the learning rate was at 2% of its largest",
        ),
        ({"gaps": FALLING, "learning_rates": COSINE, "penalty_lr": 0.7}, "too few steps"),
        ({"accuracies": [100, 100, 99.6, 100]}, "1 training image is misclassified, most in class 2"),
        ({"zero_samples": [0, 1, 0, 0]}, "1 training image has features that are all zero, most in class 1"),
        ({"gaps": np.maximum(FALLING, 10.0**-5.8), "learning_rates": COSINE}, "too few steps"),
        ({"gaps": LATE_FLAT * 0 + 0.1, "learning_rates": COSINE}, None),
        ({"gaps": LATE_FLAT, "training_gap": 1e-6, "batch_norm": True}, "BatchNorm's running averages"),
        ({"gaps": LATE_FLAT, "training_gap": 1e-6}, None),
        ({"gaps": LATE_FLAT, "batch_norm": True, "least_images": 1.2}, "batches have 1.2 images of the rarest class"),
        ({"gaps": LATE_FLAT, "batch_norm": True, "least_images": 12.0}, None),
        ({"gaps": LATE_FLAT, "precision": "bf16"}, "bf16"),
        ({"gaps": LATE_FLAT, "NC0": 0.2}, "NC0 is 0.2, which no stationary point"),
        ({"gaps": LATE_FLAT, "learning_rates": EPOCHS * 0 + 1e-3}, "the learning rate is still 100% of its largest"),
        ({}, None),
    ],
)
def test_the_cause_is_the_one_that_was_built_in(facts, cause):
    epochs = {"epochs": EPOCHS} if "gaps" in facts else {}
    found = diagnose(*network(head=1.2), **epochs, **facts).cause
    assert found is None if cause is None else found.startswith(cause), found


def test_a_class_that_collapses_at_the_optimum_is_no_cause():
    """Nothing that happens to its images keeps the network away: at the optimum they are at zero, without a class."""
    optimum = solve(UFM([1, 20, 200, 300], 1e-2, 1e-3))
    _, gap, norms = network(head=1.2, optimum=optimum)
    norms = norms + 0.01  # nor is its class mean at zero
    facts = {"accuracies": [0, 100, 100, 100], "zero_samples": [1, 0, 0, 0]}
    assert diagnose(optimum, gap, norms, **facts).cause is None
    assert diagnose(optimum, gap, norms, accuracies=[0, 95, 100, 100]).cause.startswith("1 training image is")


def test_without_a_known_cause_this_is_said():
    """Also without the three measurements that show a course; not at the optimum, where nothing is wrong."""
    none = "likely cause: none of the causes that can be told apart applies"
    assert f"{none}; more epochs may help" in diagnose(*network(head=1.2), epochs=EPOCHS, gaps=LATE_FLAT).lines()
    (line,) = (line for line in diagnose(*network(head=1.2)).lines() if line.startswith("likely cause"))
    assert line.startswith(f"{none}, and without three measurements of the gap")
    assert not any("cause" in line for line in diagnose(*network()).lines())


def test_mse_and_scaled_logits_have_no_cause_in_nc0():
    for changed in ({"loss": "MSE"}, {"variant": LossVariant(logit_scaling=0.1)}):
        optimum = solve(UFM([10, 20, 200, 300], 5e-3, 5e-5, **changed))
        _, gap, norms = network(head=1.2, optimum=optimum)
        assert diagnose(optimum, gap, norms, epochs=EPOCHS, gaps=LATE_FLAT, NC0=0.2).cause is None


def test_at_the_optimum_nothing_is_wrong():
    found = diagnose(*network(), epochs=EPOCHS, gaps=LATE_FLAT, learning_rates=COSINE, accuracies=[100] * 4)
    assert found.cause is None and found.died == ()


@pytest.mark.parametrize(
    ("gaps", "rates", "text"),
    [
        (FALLING, None, "falling by 10 every 40 epochs: 1e-07 at about epoch 280"),
        (3 * FALLING, None, "falling by 10 every 40 epochs: 1e-06 at about epoch 259"),
        (1e8 * FALLING, None, "falling by 10 every 40 epochs: 1e+01 at about epoch 280, 1e-02 at about epoch 400"),
        (1e5 * FALLING, None, "falling by 10 every 40 epochs: 1e-02 at about epoch 280"),
        (FALLING, COSINE, "falling by 10 every 40 epochs until the learning rate was at zero"),
        (LATE_FLAT, None, "flat since epoch 201"),
        (LATE_FLAT, COSINE, "flat since epoch 201, with the learning rate at zero"),
        (1 / FALLING, None, "rising by 10 every 40 epochs"),
    ],
)
def test_the_course_of_the_gap_in_words(gaps, rates, text):
    noise = 10 ** (0.004 * np.random.default_rng(0).standard_normal(len(gaps)))
    found = convergence(EPOCHS, gaps, rates).text()
    assert found == text
    assert convergence(EPOCHS, gaps * noise, rates).text().split()[:2] == text.split()[:2]


def test_three_positive_gaps_are_needed():
    assert convergence([1, 2], [1.0, 0.1]) is None
    assert convergence([1, 2, 3, 4], [1.0, 0.1, 0.0, math.nan]) is None


def test_a_wrong_shape_is_one_line():
    optimum, gap, _ = network()
    with pytest.raises(ValueError, match=r"mean_norms_sq has shape \(2,\), wanted \(4,\)"):
        diagnose(optimum, gap, [1.0, 2.0])


# ---------------------------------------------------------------------------------------------------------
# Of a run, in the output of the scripts
# ---------------------------------------------------------------------------------------------------------

FLAGS = "--dataset digits --width 32 --depth_relu 1 --batch_size 102 --no-bias --sep_decay --lr 0.003".split()
FLAGS += "--weight_decay 0.005 --feature_decay_rate 0.0001 --epochs 40 --nc_every 10".split()


def test_training_validation_and_report_say_the_same(train, validate, tmp_path):
    out, _ = train(*FLAGS, "--save_path", "run")
    measured = MeasuredRun(Run(tmp_path / "run"))
    lines = explain(measured)
    assert "\n".join(lines) in out
    out, _ = validate("--load_path", "run")
    assert "\n".join(lines[:5]) in out
    assert lines[0] in (tmp_path / "run" / "report.html").read_text()


def test_with_two_measurements_the_log_tells_the_course(train, tmp_path):
    """With `--nc_every 39` of 40 epochs: measured at epochs 1 and 40, but the objective was logged at all 40."""
    train(*FLAGS[:-1], 39, "--save_path", "run")
    measured = MeasuredRun(Run(tmp_path / "run"))
    assert len(measured.rows) == 2
    assert any(line.startswith("the gap: ") for line in explain(measured))


def test_a_penalty_warm_up_that_ends_with_the_run_is_the_cause(train, tmp_path):
    """The penalties are at their final strength in the last epoch alone, in which the cosine has come to zero."""
    schedule = "--width 128 --penalty_warmup_epochs 39 --decay_type cosine --patience 10"
    flags = [*FLAGS, *schedule.split(), "--save_path"]
    late = "the penalties reached their final strength too late, when the learning rate was at 0% of its largest"
    assert late in train(*flags, "run")[0]
    assert late not in train(*flags, "soon", "--penalty_warmup_epochs", 8)[0]


def test_what_is_proved_stands_beside_what_is_measured(train, tmp_path):
    """For a head at the optimum: the proved bounds hold, and the printed ones are those of `gap_bounds`."""
    schedule = "--width 128 --decay_type cosine --patience 40 --adam_beta2 0.99 --clip_grad_norm 0.5 --stratified"
    train(*FLAGS, "--head_init", "optimum", "--epochs", 120, *schedule.split(), "--save_path", "run")
    measured = MeasuredRun(Run(tmp_path / "run"))
    row, parts, optimum = measured.rows.iloc[-1], measured.geometry(120), closed_form(UFM(**measured.comparison.entry))
    bounds = gap_bounds(optimum, row["optimality_gap"] * optimum.lower_bound)
    possible = 100 * float((bounds.margins / optimum.margins[:, None] - 1).abs().max())
    line = next(line for line in explain(measured) if line.startswith("every margin within"))
    assert line.startswith(f"every margin within {possible:.2g} % ({100 * row['margin_rel_err']:.2g})")
    assert row["margin_rel_err"] < possible / 100
    norms = np.sqrt(parts["mean_norms_sq"])
    html = proof_table(measured)  # of the report
    assert f"<td>every margin within {possible:.2g} %</td>" in html
    assert f"<td>{100 * row['margin_rel_err']:.2g} %</td>" in html
    cosines = parts["HTH"] / np.outer(norms, norms) - np.eye(10)
    assert f"({math.degrees(math.asin(cosines.max())):.2g}) of orthogonal" in line


def test_an_nc1_that_is_large_because_classes_merge_is_explained():
    """Means 1e-3 apart and dead up to that: NC1 divides by it. Equal distances, or an NC1 that is as large as NC1_trace
    says, need no explanation."""
    means = np.diag([1.0, 1.0, 1.0, 1e-3, 1e-3])
    row = {"NC1": 8.2e3, "NC1_trace": 0.05, "epoch": 1}

    def of(means):
        return SimpleNamespace(geometry=lambda epoch: {"HTH": means @ means.T})

    (line,) = nc1_lines(of(means), row)
    assert line.startswith("NC1 is 8.2e+03 because the means of classes 3 and 4 have nearly merged")
    assert line.endswith("see NC1_trace: 0.05")
    assert nc1_lines(of(np.eye(5)), row) == []
    for other in ({"NC1_trace": 5e3}, {"NC1": 0.5, "NC1_trace": 1e-4}):
        assert nc1_lines(of(means), row | other) == []


def test_validation_names_merged_classes_without_an_optimum_too(train, validate, tmp_path):
    """The measurements are changed to those of a network in which two classes are dead but for a trace."""
    train(*FLAGS, "--no-sep_decay", "--epochs", 2, "--save_path", "run")
    validate("--load_path", "run")
    run = tmp_path / "run"
    change_rows(run, lambda column: {"NC1": 0 * column + 900, "NC1_trace": 0 * column + 0.1}.get(column.name, column))
    near = np.diag([1.0] * 8 + [1e-3] * 2)
    for path in (run / "geometry").iterdir():
        change_geometry(path, lambda name, array: near if name == "HTH" else array)
    (line,) = explain(MeasuredRun(Run(run)))
    assert "the means of classes 8 and 9 have nearly merged" in line
    assert line in validate("--load_path", "run")[0]


def test_without_an_optimum_nothing_is_said(train, tmp_path):
    train(*FLAGS, "--no-sep_decay", "--epochs", 2, "--save_path", "run")
    assert explain(MeasuredRun(Run(tmp_path / "run"))) == []
