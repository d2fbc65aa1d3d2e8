"""Check in ten minutes that a GPU trains correctly, how fast it is, and where time is lost.

    python benchmarks/check_gpu.py [--data_dir DIR]       (or scripts/check_gpu.sh [DIR])

The parts run one after the other, each in processes of its own that end at its limit. Every figure is printed, and
added to benchmarks/results/check_gpu_DEVICE.csv, as soon as it is known. --device cpu runs everything at a small size.
The exit status is 1 if a part failed, ran past its limit, or found a difference where there must be none.
"""

import argparse
import contextlib
import csv
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import ROOT, random_images, ratios, time_in_turn
from reference import run_usual_training
from torch.nn.utils import parameters_to_vector
from training import OurTraining

import train_1st_order_unbalanced as train_script
from args import parse_args
from datasets import load_data
from engine.checkpoints import load_torch
from engine.cuda_graph import CudaGraphs
from engine.device import device_name, keep_freed_memory, pick_device, set_precision
from engine.run import Run
from engine.step_log import MEASURED
from engine.tables import MeasuredRun
from utils import Interrupted, run_script

TRAIN = ROOT / "train_1st_order_unbalanced.py"
# "batch" is the MLP's batch size, and "images" that of ResNet18
GPU = {"width": 1024, "planes": 64, "batch": 256, "fraction": 1.0, "product": 8192, "steps": 50, "pairs": 5}
GPU |= {"images": 32, "epochs": 400, "seconds": 180, "seeds": 5, "sweep_epochs": 150, "patience": 1}
GPU |= {"objectives": ("paper", "released")}
CPU = {"width": 32, "planes": 8, "batch": 64, "fraction": 0.01, "product": 256, "steps": 3, "pairs": 1}
CPU |= {"images": 4, "epochs": 20, "seconds": 1, "seeds": 2, "sweep_epochs": 2, "patience": 5}
CPU |= {"objectives": ("paper",)}
ELSEWHERE = multiprocessing.get_context("forkserver")  # forks a process that has imported torch but used no GPU
PRELOADED = ["train_1st_order_unbalanced"]
AGREE = 1e-2  # relative difference, of all weights or of losses, that rounding may make


# ---------------------------------------------------------------------------------------------------------
# Parts: each yields (what, value, unit); a value that is False is a failure
# ---------------------------------------------------------------------------------------------------------


def collapse(device, size, data):
    """Train the paper's MLP with the recipe until NC2_H, NC3_WH, margins and norms are at most 0.01."""
    for objective in size.objectives:
        words = "--lr 0.0005 --epochs 25 --nc_every 1 --until 0.01 --force --weight_decay 0.0001"
        words += f" --feature_decay_rate 0.00001 --objective {objective}"
        words = [f"@{ROOT}/scripts/collapse.flags", *words.split()]
        with tempfile.TemporaryDirectory() as folder:
            run, began = MeasuredRun(Run(folder)), time.perf_counter()
            train_here([*words, *mlp_words(device, size), "--save_path", folder], data)
            wall, log, reached = time.perf_counter() - began, run.log, "ended_at_epoch" in run.run.config
        yield f"{objective}: steps to 0.01", int(run.steps_until(len(log))) if reached else math.nan, "steps"
        yield f"{objective}: training to 0.01", log["seconds"].sum() if reached else math.nan, "s"
        yield f"{objective}: the whole command", wall, "s, with start, measurements and files"


