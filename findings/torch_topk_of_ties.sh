#!/usr/bin/env bash
# PyTorch 2.14.1: the class on top of equal logits is not the first for topk, and depends on the number of classes.
# Guess: topk(1) of a row of zeros is class 0, as argmax is.
# Seen on the CPU: of 2, 3, 5, 10, 20, 100, 1000 classes topk(1) gives 0, 0, 2, 8, 12, 0, 0, and topk(5) of 10 gives
# 8, 6, 7, 5, 9; argmax gives 0. So of a network whose features have died, or of classes that have collapsed, top-1
# accuracy by topk is another class's share than by argmax. torch from PyPI brings its CUDA libraries, some gigabytes;
# to use an installed torch 2.14.1, set FINDINGS_INSTALLED=1. We ran it in that way only.
source "$(dirname "$0")/pinned.sh"
pinned torch==2.14.1
check <<'CODE'
import torch

rows = [torch.zeros(1, classes) for classes in (2, 3, 5, 10, 20, 100, 1000)]
found = [row.topk(1).indices.item() for row in rows]
print(found, torch.zeros(1, 10).topk(5).indices.tolist(), [row.argmax(1).item() for row in rows])
assert found == [0, 0, 2, 8, 12, 0, 0] and all(row.argmax(1) == 0 for row in rows)
CODE
