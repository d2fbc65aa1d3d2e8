#!/usr/bin/env bash
# PyTorch 2.14.1: the gradient of the nuclear norm gives the null direction of a centred matrix a slope of one.
# Guess: at I - 11^T/K, whose singular values coincide, the gradient is NaN, as that of singular vectors is.
# Seen: it is finite, and its rows sum to the vector of ones, not to 0: U V^T takes in the null direction. At
# W = 0 it is an orthogonal matrix. Both are subgradients, but a step moves a head off sum_k w_k = 0. torch from PyPI
# brings its CUDA libraries, some gigabytes; to use an installed torch 2.14.1, set FINDINGS_INSTALLED=1. We ran it on the
# CPU in that way only.
source "$(dirname "$0")/pinned.sh"
pinned torch==2.14.1
check <<'CODE'
import torch

K = 6
for start in (torch.eye(K, dtype=torch.double) - 1 / K, torch.zeros(K, K, dtype=torch.double)):
    W = start.clone().requires_grad_()
    torch.linalg.matrix_norm(W, "nuc").backward()
    print(W.grad.sum(0), torch.linalg.svdvals(W.grad))
    assert torch.allclose(torch.linalg.svdvals(W.grad), torch.ones(K, dtype=torch.double))
    assert torch.allclose(W.grad.sum(0).abs(), torch.ones(K, dtype=torch.double))
CODE
