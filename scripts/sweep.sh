#!/usr/bin/env bash
# Runs the commands of a file, several at a time; called again, it goes on with what is not complete.
#
#   scripts/sweep.sh [-j JOBS] FILE     all of them, JOBS at a time (default: one a GPU of CUDA_VISIBLE_DEVICES, else 1)
#   scripts/sweep.sh --line N FILE      the Nth alone, as scripts/slurm_array.sbatch does
#   scripts/sweep.sh --count FILE       says how many there are
#
# FILE has a shell command a line, run from the repository's root; blank lines and lines that begin with # are left out.
# With --resume a training run that was cut goes on where it stopped. For instance:
#
#   f="--lr 0.001 --resume"; python train_1st_order_unbalanced.py $f && python validate_NC_unbalanced.py $f
#   f="--lr 0.003 --resume"; python train_1st_order_unbalanced.py $f && python validate_NC_unbalanced.py $f
#
# A job sees one GPU of CUDA_VISIBLE_DEVICES, in turn (so -j 4 puts two jobs on each of two GPUs); on the CPU it has
# its share of the cores, unless OMP_NUM_THREADS is set. FILE.jobs/ keeps, under a hash of the command, a job's log and,
# once it has ended with status 0, a file .done: a changed line is another job. Ctrl-C and SIGTERM stop the jobs too.
# Exit status: 0 if all are complete, 1 if not, 2 for a wrong call. Needs GNU xargs and flock, as Linux has them.
set -euo pipefail

usage() {
    echo "sweep.sh: error: $1; usage: scripts/sweep.sh [-j JOBS | --line N | --count] FILE" >&2
    exit 2
}

job_of() { # the path of a command's files, without their ending
    echo "$folder/$(sha256sum <<<"$1" | cut -c1-12)"
}

run_job() { # runs in a process of its own; SLOT numbers those that run at a time from 0
    local job status=0 gpus
    job=$(job_of "$1")
    exec 9>"$job.lock" # held until the last process of the job has gone
    if ! flock -n 9; then
        echo "busy     $job.log: it runs already"
    elif [ ! -e "$job.done" ]; then
        IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
        [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
        echo "begins   $job.log: $1"
        rm -f "$job.failed"
        { echo "$(date '+%F %T')  $1" && bash -c "$1"; } >>"$job.log" 2>&1 </dev/null || status=$?
        if [ $status -eq 0 ]; then touch "$job.done"; else echo $status >"$job.failed"; fi
        echo "ends     $job.log: exit status $status"
    fi
}

stop() { # on a signal: ends the jobs, and waits until they have gone
    trap - INT TERM HUP # a second signal ends this script at once
    kill -TERM -- "-$xargs" 2>/dev/null || true
    for command in "${commands[@]}"; do
        flock -w 60 "$(job_of "$command").lock" true || true
    done
    echo "sweep.sh: stopped; the same call goes on" >&2
    exit $((128 + $1))
}

summarize() { # says how each job stands; fails if one is not complete
    local command job complete=0
    for command in "${commands[@]}"; do
        job=$(job_of "$command")
        if [ -e "$job.done" ]; then
            complete=$((complete + 1))
        elif [ -e "$job.failed" ]; then
            echo "failed   $job.log: exit status $(<"$job.failed"): $(tail -n 1 "$job.log")"
        else
            echo "cut      $job.log: $command"
        fi
    done
    echo "$complete of ${#commands[@]} complete"
    [ $complete -eq ${#commands[@]} ]
}

# ---- what to run

jobs='' line='' count=''
while [[ ${1:-} == -* ]]; do
    case $1 in
        --count) count=1 ;;
        -j | --line)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$1: '${2:-}' is not a whole number >= 1"
            if [ "$1" = -j ]; then jobs=$2; else line=$2; fi
            shift
            ;;
        *) usage "unknown option $1" ;;
    esac
    shift
done
[ $# -eq 1 ] || usage "one FILE is needed"
[ -f "$1" ] && [ -r "$1" ] || usage "$1: no such file"
folder=$(realpath "$1").jobs
mapfile -t commands < <(grep -vE '^[[:space:]]*(#|$)' "$1" | awk '!seen[$0]++')
[ ${#commands[@]} -gt 0 ] || usage "$1: no command in it"
if [ "$count" ]; then
    echo ${#commands[@]}
    exit
fi
if [ "$line" ]; then
    [ "$line" -le ${#commands[@]} ] || usage "--line $line: $1 has ${#commands[@]} commands"
    commands=("${commands[line - 1]}")
fi

# ---- run it

cd "$(dirname "$0")/.."
mkdir -p "$folder"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
jobs=${jobs:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))}
jobs=$((jobs < ${#commands[@]} ? jobs : ${#commands[@]}))
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))} folder
export -f job_of run_job
xargs=
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM
set -m # gives xargs and all below it a process group, which `stop` ends as a whole
xargs -0 -n 1 -P "$jobs" --process-slot-var=SLOT bash -ec 'run_job "$1"' run_job < <(printf '%s\0' "${commands[@]}") &
xargs=$!
set +m
wait $xargs || true # what became of each job is in its files
summarize
