# Sourced by the other scripts. Prints their help for --help; `root` is the root of the repository.

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
fail() { echo "${0##*/}: error: $1" >&2 && exit 2; }

find_python() { # set PYTHON to an interpreter, or stop
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$PYTHON is not Python 3.11 or later: install it, or set PYTHON=/path/to/python3"
}

use_python() { # use_python REQUIREMENTS: set PYTHON to an interpreter that satisfies the file, if need be in $venv
    find_python
    venv=${venv:-.venv}
    plan=$(PIP_CONFIG_FILE=/dev/null "$PYTHON" -m pip install --dry-run --no-index -r "$1" 2>&1) &&
        [[ $plan != *"Would install"* ]] && return
    [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
    PYTHON=$root/$venv/bin/python
    echo "Using $venv; the first time, this installs $1 (several GB)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1" >&2
}

run_tables() { # run_tables ARGUMENT...: run scripts/tables.py, whose --check finds wrong arguments before an installation
    cd "$root"
    find_python
    "$PYTHON" scripts/tables.py --check "$@"
    use_python requirements.txt
    export PYTHON
    exec "$PYTHON" scripts/tables.py "$@"
}

print_help() { # print the header comment of the script, and for table.sh the tables
    awk '/^#!/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
    [[ ${0##*/} == table.sh ]] || return 0
    cd "$root" && find_python
    "$PYTHON" scripts/tables.py --list
}

for word; do
    case $word in -h | --help) print_help; exit ;; esac
done
