"""Time a run on one process against the same run on several, started by torchrun, in turn.

    python benchmarks/ranks.py --ranks 2                (processes share the CPU's cores: ratio below 1)
    python benchmarks/ranks.py --ranks 8 --model ResNet50 --batch_size 2048 --classes 1000                 (8 GPUs)

Each run trains on random images in a folder; a rate is the median over the epochs after the first.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, make_parser, report
from PIL import Image

from engine.device import pick_device
from engine.run import Run


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="MLP")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch, over all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    device = pick_device(options.device, 0)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.classes, int(30_000 * options.fraction) // options.classes)
        pairs = [
            [images_per_second(options, ranks, folder) for ranks in (1, options.ranks)] for _ in range(options.pairs)
        ]
    ratios = [many / one for one, many in pairs]
    row = {"model": options.model, "batch": options.batch_size, "ranks": options.ranks}
    row |= {"images/s, one": statistics.median(one for one, _ in pairs)}
    row |= {"images/s, all": statistics.median(many for _, many in pairs)}
    row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "pairs": options.pairs}
    report(f"ranks_{options.model}", [row], device, options.out)


def write_images(folder, classes, count):
    """Write `count` random 32 x 32 images for each class, and one for testing."""
    random = np.random.default_rng(0)
    for label in range(classes):
        for split, size in (("train", count), ("test", 1)):
            (folder / split / f"{label:04d}").mkdir(parents=True)
            for index, pixels in enumerate(random.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)):
                Image.fromarray(pixels).save(folder / split / f"{label:04d}" / f"{index:05d}.png", compress_level=0)


def images_per_second(options, ranks, folder):
    """Train on `ranks` processes, without torchrun if it is one; return the rate that the log records."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = f"--dataset imagefolder --no-bias --sep_decay --force --save_every 1000 --device {options.device}".split()
    for name in ("model", "batch_size", "epochs", "width"):
        flags += [f"--{name}", str(getattr(options, name))]
    flags += ["--data_dir", folder, "--save_path", f"{folder}/run"]
    command = [sys.executable, *launcher, ROOT / "train_1st_order_unbalanced.py", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Run(f"{folder}/run").train_log.table()["images_per_second"][1:].median()


if __name__ == "__main__":
    main()
