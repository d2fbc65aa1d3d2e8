"""Images as tensors on the device: sources, imbalance profiles, and shuffled batches.

The training subset is the first n_k images of class k in the order of the data set, for every seed, so that
training and validation see the same images.
"""

import contextlib
import hashlib
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from utils import UserError, atomic_write, message_of

SIZE = 32  # pixels of an image's side
PADDING = 4  # pixels around an image before the random crop of --data_augmentation
FILES_IN_ONE_PROCESS = 5_000  # more image files than that are decoded by several processes
SHUFFLE, AUGMENT = 0, 1  # purposes of the random generators of an epoch


# ---------------------------------------------------------------------------------------------------------
# Sources: each reader gives uint8 images (N, H, W) or (N, H, W, C) and labels (N,), for training and test
# ---------------------------------------------------------------------------------------------------------


def read_torchvision(name, data_dir, download):
    from torchvision import datasets

    reader, archive = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
        "mnist": (datasets.MNIST, "MNIST"),
        "fashionmnist": (datasets.FashionMNIST, "FashionMNIST"),
        "svhn": (datasets.SVHN, "train_32x32.mat"),
    }[name]
    parts = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
    present = (Path(data_dir) / archive).exists()
    if not present and download:
        print(f"{name}: not found in {data_dir}, downloading", flush=True)
    try:
        splits = [reader(data_dir, download=download, **part) for part in parts]
    except Exception as error:  # damaged archives raise exceptions of many types
        folder = f", or images as {name}/{{train,test}}/<class>/*" if name.startswith("cifar") else ""
        state = "damaged" if present else "absent" if not download else "absent, and the download failed"
        raise UserError(
            f"{name}: the archive {archive} in --data_dir {data_dir} is {state} ({message_of(error)}); put it "
            f"there{folder}, give another --data_dir, or use --dataset digits, which needs none"
        ) from None
    arrays = []
    for split in splits:
        images = np.asarray(split.data)
        arrays += [images.transpose(0, 2, 3, 1) if name == "svhn" else images]
        arrays += [np.asarray(split.labels if name == "svhn" else split.targets)]
    return arrays


def read_cifar(name, data_dir, download):
    """Read the torchvision archive, else <data_dir>/<name>/{train,test}/<class>/*, else download the archive."""
    root = Path(data_dir)
    if root.name == name and (root / "train").is_dir():  # one level too deep
        root = root.parent
    archives = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    }[name]
    if not any((root / archive).exists() for archive in archives) and (root / name).is_dir():
        return read_folder(root / name)
    return read_torchvision(name, root, download)


