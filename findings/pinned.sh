# Sourced by every finding. `pinned NAME==VERSION ...` installs packages from PyPI into a temporary folder, which is
# deleted at the end; `check` runs Python code from standard input with them. PYTHON names the interpreter (3.11 or newer).
# With FINDINGS_INSTALLED=1 nothing is installed, and the packages of PYTHON are used if their versions are the pinned ones.
set -euo pipefail
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

pinned() {
    if [ "${FINDINGS_INSTALLED:-}" = 1 ]; then
        "$PYTHON" - "$@" <<'CODE'
import sys
from importlib.metadata import version
for name, wanted in (pin.split("==") for pin in sys.argv[1:]):
    if version(name) != wanted:
        sys.exit(f"{name} is {version(name)}, not {wanted}")
CODE
    else
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --root-user-action ignore \
            --target "$folder/packages" "$@"
        export PYTHONPATH=$folder/packages
    fi
}

check() {
    "$PYTHON" -W ignore -
    echo "as described"
}
