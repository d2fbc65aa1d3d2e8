#!/usr/bin/env bash
# PyTorch 2.14.1: a stochastic weight average with buffers cannot average a BatchNorm.
# Guess: AveragedModel(use_buffers=True, multi_avg_fn=get_swa_multi_avg_fn()) averages running_mean and running_var and
# rounds the integer num_batches_tracked.
# Seen: the second update_parameters raises "RuntimeError: Integer division with addcdiv is no longer supported"; the
# exponential average get_ema_multi_avg_fn() works. torch from PyPI brings its CUDA libraries, some gigabytes; to use an
# installed torch 2.14.1, set FINDINGS_INSTALLED=1. We ran it on the CPU in that way only.
source "$(dirname "$0")/pinned.sh"
pinned torch==2.14.1
check <<'CODE'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn


def average(function):
    model = torch.nn.BatchNorm1d(2)
    averaged = AveragedModel(model, multi_avg_fn=function, use_buffers=True)
    for _ in range(3):
        model(torch.randn(4, 2))
        averaged.update_parameters(model)


average(get_ema_multi_avg_fn())
try:
    average(get_swa_multi_avg_fn())
except RuntimeError as error:
    print(error)
    assert "Integer division" in str(error)
else:
    raise AssertionError("it works now")
CODE
