"""Image files: class folders and lists of files, and their pixels, decoded once.

The order of the classes and of the files in a class decides which images a run trains on.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import STOP_SIGNALS, UserError, atomic_write, message_of, printable

FILES_IN_ONE_PROCESS = 5_000  # more image files than that are decoded by several processes
DECODER = 2  # version of `open_rgb` and `decode_file`: other pixels of the same file need another number
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, but needs another program for them


# ---------------------------------------------------------------------------------------------------------
# Which files, and of which class
# ---------------------------------------------------------------------------------------------------------


@dataclass
class ImageFiles:
    """Image files of a split: their names (N,), relative to the folder `root`, and labels (N,)."""

    root: Path
    split: str
    names: list
    labels: np.ndarray

    @property
    def paths(self):
        """The files' paths (N,), strings."""
        return [os.path.join(self.root, name) for name in self.names]

    @cached_property
    def stats(self):
        """(size in bytes, time of the last change) of each file (N,)."""
        found = map(os.stat, self.paths)
        return [(stat.st_size, stat.st_mtime_ns) for stat in found]

    @property
    def marks(self):
        """A text (N,) that identifies each file wherever the folder is: its name and its size."""
        return [f"{name} {size}" for name, (size, _) in zip(self.names, self.stats, strict=True)]


def list_folder(root):
    """Return (classes, {split: ImageFiles}) of <root>/{train,test}/<class>/*, also in sub-folders of a class.

    The test images may be in <root>/val instead, as in Tiny ImageNet. Raises UserError for classes that differ between
    the splits, or fewer than two.
    """
    root = Path(root)
    classes, train = list_split(root, "train")
    if (root / "val" / "val_annotations.txt").is_file():
        return classes, {"train": train, "test": list_annotated(root, classes)}
    split = "test"
    if not (root / "test").is_dir() and (root / "val").is_dir():
        print(f"note       {root} has no folder test: val is the test set", flush=True)
        split = "val"
    test_classes, test = list_split(root, split)
    if classes != test_classes:
        odd = min(set(classes) ^ set(test_classes), key=class_order)
        raise UserError(f"{root}: train and {split} have different classes; '{odd}' is in only one of them")
    if len(classes) < 2:
        raise UserError(f"{root}/train: one class only; a classifier needs two or more")
    return classes, {"train": train, "test": test}


