#!/usr/bin/env bash
# The paper's experiments on one data set: MLP, ResNet18, VGG11 and densenet_cifar are trained, measured and drawn, and
# put into a table. reproduce_cifar10.sh and its siblings call it; their headers say what it takes and what to expect.
#
#   scripts/reproduce.sh DATASET [-j JOBS]     options of scripts/sweep.sh, which runs a model on each GPU
#
# OBJECTIVE   paper (default) or released: what the paper's released code minimises, with which its curves were made
# FLAGS       further flags of training and validating, such as FLAGS="--data_dir /data --save_every 100"
# PYTHON      interpreter, as for quickstart.sh
#
# Writes model_weights/DATASET_OBJECTIVE/: a run a model, figures/ of all, summary.md, summary.csv, commands.txt and the
# logs of its jobs. A call that was cut goes on when it is made again. With Slurm, from the repository's root:
#
#   jobs=$(scripts/reproduce_cifar10.sh --count)
#   sbatch --array=1-$jobs scripts/slurm_array.sbatch model_weights/cifar10_paper/commands.txt
#
# The flags of MLP and ResNet18 on cifar10 are the paper's. That VGG11 and densenet_cifar are trained as ResNet18, and
# the other data sets as cifar10, is our assumption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt >&2

dataset=${1:?give a DATASET}
shift
objective=${OBJECTIVE:-paper}
out=model_weights/${dataset}_$objective
models=(MLP ResNet18 VGG11 densenet_cifar)
mkdir -p "${models[@]/#/$out/}"

for model in "${models[@]}"; do
    batch_size=32
    [ "$model" != MLP ] || batch_size=256
    flags="--model $model --no-bias --dataset $dataset --depth_relu 6 --depth_linear 1 --width 1024 --seed 1"
    flags+=" --sep_decay --batch_size $batch_size --feature_decay_rate 0.00001 --loss CrossEntropy --lr 0.0001"
    flags+=" --weight_decay 0.0001 --optimizer Adam --epochs 4000 --patience 2000 --objective $objective"
    flags+=" --save_path $out/$model ${FLAGS:-} --resume"
    echo "'$PYTHON' train_1st_order_unbalanced.py $flags && '$PYTHON' validate_NC_unbalanced.py $flags"
done >"$out/commands.txt"

if [ "${1:-}" = --count ]; then
    exec scripts/sweep.sh --count "$out/commands.txt"
fi

# The data set, before all jobs begin to download it at once.
"$PYTHON" - --dataset "$dataset" ${FLAGS:-} <<'PYTHON'
import sys

from args import parse_args
from datasets import load_data
from utils import run_script


def main():
    args = parse_args()
    counts = {"imbalance": args.imbalance, "n_max": args.n_max, "class_counts": args.class_counts}
    load_data(args.dataset, args.data_dir, download=args.download, **counts)


sys.argv[0] = "reproduce.sh"
run_script(main)
PYTHON

status=0
scripts/sweep.sh "$@" "$out/commands.txt" || status=$?
[ $status -le 1 ] || exit $status # it was stopped, or called wrongly
"$PYTHON" summarize.py "${models[@]/#/$out/}" --out "$out"
shopt -s nullglob
measured=("$out"/*/nc_metrics.csv)
[ ${#measured[@]} -eq 0 ] || "$PYTHON" plot_nc.py "${measured[@]%/nc_metrics.csv}" --out "$out/figures"
exit $status
