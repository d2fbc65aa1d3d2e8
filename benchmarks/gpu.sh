#!/usr/bin/env bash
# All that is claimed for one GPU, in one call of under 9 minutes: steps of each loop and precision, measuring, the
# share of the chip's ceilings, the README's run (a) and the paper's full MLP run in each precision, ResNet18 epochs.
#
#   benchmarks/gpu.sh DATA_DIR [folder of the results, default benchmarks/results/gpu]
#
# DATA_DIR is as for --data_dir, with CIFAR-10 in it. Needs 16 GB of disk under model_weights/ while it runs; what stays is
# small. Tables come last, in tables.md too. Expected: not measured. DEVICE=cpu EPOCHS=1 tries the script without a GPU.
set -uo pipefail
data=$(realpath -m "${1:?give the folder of the data}")
out=${2:+$(realpath -m "$2")}
cd "$(dirname "$0")/.."
out=${out:-benchmarks/results/gpu}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
limit=${SECONDS_IN_ALL:-530}
mkdir -p "$out"
: >"$out/log.txt"

# part MOST NAME FLAGS...: a benchmark, cut after MOST seconds, or fewer where less than that is left of the whole
part() {
    local most=$1 left=$((limit - SECONDS))
    shift
    ((most < left)) || most=$left
    ((most > 10)) || { echo "no time left for $*" | tee -a "$out/log.txt"; return; }
    echo "[$SECONDS s] $*" | tee -a "$out/log.txt"
    timeout --signal=INT --kill-after=20 "$most" "$python" "benchmarks/$@" --device "$device" --out "$out" \
        >>"$out/log.txt" 2>&1 || echo "ended with status $?: $*" | tee -a "$out/log.txt"
}
full() { # full SECONDS SETTING PRECISIONS
    part $(($1 + 20)) full_run.py --setting "$2" --precisions "$3" --limit "$1" --data_dir "$data" \
        ${EPOCHS:+--epochs "$EPOCHS"}
}
tf32=tf32,
[ "$device" = cpu ] && tf32=

part 30 training.py --model MLP --steps "${STEPS:-200}" --pairs 3 --data_dir "$data"
part 30 training.py --model ResNet18 --steps "${STEPS:-50}" --pairs 3 --data_dir "$data"
part 30 measuring.py --pairs 3 --data_dir "$data"
full 40 readme "fp32,${tf32}bf16"
full 300 paper_mlp "fp32,${tf32}bf16"
full 20 resnet18_batch256 bf16
full 20 paper_resnet18 bf16

grep -A 30 --no-group-separator -E '^(training|ceiling|measuring|full_run)_' "$out/log.txt" |
    grep -E '^(\||(training|ceiling|measuring|full_run)_)' | tee "$out/tables.md"
