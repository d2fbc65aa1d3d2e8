"""Images as tensors on the device: sources, imbalance profiles, and shuffled batches.

The training subset is the first n_k images of class k in the order of the data set, for every seed, so that
training and validation see the same images.
"""

import dataclasses
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from image_files import classes_of_list, decode, list_folder, read_list
from utils import UserError, class_text, message_of, printable

SIZE = 32  # pixels of an image's side, unless --image_size says otherwise
WHITENED_VALUES = 3 * 64 * 64  # the covariance of so many values takes 1.2 GB
PADDING = 4  # pixels around an image before the random crop of --data_augmentation
SHUFFLE, AUGMENT = 0, 1  # purposes of the random generators of an epoch


# ---------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Arrays:
    """What a reader gives: uint8 images (N, H, W) or (N, H, W, C), or features (N, F), and labels (N,), of both splits.

    Without test images, `load_data` tests on the images that it does not train on.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray | None
    test_labels: np.ndarray | None
    class_names: list | None = None  # None: their numbers
    marks: list | None = None  # a text (N,) that identifies each training image; None: its pixels do


@dataclass(frozen=True)
class Place:
    """Where the images are, and at which size to read them. Fields are named as the flags that set them."""

    dataset: str
    data_dir: str
    download: bool = True
    train_list: str | None = None
    test_list: str | None = None
    image_size: int = SIZE


ARCHIVES = {  # data set: its class in torchvision, and the files or folders, one of which is in --data_dir
    "cifar10": ("CIFAR10", ("cifar-10-batches-py", "cifar-10-python.tar.gz")),
    "cifar100": ("CIFAR100", ("cifar-100-python", "cifar-100-python.tar.gz")),
    "mnist": ("MNIST", ("MNIST",)),
    "fashionmnist": ("FashionMNIST", ("FashionMNIST",)),
    "svhn": ("SVHN", ("train_32x32.mat",)),
}


def read_torchvision(place):
    """Read the archive of a data set of torchvision; download it if there is none."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    name, data_dir, download = place.dataset, Path(place.data_dir), place.download
    class_name, (archive, *packed) = ARCHIVES[name]
    reader, state = getattr(datasets, class_name), "absent"
    if (found := folder_of_archive(data_dir, (archive, *packed))) not in (None, data_dir):
        print(f"note       {name} is read from {found}", flush=True)
        data_dir = found
    if (data_dir / archive).exists():
        state = "damaged"
    elif found:
        (archive,) = packed
        if check_integrity(str(data_dir / archive), reader.tgz_md5):
            download = True  # which only unpacks it
        else:
            state = "incomplete or damaged"
    if download and state != "damaged" and not found:
        print(f"{name}: not found in {data_dir}, downloading", flush=True)
    parts = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
    try:
        splits = [reader(data_dir, download=download, **part) for part in parts]
    except Exception as error:  # damaged archives raise exceptions of many types
        folder = f", or images as {name}/{{train,test}}/<class>/*" if name.startswith("cifar") else ""
        state += ", and the download failed" if download and state != "damaged" else ""
        raise UserError(
            f"{name}: the archive {archive} in --data_dir {data_dir} is {state} ({message_of(error)}); put it "
            f"there{folder}, give another --data_dir, or use --dataset digits, which needs none"
        ) from None
    arrays = []
    for split in splits:
        images = np.asarray(split.data)
        arrays += [images.transpose(0, 2, 3, 1) if name == "svhn" else images]
        arrays += [np.asarray(split.labels if name == "svhn" else split.targets)]
    return Arrays(*arrays, class_names=getattr(splits[0], "classes", None))


def folder_of_archive(root, names):
    """Return the folder that holds one of the files `names`: root, the one above it if root is one of them, or one in
    it; None if there is none."""
    above = [root.parent] if root.name in names else []
    for folder in (root, *above, *sorted(root.glob("*/"))):
        if any(os.path.exists(folder / name) for name in names):
            return folder
    return None


def read_cifar(place):
    """Read the torchvision archive, else <data_dir>/<name>/{train,test}/<class>/*, else download the archive."""
    root, name = Path(place.data_dir), place.dataset
    if root.name == name and (root / "train").is_dir():  # one level too deep
        root = root.parent
    archives = ARCHIVES[name][1]
    if folder_of_archive(root, archives) == root or not (root / name).is_dir():
        return read_torchvision(dataclasses.replace(place, data_dir=root))
    if any((root / name / archive).exists() for archive in archives):
        return read_torchvision(dataclasses.replace(place, data_dir=root / name))
    return read_folder(root / name, SIZE, classes=SOURCES[name].num_classes)


