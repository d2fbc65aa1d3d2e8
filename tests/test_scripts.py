"""The two entry scripts as a user runs them, with tiny budgets, on the CPU."""

import functools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.summary import state
from datasets import epoch_order, load_data
from engine.measurement import Measurement, features, load_run
from engine.run import Run
from engine.tables import MeasuredRun
from engine.training import make_objective
from models import MODELS, build_model
from nc_metrics import THEORY_COLUMNS
from nc_theory import GAP_COLUMNS, UFM, closed_form, solve, solve_numerically
from tests.conftest import TINY, TRAIN, config_of, documented, log_of, rows_of, same_weights, weights, write_folder
from utils import UserError


def test_files_of_a_run(train, validate, tmp_path):
    """Each file of a run in the default folder, which validation finds from the same flags."""
    out, _ = train(*TINY, "--epochs", 5, "--save_every", 3)
    folder = next((tmp_path / "model_weights").iterdir())
    assert str(folder.name) in out and "epoch 5/5" in out
    assert sorted(p.name for p in folder.glob("epoch_*")) == ["epoch_001.pth", "epoch_004.pth", "epoch_005.pth"]
    config = config_of(folder)
    assert config["class_counts"] == [34, 34, 68, 68, 102, 102, 136, 136, 170, 170]
    assert (config["effective_weight_decay"], config["effective_feature_decay"]) == (1e-4, 1e-5)
    model = build_model("MLP", 10, bias=False, depth_relu=1, width=24)
    assert config["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert config["flags"]["width"] == 24 and config["versions"]["torch"] == torch.__version__
    log = log_of(folder, drop=())
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    wanted = "epoch lr penalty_scale loss ce train_acc1 grad_norm_max loss_spike seconds images_per_second".split()
    assert list(log[0]) == [*wanted, "seconds_waiting"] and log[4]["loss"] < log[0]["loss"]
    assert set(weights(folder / "epoch_001.pth")) == set(model.state_dict())

    out, _ = validate(*TINY, "--epochs", 5, "--save_every", 3)
    rows = rows_of(folder / "nc_metrics.csv")
    first, *columns = rows[0]
    assert first == "epoch" and sorted(columns) == sorted(documented("theory.md", "column"))
    assert [row["epoch"] for row in rows] == ["1", "4", "5"]
    assert all(math.isfinite(float(cell)) for row in rows for cell in row.values())
    geometry = np.load(folder / "geometry" / "epoch_005.npz")
    names = ["HTH", "WWT", "WH", "margins", "mean_norms_sq"]
    assert set(geometry) == {
        *("class_counts", "zero_samples", *names, *(f"{name}_theory" for name in names)),
        *GAP_COLUMNS[1:],
    }
    problem = UFM(config["class_counts"], 1e-4, 1e-5)
    assert UFM(**config["problems"]["objective"]) == UFM(**config["problems"]["nominal"]) == problem
    optimum = closed_form(problem)
    np.testing.assert_allclose(geometry["WWT_theory"], optimum.WWT)
    figures = {path.name for path in (folder / "figures").glob("[!.]*")}
    drawn = {*documented("results.md", "figure")} - {"layers"}  # which needs --nc_layers
    assert figures == {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")}
    assert "measured against theorem" in out and f"{optimum.margins[0]:.4f}" in out


def test_the_row_is_that_of_the_checkpoint(train, measure, tmp_path):
    """Accuracies and NC1 of the CSV against an independent evaluation, image by image."""
    train(*TINY, "--save_path", "run")
    measure("--load_path", "run")
    row = rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]
    model = build_model("MLP", 10, bias=False, depth_relu=1, width=24)
    model.load_state_dict(weights(tmp_path / "run" / "epoch_002.pth"))
    data = load_data("digits", "unused")
    with torch.no_grad():
        logits, features = model(data.train.images)
        test_logits, _ = model(data.test.images)
    assert float(row["train_acc1"]) == pytest.approx(
        100 * (logits.argmax(1) == data.train.labels).float().mean().item()
    )
    hits = (test_logits.argmax(1) == data.test.labels).double()
    assert float(row["test_acc1"]) == pytest.approx(100 * hits.mean().item())
    larger = (test_logits > test_logits.gather(1, data.test.labels[:, None])).sum(1)
    assert float(row["test_acc5"]) == pytest.approx(100 * (larger < 5).double().mean().item())
    by_class = torch.stack([100 * hits[data.test.labels == k].mean() for k in range(10)])
    groups = {"balanced": range(10), "many": (9, 8, 7, 6), "medium": (4, 5), "few": (0, 1, 2, 3)}
    for name, labels in groups.items():
        assert float(row[f"{name}_acc1"]) == pytest.approx(by_class[list(labels)].mean().item())
    accuracies = rows_of(tmp_path / "run" / "class_accuracy.csv")
    assert (
        list(accuracies[0]) == ["epoch", "split", "class", "name", "n_k", "accuracy"] and len(accuracies) == 2 * 2 * 10
    )
    found = [float(line["accuracy"]) for line in accuracies if (line["epoch"], line["split"]) == ("2", "test")]
    assert found == pytest.approx(by_class.tolist())
    h, y = features.double().numpy(), data.train.labels.numpy()
    means = np.stack([h[y == k].mean(0) for k in range(10)])
    sigma_b = sum(np.outer(m - h.mean(0), m - h.mean(0)) for m in means) / 10
    sigma_w = (h - means[y]).T @ (h - means[y]) / len(h)
    spectrum = np.linalg.eigvalsh(sigma_b)[-9:]  # its rank is K - 1
    rounding = 1e-6 * spectrum[-1] / spectrum[0]  # of features in fp32, times the condition number
    assert rounding < 1e-2
    assert float(row["NC1"]) == pytest.approx(np.trace(sigma_w @ np.linalg.pinv(sigma_b)) / 10, rel=rounding)


@pytest.mark.parametrize("name", MODELS)
def test_every_model(train, measure, tmp_path, name):
    write_folder(tmp_path / "images", train=6)
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--model", name, "--batch_size", 8, "--epochs", 1]
    flags += ["--width", 16] if name == "MLP" else ["--planes", 8]
    flags += ["--no-bias", "--sep_decay", "--save_path", "run"]
    out, _ = train(*flags)
    assert "epoch 1/1" in out
    out, _ = measure(*flags)
    assert "NC3_WH" in out


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
@pytest.mark.parametrize("objective", ["paper", "released"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_every_loss_objective_and_optimizer(train, measure, tmp_path, loss, objective, optimizer):
    flags = [*TINY, "--loss", loss, "--objective", objective, "--optimizer", optimizer, "--save_path", "run"]
    train(*flags)
    measure(*flags)
    log = log_of(tmp_path / "run")
    assert ("ce" if loss == "CrossEntropy" else "mse") in log[0]
    assert log[1]["loss"] < log[0]["loss"]
    row = rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]
    del row["NC1_corrected"]  # empty while the class means are mostly noise
    assert all(math.isfinite(float(cell)) for cell in row.values())


@pytest.mark.parametrize("stratified", [False, True])
def test_the_log_is_the_training_pass(train, tmp_path, stratified):
    """Loss and accuracy of the first epoch, against a plain loop with torch's own parts, batch by batch: 20 of 50
    images and one of 20, or, stratified, 12 of 49 and 9 of 48. SGD does not magnify rounding; Adam divides it by the
    root of a small gradient."""
    train(
        *TINY, "--optimizer", "SGD", "--lr", 0.01, "--epochs", 1, "--save_path", "run", *["--stratified"] * stratified
    )
    data = load_data("digits", "unused")
    torch.manual_seed(1)
    model = build_model("MLP", 10, bias=False, depth_relu=1, width=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    total = correct = 0
    order = epoch_order(1020, epoch=1, seed=1, labels=data.train.labels if stratified else None)
    for rows in order.split([49] * 12 + [48] * 9 if stratified else 50):
        images, labels = data.train.images[rows], data.train.labels[rows]
        logits, features = model(images)
        ce = torch.nn.functional.cross_entropy(logits, labels)
        loss = ce + 0.5e-4 * model.fc[0].weight.square().sum()
        loss = loss + 0.5e-5 * 1020 / len(labels) * features.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
    line = log_of(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(total / 1020, rel=1e-5)
    assert line["train_acc1"] == pytest.approx(100 * correct / 1020, abs=100.1 / 1020)  # one image on a boundary
    found = weights(tmp_path / "run" / "epoch_001.pth")
    for key, value in model.state_dict().items():  # 21 times the rounding of weights up to 0.3 in fp32 is 4e-7
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_learning_rate_schedules(train, tmp_path):
    train(*TINY, "--epochs", 5, "--patience", 2, "--gamma", 0.5, "--save_path", "a")
    assert [line["lr"] for line in log_of(tmp_path / "a")] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])
    train(*TINY, "--epochs", 4, "--decay_type", "step_1_3", "--save_path", "b")
    assert [line["lr"] for line in log_of(tmp_path / "b")] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 2],
        ["--no_shuffle"],
        ["--data_augmentation"],
        ["--clip_grad_norm", 0.01],
        ["--weight_decay", 0.1],
        ["--feature_decay_rate", 0.1],
        ["--batch_size", 51],
        ["--precision", "bf16"],
        ["--imbalance", "exp:2", "--n_max", 60],
        ["--imbalance", "balanced"],
        ["--bias"],
        ["--depth_linear", 2],
        ["--no-feature_relu"],
        ["--penalty_start", 5, "--penalty_fall_epochs", 1, "--epochs", 2],
        ["--class_weights", 1],
        ["--logit_adjustment", 1],
        ["--logit_scaling", 0.3],
        ["--ldam_margin", 0.5],
        ["--label_smoothing", 0.1],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_has_its_effect(train, tmp_path, flags):
    train(*TINY, "--epochs", 1, "--save_path", "plain")
    train(*TINY, "--epochs", 1, "--save_path", "flag", *flags)
    assert not same_weights(tmp_path / "plain" / "epoch_001.pth", tmp_path / "flag" / "epoch_001.pth")


def test_bf16_on_a_cpu_prints_its_speed(train):
    out, _ = train(*TINY, "--epochs", 1, "--precision", "bf16", "--save_path", "run")
    assert re.search(r"bf16 \(on this CPU a bf16 product is \d+\.\d times (as fast as|slower than) one in fp32\)", out)


def test_same_flags_same_weights_and_rows(train, measure, tmp_path):
    for name in "ab":
        train(*TINY, "--save_path", name)
        measure("--load_path", name)
    assert same_weights(tmp_path / "a" / "epoch_002.pth", tmp_path / "b" / "epoch_002.pth")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert (tmp_path / "a" / "nc_metrics.csv").read_text() == (tmp_path / "b" / "nc_metrics.csv").read_text()


def test_init_from_takes_the_weights(train, tmp_path):
    train(*TINY, "--save_path", "first")
    train(*TINY, "--save_path", "second", "--init_from", "first/epoch_002.pth", "--lr", 1e-12, "--epochs", 1)
    first, second = weights(tmp_path / "first" / "epoch_002.pth"), weights(tmp_path / "second" / "epoch_001.pth")
    for key in first:  # Adam moves a weight by lr a step, to within its bias correction
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-8)
    _, error = train(*TINY, "--init_from", "nothing.pth", "--save_path", "third", status=2)
    assert "nothing.pth: no such file" in error