def read_digits(name, data_dir, download):
    """Return scikit-learn's built-in digits, 1,797 images of 8 x 8 pixels, for `load_data` to split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target, None, None  # load_data tests on the images that it does not train on


def read_imagefolder(name, data_dir, download):
    return read_folder(Path(data_dir))


def read_folder(root):
    """Return the images of <root>/{train,test}/<class>/*, classes and files in sorted order."""
    try:
        _, splits = list_folder(root)
        (train_files, train_labels), (test_files, test_labels) = splits["train"], splits["test"]
        return decode(root, "train", train_files), train_labels, decode(root, "test", test_files), test_labels
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def list_folder(root):
    """Return (classes, {split: (files (N,), labels (N,))}) of <root>/{train,test}/<class>/*.

    Raises UserError for classes that differ between the splits, or fewer than two.
    """
    train_classes, *train = list_split(root / "train")
    test_classes, *test = list_split(root / "test")
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))[0]
        raise UserError(f"{root}: train and test have different classes; {odd!r} is in only one of them")
    if len(train_classes) < 2:
        raise UserError(f"{root}/train: one class only; a classifier needs two or more")
    return train_classes, {"train": train, "test": test}


def list_split(folder):
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted images as train/<class>/*.png|jpg and test/<class>/*")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it")
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = sorted(
            path for path in (folder / name).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        )
        if not of_class:
            raise UserError(f"{folder / name}: no .png or .jpg file in it")
        files += of_class
        labels += [label] * len(of_class)
    return classes, files, np.array(labels)


def decode(root, split, files):
    """Return image files as uint8 RGB (N, 32, 32, 3), from a cache beside them as long as the files do not change."""
    listing = "".join(f"{path.relative_to(root)} {(s := path.stat()).st_size} {s.st_mtime_ns}\n" for path in files)
    name = f".decoded-{split}-{SIZE}px"
    cache = root / f"{name}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # no cache, or a damaged one: it is made again
        return np.load(cache, mmap_mode="r")
    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    with decoder(len(files)) as decoded:
        for row, image in enumerate(tqdm(decoded(files), f"decoding {split}", len(files), disable=None, leave=False)):
            images[row] = image
    try:
        with atomic_write(cache) as file:
            np.save(file, images)
        for older in set(root.glob(f"{name}*")) - {cache}:
            older.unlink(missing_ok=True)
    except OSError as error:
        print(f"{cache}: not written ({message_of(error)}); images are decoded again next time")
    return images


@contextlib.contextmanager
def decoder(count):
    """Yield a function that maps `decode_file` over `count` files, on all processors if there are many files."""
    if count < FILES_IN_ONE_PROCESS:
        yield partial(map, decode_file)
        return
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork"), initializer=leave_signals_to_parent)
    try:
        yield partial(pool.map, decode_file, chunksize=64)
    finally:
        pool.shutdown(cancel_futures=True)


def leave_signals_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def decode_file(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({message_of(error)})") from None


@dataclass(frozen=True)
class Source:
    """A data set: the function that reads it, and its fixed properties.

    mean and std normalise each channel of values in [0, 1]. They are the customary constants: mean and standard
    deviation of all pixels of the training set. cifar10 is an exception, here as in most code for it: its std is the
    mean of the images' own standard deviations; that of all pixels is (0.2470, 0.2435, 0.2616). Those of digits are of
    all its images, to three digits.
    """

    read: Callable
    num_classes: int | None  # None: the images decide it
    paper_counts: tuple | None  # training images per class in the paper; None: it has no such data set
    mean: tuple | None  # None: mean and std are those of all pixels of the training images, computed when they are read
    std: tuple | None


SMALL = tuple(n for n in (100, 200, 300, 400, 500) for _ in range(2))
SOURCES = {
    "cifar10": Source(read_cifar, 10, tuple(10 * n for n in SMALL), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Source(
        read_cifar,
        100,
        tuple(n for n in (100, 200, 300, 400, 500) for _ in range(20)),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "mnist": Source(read_torchvision, 10, SMALL, (0.1307,), (0.3081,)),
    "fashionmnist": Source(read_torchvision, 10, SMALL, (0.2860,), (0.3530,)),
    "svhn": Source(read_torchvision, 10, SMALL, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "digits": Source(read_digits, 10, tuple(34 * n // 100 for n in SMALL), (0.3053,), (0.3761,)),
    "imagefolder": Source(read_imagefolder, None, None, None, None),
}


# ---------------------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------------------


def profile_counts(profile, available, n_max=None):
    """Return the number of training images of each class, n_k, for an imbalance profile.

    profile: "all", "balanced", "exp:R" or "step:R", R = n_max/n_min, as in LDAM (Cao et al., 2019, section 4). Class 0
        is the largest. exp: n_k = n_max R^(-k/(K-1)). step: n_k = n_max/R for the second half of the classes.
    available: the number of images that each class has, (K,).
    n_max: images of the largest class; by default the most for which every class has enough images.
    """
    num_classes = len(available)
    kind, _, ratio = profile.partition(":")
    if kind == "all":
        return list(available)
    if kind == "balanced":
        return [n_max or min(available)] * num_classes
    ratio = float(ratio)
    if kind == "exp":
        powers = [k / (num_classes - 1) for k in range(num_classes)]
    else:
        powers = [0.0] * (num_classes // 2) + [1.0] * (num_classes - num_classes // 2)
    n_max = n_max or int(min(count * ratio**power for count, power in zip(available, powers, strict=True)) + 1e-9)
    return [int(n_max * ratio**-power + 1e-9) for power in powers]  # 1e-9: 500 / 10 is 50, not 49.999...


# ---------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Images (N, 3, 32, 32) and labels (N,) int64, on one device.

    pixels: uint8, which is normalised batch by batch and takes a quarter of the memory; or float32, normalised.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    black: torch.Tensor  # (3,): the value of a black pixel after normalisation
    mean: torch.Tensor | None = None  # (3,) channel means of uint8 pixels, in [0, 1]
    std: torch.Tensor | None = None  # (3,)

    def __len__(self):
        return len(self.labels)

    @property
    def images(self):
        """All images, normalised: (N, 3, 32, 32) float32."""
        return self.normalise(self.pixels)

    def normalise(self, pixels):
        """Return pixels (B, 3, 32, 32) of the split as normalised float32, in their memory format."""
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = self.mean.view(3, 1, 1), self.std.view(3, 1, 1)
        return pixels.float().div_(255).sub_(mean).div_(std)

    def batch(self, indices, shifts=None):
        """Return images (B, 3, 32, 32), in the memory format of the split, and labels (B,) at `indices` (B,).

        shifts: `random_shifts` (N, 3) of the whole split by which images are cropped and mirrored, or None.
        """
        if self.pixels.is_contiguous():
            pixels = self.pixels.index_select(0, indices)
        else:  # channels last: selecting is fastest where the channels are the last dimension
            pixels = self.pixels.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        images = self.normalise(pixels)
        if shifts is not None:
            images = crop_and_flip(images, shifts.index_select(0, indices), self.black)
        return images, self.labels.index_select(0, indices)

    def to(self, device, memory_format=torch.contiguous_format):
        pixels = self.pixels.to(device).contiguous(memory_format=memory_format)
        others = (self.labels, self.black, self.mean, self.std)
        return Split(pixels, *(None if other is None else other.to(device) for other in others))


@dataclass
class Data:
    """An imbalanced training set, its test set, and the number of training images of each class (K,)."""

    train: Split
    test: Split
    class_counts: list

    @property
    def num_classes(self):
        return len(self.class_counts)

    def to(self, device, memory_format=torch.contiguous_format):
        return Data(self.train.to(device, memory_format), self.test.to(device, memory_format), self.class_counts)


def load_data(dataset, data_dir, *, imbalance=None, n_max=None, class_counts=None, download=True):
    """Return the `Data` of a data set, with the first n_k images of each class as the training set.

    The tensors are on the CPU. Raises UserError if files are missing or damaged, or a class has too few images.
    """
    source = SOURCES[dataset]
    train_images, train_labels, test_images, test_labels = source.read(dataset, data_dir, download)
    num_classes = source.num_classes or int(train_labels.max()) + 1
    available = np.bincount(train_labels, minlength=num_classes).tolist()
    if class_counts:
        counts = list(class_counts)
    elif imbalance in (None, "paper") and source.paper_counts:
        counts = list(source.paper_counts)
    else:
        counts = profile_counts(imbalance or "all", available, n_max)
    if len(counts) != num_classes:
        raise UserError(f"--class_counts: {data_dir} has {num_classes} classes, {len(counts)} counts were given")
    for label, (wanted, there) in enumerate(zip(counts, available, strict=True)):
        if wanted < 1:
            raise UserError(f"--imbalance {imbalance} leaves class {label} without training images; raise --n_max")
        if wanted > there:
            raise UserError(f"{dataset}: class {label} has {there} training images, {wanted} are wanted")

    chosen = first_of_each(train_labels, counts)
    if test_images is None:
        rest = np.setdiff1d(np.arange(len(train_labels)), chosen)
        test_images, test_labels = train_images[rest], train_labels[rest]
    mean, std = (source.mean, source.std) if source.mean else channel_statistics(train_images)
    return Data(
        to_split(train_images[chosen], train_labels[chosen], mean, std),
        to_split(test_images, test_labels, mean, std),
        counts,
    )


def whiten(data, eps):
    """Return `data` with images whitened by ZCA: P (x - m), P = (C + eps v I)^(-1/2), in float32.

    m (D,) and C (D, D): mean and covariance of the training images x, flattened to D = 3072 values. v: the mean of the
    eigenvalues of C. P is scaled such that the training images have a mean square of 1 (Krizhevsky, 2009, appendix A).
    """
    images = data.train.images.flatten(1)
    mean = images.mean(0)
    centred = images - mean
    covariance = sum(part.T @ part for part in (part.double() for part in centred.split(4096))) / len(images)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp_(min=0)
    shrunk = variances + eps * variances.mean()
    scale = (len(variances) / (variances / shrunk).sum()).sqrt()
    matrix = ((directions * (scale * shrunk.rsqrt())) @ directions.T).float()

    def whitened(split):
        pixels = (split.images.flatten(1) - mean) @ matrix
        return Split(pixels.view(split.pixels.shape), split.labels, split.black)

    return Data(whitened(data.train), whitened(data.test), data.class_counts)


def first_of_each(labels, counts):
    """Return the indices of the first counts[k] samples of each class k, in the order of the data set."""
    chosen = [np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(chosen))


def channel_statistics(images):
    """Return the mean and standard deviation of each channel, in [0, 1], of uint8 images (N, H, W) or (N, H, W, C)."""
    images = images[..., None] if images.ndim == 3 else images
    levels = np.arange(256) / 255
    mean, std = [], []
    parts = np.array_split(images, -(-len(images) // 10_000))  # np.bincount copies its input as int64
    for channel in range(images.shape[-1]):
        counts = sum(np.bincount(part[..., channel].ravel(), minlength=256) for part in parts)
        share = counts / counts.sum()
        mean.append(float(share @ levels))
        std.append(max(float(np.sqrt(share @ (levels - mean[-1]) ** 2)), 1 / 255))
    return mean, std


def to_split(images, labels, mean, std):
    """Return uint8 images (N, H, W) or (N, H, W, C), C = 1 or 3, as a Split; images of 32 x 32 RGB stay uint8."""
    if images.ndim == 3:
        images = images[..., None]
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    labels, mean, std = torch.from_numpy(labels.astype(np.int64)), torch.tensor(mean), torch.tensor(std)
    black = (-mean / std).expand(3).contiguous()
    if pixels.shape[1:] == (3, SIZE, SIZE):
        return Split(pixels, labels, black, mean, std)
    pixels = pixels.float().div_(255)
    if len(pixels):
        pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    pixels = pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    return Split(pixels.expand(-1, 3, -1, -1).contiguous(), labels, black)


# ---------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------


def epoch_generator(seed, epoch, purpose):
    """Return a CPU generator that depends on the arguments alone, so that a resumed run draws the same numbers."""
    words = np.random.SeedSequence([seed, epoch, purpose]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def epoch_order(count, *, epoch, seed, shuffle=True, labels=None):
    """Return the order (N,) in which an epoch takes the samples, on the CPU.

    It depends on (seed, epoch) alone: it is the same on every device, and in a run that was resumed. With labels (N,)
    on the CPU, it is stratified: each class is spread evenly over the epoch, so that every batch has its share of it.
    """
    if not shuffle:
        return torch.arange(count)
    generator = epoch_generator(seed, epoch, SHUFFLE)
    order = torch.randperm(count, generator=generator)
    if labels is None:
        return order
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.arange(count) - (counts.cumsum(0) - counts)[labels[by_class]]
    offset = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    place = (rank + offset[labels[by_class]]) / counts[labels[by_class]]
    return by_class[place.argsort()]


def epoch_batches(order, batch_size, *, even=False):
    """Split an epoch's order (N,) into ceil(N / batch_size) batches; the last one holds the remainder.

    even: make their sizes differ by at most one. The gradient of a small last batch is noisy.
    """
    if even:
        return order.tensor_split(-(-len(order) // batch_size))
    return order.split(batch_size)


def random_shifts(count, *, epoch, seed):
    """Return random (top, left, flip) of crops (N, 3), in 0..2*PADDING and 0..1, from seed and epoch alone."""
    high = torch.tensor([2 * PADDING + 1, 2 * PADDING + 1, 2])
    return (torch.rand(count, 3, generator=epoch_generator(seed, epoch, AUGMENT)) * high).long()


def crop_and_flip(images, shifts, black):
    """Crop images (B, 3, 32, 32), padded with black, at shifts (B, 3), and mirror those whose flip is 1."""
    side = torch.arange(SIZE, device=images.device)
    top, left, flip = shifts.split(1, dim=1)
    rows = top + side
    columns = left + torch.where(flip.bool(), SIZE - 1 - side, side)
    padded = F.pad(images - black.view(3, 1, 1), [PADDING] * 4).permute(0, 2, 3, 1)
    sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    crops = padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) + black.view(3, 1, 1)
    return crops if not images.is_contiguous() else crops.contiguous()
