#!/usr/bin/env bash
# Usage: scripts/table.sh TABLE DIR [OPTION of scripts/sweep.sh]...
#
# Train and measure the runs of a published table. DIR is a --data_dir with CIFAR-10, downloaded if it is absent.
# Writes model_weights/TABLE/: a folder per run, summary.md, summary.csv, figures/, commands.txt and its logs. Run it
# again after an interruption. The runs of each TABLE are in scripts/tables.txt:
#
#   recipe         The recipe of docs/recipe.md on five settings, five seeds each: 25 minutes on 2 CPU cores, 1.6 GB.
#                  Expected: every run ends within 0.04 % of the theorem.
#   small          Imbalanced and balanced classes, an exponential and a step profile, and large lambdas, with which the
#                  minority classes collapse, three seeds each: 13 minutes on 2 CPU cores, 1.1 GB. Without CIFAR-10 in
#                  DIR: digits. Expected: within 0.1 % of the theorem; 100 % training accuracy unless classes collapse.
#   paper_counts   N = 30,000 as in the paper, with larger lambdas: half an hour each in fp32 and bf16 on 2 CPU cores.
#   paper_lambdas  The paper's command, and the recipe with its lambdas, with both objectives. Not run: needs a GPU.
#   paper_schedule, paper_released  The paper's MLP and lambdas, small_lambda.flags: about an hour each on one core.
#   small_lambda   The same difficulty on 3,000 images, three seeds: 16 to 18 minutes each on a core. Expected: 0.02 %.
#   small_lambda_without  The same without the schedule, one seed each. Expected: the recipe 0.6 %, plain Adam 170 %.
#   losses         Nine losses against imbalance, three seeds each: 43 minutes on one core.
#   zoo            ResNet18, ResNet50, VGG11 and DenseNet with BatchNorm: 2 to 65 minutes for each run on one core.
#                  With more than six jobs, run it twice: two runs continue others.
#   plain          Plain Adam in fp32 (11 minutes on one core) and bf16 on 3,000 CIFAR-10 images; on digits a head with
#                  bias, and MSE. Expected: fp32 runs within 0.5 % of the optimum, bf16 within 2 %.
#
# One job runs per CPU core, or per GPU if CUDA_VISIBLE_DEVICES is set; the jobs of paper_* run one after the other.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
table=${1:-} data=${2:-}
[[ -n $data && $data != -* ]] || fail "give TABLE and DIR (a DIR with a leading dash as ./-DIR)"
data=$(realpath -m -- "$data")
shift 2
[ "$table" != small ] || [ -d "$data/cifar10/train" ] || [ -d "$data/cifar-10-batches-py" ] || table=small_digits
[[ $table != paper_* ]] || plot_flags=(--x minutes)
[[ $table == paper_* || $# -gt 0 || ${CUDA_VISIBLE_DEVICES:-} ]] || set -- -j "$(OMP_NUM_THREADS='' nproc)"
out=model_weights/$table
add_table "$table" --data_dir "$data"
run_table "$@"
