#!/usr/bin/env bash
# Usage: scripts/test.sh [ARGUMENT of pytest]...
#
# Run the linter and all tests in JOBS processes (environment variable, default 2). Missing packages are installed into
# .venv. Time: 5.5 minutes on 2 CPU cores after installation.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
use_python requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest tests -n "${JOBS:-2}" "$@"
