#!/usr/bin/env bash
# The whole story on two CPU cores: MLPs on imbalanced and on balanced classes, an exponential and a step profile, and one
# with lambdas so large that the minority classes collapse; three seeds of each, their figures and a table.
#
#   scripts/reproduce_small.sh DIR [options of scripts/sweep.sh, default -j with all cores]
#
# DIR: a --data_dir with CIFAR-10, as images or as torchvision's archive; where it is not there, scikit-learn's digits.
# Writes model_weights/small_cifar10/ (or small_digits/): a folder a run, figures/ of all, summary.md. A call that was cut
# goes on when it is made again.
# Time: 13 minutes on 2 CPU cores. Disk: 1.1 GB. Expected: every run ends within 0.1 % of the theorem
# and, but for the collapsed ones, with train accuracy 100 %; the means of classes that collapse are zero.
set -euo pipefail
data=$(realpath -m "${1:?give the folder of the data}")
shift
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt >&2

[ $# -gt 0 ] || set -- -j "$(nproc)"
if [ -d "$data/cifar10/train" ] || [ -d "$data/cifar-10-batches-py" ]; then
    dataset=cifar10
    network="--width 256 --depth_relu 4 --batch_size 200 --data_dir '$data'"
    n_max=500 even=300 lambdas="--weight_decay 0.004 --feature_decay_rate 0.0001"
    imbalanced="--class_counts 100,100,200,200,300,300,400,400,500,500"
    minorities="--class_counts 500,450,400,350,300,250,200,60,50,40 --weight_decay 0.024 --feature_decay_rate 0.0006"
else
    echo "no CIFAR-10 in $data: digits instead"
    dataset=digits
    network="--width 256 --depth_relu 3 --batch_size 102"
    n_max=170 even=100 lambdas="--weight_decay 0.01 --feature_decay_rate 0.0005"
    imbalanced="--imbalance paper"
    minorities="--class_counts 170,150,130,110,90,80,70,20,15,10 --weight_decay 0.03 --feature_decay_rate 0.0015"
fi
out=model_weights/small_$dataset
mkdir -p "$out"
recipe=$(sha256sum scripts/collapse.flags | cut -c1-8) # in each line: another recipe is another job

setting() { # setting NAME FLAGS: a line a seed
    for seed in 1 2 3; do
        mkdir -p "$out/$1_seed$seed"
        echo "scripts/collapse.sh --dataset $dataset $network $2 --seed $seed --save_every 20 \
--save_path $out/$1_seed$seed # recipe $recipe"
    done
}
{
    setting imbalanced "$imbalanced $lambdas"
    setting balanced "--imbalance balanced --n_max $even $lambdas"
    setting exp10 "--imbalance exp:10 --n_max $n_max $lambdas"
    setting step10 "--imbalance step:10 --n_max $n_max $lambdas"
    setting collapsed "$minorities" # those of fewer than 108 images (digits: 35) are to collapse
} >"$out/commands.txt"

status=0
scripts/sweep.sh "$@" "$out/commands.txt" || status=$?
[ $status -le 1 ] || exit $status # it was stopped, or called wrongly
"$PYTHON" summarize.py "$out"/*_seed? --out "$out"
shopt -s nullglob
measured=("$out"/*/nc_metrics.csv)
[ ${#measured[@]} -eq 0 ] || "$PYTHON" plot_nc.py "${measured[@]%/nc_metrics.csv}" --out "$out/figures"
exit $status
