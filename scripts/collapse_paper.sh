#!/usr/bin/env bash
# How near the theorem the recipe comes on the paper's own CIFAR-10 counts, N = 30,000.
#
#   scripts/collapse_paper.sh DIR [options of scripts/sweep.sh]
#
# DIR: a --data_dir with CIFAR-10. On the CPU: the recipe with larger lambdas than the paper's, half an hour in fp32 and
# half an hour in bf16 on 2 cores that do nothing else. With a GPU: the paper's command in full and the recipe with the
# paper's lambdas, each with both objectives; not measured. DEVICE=cpu or cuda chooses.
#
# Writes model_weights/collapse_paper_DEVICE/: a folder a run, figures/ of all against minutes of training, summary.md with
# the time to collapse, summary.csv, the commands and their logs. A call that was cut goes on when it is made again.
set -euo pipefail
data=$(realpath -m "${1:?give the folder of the data}")
shift
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt >&2

device=${DEVICE:-$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
out=model_weights/collapse_paper_$device
mkdir -p "$out"

recipe=$(sha256sum scripts/collapse.flags | cut -c1-8) # in each line: another recipe is another job
runs=()
run() { # run NAME FLAGS: a line
    runs+=("$out/$1")
    mkdir -p "$out/$1"
    local flags="$2 --data_dir '$data' --device $device --save_every 50 --nc_every 10 --save_path $out/$1 --resume"
    echo "'$PYTHON' train_1st_order_unbalanced.py $flags && '$PYTHON' validate_NC_unbalanced.py $flags # recipe $recipe"
}
network="--model MLP --no-bias --dataset cifar10 --depth_relu 6 --depth_linear 1 --width 1024 --seed 1 --sep_decay"
with_recipe="@scripts/collapse.flags $network --batch_size 256 --lr 0.001"
if [ "$device" = cpu ]; then
    lambdas="--weight_decay 0.005 --feature_decay_rate 0.000005"
    run fp32 "$with_recipe $lambdas --epochs 150 --patience 54 --penalty_warmup_epochs 30"
    run bf16 "$with_recipe $lambdas --epochs 260 --patience 93 --penalty_warmup_epochs 52 --precision bf16"
else
    lambdas="--weight_decay 0.0001 --feature_decay_rate 0.00001"
    for objective in paper released; do
        run "recipe_$objective" "$with_recipe $lambdas --objective $objective --epochs 1000 --patience 360"
        run "plain_$objective" "$network --batch_size 256 $lambdas --objective $objective --loss CrossEntropy --lr 0.0001 \
--optimizer Adam --epochs 4000 --patience 2000"
    done
fi >"$out/commands.txt"

if [ "${1:-}" = --count ]; then
    exec scripts/sweep.sh --count "$out/commands.txt"
fi
status=0
scripts/sweep.sh "$@" "$out/commands.txt" || status=$?
[ $status -le 1 ] || exit $status # it was stopped, or called wrongly
"$PYTHON" summarize.py "${runs[@]}" --out "$out"
shopt -s nullglob
measured=("$out"/*/nc_metrics.csv)
[ ${#measured[@]} -eq 0 ] || "$PYTHON" plot_nc.py "${measured[@]%/nc_metrics.csv}" --x minutes --out "$out/figures"
exit $status
