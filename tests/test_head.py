"""Heads that start or stay at the optimum: the minimiser in any dimension, and training from it."""

import shlex

import numpy as np
import pytest
import torch

from args import parse_args
from datasets import Data, Split
from engine.cuda_graph import GraphedStep
from engine.training import Training, make_model
from nc_theory import UFM, LossVariant, random_frame, simplex_etf, solve
from tests.conftest import TINY, log_of, rows_of, same_weights, weights
from utils import UserError

COUNTS = [5, 20, 50, 100]
PROBLEMS = [
    {}, {"bias": True}, {"loss": "MSE"}, {"loss": "MSE", "bias": True}, {"relu": False}, {"relu": False, "bias": True},
    {"variant": LossVariant(class_weights=1.0)}, {"variant": LossVariant(logit_adjustment=1.0)},
    {"variant": LossVariant(logit_scaling=0.3)}, {"variant": LossVariant(logit_adjustment=1.0, logit_scaling=0.3)},
    {"variant": LossVariant(ldam_margin=0.5)}, {"variant": LossVariant(label_smoothing=0.1)},
    {"variant": LossVariant(logit_adjustment=1.0), "relu": False},
]  # fmt: skip


def value(problem, weight, means, bias):
    """The objective of (UFM) in NumPy, from its definition, at W (K, d), class means (K, d) and b (K,)."""
    counts, variant = np.array(problem.class_counts, dtype=float), problem.variant
    num_classes, total = len(counts), counts.sum()
    logits = means @ weight.T + bias
    if problem.loss == "MSE":
        losses = 0.5 * np.square(logits - np.eye(num_classes)).sum(1)
    else:
        scores = logits * (counts / counts.max()) ** variant.logit_scaling
        scores = scores + variant.logit_adjustment * np.log(counts / total)
        scores = scores - np.diag(variant.ldam_margin * (counts.min() / counts) ** 0.25)
        targets = (1 - variant.label_smoothing) * np.eye(num_classes) + variant.label_smoothing / num_classes
        losses = np.log(np.exp(scores).sum(1)) - (targets * scores).sum(1)
        shares = counts**-variant.class_weights
        losses = losses * shares * total / (counts @ shares)
    penalty = 0.5 * problem.lambda_w * np.square(weight).sum()
    return counts / total @ losses + penalty + 0.5 * problem.lambda_h * counts @ np.square(means).sum(1)


