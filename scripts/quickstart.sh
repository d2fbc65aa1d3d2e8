#!/usr/bin/env bash
# Usage: scripts/quickstart.sh [FOLDER]
#
# Train an MLP on scikit-learn's handwritten digits (no download), measure it against the theorem, and draw the figures.
# Missing packages are installed into .venv. The run is written to FOLDER (default: model_weights/quickstart) and is
# resumed if it was interrupted. Time: half a minute on 2 CPU cores after installation.
# Expected: 100 % training accuracy, and everything within 0.1 % of the theorem (five seeds: within 0.07 %).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ "${1:-}" = -- ]; then shift; elif [[ ${1:-} == -* ]]; then fail "unknown option $1"; fi
[ $# -le 1 ] || fail "give one FOLDER at most"
folder=$(realpath -m -- "${1:-$root/model_weights/quickstart}")
cd "$root"
use_python requirements.txt
flags=(@scripts/collapse.flags --dataset digits --depth_relu 3 --width 256 --batch_size 102 --seed 1 --weight_decay 0.01
    --feature_decay_rate 0.0005 --save_every 10 --save_path "$folder" --resume)
"$PYTHON" train_1st_order_unbalanced.py "${flags[@]}"
"$PYTHON" validate_NC_unbalanced.py "${flags[@]}"
