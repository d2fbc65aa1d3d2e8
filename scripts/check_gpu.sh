#!/usr/bin/env bash
# Usage: scripts/check_gpu.sh [DIR]
#
# Find out in ten minutes whether one GPU trains correctly, and how fast, and what is lost where: see
# benchmarks/check_gpu.py. DIR is a --data_dir with CIFAR-10 (default: random images). DEVICE=cpu rehearses it.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[ $# -le 1 ] || fail "give one DIR at most"
data=${1:+$(realpath -m -- "$1")}
cd "$root" && use_python requirements.txt
exec "$PYTHON" benchmarks/check_gpu.py --device "${DEVICE:-cuda}" --data_dir "$data"
