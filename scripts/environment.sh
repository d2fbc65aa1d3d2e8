# Sourced by the other scripts. Sets PYTHON to an interpreter that satisfies the requirements file named as the
# first argument: the one in use (or $PYTHON) where it already does, else that of .venv, which is made and filled.

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && PYTHON=python
fi

satisfied() { # does this interpreter have all of the requirements? asks nobody outside the machine
    local plan
    plan=$(PIP_CONFIG_FILE=/dev/null "$1" -m pip install --dry-run --no-index -r "$2" 2>&1) &&
        ! grep -q "Would install" <<<"$plan"
}

set_up_environment() {
    local requirements=$1
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "$PYTHON is not Python 3.11 or later: install it, or say PYTHON=/path/to/python3" >&2
        exit 2
    }
    satisfied "$PYTHON" "$requirements" && return
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || exit 1
    PYTHON=$PWD/.venv/bin/python
    satisfied "$PYTHON" "$requirements" && return
    echo "installing $requirements into .venv (once; some GB)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || exit 1
}

set_up_environment "$1"
