#!/usr/bin/env bash
# Usage: scripts/test.sh [--oldest] [ARGUMENT of pytest]...
#
# Run ruff, mypy and all tests, in JOBS processes (environment variable; default: one for each CPU core, at most 8).
# Packages that the Python in use lacks are installed into .venv. Time: less than 6 minutes on 2 cores after installation.
# --oldest: with the oldest packages that requirements.txt allows, installed into .venv-oldest (another 5.8 GB).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
if [ "${1:-}" = --oldest ]; then
    shift && venv=.venv-oldest PIP_CONSTRAINT=$(mktemp) && export PIP_CONSTRAINT
    sed -n 's/>=/==/p' requirements.txt >"$PIP_CONSTRAINT"
fi
use_python requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest tests -n "${JOBS:-$(($(nproc) < 8 ? $(nproc) : 8))}" "$@"