def read_digits(place):
    """Return scikit-learn's built-in digits, 1,797 images of 8 x 8 pixels, for `load_data` to split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Arrays(images, digits.target, None, None)


def read_imagefolder(place):
    """Return the images of the lists, if there are any, else of the class folders."""
    if place.train_list:
        return read_lists(place)
    return read_folder(Path(place.data_dir), place.image_size)


def read_folder(root, size, classes=None):
    """Return the images of <root>/{train,test}/<class>/*. classes: how many of them there must be."""
    try:
        names, splits = list_folder(root)
        if classes not in (None, len(names)):
            raise UserError(f"{root}: {len(names)} class folders; {root.name} has {classes} classes")
        return decoded(splits["train"], splits["test"], size, list(map(printable, names)))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def read_lists(place):
    """Return the images of --train_list and --test_list."""
    train, test = (read_list(path, place.data_dir) for path in (place.train_list, place.test_list))
    num_classes = int(train.labels.max()) + 1
    if test.labels.max() >= num_classes:
        raise UserError(f"{place.test_list}: label {test.labels.max()}; {place.train_list} has {num_classes} classes")
    try:
        return decoded(train, test, place.image_size, list(map(printable, classes_of_list(train, num_classes))))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); paths in lists are relative to --data_dir"
        raise UserError(f"{error.filename}: {reason}") from None


def decoded(train, test, size, class_names):
    return Arrays(decode(train, size), train.labels, decode(test, size), test.labels, class_names, train.marks)


DAMAGED_NPZ = (OSError, EOFError, AttributeError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def read_npz(place):
    """Return train_images, train_labels, test_images and test_labels of a FILE.npz, and class_names if it has them.

    As MedMNIST is published: uint8 images (N, H, W) or (N, H, W, 3), which are resized to --image_size; or features
    (N, F), numbers of any type.
    """
    path, arrays = Path(place.dataset), []
    path = path if path.exists() else Path(place.data_dir) / path
    try:
        with np.load(path) as stored:
            for split in ("train", "test"):
                images, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
                arrays += [npz_images(images, place.image_size), npz_labels(labels, len(images))]
            names = stored.get("class_names")
    except DAMAGED_NPZ as error:
        raise UserError(
            f"{path}: not a data set ({message_of(error)}); wanted train_images, train_labels, test_images and "
            "test_labels: uint8 images (N, H, W) or (N, H, W, 3) or features (N, F), and whole numbers from 0"
        ) from None
    train_images, train_labels, test_images, test_labels = arrays
    if not len(train_labels) or train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{path}: no training images, or test images of another shape than them")
    num_classes = int(train_labels.max()) + 1
    if len(test_labels) and test_labels.max() >= num_classes:
        raise UserError(f"{path}: test_labels has label {test_labels.max()}, train_labels {num_classes} classes")
    if names is not None and names.shape != (num_classes,):
        raise UserError(f"{path}: class_names has the shape {names.shape}, for {num_classes} classes")
    return Arrays(*arrays, class_names=None if names is None else [printable(str(name)) for name in names])


def npz_images(images, size):
    """Return images as uint8 RGB (N, size, size, 3), or features (N, F) as float64; ValueError for anything else."""
    if images.ndim == 2:
        features = images.astype(np.float64)
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite")
        return features
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not all(images.shape[1:3]):
        raise ValueError(f"images of type {images.dtype} and shape {images.shape}")
    parts = []
    for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(1_000):
        if part.shape[2:] != (size, size):
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        parts.append(part.expand(-1, 3, -1, -1).permute(0, 2, 3, 1))
    return torch.cat(parts).numpy() if parts else np.zeros((0, size, size, 3), np.uint8)


def npz_labels(labels, count):
    """Return labels (N,) or (N, 1) as (N,); ValueError unless they are `count` whole numbers from 0."""
    if labels.size != count or labels.shape[0] != count or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise ValueError(f"labels of type {labels.dtype} and shape {labels.shape} for {count} images")
    return labels.reshape(count).astype(np.int64)


@dataclass(frozen=True)
class Source:
    """A data set: the function that reads it, and its fixed properties.

    mean and std normalise each channel of values in [0, 1]. They are the customary constants: mean and standard
    deviation of all pixels of the training set. cifar10 is an exception, here as in most code for it: its std is the
    mean of the images' own standard deviations; that of all pixels is (0.2470, 0.2435, 0.2616). Those of digits are of
    all its images, to three digits.
    """

    read: Callable  # of a `Place`; returns `Arrays`
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
NPZ = Source(read_npz, None, None, None, None)


def source_of(dataset):
    """Return the `Source` of a --dataset: one of SOURCES, or a FILE.npz."""
    return NPZ if dataset.endswith(".npz") else SOURCES[dataset]


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
    """Images (N, 3, S, S), or features (N, F), and labels (N,) int64, on one device.

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
        """All images, normalised: (N, 3, S, S) float32."""
        return self.normalise(self.pixels)

    def normalise(self, pixels):
        """Return pixels (B, 3, S, S) of the split as normalised float32, in their memory format."""
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = self.mean.view(3, 1, 1), self.std.view(3, 1, 1)
        return pixels.float().div_(255).sub_(mean).div_(std)

    def batch(self, indices, shifts=None):
        """Return images (B, 3, S, S), in the memory format of the split, and labels (B,) at `indices` (B,).

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
        memory_format = memory_format if self.pixels.ndim == 4 else torch.contiguous_format
        pixels = self.pixels.to(device).contiguous(memory_format=memory_format)
        others = (self.labels, self.black, self.mean, self.std)
        return Split(pixels, *(None if other is None else other.to(device) for other in others))


@dataclass
class Data:
    """An imbalanced training set, its test set, and the number of training images of each class (K,).

    class_names: (K,). class_images: for each class, a hash of its training images (K,). None: not known.
    """

    train: Split
    test: Split
    class_counts: list
    class_names: list | None = None
    class_images: list | None = None

    @property
    def num_classes(self):
        return len(self.class_counts)

    @property
    def shape(self):
        """Of an image, (3, S, S), or of features, (F,)."""
        return tuple(self.train.pixels.shape[1:])

    def to(self, device, memory_format=torch.contiguous_format):
        train, test = self.train.to(device, memory_format), self.test.to(device, memory_format)
        return dataclasses.replace(self, train=train, test=test)


def load_data(
    dataset,
    data_dir,
    *,
    imbalance=None,
    n_max=None,
    class_counts=None,
    download=True,
    train_list=None,
    test_list=None,
    image_size=SIZE,
):
    """Return the `Data` of a data set, with the first n_k images of each class as the training set.

    The tensors are on the CPU. Raises UserError if files are missing or damaged, or a class has too few images.
    """
    source = source_of(dataset)
    arrays = source.read(Place(dataset, data_dir, download, train_list, test_list, image_size))
    labels, test_images, test_labels = arrays.train_labels, arrays.test_images, arrays.test_labels
    num_classes = source.num_classes or int(labels.max()) + 1
    names = arrays.class_names or [str(label) for label in range(num_classes)]
    available = np.bincount(labels, minlength=num_classes).tolist()
    if class_counts:
        counts = list(class_counts)
    elif imbalance in (None, "paper") and source.paper_counts:
        counts = list(source.paper_counts)
    else:
        counts = profile_counts(imbalance or "all", available, n_max)
    if len(counts) != num_classes:
        where = dataset if source is NPZ else data_dir
        raise UserError(f"--class_counts: {where} has {num_classes} classes, {len(counts)} counts were given")
    for label, (wanted, there) in enumerate(zip(counts, available, strict=True)):
        if not there:
            raise UserError(f"{dataset}: {class_text(label, names)} has no training images")
        if wanted < 1:
            raise UserError(f"--imbalance {imbalance} leaves class {label} without training images; raise --n_max")
        if wanted > there:
            raise UserError(f"{dataset}: {class_text(label, names)} has {there} training images, {wanted} are wanted")

    rows = class_rows(labels, counts)
    chosen = np.sort(np.concatenate(rows))  # in the order of the data set
    if test_images is None:
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        test_images, test_labels = arrays.train_images[rest], labels[rest]
    statistics = channel_statistics if arrays.train_images.ndim > 2 else feature_statistics
    mean, std = (source.mean, source.std) if source.mean else statistics(arrays.train_images)
    note_equal_images(arrays.train_images, rows, names)
    return Data(
        to_split(arrays.train_images[chosen], labels[chosen], mean, std, image_size),
        to_split(test_images, test_labels, mean, std, image_size),
        counts,
        names,
        [class_hash(arrays, of_class) for of_class in rows],
    )


def whiten(data, eps):
    """Return `data` with images whitened by ZCA: P (x - m), P = (C + eps v I)^(-1/2), in float32.

    m (D,) and C (D, D): mean and covariance of the training images x, flattened to D values. v: the mean of the
    eigenvalues of C. P is scaled such that the training images have a mean square of 1 (Krizhevsky, 2009, appendix A).
    Raises UserError if D is above WHITENED_VALUES.
    """
    if (values := data.train.pixels[0].numel()) > WHITENED_VALUES:
        raise UserError(f"--whiten: images of {values} values, more than {WHITENED_VALUES}: lower --image_size")
    images = data.train.images.flatten(1)
    mean = images.mean(0)
    centred = images - mean
    covariance = sum(part.T @ part for part in (part.double() for part in centred.split(4096))) / len(images)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp_(min=0)
    shrunk = variances + eps * variances.mean()
    scale = (len(variances) / (variances / shrunk).sum()).sqrt()
    matrix = ((directions * (scale * shrunk.rsqrt())) @ directions.T).float()

    def whitened(split, centred):
        return Split((centred @ matrix).view(split.pixels.shape), split.labels, split.black)

    test = whitened(data.test, data.test.images.flatten(1) - mean)
    return dataclasses.replace(data, train=whitened(data.train, centred), test=test)


def class_rows(labels, counts):
    """Return, for each class k, the indices of its first counts[k] samples, in the order of the data set."""
    return [np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]


def class_hash(arrays, rows):
    """Return a hash of the training images in `rows`: of their marks if they have some, else of their pixels."""
    if arrays.marks:
        content = "\n".join(arrays.marks[row] for row in rows).encode(errors="surrogateescape")
    else:
        content = np.ascontiguousarray(arrays.train_images[rows])
    return hashlib.blake2b(content, digest_size=6).hexdigest()


def note_equal_images(images, rows, names):
    """Print the classes all of whose training images are equal: something is likely to be wrong with them.

    rows: for each class, the indices of its training images.
    """
    for label, of_class in enumerate(rows):
        first = images[of_class[0]]
        if len(of_class) > 1 and all(np.array_equal(images[row], first) for row in of_class[1:]):
            print(f"note       all {len(of_class)} training images of {class_text(label, names)} are equal", flush=True)


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


def feature_statistics(features):
    """Return the mean (F,) and standard deviation (F,) of features (N, F); the deviation of a constant one is 1."""
    std = features.std(0)
    return features.mean(0), np.where(std > 0, std, 1.0)


def to_split(images, labels, mean, std, size=SIZE):
    """Return uint8 images (N, H, W) or (N, H, W, C), C = 1 or 3, or features (N, F), as a Split.

    Images of size x size pixels with three channels stay uint8; others become so large, and are normalised.
    """
    labels = torch.from_numpy(labels.astype(np.int64))
    if images.ndim == 2:
        return Split(torch.from_numpy(((images - mean) / std).astype(np.float32)), labels, torch.zeros(3))
    if images.ndim == 3:
        images = images[..., None]
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    mean, std = torch.tensor(mean), torch.tensor(std)
    black = (-mean / std).expand(3).contiguous()
    if pixels.shape[1:] == (3, size, size):
        return Split(pixels, labels, black, mean, std)
    pixels = pixels.float().div_(255)
    if len(pixels):
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
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
    """Crop images (B, 3, S, S), padded with black, at shifts (B, 3), and mirror those whose flip is 1."""
    size = images.shape[-1]
    side = torch.arange(size, device=images.device)
    top, left, flip = shifts.split(1, dim=1)
    rows = top + side
    columns = left + torch.where(flip.bool(), size - 1 - side, side)
    padded = F.pad(images - black.view(3, 1, 1), [PADDING] * 4).permute(0, 2, 3, 1)
    sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    crops = padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) + black.view(3, 1, 1)
    return crops if not images.is_contiguous() else crops.contiguous()
