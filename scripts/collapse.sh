#!/usr/bin/env bash
# Trains an MLP until it meets the theorem, and measures it: the recipe of docs/collapse.md with your flags after it.
#
#   scripts/collapse.sh --dataset digits --width 256 --depth_relu 3 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005
#
# A run that was cut goes on. Expected: train accuracy 100 %, all distances to the theorem below 0.01.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt
"$PYTHON" train_1st_order_unbalanced.py @scripts/collapse.flags "$@" --resume
"$PYTHON" validate_NC_unbalanced.py @scripts/collapse.flags "$@"