def test_resume_ends_where_an_uncut_run_ends(train, tmp_path):
    """Adam's state, the schedule and the order of batches continue; the log has each epoch once."""
    flags = [*TINY, "--patience", 3, "--save_every", 2, "--nc_every", 1]
    train(*flags, "--epochs", 5, "--save_path", "whole")
    train(*flags, "--epochs", 3, "--save_path", "cut")
    with open(tmp_path / "cut" / "train_log.jsonl", "a") as file:
        file.write('{"epoch": 4, "lr": 0.1}\n{"epoch": 5, "l')  # as after a kill
    train(*flags, "--epochs", 5, "--save_path", "cut", "--resume")
    assert same_weights(tmp_path / "whole" / "epoch_005.pth", tmp_path / "cut" / "epoch_005.pth")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert (tmp_path / "whole" / "nc_metrics.csv").read_text() == (tmp_path / "cut" / "nc_metrics.csv").read_text()


def test_a_run_is_not_overwritten(train, tmp_path):
    train(*TINY, "--save_path", "run")
    before = (tmp_path / "run" / "epoch_002.pth").read_bytes()
    _, error = train(*TINY, "--save_path", "run", status=2)
    assert "give --resume to continue it, --force to delete it" in error and error.count("\n") == 1
    _, error = train(*TINY, "--save_path", "run", "--resume", "--lr", 0.5, status=2)
    assert "contradicts the flags: --lr is 0.5, in the run 0.001; to go on with other flags, train a new run" in error
    assert (tmp_path / "run" / "epoch_002.pth").read_bytes() == before
    for path in (tmp_path / "run").glob("epoch_*"):
        path.rename(tmp_path / path.name)  # as if to save space: log and metrics alone still count as a run
    train(*TINY, "--save_path", "run", status=2)
    (tmp_path / "run" / "last.pt").rename(tmp_path / "last.pt")
    (tmp_path / "run" / "nc_metrics_bn_nominal.csv").write_text("epoch,NC1\n1,2\n")
    train(*TINY, "--save_path", "run", status=2)
    (tmp_path / "epoch_002.pth").rename(tmp_path / "run" / "epoch_002.pth")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(*TINY, "--save_path", "run", "--epochs", 1, "--force")
    assert not (tmp_path / "run" / "epoch_002.pth").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_measuring_while_training_gives_the_rows_of_validate(train, measure, tmp_path):
    train(*TINY, "--epochs", 3, "--save_every", 1, "--nc_every", 2, "--save_path", "run")
    while_training = rows_of(tmp_path / "run" / "nc_metrics.csv")
    assert [row["epoch"] for row in while_training] == ["1", "3"]
    out, _ = measure("--load_path", "run")
    assert "checkpoint 1/1" in out  # only epoch 2 was left to measure
    rows = rows_of(tmp_path / "run" / "nc_metrics.csv")
    assert [rows[0], rows[2]] == while_training
    measure("--load_path", "run", "--recompute")
    assert rows_of(tmp_path / "run" / "nc_metrics.csv") == rows