@pytest.mark.parametrize("changes", PROBLEMS, ids=str)
def test_head_and_features_are_a_minimiser_in_any_dimension(changes):
    """Their objective is the least one, no direction of the frame is better than another, and the ReLU holds."""
    problem = UFM(COUNTS, 2e-3, 2e-4, **changes)
    optimum = solve(problem)
    for dim, seed in ((8, 0), (64, 1), (65, 2)):
        generator = torch.Generator().manual_seed(seed)
        head, features = optimum.head(dim, generator), optimum.features(dim, generator)
        assert head.shape == features.shape == (4, dim)
        assert not problem.relu or (features >= 0).all()
        found = value(problem, head.numpy(), features.numpy(), optimum.bias.numpy())
        assert found == pytest.approx(optimum.loss, rel=1e-9)
        torch.testing.assert_close(features @ features.T, optimum.HTH, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(head @ features.T, optimum.WH, rtol=1e-6, atol=1e-9)
    assert optimum.certified


def test_a_class_at_zero_has_no_feature_and_no_direction_in_the_head():
    optimum = solve(UFM([1, 200, 300], 5e-3, 5e-3))
    head, features = optimum.head(6), optimum.features(6)
    assert optimum.collapsed.tolist() == [True, False, False] and not features[0].any()
    torch.testing.assert_close(head @ head.T, optimum.WWT)
    assert torch.linalg.matrix_rank(head) == 2


@pytest.mark.parametrize("non_negative", [True, False])
def test_frames_are_orthonormal_and_drawn_from_the_generator(non_negative):
    frames = [random_frame(13, 4, non_negative, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    torch.testing.assert_close(frames[0].T @ frames[0], torch.eye(4, dtype=torch.float64))
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])
    assert (frames[0] >= 0).all() == non_negative
    with pytest.raises(ValueError, match="no 4 orthonormal directions in 3"):
        random_frame(3, 4, non_negative)


def test_a_simplex_etf_has_equal_angles():
    etf = simplex_etf(5, 12)
    cosines = etf @ etf.T
    torch.testing.assert_close(cosines.diag(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(cosines[0, 1:], torch.full((4,), -0.25, dtype=torch.float64))


def build(text):
    """The Training of a small MLP on 20 images of four classes with the flags in `text`."""
    words = "--depth_relu 1 --width 8 --batch_size 8 --sep_decay --lr 0.01 --weight_decay 0.01"
    args = parse_args(argv=[*words.split(), "--feature_decay_rate", "0.001", *shlex.split(text)])
    torch.manual_seed(0)
    split = Split(torch.rand(20, 3, 32, 32), torch.arange(20) % 4, torch.zeros(3))
    training = Training(args, Data(split, split, [5] * 4), make_model(args, 4), torch.device("cpu"))
    training.initialise_head(args.head_init, args.seed)
    return training


@pytest.mark.parametrize("objective", ["paper", "released"])
def test_the_head_starts_at_the_optimum_of_the_runs_own_problem(objective):
    training = build(f"--head_init optimum --no-bias --objective {objective}")
    optimum = solve(training.objective.problem())
    head = training.model.fc[0].weight.detach().double()
    torch.testing.assert_close(head @ head.T, optimum.WWT, rtol=1e-5, atol=1e-6)
    etf = build(f"--head_init etf --no-bias --objective {objective}").model.fc[0].weight.detach().double()
    assert float(etf.norm()) == pytest.approx(float(head.norm()), rel=1e-6)
    assert float(head.sum(0).norm()) < 1e-6 and float(etf.sum(0).norm()) < 1e-6


def test_the_bias_starts_at_the_optimum_too():
    training = build("--head_init optimum --bias --logit_adjustment 1")
    bias = solve(training.objective.problem()).bias
    torch.testing.assert_close(training.model.fc[0].bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


def test_a_fixed_head_takes_no_part_in_a_step():
    """Nor in the norm of the gradient and its clipping; a captured step is the plain one."""
    training, captured = (build("--head_init optimum --head_fixed --no-bias --clip_grad_norm 0.01") for _ in range(2))
    before = training.model.fc[0].weight.clone()
    graphed = GraphedStep(
        captured.step, [8], captured.state.tensors, "cpu", lambda step, indices: lambda: step(indices)
    )
    for indices in torch.arange(16).split(8):
        row = training.step(indices)
        graphed.replays[8][0].copy_(indices)
        assert torch.equal(row, captured.step(indices))
    assert torch.equal(training.model.fc[0].weight, before)
    norms = [parameter.grad.norm() for parameter in training.model.parameters() if parameter.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.01, rel=1e-3)
    assert len(training.optimizer.param_groups[0]["params"]) == len(list(training.model.parameters())) - 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--head_init optimum --depth_linear 2", "--head_init optimum: only with --depth_linear 1"),
        ("--head_init etf --no-sep_decay", "--head_init etf: without --sep_decay"),
        ("--head_init optimum --width 3", "and the model has 3 features"),
        ("--head_init optimum --weight_decay 0", "--head_init optimum: without a positive --weight_decay"),
    ],
)
def test_a_head_without_an_optimum_is_one_line(flags, words):
    with pytest.raises(UserError, match=words):
        build(flags)


def test_a_run_with_a_fixed_head_is_resumed_and_measured(train, measure, tmp_path):
    """The head stays at the optimum of the problem that validation compares with, which is the same."""
    flags = [*TINY, "--weight_decay", 0.01, "--feature_decay_rate", 0.0005, "--head_init", "optimum", "--head_fixed"]
    train(*flags, "--epochs", 4, "--save_path", "whole")
    train(*flags, "--epochs", 2, "--save_path", "cut")
    train(*flags, "--epochs", 4, "--save_path", "cut", "--resume")
    assert same_weights(tmp_path / "whole" / "epoch_004.pth", tmp_path / "cut" / "epoch_004.pth")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    heads = [weights(tmp_path / "whole" / f"epoch_00{epoch}.pth")["fc.0.weight"] for epoch in (1, 4)]
    assert torch.equal(*heads)
    out, _ = measure("--load_path", "whole")
    assert float(rows_of(tmp_path / "whole" / "nc_metrics.csv")[-1]["NC2_WWT"]) < 1e-6
    assert "the head was fixed" in out
    _, error = train(*flags, "--no-head_fixed", "--epochs", 5, "--save_path", "cut", "--resume", status=2)
    assert "--head_fixed is False, in the run True" in error


def test_a_problem_in_which_all_classes_collapse_has_a_head_of_zeros():
    optimum = solve(UFM([3, 4, 5], 1.0, 1.0))
    assert optimum.collapsed.all() and torch.equal(optimum.head(8), torch.zeros(3, 8, dtype=torch.float64))
    assert torch.equal(optimum.features(8), torch.zeros_like(optimum.features(8)))
