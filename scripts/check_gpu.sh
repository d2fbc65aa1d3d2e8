#!/usr/bin/env bash
# Usage: scripts/check_gpu.sh [DIR]
#
# Check in ten minutes that training on one GPU is correct, and measure its speed: see benchmarks/check_gpu.py. DIR is a
# --data_dir with CIFAR-10 (default: random images). DEVICE=cpu rehearses the check on the CPU at a small size.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[[ $# -le 1 && ${1:-} != -* ]] || fail "give one DIR at most (a DIR with a leading dash as ./-DIR)"
data=${1:+$(realpath -m -- "$1")}
cd "$root" && use_python requirements.txt
exec "$PYTHON" benchmarks/check_gpu.py --device "${DEVICE:-cuda}" --data_dir "$data"
