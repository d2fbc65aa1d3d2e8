# Sourced by the other scripts. Prints their header comment for --help; `root` is the root of the repository.

for word; do
    case $word in -h | --help) exec awk '/^#!/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0" ;; esac
done
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
fail() { echo "${0##*/}: error: $1" >&2 && exit 2; }

use_python() { # use_python REQUIREMENTS: set PYTHON to an interpreter that satisfies the file, if need be in $venv
    PYTHON=${PYTHON:-python3} venv=${venv:-.venv}
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$PYTHON is not Python 3.11 or later: install it, or set PYTHON=/path/to/python3"
    plan=$(PIP_CONFIG_FILE=/dev/null "$PYTHON" -m pip install --dry-run --no-index -r "$1" 2>&1) &&
        [[ $plan != *"Would install"* ]] && return
    [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
    PYTHON=$root/$venv/bin/python
    echo "Using $venv; the first time, this installs $1 (several GB)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1" >&2
}

runs=() run_flags=() plot_flags=()
add_table() { # add_table TABLE FLAG...: add the runs of a table in tables.txt, with further flags, as folders in $out
    local name run flags seeds common count seed folder
    while read name run flags; do # without -r, so that a line that ends in \ continues
        [ "$name" = "$1" ] || continue
        [ "$run" != common ] || { read seeds common <<<"$flags" && continue; }
        count=$seeds && [[ $run != *\** ]] || { count=${run#*\*} && run=${run%\**}; }
        for seed in $(seq "$count"); do
            folder=$out/$run && [ "$count" = 1 ] || folder+=-$seed
            printf -v "run_flags[${#runs[@]}]" ' %q' $common $flags --seed $seed "${@:2}" --save_path "$folder" --resume
            runs+=("$folder")
        done
    done <"$root/scripts/tables.txt"
    [ ${#runs[@]} -gt 0 ] || fail "there is no table '$1': see --help"
}

read_data='import sys, args, datasets, utils; del sys.argv[0]
def main():
    flags = args.parse_args()
    counts = {name: getattr(flags, name) for name in ("imbalance", "n_max", "class_counts")}
    datasets.load_data(flags.dataset, flags.data_dir, download=flags.download, **counts)
utils.run_script(main)'

run_table() { # run_table [OPTION of sweep.sh]...: train and measure the runs, then write the table and the figures
    local status=0 sweep run python flags measured=() bn=()
    cd "$root"
    scripts/sweep.sh "$@" --count scripts/sweep.sh >/dev/null # stop here if an option is wrong
    use_python requirements.txt
    mkdir -p "${runs[@]}"
    printf -v python %q "$PYTHON"
    [[ ${run_flags[0]} != *'--bn_statistics training_set'* ]] || bn=(--bn_statistics training_set)
    for flags in "${run_flags[@]//\\,/,}"; do # commas need no quoting
        echo "$python train_1st_order_unbalanced.py$flags && $python validate_NC_unbalanced.py$flags" \
            ${bn:+"&& $python validate_NC_unbalanced.py$flags --bn_statistics running"}
    done >"$out/commands.txt"
    [[ " $* " != *" --count "* ]] || exec scripts/sweep.sh "$@" "$out/commands.txt"
    eval '"$PYTHON" -c "$read_data"' "${0##*/} ${run_flags[0]}" # download or decode the images once, not in every job
    scripts/sweep.sh "$@" "$out/commands.txt" &
    sweep=$!
    trap 'kill $sweep; wait $sweep; exit 143' INT TERM HUP
    wait $sweep || status=$?
    [ $status -le 1 ] || exit $status # the sweep was stopped
    [ ! "${bn-}" ] || "$PYTHON" summarize.py "${runs[@]}" --worst --out "${out}_running"
    "$PYTHON" summarize.py "${runs[@]}" --worst --out "$out" "${bn[@]}"
    for run in "${runs[@]}"; do [ ! -e "$run/nc_metrics.csv" ] || measured+=("$run"); done
    [ ${#measured[@]} -eq 0 ] || "$PYTHON" plot_nc.py "${measured[@]}" "${plot_flags[@]}" "${bn[@]}" --out "$out/figures"
    exit $status
}
