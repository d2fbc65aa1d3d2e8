#!/usr/bin/env bash
# The table of docs/collapse.md: the recipe on five settings, five seeds each.
#
#   scripts/collapse_table.sh DIR [options of scripts/sweep.sh, default -j with all cores]
#
# DIR: a --data_dir with CIFAR-10. Writes model_weights/collapse/: a folder a run, summary.md, summary.csv, the commands
# and their logs. A call that was cut goes on when it is made again. Time: 24 minutes on 2 CPU cores. Disk: 1.6 GB.
set -euo pipefail
data=$(realpath -m "${1:?give the folder of the data}")
shift
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt >&2

cifar10="--dataset cifar10 --data_dir '$data'"
[ $# -gt 0 ] || set -- -j "$(nproc)"
out=model_weights/collapse
mkdir -p "$out"
recipe=$(sha256sum scripts/collapse.flags | cut -c1-8) # in each line: another recipe is another job

setting() { # setting NAME FLAGS: a line a seed
    for seed in 1 2 3 4 5; do
        mkdir -p "$out/$1-$seed"
        echo "scripts/collapse.sh $2 --seed $seed --save_every 50 --nc_every 10 --save_path $out/$1-$seed # recipe $recipe"
    done
}
lambdas="--weight_decay 0.004 --feature_decay_rate 0.0001"
{
    setting mixed "$cifar10 --class_counts 420,60,350,120,280,90,500,240,150,200 --width 512 --depth_relu 4 --batch_size 200 $lambdas"
    setting readme "$cifar10 --class_counts 100,100,200,200,300,300,400,400,500,500 --width 512 --depth_relu 6 \
--batch_size 256 --weight_decay 0.005 --feature_decay_rate 0.00005"
    setting exp10 "$cifar10 --imbalance exp:10 --n_max 500 --width 256 --depth_relu 4 --batch_size 200 $lambdas"
    setting step10 "$cifar10 --imbalance step:10 --n_max 500 --width 256 --depth_relu 4 --batch_size 200 $lambdas"
    setting digits "--dataset digits --width 256 --depth_relu 3 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005"
} >"$out/commands.txt"

status=0
scripts/sweep.sh "$@" "$out/commands.txt" || status=$?
[ $status -le 1 ] || exit $status # it was stopped, or called wrongly
"$PYTHON" summarize.py "$out"/*-[1-5] --worst --out "$out"
exit $status