LAYERS = [*TINY, "--save_every", 1, "--nc_every", 2, "--nc_layers", "layers.1,head"]


def test_layers_measured_while_training(train, run_script, tmp_path):
    """Training goes on as without; a resumed run ends with the same rows, which are those of measure_model.py."""
    train(*LAYERS, "--epochs", 3, "--save_path", "whole")
    train(*LAYERS, "--epochs", 1, "--save_path", "cut")
    train(*LAYERS, "--epochs", 3, "--save_path", "cut", "--resume")
    train(*TINY, "--save_every", 1, "--epochs", 3, "--save_path", "without")
    for name in ("cut", "without"):
        assert same_weights(tmp_path / "whole" / "epoch_003.pth", tmp_path / name / "epoch_003.pth")
    text = (tmp_path / "whole" / "nc_layers.csv").read_text()
    assert text == (tmp_path / "cut" / "nc_layers.csv").read_text()
    assert not (tmp_path / "without" / "nc_layers.csv").exists()

    rows = rows_of(tmp_path / "whole" / "nc_layers.csv")
    keys = [(row["epoch"], row["layer"], row["split"]) for row in rows]
    assert keys == [(e, name, split) for e in "13" for name in ("layers.1", "fc") for split in ("train", "test")]
    run_script("measure_model.py", "--run", "whole", "--layers", "layers.1,head", "--epochs", "1,3")
    for row, later in zip(rows, rows_of(tmp_path / "layers" / "layers.csv"), strict=True):
        assert {name: row[name] for name in later} == later
    (of_head,) = (row for row in rows if (row["epoch"], row["layer"], row["split"]) == ("3", "fc", "train"))
    for name in ("NC1", "NC0", "NC2_W", "CDNV", "NC4"):
        measured = rows_of(tmp_path / "whole" / "nc_metrics.csv")[-1][name]
        assert float(of_head[name]) == pytest.approx(float(measured), rel=1e-5), name
    run_script("plot_nc.py", "whole", "cut")
    assert {path.stem for path in (tmp_path / "figures").glob("layers.*")} == {"layers"}
    train(*TINY, "--epochs", 1, "--save_path", "whole", "--force")
    assert not (tmp_path / "whole" / "nc_layers.csv").exists()
    _, error = train(*TINY, "--nc_every", 1, "--nc_layers", "layer.1", "--save_path", "no", status=2)
    assert "--nc_layers: the model has no layer 'layer.1'; the nearest names are layers.1" in error


