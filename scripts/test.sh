#!/usr/bin/env bash
# Lint and all tests, from a fresh clone: makes .venv if need be. Further arguments go to pytest.
# Time: about 4 minutes after the install on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-dev.txt

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest tests -n "${JOBS:-2}" "$@"