def seeds(device, size, data):
    """Train one seed of the paper's MLP, and several at once, without and with NVIDIA's Multi-Process Service."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = {"train_images": data.train.pixels, "test_images": data.test.pixels}
        arrays = {name: pixels.permute(0, 2, 3, 1).cpu().numpy() for name, pixels in arrays.items()}
        labels = {f"{name}_labels": getattr(data, name).labels.cpu().numpy() for name in ("train", "test")}
        np.savez(f"{folder}/images.npz", **arrays, **labels)
        names = {"one": 1, f"{size.seeds} at once": size.seeds}
        if shutil.which("nvidia-cuda-mps-control"):
            names[f"{size.seeds} at once, with MPS"] = size.seeds
        alone = None
        for name, count in names.items():
            flags = f"--dataset images.npz --data_dir {folder} --no-bias --sep_decay --epochs {size.sweep_epochs}"
            words = [sys.executable, str(TRAIN), *flags.split(), *mlp_words(device, size)]
            runs = [Run(f"{folder}/{name}/{seed}") for seed in range(1, count + 1)]
            jobs = [
                shlex.join([*words, "--seed", str(seed), "--save_path", str(run.folder)])
                for seed, run in enumerate(runs, 1)
            ]
            Path(folder, "jobs.txt").write_text("\n".join(jobs))
            options = ["-j", str(count), *(["--mps"] if "MPS" in name else [])]
            done = subprocess.run([ROOT / "scripts" / "sweep.sh", *options, f"{folder}/jobs.txt"], capture_output=True)
            yield f"{name}: every job succeeds", done.returncode == 0, ""
            if done.returncode == 0:  # the median epoch of a job is one in which the others train too
                rate = sum(run.train_log.table()["images_per_second"].median() for run in runs)
                alone = alone or rate
                yield f"{name}: all together", rate / size.batch, "steps/s"
                yield f"{name}: against one", rate / alone, "times"


def agreement(device, size, data):
    """Compare a captured training step with an uncaptured one, and the GPU with the CPU.

    On an H100 both steps give the same weights, bit for bit. AGREE leaves room for a learning rate that is rounded
    otherwise: in 50 steps of the MLP in fp32 it makes a difference of 0.1 % of the weights' norm; the steps make 11 %.
    """
    for model in ("MLP", "ResNet18"):
        for precision in precisions(device):
            make = partial(build, model, precision, device, size, data)
            captured, plain = make(), make("--no-cuda_graph")
            for one in (captured, plain):
                one.run(size.steps)
            difference = max(map(relative_difference, captured.model.parameters(), plain.model.parameters()))
            what = f"{model}, {precision}: weights after {size.steps} steps, captured against plain"
            yield what, difference, "relative"
            if (model, precision) == ("MLP", "fp32"):
                vectors = [parameters_to_vector(one.model.parameters()) for one in (captured, plain)]
                yield f"{what}, agree", bool((vectors[0] - vectors[1]).norm() <= AGREE * vectors[1].norm()), ""
    losses = [loss_of_steps(build("MLP", "fp32", place, size, data, "--no-cuda_graph")) for place in ("cpu", device)]
    difference = relative_difference(*losses)
    yield "MLP, fp32: loss of 5 steps, GPU against CPU", difference, "relative"
    yield "MLP, fp32: loss of 5 steps, GPU against CPU, agree", difference < AGREE, ""


def resume(device, size, data):
    """Compare a run that was killed and resumed with an uninterrupted one."""
    flags = f"--dataset digits --width {size.width} --depth_relu 2 --batch_size 102 --no-bias"
    flags += f" --sep_decay --epochs {size.epochs} --save_every 2 --device {device.type} --save_path"
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Run(f"{folder}/whole"), Run(f"{folder}/cut")
        train_here([*flags.split(), str(whole.folder)])
        words = [*flags.split(), str(cut.folder), "--resume"]
        for number in (signal.SIGTERM, signal.SIGKILL):
            process = ELSEWHERE.Process(target=train_elsewhere, args=(os.getpgrp(), words))
            process.start()
            already = len(cut.checkpoints())
            while len(cut.checkpoints()) < already + 2 and process.is_alive():
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):  # a small run may have ended
                os.kill(process.pid, number)
            began = time.perf_counter()
            process.join()
            yield f"from {number.name} to the end of the process", time.perf_counter() - began, "s"
        train_here(words)
        states = [load_torch(run.checkpoint(size.epochs)) for run in (whole, cut)]
    yield "resumed after both, the run ends bit for bit as one that was not cut", states_equal(*states), ""


def rates(device, size, data):
    """Time steps of the MLP against the usual loop, the same matrix products alone, and one large product."""
    with elsewhere() as process:
        setting = (size.steps, "MLP", size.batch, size.width, size.fraction, device)
        works = {"usual": lambda: process.submit(run_usual_training, *setting).result()}
        usual = time_in_turn(works, size.pairs, device)["usual"]
    yield "MLP, fp32, the usual loop", size.steps / statistics.median(usual), "steps/s"
    bytes_ = torch.empty(size.product, size.product, device=device)
    copied = time_in_turn({"": lambda: bytes_.clone()}, size.pairs, device)[""]
    yield "copying memory", 2 * bytes_.nbytes / statistics.median(copied) / 1e9, "GB/s"
    for precision in precisions(device):
        with elsewhere() as process:  # its own, because torch chooses between libraries for products only once
            flops, times = process.submit(time_products, precision, device, size, data).result()
        medians = {name: statistics.median(spent) for name, spent in times.items()}
        rate, peak = size.steps * flops / medians["ours"], 2 * size.product**3 / medians["product"]
        yield f"MLP, {precision}, ours", size.steps / medians["ours"], "steps/s"
        yield f"MLP, {precision}, ours against the usual loop in fp32", ratios(usual, times["ours"])[0], "times"
        yield f"MLP, {precision}, the same products alone", size.steps / medians["products"], "steps/s"
        yield f"a large product, {precision}", peak / 1e12, "TFLOP/s"
        yield f"MLP, {precision}, share of the large product's rate", rate / peak, ""


def paper(device, size, data):
    """Run the paper's command for the MLP until its time is up."""
    words = "--no-bias --sep_decay --epochs 4000 --patience 2000 --lr 0.0001 --save_every 50 --nc_every 10 --force"
    with tempfile.TemporaryDirectory() as folder:
        run, began = MeasuredRun(Run(folder)), time.perf_counter()
        train_for(size.seconds, [*words.split(), *mlp_words(device, size)], run, data)
        wall, log, row = time.perf_counter() - began, run.log, run.rows.iloc[-1]
    yield "epochs", len(log), f"in {wall:.1f} s, with start, measurements and files"
    yield "training of an epoch", log["seconds"].median() * 1000, "ms"
    yield "training waited for the disk", log["seconds_waiting"].sum(), "s"
    yield "loss", log["loss"].iloc[-1], ""
    yield f"NC1 in epoch {row['epoch']:.0f}", row["NC1"], ""