@pytest.mark.parametrize("flags", ["--bn_statistics training_set", "--precision bf16"])
def test_layers_are_measured_as_the_run_is(train, tmp_path, flags):
    """With the same statistics of BatchNorm, and in the same precision."""
    net = "--dataset digits --class_counts 9,9,9,9,9,9,9,9,9,9 --model ResNet18 --planes 2 --epochs 1 --batch_size 30"
    train(*net.split(), *flags.split(), "--nc_every", 1, "--nc_layers", "layer1,head", "--save_path", "run")
    suffix = "_bn" if "bn" in flags else ""
    row = next(r for r in rows_of(tmp_path / "run" / f"nc_layers{suffix}.csv") if r["layer"] == "fc")
    measured = rows_of(tmp_path / "run" / f"nc_metrics{suffix}.csv")[-1]
    for name in ("NC1", "CDNV", "NC4", "NCM_acc1"):
        assert float(row[name]) == pytest.approx(float(measured[name]), rel=1e-5), name


def test_done_rows_are_kept_and_damaged_checkpoints_named(train, measure, tmp_path):
    train(*TINY, "--epochs", 3, "--save_every", 1, "--save_path", "run")
    (tmp_path / "run" / "epoch_002.pth").write_bytes((tmp_path / "run" / "epoch_002.pth").read_bytes()[:500])
    _, error = measure("--load_path", "run", status=1)
    assert "epoch_002.pth: truncated or damaged" in error and error.count("\n") == 1
    assert [row["epoch"] for row in rows_of(tmp_path / "run" / "nc_metrics.csv")] == ["1", "3"]


def test_training_prints_the_prediction_of_the_theory(train):
    """From the closed form only. With a bias there is none, and training does not wait for a minimisation."""
    expected = solve(UFM([34, 34, 68, 68, 102, 102, 136, 136, 170, 170], 1e-4, 1e-5))
    out, _ = train(*TINY, "--epochs", 1, "--save_path", "run")
    assert f"least loss {expected.loss:.6f}; margins {expected.margins.min():.3f} to" in out
    assert "no class collapses" in out
    out, _ = train(*TINY, "--epochs", 1, "--weight_decay", 1, "--feature_decay_rate", 1, "--save_path", "collapsed")
    assert "classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 collapse to zero" in out
    out, _ = train(*TINY, "--bias", "--epochs", 1, "--save_path", "bias")
    assert "theory     no closed form: measuring finds the optimum by minimisation" in out


def test_theories_have_files_of_their_own(train, measure, tmp_path):
    """The released objective against its own optimum, the flags' and the released formula."""
    train(*TINY, "--objective", "released", "--save_path", "run")
    tables = {}
    for theory, suffix in (("objective", ""), ("nominal", "_nominal"), ("released", "_released")):
        measure("--load_path", "run", "--theory", theory)
        tables[theory] = rows_of(tmp_path / "run" / f"nc_metrics{suffix}.csv")[-1]
        assert (tmp_path / "run" / f"geometry{suffix}" / "epoch_002.npz").exists()
    assert len({row["NC2_H"] for row in tables.values()}) == 3
    assert len({row["NC1"] for row in tables.values()}) == 1
    stored = np.load(tmp_path / "run" / "geometry" / "epoch_002.npz")
    expected = closed_form(UFM(stored["class_counts"], 2e-4, 2e-5 / 21))  # 1,020 images: 21 batches of 50
    np.testing.assert_allclose(stored["margins_theory"], expected.margins)


def test_without_sep_decay_no_theory(train, measure, tmp_path):
    flags = [flag for flag in TINY if flag != "--sep_decay"] + ["--save_path", "run"]
    train(*flags)
    out, _ = measure(*flags)
    assert "stay empty: without --sep_decay no optimum is known" in out
    row = rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]
    assert {name for name, cell in row.items() if not cell} == {*THEORY_COLUMNS, *GAP_COLUMNS}
    measure(*flags, "--theory", "nominal")
    assert all(rows_of(tmp_path / "run" / "nc_metrics_nominal.csv")[-1].values())


