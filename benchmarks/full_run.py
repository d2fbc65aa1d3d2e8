"""Whole runs of train_1st_order_unbalanced.py in each precision: wall time, and where they end.

    python benchmarks/full_run.py --setting paper_mlp --data_dir ~/data        (on a GPU)

The runs share --limit seconds; one that does not end within its part is told to stop (SIGTERM), and its row says how
far it came. Configs, logs and CSV go to --out; checkpoints are written to --scratch as in any run, and deleted.
"""

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, report

from runs import read_run
from utils import pick_device

SEP_DECAY = "--no-bias --seed 1 --sep_decay --loss CrossEntropy --optimizer Adam --depth_linear 1"
PAPER = f"{SEP_DECAY} --feature_decay_rate 0.00001 --weight_decay 0.0001 --lr 0.0001 --epochs 4000 --patience 2000"
SETTINGS = {
    "paper_mlp": f"--model MLP --depth_relu 6 --width 1024 --batch_size 256 {PAPER} --nc_every 50",
    "readme": f"--model MLP --depth_relu 6 --width 512 --batch_size 256 {SEP_DECAY} --lr 0.001 --weight_decay 0.005 "
    "--feature_decay_rate 0.00005 --epochs 1000 --patience 500 --class_counts 100,100,200,200,300,300,400,400,500,500 "
    "--nc_every 50",
    "paper_resnet18": f"--model ResNet18 --batch_size 32 {PAPER} --nc_every 10",
    "resnet18_batch256": f"--model ResNet18 --batch_size 256 {PAPER} --nc_every 10",
}
METRICS = ("train_acc1", "NC1", "NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err")
SCRIPT = ROOT / "train_1st_order_unbalanced.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="paper_mlp")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", default="fp32,tf32,bf16")
    parser.add_argument("--epochs", type=int, help="default: those of the setting")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of all the runs together")
    parser.add_argument("--scratch", type=Path, default=Path("model_weights/full_run"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    rows, precisions, end = [], options.precisions.split(","), time.monotonic() + options.limit
    for done, precision in enumerate(precisions):
        rows.append(run(options, precision, device, (end - time.monotonic()) / (len(precisions) - done)))
    report(f"full_run_{options.setting}_{device.type}", rows, device, options.out)


def run(options, precision, device, limit):
    """A row: one run of at most `limit` seconds."""
    shutil.rmtree(options.scratch, ignore_errors=True)
    flags = [*SETTINGS[options.setting].split(), "--precision", precision, "--device", device.type]
    flags += ["--data_dir", options.data_dir, "--dataset", "cifar10", "--save_path", str(options.scratch)]
    if options.epochs:
        flags += ["--epochs", str(options.epochs)]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPT, *flags])
    try:
        process.wait(limit)
        ended = "finished" if process.returncode == 0 else f"failed, exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        ended = "cut"
    wall = time.perf_counter() - began

    if not options.scratch.exists():
        sys.exit(f"{options.setting}, {precision}: {ended}")
    found = read_run(options.scratch)
    kept = options.out / f"{options.setting}_{precision}_{device.type}"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "train_log.jsonl", "nc_metrics.csv"):
        if (options.scratch / name).exists():
            shutil.copy(options.scratch / name, kept)
    shutil.rmtree(options.scratch)
    last = found.rows[-1] if found.rows else {}
    return {
        "run": f"{options.setting}, {precision}",
        "ended": ended,
        "wall, s": wall,
        "epochs": len(found.log),
        "s an epoch": statistics.median([line["seconds"] for line in found.log] or [float("nan")]),
        "measured at": int(last.get("epoch", 0)),
        **{name: last.get(name, float("nan")) for name in METRICS},
    }


if __name__ == "__main__":
    main()
