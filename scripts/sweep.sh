#!/usr/bin/env bash
# Usage: scripts/sweep.sh [-j JOBS [--mps] | --line N | --count] FILE
#
# Run the shell commands in FILE, one per line, in the root of the repository, JOBS at a time (default: one per GPU in
# CUDA_VISIBLE_DEVICES, else 1). --line N runs only the Nth; --count prints their number. Blank, comment and repeated
# lines do not count. Each job sees one GPU of CUDA_VISIBLE_DEVICES (-j 4 puts two jobs on each of two GPUs);
# on the CPU it gets its share of the cores unless OMP_NUM_THREADS is set. Job N appends its output to FILE.logs/N.log.
# After each job: how many are done, failed and left, and about how long the rest takes.
# --mps starts NVIDIA's Multi-Process Service for the time of the sweep, so that jobs on one GPU run at the same time
# instead of taking turns; it needs the driver's nvidia-cuda-mps-control, and changes no setting of the GPU.
# Ctrl-C and SIGTERM stop the jobs as well, and so do SIGHUP, SIGUSR1 and SIGXCPU. If the commands have --resume, run the sweep again to continue.
#
# Exit status: 0 if every job succeeded, 1 if not, 2 for a wrong call. Needs GNU xargs, and flock from util-linux.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

run_job() { # run_job N COMMAND: called by xargs in a process of its own; SLOT numbers the processes
    local gpus status=0 log=$logs/$1.log
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
    echo "job $1 starts, log: $log"
    { echo "$(date '+%F %T')  $2" && bash -c "$2"; } >>"$log" 2>&1 </dev/null || status=$?
    [ $status -eq 0 ] || echo "job $1 failed with exit status $status, $log: $(tail -n 1 "$log")" >>"$failures"
    echo >>"$ended"
    local done_now failed left seconds
    done_now=$(wc -l <"$ended") failed=$(wc -l <"$failures")
    left=$((total - done_now)) seconds=$((($(date +%s) - began) * left / done_now))
    printf 'job %s %s: %s of %s done, %s failed, %s to go, about %d:%02d:%02d\n' "$1" \
        "$([ $status -eq 0 ] && echo ended || echo failed)" $((done_now - failed)) "$total" "$failed" "$left" \
        $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60))
}

start_mps() { # start a service of this sweep alone: its sockets and logs lie in a folder of its own
    command -v nvidia-cuda-mps-control >/dev/null || fail "--mps: nvidia-cuda-mps-control, of NVIDIA's driver, is not installed"
    mps=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
    env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d >"$mps/start" 2>&1 ||
        fail "--mps: the service does not start: $(tail -n 1 "$mps/start")"
}

finish() {
    rm -f "$failures" "$ended"
    [ -z "$mps" ] || { echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true; rm -rf "$mps"; }
}

stop() { # stop SIGNAL: end the jobs and wait until they have gone; a second signal ends this script at once
    trap - $stopping
    kill -TERM -- "-$xargs" 2>/dev/null || true
    flock -w 60 "$failures" true || true
    echo "sweep.sh: stopped; run it again to continue" >&2
    exit $((128 + $1))
}

jobs='' line='' count='' mps='' wants_mps='' stopping='HUP INT TERM USR1 XCPU'
while [[ ${1:-} == -* ]]; do
    case $1 in
        -j | --line) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "$1: '${2:-}' is not a whole number >= 1" ;;&
        -j) jobs=$2 && shift ;;
        --line) line=$2 && shift ;;
        --count) count=1 ;;
        --mps) wants_mps=1 ;;
        --) shift && break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
[ $# -eq 1 ] || fail "give one FILE"
[ -f "$1" ] && [ -r "$1" ] || fail "$1: no such file"
mapfile -t -O 1 commands < <(awk '!/^[[:space:]]*(#|$)/ && !seen[$0]++' <"$1")
[ ${#commands[@]} -gt 0 ] || fail "$1: there is no command in it"
[ "${line:-1}" -le ${#commands[@]} ] || fail "--line $line: $1 has ${#commands[@]} commands"
[ -z "$count" ] || { echo ${#commands[@]} && exit; }

logs=$(realpath -- "$1").logs failures=$(mktemp) ended=$(mktemp) xargs='' began=$(date +%s) total=${#commands[@]}
trap finish EXIT
[ -z "$line" ] || total=1
[ -z "$wants_mps" ] || start_mps
mkdir -p -- "$logs"
cd "$root"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
jobs=${jobs:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))} cores=$(nproc)
jobs=$((line ? 1 : jobs < ${#commands[@]} ? jobs : ${#commands[@]}))
export logs failures ended began total OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
export -f run_job
for name in $stopping; do trap "stop $(kill -l "$name")" "$name"; done
exec 9<"$failures" && flock 9 # jobs inherit this lock; it is free again when the last of their processes has ended
set -m # puts xargs and the jobs into a process group of their own
xargs -0 -n 2 -P "$jobs" --process-slot-var=SLOT bash -ec 'run_job "$@"' run_job \
    < <(for n in ${line:-${!commands[@]}}; do printf '%s\0' "$n" "${commands[n]}"; done) &
xargs=$! && set +m && exec 9<&-
wait $xargs || echo "not all jobs were run: xargs ended with exit status $?" >>"$failures"
if grep . "$failures"; then
    echo "next: mend what failed and run the sweep again; commands with --resume then end at once where they are done"
    exit 1
fi
echo "next: python summarize.py with the folders of the runs, for a table and a row a run in summary_runs.csv"