@pytest.mark.parametrize("loss", ["CrossEntropy", "MSE"])
def test_a_run_with_bias_meets_its_own_optimum(train, measure, tmp_path, loss):
    """That is the minimiser with a free bias, not the closed form without a bias."""
    flags = [*TINY, "--bias", "--loss", loss, "--save_path", "run"]
    train(*flags)
    measure(*flags)
    stored = np.load(tmp_path / "run" / "geometry" / "epoch_002.npz")
    expected = solve_numerically(UFM(stored["class_counts"], 1e-4, 1e-5, loss=loss, bias=True)).optimum
    np.testing.assert_allclose(stored["margins_theory"], expected.margins, rtol=1e-5)
    without_bias = closed_form(UFM(stored["class_counts"], 1e-4, 1e-5, loss=loss))
    assert not np.allclose(stored["margins_theory"], without_bias.margins, rtol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [[], ["--bias"], ["--loss", "MSE"], ["--logit_adjustment", 1, "--class_weights", 0.5], ["--no-feature_relu"]],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_the_optimality_gap_is_that_of_the_objective(train, measure, tmp_path, flags):
    """(objective in float64 over all images in one batch) / optimum - 1, and its parts in words."""
    flags = [*TINY, "--weight_decay", 0.01, "--feature_decay_rate", 0.0005, *flags, "--save_path", "run"]
    train(*flags)
    out, _ = measure(*flags)
    row = {name: float(cell) for name, cell in rows_of(tmp_path / "run" / "nc_metrics.csv")[-1].items() if cell}
    config, data, model = load_run(tmp_path / "run")
    objective = make_objective(SimpleNamespace(**config["flags"]), data.class_counts, feature_dim=24)
    with torch.inference_mode():
        total = objective(*model.double()(data.train.images.double()), data.train.labels, model.fc)[0].item()
    bound = solve(objective.problem()).lower_bound
    assert row["optimality_gap"] == pytest.approx(total / bound - 1, rel=1e-4)
    parts = [row[name] for name in GAP_COLUMNS[1:]]
    assert sum(parts) == pytest.approx(total - bound, rel=1e-4) and min(parts) >= -1e-9
    assert f"The objective is {row['optimality_gap']:.1e} above the least value that any network can reach" in out
    largest = f"{max(parts):9.1e}  "
    assert next(line for line in out.splitlines() if line.endswith("(the largest share)")).startswith(largest)


@pytest.mark.parametrize("flags", [["--bias"], ["--depth_linear", 2], ["--bias", "--depth_linear", 2]], ids=str)
@pytest.mark.parametrize("theory", ["nominal", "released"])
def test_the_gap_under_another_theory_is_that_of_w_and_h_in_its_problem(train, measure, tmp_path, flags, theory):
    """Without the network's bias, which that problem has not, and for the product of the head's matrices."""
    flags = [*TINY, "--epochs", 10, *flags, "--save_path", "run"]
    flags += ["--weight_decay", 0.005, "--feature_decay_rate", 0.0001]
    train(*flags)
    measure(*flags, "--theory", theory)
    row = rows_of(tmp_path / "run" / f"nc_metrics_{theory}.csv")[-1]
    _, data, model = load_run(tmp_path / "run")
    with torch.inference_mode():
        features = model.double()(data.train.images.double())[1]
        weight = functools.reduce(lambda product, layer: layer.weight @ product, model.fc[1:], model.fc[0].weight)
        value = torch.nn.functional.cross_entropy(features @ weight.T, data.train.labels)
        value += 0.0025 * weight.square().sum() + 0.00005 * features.square().sum()
    least = closed_form(UFM(data.class_counts, 0.005, 0.0001)).loss
    assert float(row["optimality_gap"]) == pytest.approx(value.item() / least - 1, rel=1e-4)
    assert min(float(row[name]) for name in GAP_COLUMNS) >= 0


UNTIL = [*TINY, "--epochs", 9, "--nc_every", 2, "--until", 100]  # met by any network, and so at the second measurement


def test_until_ends_training_at_two_measurements_below_it(train, measure, tmp_path):
    out, _ = train(*UNTIL, "--save_every", 9, "--save_path", "run")
    folder = tmp_path / "run"
    assert "epoch 3: NC2_H, NC3_WH, margin_rel_err, norm_rel_err are at most 100" in out and "of the gap" in out
    assert [row["epoch"] for row in rows_of(folder / "nc_metrics.csv")] == ["1", "3"]
    assert [line["epoch"] for line in log_of(folder)] == [1, 2, 3]
    assert sorted(path.name for path in folder.glob("*.pth")) == ["epoch_001.pth", "epoch_003.pth"]
    assert state(MeasuredRun(Run(folder))) == "finished"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    out, _ = train(*UNTIL, "--save_every", 9, "--save_path", "run", "--resume")
    assert "3 are done, with which --until 100 was reached" in out
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    measure("--load_path", "run", "--watch")  # ends, as epoch 3 was the last one


def test_until_ends_a_resumed_run_where_it_ends_an_uncut_one(train, tmp_path):
    train(*UNTIL, "--save_path", "whole")
    train(*UNTIL, "--epochs", 2, "--save_path", "cut")
    train(*UNTIL, "--save_path", "cut", "--resume")
    assert same_weights(tmp_path / "whole" / "epoch_003.pth", tmp_path / "cut" / "epoch_003.pth")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert config_of(tmp_path / "cut")["ended_at_epoch"] == 3


def test_until_needs_an_optimum_and_goes_on_above_it(train, tmp_path):
    _, error = train(*UNTIL, "--no-sep_decay", "--save_path", "run", status=2)
    assert "--until: without --sep_decay no optimum is known" in error and error.count("\n") == 1
    train(*UNTIL, "--until", 1e-9, "--epochs", 4, "--save_path", "run")
    assert len(log_of(tmp_path / "run")) == 4 and "ended_at_epoch" not in config_of(tmp_path / "run")


def test_negative_features_are_noted_once(train, tmp_path, capsys, recwarn):
    train(*TINY, "--save_path", "run")
    _, data, model = load_run(tmp_path / "run")
    model.embed = lambda images, embed=model.embed: embed(images) - 1
    measurement = Measurement(MeasuredRun(Run(tmp_path / "run")), model, data)
    capsys.readouterr()
    for _ in range(2):
        measurement.measure()
    error = capsys.readouterr().err
    assert error.count("entries are negative, but the optimum is that of ReLU features") == 1 == error.count("\n")
    assert not recwarn.list


def test_a_deep_head_has_no_theory_but_a_nominal_one(train, measure, tmp_path):
    flags = [*TINY, "--depth_linear", 2, "--save_path", "run"]
    train(*flags)
    out, _ = measure(*flags)
    assert "stay empty: with --depth_linear > 1 an optimum is known only for --loss MSE" in out
    assert not rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]["NC3_WH"]
    measure(*flags, "--theory", "nominal")
    assert rows_of(tmp_path / "run" / "nc_metrics_nominal.csv")[-1]["NC3_WH"]


def test_bare_checkpoints_validate_from_the_flags(train, measure, tmp_path):
    """A folder as the released code writes it, with epoch_*.pth and nothing else."""
    write_folder(tmp_path / "images", train=6)
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--model", "ResNet18", "--no-bias", "--sep_decay"]
    train(*flags, "--epochs", 1, "--save_path", "run")
    state = weights(tmp_path / "run" / "epoch_001.pth")
    (tmp_path / "bare").mkdir()
    torch.save(state | {"batch_norm.weight": torch.ones(512)}, tmp_path / "bare" / "epoch_001.pth")
    measure(*flags, "--load_path", "run")
    measure(*flags, "--load_path", "bare")
    assert rows_of(tmp_path / "bare" / "nc_metrics.csv") == rows_of(tmp_path / "run" / "nc_metrics.csv")
    _, error = measure(
        "--dataset", "imagefolder", "--data_dir", "images", "--load_path", "bare", "--recompute", status=1
    )
    assert "epoch_001.pth: does not fit the model" in error