def list_split(root, split):
    """Return (classes, ImageFiles) of the class folders of a split: the folders' names, whole numbers as numbers."""
    folder = Path(root) / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted images as train/<class>/* and test/<class>/*")
    entries = sorted_entries(folder)
    classes = sorted((entry.name for entry in entries if entry.is_dir()), key=class_order)
    if not classes:
        raise UserError(f"{folder}: no class folders in it")
    left_out = [f"{split}/{entry.name}" for entry in entries if not entry.is_dir()]
    names, counts = [], []
    for name in classes:
        before = len(names)
        names += images_below(folder / name, f"{split}/{name}", left_out)
        counts.append(len(names) - before)
        if not counts[-1]:
            raise UserError(f"{folder / name}: no image in it ({what_is_read()})")
    if left_out:
        first = printable(", ".join(left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        print(f"note       {len(left_out)} files in {folder} are not images and are left out: {first}", flush=True)
    return classes, ImageFiles(Path(root), split, names, np.repeat(np.arange(len(classes)), counts))


def class_order(name):
    """Return the key by which class folders are sorted: whole numbers as numbers, and before other names."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def sorted_entries(folder):
    """Return the os.DirEntry of a folder, sorted by name, without hidden ones (`._0001.png` of macOS is no image)."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def images_below(folder, name, left_out, above=()) -> Iterator[str]:
    """Yield the images in a folder, in sorted order, and then those of its sub-folders, as `name`/...

    left_out: a list, to which the other files are added. above: the folders that this one is in, which a symbolic link
    in it may lead back to.
    """
    here = os.stat(folder)
    above, folders = (*above, (here.st_dev, here.st_ino)), []
    for entry in sorted_entries(folder):
        if entry.is_dir():
            folders.append(entry)
        elif os.path.splitext(entry.name)[1].lower() in suffixes() and (entry.is_file() or not exists(entry)):
            yield f"{name}/{entry.name}"
        else:
            left_out.append(f"{name}/{entry.name}")
    for entry in folders:
        stat = entry.stat()
        if (stat.st_dev, stat.st_ino) not in above:
            yield from images_below(entry.path, f"{name}/{entry.name}", left_out, above)


def exists(entry):
    return os.path.exists(entry.path)


@cache
def suffixes():
    """Return the suffixes of the image files that Pillow decodes by itself."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_DECODED)


def what_is_read():
    return "formats that Pillow reads, such as .png, .jpg, .webp, .bmp, .gif and .tif"


def list_annotated(root, classes):
    """Return the ImageFiles of Tiny ImageNet's val: images/*, with the class in the lines of val_annotations.txt."""
    path, names, labels = root / "val" / "val_annotations.txt", [], []
    print(f"note       {path} gives the classes of the test set, {root / 'val'}", flush=True)
    number = {name: label for label, name in enumerate(classes)}
    for line in read_lines(path):
        name, _, rest = line.partition("\t")
        label = number.get(rest.partition("\t")[0])
        if label is None:
            raise UserError(f"{path}: '{line}' is not a file and one of the classes of train, with a tab between them")
        names.append(f"val/images/{name}")
        labels.append(label)
    return ImageFiles(root, "val", names, np.array(labels, int))


def read_list(path, root):
    """Return the ImageFiles of a list with a line `path label` for each image; paths are relative to `root`.

    As ImageNet-LT, Places-LT and iNaturalist are published. Labels are whole numbers from 0.
    """
    names, labels = [], []
    for line in read_lines(path):
        name, label = [*line.strip().rsplit(None, 1), ""][:2]
        if not (label.isascii() and label.isdigit() and len(label) < 7):
            raise UserError(f"{path}: '{line[:200]}' is not the path of an image and its label, a whole number from 0")
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise UserError(f"{path}: no line in it")
    stem = re.sub(r"[^\w.-]", "_", Path(path).stem, flags=re.ASCII)
    return ImageFiles(Path(root), stem, names, np.array(labels))


def read_lines(path):
    """Return the lines of a text file that are not blank, with tabs between columns of a list as they are."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [line for line in text.split("\n") if line.strip()]


def classes_of_list(files, num_classes):
    """Return the names of a list's classes: those of their folders if each has one of its own, else their numbers."""
    folders = {}
    for name, label in zip(files.names, files.labels.tolist(), strict=True):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(name)))
    names = [next(iter(folders[label])) for label in sorted(folders) if len(folders[label]) == 1]
    return names if len(set(names)) == num_classes and "" not in names else [str(k) for k in range(num_classes)]


# ---------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------


def decode(files, size):
    """Return `ImageFiles` as uint8 RGB (N, size, size, 3), from a cache in their root while the files do not change."""
    lines = [f"{name} {stat[0]} {stat[1]}\n" for name, stat in zip(files.names, files.stats, strict=True)]
    listing = f"decoder {DECODER}\n{''.join(lines)}".encode(errors="surrogateescape")
    name = f".decoded-{files.split}-{size}px"
    path = files.root / f"{name}-{hashlib.sha256(listing).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # no cache, or a damaged one: it is made again
        return np.load(path, mmap_mode="r")
    images, count = np.empty((len(files.names), size, size, 3), np.uint8), len(files.names)
    with decoder(count, size) as decoded:
        bar = tqdm(decoded(files.paths), f"decoding {files.split}", count, disable=None, leave=False)
        for row, image in enumerate(bar):
            images[row] = image
    try:
        with atomic_write(path) as file:
            np.save(file, images)
        for older in set(files.root.glob(f"{name}-*")) - {path}:
            older.unlink(missing_ok=True)
    except OSError as error:
        print(f"{path}: not written ({message_of(error)}); images are decoded again next time")
    return images


@contextlib.contextmanager
def decoder(count, size):
    """Yield a function that maps `decode_file` over `count` files, on all processors if there are many files."""
    decode_one = partial(decode_file, size=size)
    if count < FILES_IN_ONE_PROCESS:
        yield partial(map, decode_one)
        return
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork"), initializer=leave_signals_to_parent)
    try:
        yield partial(pool.map, decode_one, chunksize=64)
    finally:
        pool.shutdown(cancel_futures=True)


def leave_signals_to_parent():
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def decode_file(path, size):
    """Return an image file as uint8 RGB (size, size, 3)."""
    from PIL import Image

    image = open_rgb(path)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def open_rgb(path):
    """Return an image file as a PIL image of 8-bit RGB. Levels of 16 bits are divided by 257.

    Raises UserError for a file that is not an image, and for levels of 32 bits, whose range is not known.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not is_16_bit:
                raise ValueError(f"mode {image.mode} has 32 bits a pixel, of no known range: save it with 8 or 16")
            if is_16_bit:
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({message_of(error)})") from None