def images(device, size, data):
    """Time ResNet18 with the deterministic algorithms of cuDNN, which we use, and with the fastest."""
    for precision in precisions(device):
        choices = {"deterministic": set_precision, "fastest": set_precision_not_deterministic}
        for how in choices if device.type == "cuda" else ("deterministic",):
            ours = build("ResNet18", precision, device, size, data, choose=choices[how])
            times = time_in_turn({"": partial(ours.run, size.steps)}, size.pairs, device)[""]
            yield f"ResNet18, {precision}, {how}", size.images * size.steps / statistics.median(times), "images/s"


PARTS = {collapse: 40, seeds: 110, paper: 210, rates: 90, agreement: 40, resume: 40, images: 70}  # limits on a GPU, s


# ---------------------------------------------------------------------------------------------------------
# Helpers of the parts
# ---------------------------------------------------------------------------------------------------------


def precisions(device):
    return ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]


def mlp_words(device, size):
    """Return the flags of the paper's MLP at a size, in the fastest precision that is as good as fp32."""
    precision = "tf32" if "tf32" in precisions(device) else "fp32"
    return f"--width {size.width} --batch_size 256 --device {device.type} --precision {precision}".split()


def build(model, precision, device, size, data, *more, choose=set_precision):
    """Return the `OurTraining` of the paper's flags for a model. choose: as in `OurTraining`."""
    batch = size.batch if model == "MLP" else size.images
    words = f"--model {model} --batch_size {batch} --width {size.width} --precision {precision} --no-bias --sep_decay"
    words = [*words.split(), *more] + ([] if model == "MLP" else ["--planes", str(size.planes)])
    return OurTraining(parse_args(argv=words), data, torch.device(device), choose)


def relative_difference(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / a.abs().max())


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loss_of_steps(ours):
    return torch.stack([ours.step(next(ours.endless))[MEASURED.index("loss")] for _ in range(5)])


def elsewhere():
    """Return an executor with a single process, which joins the process group of this one."""
    return ProcessPoolExecutor(1, ELSEWHERE, os.setpgid, (0, os.getpgrp()))