def test_wrong_input_is_one_line(train, measure, tmp_path):
    (tmp_path / "a_file").write_text("a file")
    for run, flags, status, words in (
        (measure, ["--load_path", "nowhere"], 2, "nowhere: no such folder"),
        (measure, ["--load_path", "."], 2, "no epoch_*.pth in it"),
        (train, ["--dataset", "digits", "--device", "cuda"], 2, "no usable GPU"),
        (train, ["--dataset", "digits", "--gpu_id", "7"], 2, "no usable GPU"),
        (train, ["--dataset", "digits", "--precision", "tf32"], 2, "tf32 needs an NVIDIA GPU"),
        (train, ["--dataset", "imagefolder", "--data_dir", "nowhere"], 2, "nowhere/train: no such folder"),
        (train, ["--dataset", "svhn", "--data_dir", "x", "--no-download"], 2, "svhn: the archive"),
        (train, ["--dataset", "digits", "--class_counts", "9,9,9,9,9,9,9,9,9,999"], 2, "digits: class 9 has 180"),
        (train, ["--dataset", "digits", "--save_path", "a_file"], 2, "a_file: not a folder"),
    ):
        _, error = run(*flags, status=status)
        assert words in error and error.count("\n") == 1, error


def test_a_diverged_run_leaves_a_folder_that_can_be_used_again(train, measure, tmp_path):
    """The error mentions no checkpoint, since there is none; the next run does not depend on what is left."""
    _, error = train(*TINY, "--lr", 1e30, "--save_path", "run", status=1)
    advice = "lower --lr or give --clip_grad_norm 1"
    assert re.fullmatch(rf"{TRAIN}: error: the loss is not finite in epoch 1, step \d+: {advice}\n", error)
    assert {path.name for path in (tmp_path / "run").glob("[!.]*")} == {"config.json", "train_log.jsonl"}
    flags = [*TINY, "--weight_decay", 0.01, "--class_counts", "9,9,9,9,9,9,9,9,9,19"]
    train(*flags, "--save_path", "run")
    train(*flags, "--save_path", "fresh")
    for name in ("run", "fresh"):
        measure("--load_path", name)
    configs = [config_of(tmp_path / name) for name in ("run", "fresh")]
    assert configs[0] == configs[1] | {"flags": configs[1]["flags"] | {"save_path": "run"}}
    assert configs[0]["class_counts"] == [9] * 9 + [19] and configs[0]["problems"]["objective"]["lambda_w"] == 0.01
    rows = [(tmp_path / name / "nc_metrics.csv").read_text() for name in ("run", "fresh")]
    assert rows[0] == rows[1] and log_of(tmp_path / "run") == log_of(tmp_path / "fresh")


def test_force_keeps_the_old_run_until_the_new_one_can_start(train, tmp_path):
    train(*TINY, "--save_path", "run")
    train(*TINY, "--save_path", "run", "--force", "--init_from", "nothing.pth", status=2)
    assert (tmp_path / "run" / "epoch_002.pth").exists()
    (tmp_path / "run" / "nc_metrics_mine.csv").write_text("mine")
    train(*TINY, "--save_path", "run", "--force", "--init_from", "run/epoch_002.pth", "--epochs", 1)
    assert not (tmp_path / "run" / "epoch_002.pth").exists() and (tmp_path / "run" / "nc_metrics_mine.csv").exists()
    (tmp_path / "run" / "epoch_001.pth").rename(tmp_path / "elsewhere.pth")
    train(*TINY, "--save_path", "run", "--resume", "--epochs", 2)  # what it began with is not asked for again


def test_resume_does_not_overwrite_what_it_cannot_resume(train, tmp_path):
    train(*TINY, "--save_path", "run")
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).unlink()
    _, error = train(*TINY, "--save_path", "run", "--resume", status=2)
    assert "holds a run without its config.json" in error


