#!/usr/bin/env bash
# Usage: scripts/table.sh TABLE DIR [OPTION of scripts/sweep.sh]...
#
# Train and measure the runs of a published table. DIR is a --data_dir with CIFAR-10, downloaded if it is absent.
# Writes model_weights/TABLE/: a folder per run, summary.md, summary.csv, figures/, commands.txt and its logs. Run it
# again after an interruption. Environment: PYTHON, the interpreter.
#
# One job runs per CPU core, or per GPU if CUDA_VISIBLE_DEVICES is set; the jobs of paper_* run one after the other.
# The runs of each TABLE are defined in scripts/tables.py:
#
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[[ -n ${2:-} && $2 != -* ]] || fail "give TABLE and DIR (a DIR with a leading dash as ./-DIR)"
run_tables run "$1" "$(realpath -m -- "$2")" "${@:3}"