def time_products(precision, device, size, data):
    """Return (floating-point operations of a step of the MLP, times of steps, of their products, of a large one)."""
    keep_freed_memory()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours = build("MLP", precision, device, size, data)
    a, b = torch.randn(2, size.product, size.product, device=device).to(dtype)
    flops, pairs = products_of_a_step(ours, dtype)

    def multiply(_):
        return [c @ d for c, d in pairs]

    step = CudaGraphs()(multiply, None) if device.type == "cuda" else partial(multiply, None)

    def products():
        for _ in range(size.steps):
            step()

    works = {"ours": partial(ours.run, size.steps), "product": lambda: a @ b, "products": products}
    return flops, time_in_turn(works, size.pairs, device)


def products_of_a_step(ours, dtype):
    """Return (floating-point operations, pairs of matrices) of the products that a step of the MLP must make."""
    args, device = ours.args, ours.device
    widths, pairs = [3072] + [args.width] * (args.depth_relu + 1) + [10], []
    for number, (before, after) in enumerate(pairwise(widths)):
        inputs, weight, gradient = (
            torch.randn(*shape, device=device).to(dtype)
            for shape in ((args.batch_size, before), (after, before), (args.batch_size, after))
        )
        pairs += [(inputs, weight.T), (gradient.T, inputs)] + ([(gradient, weight)] if number else [])
    return sum(2 * len(a) * a.shape[1] * b.shape[1] for a, b in pairs), pairs


def train_here(words, data=None):
    """Run the training script in this process, silently, on the images that the flags name, or on `data`."""
    with contextlib.redirect_stdout(None):
        train_script.main(words, data)


def train_elsewhere(group, words):
    """Run the training script as the whole of this process, silently; the process joins the process group."""
    os.setpgid(0, group)
    sys.argv = [str(TRAIN), *words]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run_script(train_script.main)


def train_for(seconds, words, run, data):
    """Train in this process, on `data`, and stop by SIGTERM `seconds` after the first measurement."""
    ended = threading.Event()

    def stop():
        while not run.csv.exists() and not ended.wait(0.05):
            pass
        if not ended.wait(seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(Interrupted):
        threading.Thread(target=stop, daemon=True).start()
        train_here([*words, "--save_path", str(run.folder)], data)
        ended.set()


def set_precision_not_deterministic(precision, device):
    """Set the precision, and let cuDNN use the fastest algorithms that it finds."""
    set_precision(precision, device)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True


# ---------------------------------------------------------------------------------------------------------
# One part after the other
# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--data_dir", default="", help="with CIFAR-10; default: random images")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV file")
    parser.add_argument("--part", choices=[part.__name__ for part in PARTS], help="run this one alone")
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    size = SimpleNamespace(**(GPU if device.type == "cuda" else CPU))
    table = options.out / f"check_gpu_{device.type}.csv"
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.part and table.exists()):  # a part alone adds to the rows of an earlier check
        table.write_text("part,what,value,unit\n")
    add_row(table, "machine", device_name(device), torch.__version__, "torch")
    ELSEWHERE.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # which tidies up after a part that was killed
    parts = [globals()[options.part]] if options.part else PARTS
    setting = device, size, options.data_dir
    return max([run_elsewhere(part, PARTS[part] * size.patience, table, *setting) for part in parts])


def run_elsewhere(part, limit, table, *setting):
    """Run a part in a process of its own, and end that and its children at the limit; return its exit status."""
    process = ELSEWHERE.Process(target=run_script, args=(partial(run_part, part, table, *setting),))
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            add_row(table, part.__name__, "cut after", limit, "s")
        return int(process.exitcode != 0)
    finally:
        end_group(process)


def end_group(process):
    """End a part; the processes that it has started get ten seconds to end what they have started."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):  # until no process is left
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(100):
            process.join(0.1)
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def run_part(part, table, device, size, data_dir):
    """Add the rows of a part to the table; return 1 if one of them is False."""
    os.setpgid(0, 0)
    ELSEWHERE.set_forkserver_preload(PRELOADED)  # for the processes that the part starts
    keep_freed_memory()
    data = load_data("cifar10", data_dir) if data_dir else random_images(size.fraction)
    values = [add_row(table, part.__name__, *row) for row in part(device, size, data)]
    return int(any(value is False for value in values))


def add_row(table, part, what, value, unit):
    """Print a row and add it to the table; return its value."""
    print(f"{part:10} {what}: {f'{value:.4g}' if isinstance(value, float) else value} {unit}", flush=True)
    with open(table, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([part, what, value, unit])
    return value


if __name__ == "__main__":
    run_script(main)