def test_a_resumed_run_can_be_longer(train, tmp_path):
    """Like one of that length from the start, whose shares of --epochs are given as numbers."""
    train(*TINY, "--epochs", 2, "--patience", "50%", "--save_path", "run")
    train(*TINY, "--epochs", 3, "--patience", "50%", "--save_path", "run", "--resume")
    train(*TINY, "--epochs", 4, "--patience", "50%", "--save_path", "run", "--resume")
    train(*TINY, "--epochs", 4, "--patience", 1, "--save_path", "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert same_weights(tmp_path / "run" / "epoch_004.pth", tmp_path / "whole" / "epoch_004.pth")


def test_a_run_that_has_diverged_does_not_end_as_finished(train, tmp_path):
    out, error = train(*TINY, "--lr", 100, "--save_path", "run", status=1)
    assert "finished" not in out and "run has diverged: the loss is" in error
    assert "that of a network of zeros 2.3: lower --lr or give --clip_grad_norm 1" in error and error.count("\n") == 1
    assert state(MeasuredRun(Run(tmp_path / "run"))).startswith("diverged: the loss is")
    assert config_of(tmp_path / "run")["loss_at_zero"] == pytest.approx(math.log(10))


def test_resume_of_a_finished_run_changes_nothing(train, tmp_path):
    train(*TINY, "--save_path", "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    out, _ = train(*TINY, "--save_path", "run", "--resume")
    assert "2 are done; give a larger --epochs to continue" in out
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_rows_of_training_survive_validation(train, measure, tmp_path):
    """Rows of epochs without a checkpoint are kept by --recompute."""
    train(*TINY, "--epochs", 5, "--save_every", 4, "--nc_every", 1, "--save_path", "run")
    before = (tmp_path / "run" / "nc_metrics.csv").read_text()
    measure("--load_path", "run", "--recompute")
    assert (tmp_path / "run" / "nc_metrics.csv").read_text() == before and before.count("\n") == 6


def test_other_images_are_refused(train, measure, tmp_path):
    write_folder(tmp_path / "a", train=4)
    write_folder(tmp_path / "b", train=5)
    flags = ["--dataset", "imagefolder", "--width", 8, "--epochs", 1, "--save_path", "run"]
    train(*flags, "--data_dir", "a")
    _, error = measure("--load_path", "run", "--data_dir", "b", status=2)
    assert "trained on [4, 4, 4] images of its classes, --data_dir has [5, 5, 5]" in error
    _, error = train(*flags, "--data_dir", "b", "--resume", "--epochs", 2, status=2)
    assert "trained on [4, 4, 4] images" in error


def test_other_images_of_a_class_and_renamed_classes_are_refused(train, measure, tmp_path):
    """Validation and --resume say which; the same images elsewhere are accepted."""
    write_folder(tmp_path / "a")
    flags = ["--dataset", "imagefolder", "--width", 8, "--epochs", 1, "--save_path", "run", "--class_counts", "2,2,2"]
    train(*flags, "--data_dir", "a")
    (tmp_path / "a").rename(tmp_path / "b")
    measure("--load_path", "run", "--data_dir", "b")
    for change, message in (
        (("bee/0000.png", "bee/0009.png"), "the run was trained on other images of class 1 (bee) than --data_dir has"),
        (("cow", "dog"), "class 2 was 'cow' in training, and is 'dog' in --data_dir"),
    ):
        before, after = ([tmp_path / "b" / split / name for split in ("train", "test")] for name in change)
        for old, new in zip(before, after, strict=True):
            old.rename(new)
        _, error = measure("--load_path", "run", "--data_dir", "b", status=2)
        assert error.endswith(f"{message}\n")
        _, error = train(*flags, "--data_dir", "b", "--resume", "--epochs", 2, status=2)
        assert error.endswith(f"{message}\n")
        for old, new in zip(before, after, strict=True):
            new.rename(old)


NAMES = ["$x_1$ a_b", "<b>&amp;", "n" * 200]


def test_names_of_classes_stand_in_the_table_the_csv_and_the_config(train, validate, tmp_path):
    write_folder(tmp_path / "images", classes=NAMES)
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--width", 8, "--no-bias", "--sep_decay"]
    train(*flags, "--epochs", 1, "--save_path", "run")
    out, _ = validate("--load_path", "run")
    order = sorted(NAMES)
    lines = out[out.index("class    n_k") :].splitlines()[1:4]
    assert [line[80:] for line in lines] == [name if len(name) < 31 else f"{name[:29]}…" for name in order]
    assert [row["name"] for row in rows_of(tmp_path / "run" / "class_accuracy.csv")] == 2 * order
    assert config_of(tmp_path / "run")["class_names"] == order


@pytest.mark.parametrize("model", ["MLP", "ResNet18", "densenet_cifar"])
def test_images_of_another_size(train, measure, tmp_path, model):
    write_folder(tmp_path / "images", size=(20, 24))
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--model", model, "--image_size", 20, "--width", 8]
    flags += ["--planes", 8] if model != "MLP" else []
    train(*flags, "--data_augmentation", "--epochs", 1, "--save_path", "run")
    measure("--load_path", "run")
    _, data, network = load_run(tmp_path / "run", data_dir=tmp_path / "images")
    assert data.shape == (3, 20, 20)
    if model == "MLP":
        assert network.layers[0].in_features == 1200


def test_a_table_of_features(train, measure, tmp_path):
    """It trains the MLP alone, is found again after it has moved, and other rows of it are refused."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    parts = {"train_images": random.normal(size=(60, 5)) + 4 * labels[:, None], "train_labels": labels}
    np.savez(tmp_path / "a.npz", **parts, test_images=parts["train_images"], test_labels=labels)
    flags = ["--dataset", "a.npz", "--imbalance", "step:4", "--width", 16, "--depth_relu", 1, "--lr", 0.01, "--no-bias"]
    train(*flags, "--sep_decay", "--epochs", 40, "--batch_size", 10, "--save_path", "run")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    measure("--load_path", "run", "--dataset", "b.npz")
    assert float(rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]["train_acc1"]) > 95
    parts["train_images"][0] += 1e-9
    np.savez(tmp_path / "b.npz", **parts, test_images=parts["train_images"], test_labels=labels)
    _, error = measure("--load_path", "run", "--dataset", "b.npz", status=2)
    assert "trained on other images of class 0" in error
    _, error = train(*flags, "--dataset", "b.npz", "--model", "VGG11", status=2)
    assert "b.npz has features instead of images; give --model MLP" in error
    _, error = train(*flags, "--dataset", "b.npz", "--data_augmentation", status=2)
    assert "b.npz has features instead of images" in error


def test_features_that_overflow_are_skipped(train, measure, tmp_path):
    train(*TINY, "--save_path", "run")
    path = tmp_path / "run" / "epoch_001.pth"
    torch.save({key: value * 1e20 for key, value in weights(path).items()}, path)
    _, error = measure("--load_path", "run", status=1)
    assert "skipped: epoch 1: the features overflow" in error
    assert [row["epoch"] for row in rows_of(tmp_path / "run" / "nc_metrics.csv")] == ["2"]


def test_features_that_are_all_zero_are_no_collapse(train, measure, tmp_path):
    train(*TINY, "--save_path", "run")
    for path in (tmp_path / "run").glob("epoch_*.pth"):
        torch.save({key: value * (0 if "intermediate" in key else 1) for key, value in weights(path).items()}, path)
    _, error = measure("--load_path", "run")
    assert error.count("note: all features are zero (dead ReLUs): what compares class means is empty") == 1
    for row in rows_of(tmp_path / "run" / "nc_metrics.csv"):
        assert not any(row[name] for name in ("NC1", "NC1_trace", "NC2_H", "NC4", "CDNV", "NCM_acc1", "self_duality"))
        assert float(row["optimality_gap"]) > 0


def test_an_empty_test_set_leaves_its_accuracy_empty(train, measure, tmp_path):
    counts = ["--class_counts", "178,182,177,183,181,182,181,179,174,180"]
    train(*TINY, *counts, "--epochs", 1, "--save_path", "run")
    measure("--load_path", "run")
    row = rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]
    empty = ["test_acc1", "test_acc5", "balanced_acc1", "many_acc1", "medium_acc1", "few_acc1"]
    assert [name for name, cell in row.items() if not cell] == empty


def test_watch_measures_a_finished_run_and_ends(train, measure, tmp_path):
    train(*TINY, "--save_path", "run")
    measure("--load_path", "run", "--watch")
    assert len(rows_of(tmp_path / "run" / "nc_metrics.csv")) == 2


def test_rows_with_the_statistics_of_the_training_set(train, measure, tmp_path):
    """In files beside those of the running averages; the geometry is that of one batch in training mode."""
    write_folder(tmp_path / "images", train=6)
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--model", "VGG11", "--planes", 8, "--batch_size", 7]
    train(*flags, "--epochs", 1, "--no-bias", "--sep_decay", "--save_path", "run")
    run = tmp_path / "run"
    measure("--load_path", "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    measure("--load_path", "run", "--bn_statistics", "training_set")
    assert before == {path: path.read_bytes() for path in before}
    running, exact = (rows_of(run / f"nc_metrics{suffix}.csv") for suffix in ("", "_bn"))
    assert list(running[0]) == list(exact[0]) and running[0]["NC1"] != exact[0]["NC1"]
    assert len(rows_of(run / "class_accuracy_bn.csv")) == 2 * 3
    _, data, model = load_run(run, data_dir=tmp_path / "images")
    with torch.no_grad():
        _, found = model.double().train()(data.train.images.double())
    means = torch.stack([found[data.train.labels == k].mean(0) for k in range(3)])
    geometries = [np.load(run / f"geometry{suffix}" / "epoch_001.npz")["HTH"] for suffix in ("", "_bn")]
    running, exact, expected = (gram / np.linalg.norm(gram) for gram in (*geometries, (means @ means.T).numpy()))
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4)  # fp32 through eight layers
    assert np.abs(running - expected).max() > 1e-3


def test_a_run_in_a_notebook(train, tmp_path):
    """load_run gives the config, the same data and the model of any checkpoint; features gives the model's features."""
    write_folder(tmp_path / "images", train=6)
    flags = ["--dataset", "imagefolder", "--data_dir", "images", "--width", 16, "--batch_size", 5, "--save_every", 1]
    train(*flags, "--class_counts", "6,2,4", "--epochs", 3, "--save_path", "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    config, data, model = load_run(tmp_path / "run", data_dir=tmp_path / "moved")
    assert config == config_of(tmp_path / "run") and data.class_counts == [6, 2, 4] and not model.training
    assert torch.equal(model.fc[0].weight, weights(tmp_path / "run" / "epoch_003.pth")["fc.0.weight"])
    _, _, model = load_run(tmp_path / "run", epoch=2, data_dir=tmp_path / "moved")
    assert torch.equal(model.fc[0].weight, weights(tmp_path / "run" / "epoch_002.pth")["fc.0.weight"])
    found, labels = features(model.train(), data.train)
    assert torch.equal(labels, data.train.labels)
    torch.testing.assert_close(found, model.eval()(data.train.images)[1].detach().double())
    for arguments, words in (
        ({"epoch": 7}, "no checkpoint of epoch 7, there are 1, 2, 3"),
        ({}, "images/train: no such folder"),
        ({"folder": tmp_path / "moved"}, "no config.json with epoch_"),
    ):
        with pytest.raises(UserError, match=words):
            load_run(**{"folder": tmp_path / "run"} | arguments)


def test_a_tf32_run_is_measured_in_fp32_on_a_cpu(train, measure, tmp_path):
    train(*TINY, "--save_path", "run")
    measure("--load_path", "run")
    before = (tmp_path / "run" / "nc_metrics.csv").read_bytes()
    config = config_of(tmp_path / "run")
    config["flags"]["precision"] = "tf32"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    out, _ = measure("--load_path", "run", "--recompute")
    assert "tf32 needs a GPU: measured in fp32" in out and (tmp_path / "run" / "nc_metrics.csv").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------
# Real images
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["MLP", "ResNet18"])
def test_real_cifar10_images(train, measure, real_images, tmp_path, model):
    flags = ["--dataset", "cifar10", "--data_dir", real_images, "--model", model, "--width", 64, "--no-bias"]
    flags += ["--sep_decay", "--class_counts", "5,5,6,6,7,7,8,8,9,9", "--epochs", 2, "--lr", 0.001]
    flags += ["--save_every", 2, "--save_path", "run", "--data_augmentation", *["--planes", 8] * (model != "MLP")]
    out, _ = train(*flags)
    assert "70 training images in 10 classes, 5 to 9 each; 200 test images" in out
    measure(*flags)
    rows = rows_of(tmp_path / "run" / "nc_metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    # After two epochs the class means of five to nine images are mostly noise: NC1_corrected may be undefined.
    assert {name for name, value in rows[-1].items() if not value} <= {"NC1_corrected"}
