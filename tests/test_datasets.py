"""Sources in their real archive formats, the subset, profiles, and batches."""

import gzip
import hashlib
import math
import os
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest
import scipy.io
import scipy.linalg
import torch
from PIL import Image

import datasets
import image_files
from datasets import Split, crop_and_flip, epoch_batches, epoch_order, load_data, profile_counts, random_shifts, whiten
from tests.conftest import write_folder
from utils import UserError

COUNTS = [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 4))  # 4 of each class, in random order


def pictures(shape):
    return np.random.default_rng(1).integers(0, 256, (len(LABELS), *shape), dtype=np.uint8)


def expected_subset(images, labels, counts):
    """The first n_k images of each class in the order of the data set, by a loop."""
    seen, rows = [0] * len(counts), []
    for row, label in enumerate(labels):
        if seen[label] < counts[label]:
            seen[label] += 1
            rows.append(row)
    return images[rows], labels[rows]


def check_normalised(split, images, labels, mean, std):
    """32 x 32 pictures (N, 32, 32, 3) against a split, to rounding."""
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(split.images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    np.testing.assert_array_equal(split.labels.numpy(), labels)


# ---------------------------------------------------------------------------------------------------------
# torchvision's archives
# ---------------------------------------------------------------------------------------------------------


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10_archive(tmp_path, monkeypatch):
    """The python version of CIFAR-10: five pickles of training batches, here with 8 images each."""
    from torchvision.datasets import CIFAR10

    images, folder = pictures((32, 32, 3)), tmp_path / "cifar-10-batches-py"
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    checksums = []
    for part in range(5):
        own = slice(8 * part, 8 * part + 8)
        value = {"data": rows[own], "labels": LABELS[own].tolist()}
        checksums.append([f"data_batch_{part + 1}", write_pickle(folder / f"data_batch_{part + 1}", value)])
    test = [["test_batch", write_pickle(folder / "test_batch", {"data": rows[:5], "labels": LABELS[:5].tolist()})]]
    names = write_pickle(folder / "batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", checksums)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names})
    return tmp_path, images


def test_cifar10_archive(cifar10_archive):
    folder, images = cifar10_archive
    data = load_data("cifar10", folder, class_counts=COUNTS, download=False)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    check_normalised(data.train, *expected_subset(images, LABELS, COUNTS), mean, std)
    check_normalised(data.test, images[:5], LABELS[:5], mean, std)
    assert data.class_counts == COUNTS and data.num_classes == 10


def test_archive_goes_before_the_image_folder(cifar10_archive):
    folder, _ = cifar10_archive
    (folder / "cifar10").mkdir()
    assert len(load_data("cifar10", folder, class_counts=COUNTS, download=False).train) == sum(COUNTS)


def test_cifar10_packed_archive(cifar10_archive, monkeypatch):
    """cifar-10-python.tar.gz alone: torchvision unpacks it, without a network."""
    from torchvision.datasets import CIFAR10

    folder, images = cifar10_archive
    packed = folder / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    (folder / "cifar-10-batches-py").rename(folder / "away")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    data = load_data("cifar10", folder, class_counts=COUNTS)
    assert data.train.labels.tolist() == expected_subset(images, LABELS, COUNTS)[1].tolist()


def test_damaged_archive_is_named(cifar10_archive):
    folder, _ = cifar10_archive
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"cifar-10-batches-py in --data_dir .* is damaged"):
        load_data("cifar10", folder, class_counts=COUNTS, download=False)


def test_cifar100_archive(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    labels = np.arange(100).repeat(2)
    images = np.random.default_rng(2).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    value = {"data": images.transpose(0, 3, 1, 2).reshape(200, -1), "fine_labels": labels.tolist()}
    folder = tmp_path / "cifar-100-python"
    monkeypatch.setattr(CIFAR100, "train_list", [["train", write_pickle(folder / "train", value)]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write_pickle(folder / "test", value)]])
    meta = write_pickle(folder / "meta", {"fine_label_names": [str(label) for label in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta})
    data = load_data("cifar100", tmp_path, class_counts=[2] * 50 + [1] * 50, download=False)
    assert data.num_classes == 100
    check_normalised(
        data.train,
        *expected_subset(images, labels, data.class_counts),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    )


@pytest.mark.parametrize(
    "name, folder, mean, std", [("mnist", "MNIST", 0.1307, 0.3081), ("fashionmnist", "FashionMNIST", 0.2860, 0.3530)]
)
def test_idx_archives(tmp_path, name, folder, mean, std):
    """MNIST's idx files: a header of big-endian integers, then bytes."""
    images, raw = pictures((28, 28)), tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">IIII", 0x00000803, len(images), 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x00000801, len(images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + LABELS.astype(np.uint8).tobytes())
    data = load_data(name, tmp_path, class_counts=COUNTS, download=False)
    chosen, labels = expected_subset(images, LABELS, COUNTS)
    assert data.train.labels.tolist() == labels.tolist()
    assert data.train.images.shape == (sum(COUNTS), 3, 32, 32)
    red, green, blue = data.train.images.unbind(1)
    assert torch.equal(red, green) and torch.equal(red, blue)
    # a resized pixel away from the border, by hand: the centre of pixel 16 lies at 16.5 * 28/32 - 0.5 = 13.9375
    x = chosen[0].astype(float)
    rows = x[13] * 0.0625 + x[14] * 0.9375
    value = rows[13] * 0.0625 + rows[14] * 0.9375
    assert red[0, 16, 16].item() == pytest.approx((value / 255 - mean) / std, abs=1e-5)


def test_packed_idx_files_need_no_network(tmp_path, monkeypatch):
    """The distributed .gz files, put in place by hand, are unpacked."""
    from torchvision.datasets import MNIST

    images, raw = pictures((28, 28)), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for split in ("train", "t10k"):
        for kind, magic, shape, values in (
            ("images-idx3", 0x803, (28, 28), images),
            ("labels-idx1", 0x801, (), LABELS.astype(np.uint8)),
        ):
            path = raw / f"{split}-{kind}-ubyte.gz"
            header = struct.pack(f">{2 + len(shape)}I", magic, len(images), *shape)
            path.write_bytes(gzip.compress(header + values.tobytes()))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(load_data("mnist", tmp_path, class_counts=COUNTS).train) == sum(COUNTS)


def test_svhn_archive(tmp_path, monkeypatch):
    """MATLAB files, images (32, 32, 3, N), labels 1..10 with 10 for zero."""
    from torchvision.datasets import SVHN

    images = pictures((32, 32, 3))
    labels = np.where(LABELS == 0, 10, LABELS)[:, None]
    entries = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels})
        entries[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", entries)
    data = load_data("svhn", tmp_path, class_counts=COUNTS, download=False)
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    check_normalised(data.train, *expected_subset(images, LABELS, COUNTS), mean, std)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn"])
def test_absent_archive_says_what_to_do(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: .* is absent .*give another --data_dir, or use --dataset digits"):
        load_data(name, tmp_path, download=False)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
def test_no_network_for_a_download(tmp_path, monkeypatch, name):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no server
    with pytest.raises(UserError, match=rf"{name}: .* is absent, and the download failed"):
        load_data(name, tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\0\0\x09\3" + b"\0" * 20, b"\0\0\x08\3\0\0\0\x28" + b"\0" * 60])
def test_damaged_idx_files_are_named(tmp_path, content):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=r"mnist: the archive MNIST in --data_dir .* is damaged"):
        load_data("mnist", tmp_path, download=False)


# ---------------------------------------------------------------------------------------------------------
# Image folders and digits
# ---------------------------------------------------------------------------------------------------------


def test_imagefolder(tmp_path):
    written = write_folder(tmp_path)
    data = load_data("imagefolder", tmp_path, class_counts=[1, 4, 2])
    chosen = [written["train", name, i] for name, n in (("ant", 1), ("bee", 4), ("cow", 2)) for i in range(n)]
    whole = np.stack([pixels for (split, _, _), pixels in written.items() if split == "train"]) / 255
    check_normalised(data.train, np.stack(chosen), [0, 1, 1, 1, 1, 2, 2], whole.mean((0, 1, 2)), whole.std((0, 1, 2)))
    assert len(data.test) == 6


def test_the_constants_of_digits_are_those_of_its_pixels():
    """Those of a data set without constants are computed from its grey images in the same way."""
    source = datasets.SOURCES["digits"]
    mean, std = datasets.channel_statistics(source.read(datasets.Place("digits", "unused")).train_images)
    assert mean == pytest.approx(source.mean, abs=3e-4) and std == pytest.approx(source.std, abs=3e-4)


def test_imagefolder_takes_all_by_default_and_resizes(tmp_path):
    write_folder(tmp_path, size=(20, 50), suffix="jpg")
    data = load_data("imagefolder", tmp_path)
    assert data.class_counts == [4, 4, 4] and data.train.images.shape == (12, 3, 32, 32)


def test_the_folder_of_cifar10_itself_is_recognised(tmp_path):
    write_folder(tmp_path / "cifar10", classes=[f"class {label}" for label in range(10)])
    for folder in (tmp_path, tmp_path / "cifar10"):
        assert len(load_data("cifar10", folder, class_counts=[4] * 10).train) == 40


def test_decoded_cache_is_used_and_renewed(tmp_path, monkeypatch):
    write_folder(tmp_path)
    first = load_data("imagefolder", tmp_path)
    real = image_files.decode_file
    monkeypatch.setattr(image_files, "decode_file", lambda path, size: pytest.fail(f"{path} was decoded again"))
    again = load_data("imagefolder", tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    monkeypatch.setattr(image_files, "decode_file", real)
    changed = tmp_path / "train" / "ant" / "0000.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert not torch.equal(load_data("imagefolder", tmp_path).train.images, first.train.images)
    for cache in tmp_path.glob(".decoded-*"):
        cache.write_bytes(cache.read_bytes()[:100])  # a damaged cache is made again
    load_data("imagefolder", tmp_path)


def test_many_files_are_decoded_by_several_processes(tmp_path, monkeypatch):
    write_folder(tmp_path)
    expected = load_data("imagefolder", tmp_path)
    for cache in tmp_path.glob(".decoded-*"):
        cache.unlink()
    monkeypatch.setattr(image_files, "FILES_IN_ONE_PROCESS", 2)
    assert torch.equal(load_data("imagefolder", tmp_path).train.pixels, expected.train.pixels)
    (tmp_path / "train" / "ant" / "0002.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0002.png: not a readable image"):
        load_data("imagefolder", tmp_path)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_normalised_in_the_batch_to_the_last_bit(tmp_path, memory_format):
    """As if all images were normalised at once in fp32: (images / 255 - mean) / std."""
    write_folder(tmp_path)
    split = load_data("imagefolder", tmp_path).train.to("cpu", memory_format)
    assert split.pixels.dtype == torch.uint8
    mean, std = split.mean.view(3, 1, 1), split.std.view(3, 1, 1)
    rows = torch.tensor([3, 0, 7])
    expected = ((split.pixels.float() / 255 - mean) / std)[rows]
    images, labels = split.batch(rows)
    assert torch.equal(images, expected) and torch.equal(labels, split.labels[rows])
    assert images.is_contiguous(memory_format=memory_format)


def test_cifar10_image_folder(tmp_path):
    write_folder(tmp_path / "cifar10", classes=[f"class{k}" for k in range(10)])
    data = load_data("cifar10", tmp_path, class_counts=COUNTS, download=False)
    assert data.class_counts == COUNTS and len(data.test) == 20
    assert data.train.black.tolist() == pytest.approx([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "test").rename(root / "away"), "test: no such folder"),
        (lambda root: [path.unlink() for path in (root / "train" / "bee").iterdir()], "bee: no image in it"),
        (lambda root: (root / "test" / "cow").rename(root / "test" / "dog"), "train and test have different classes"),
        (lambda root: (root / "train" / "ant" / "0001.png").write_bytes(b"junk"), "0001.png: not a readable image"),
        (lambda root: [(root / s).rename(root / s[:2]) for s in ("train", "test")], "train: no such folder"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train: no class folders in it"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in ("ant", "bee")], "have different classes"),
        (lambda root: (root / "train" / "ant" / "0001.png").write_bytes(b""), "0001.png: not a readable image"),
        (lambda root: (root / "train" / "ant" / "9.png").symlink_to("nowhere"), "9.png: cannot be read"),
    ],
)
def test_bad_folders_are_named(tmp_path, damage, message):
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_data("imagefolder", tmp_path)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_folder(tmp_path)
    monkeypatch.setattr(image_files.os, "scandir", scandir)
    with pytest.raises(UserError, match=r"train: cannot be read \(Permission denied\)"):
        load_data("imagefolder", tmp_path)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)


@pytest.mark.parametrize("kind", ["uint16", ">u2", "int32", "tif"])
def test_16_bits_give_the_pixels_of_8_bits(tmp_path, kind):
    """Levels of 16 bits that are 257 times those of 8 bits; in Pillow's modes I;16, I;16B and I."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    levels[0, :2] = 0, 255
    if kind == "int32":  # a PPM of more than 8 bits has mode I
        path = tmp_path / "image.pgm"
        path.write_bytes(b"P5 32 32 65535\n" + (257 * levels.astype(">u2")).tobytes())
    else:
        path = tmp_path / ("image.tif" if kind in ("tif", ">u2") else "image.png")
        save(path, (257 * levels.astype(np.uint16)).astype(kind if kind != "tif" else "uint16"))
    assert Image.open(path).mode == {"int32": "I", ">u2": "I;16B"}.get(kind, "I;16")
    assert np.array_equal(image_files.decode_file(path, 32), np.repeat(levels[..., None], 3, axis=2))


@pytest.mark.parametrize("type_, mode", [(np.float32, "F"), (np.int32, "I")])
def test_levels_of_unknown_range_are_refused(tmp_path, type_, mode):
    write_folder(tmp_path)
    save(tmp_path / "train" / "bee" / "x.tif", np.ones((32, 32), type_))
    with pytest.raises(UserError, match=rf"bee/x.tif: .*mode {mode} has 32 bits a pixel, of no known range"):
        load_data("imagefolder", tmp_path)


def test_a_cache_of_an_older_decoder_is_not_read(tmp_path, monkeypatch):
    write_folder(tmp_path)
    expected = load_data("imagefolder", tmp_path).train.pixels
    for cache in tmp_path.glob(".decoded-train*"):
        np.save(cache, np.full_like(np.load(cache), 255))
    assert load_data("imagefolder", tmp_path).train.pixels.min() == 255  # the cache is read
    monkeypatch.setattr(image_files, "DECODER", image_files.DECODER + 1)
    assert torch.equal(load_data("imagefolder", tmp_path).train.pixels, expected)
    assert len(list(tmp_path.glob(".decoded-train*"))) == 1


def test_equal_images_of_a_class_are_noted(tmp_path, capsys):
    write_folder(tmp_path)
    for path in (tmp_path / "train" / "bee").iterdir():
        save(path, np.full((32, 32), 255, np.uint8))
    load_data("imagefolder", tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if "equal" in line]
    assert notes == ["note       all 4 training images of class 1 (bee) are equal"]


def test_every_format_and_sub_folder_counts_and_the_rest_is_printed(tmp_path, capsys):
    written = write_folder(tmp_path)
    bee = tmp_path / "train" / "bee"
    for position, suffix in enumerate(("webp", "bmp", "gif", "tif", "TIFF", "ppm")):
        Image.fromarray(written["train", "bee", 0]).save(bee / f"x{position}.{suffix}")
    Image.fromarray(written["train", "bee", 1]).save(bee / "0000.jpg")
    for name in ("sub/b.png", "sub/a/c.png", "Sub/d.png"):
        save(bee / name, np.full((32, 32, 3), ord(name[-5]), np.uint8))
    (bee / "sub" / "again").symlink_to(bee)  # a loop
    (bee / "._0000.png").write_bytes(b"macOS")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"macOS")
    for name in ("read.me", "boxes.txt"):
        (bee / name).write_text("no image")
    data = load_data("imagefolder", tmp_path)
    assert data.class_counts == [4, 4 + 7 + 3, 4]
    bees = data.train.pixels[data.train.labels == 1]
    assert bees[-3:, 0, 0, 0].tolist() == [ord(name) for name in "dbc"]  # after the class's own files
    assert torch.equal(bees[0].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(bee / "0000.jpg"))))
    out = capsys.readouterr().out
    assert f"2 files in {tmp_path}/train are not images and are left out: train/bee/boxes.txt, train/bee/read.me" in out


def test_class_folders_with_numbers_are_sorted_as_numbers(tmp_path):
    write_folder(tmp_path, train=2, test=1, classes=[str(number) for number in range(12)])
    data = load_data("imagefolder", tmp_path)
    assert data.class_names == [str(number) for number in range(12)]
    names = ["10", "9", "b", "a10", "a9", "007", "7"]
    assert sorted(names, key=image_files.class_order) == ["007", "7", "9", "10", "a10", "a9", "b"]


def test_hashes_tell_which_class_has_other_images(tmp_path):
    """They depend on names and sizes of the first n_k files of a class, and not on where the folder is."""
    write_folder(tmp_path / "one")
    first = load_data("imagefolder", tmp_path / "one", class_counts=[2, 2, 2])
    (tmp_path / "one").rename(tmp_path / "two")
    assert load_data("imagefolder", tmp_path / "two", class_counts=[2, 2, 2]).class_images == first.class_images
    (tmp_path / "two" / "train" / "bee" / "0001.png").rename(tmp_path / "two" / "train" / "bee" / "0009.png")
    second = load_data("imagefolder", tmp_path / "two", class_counts=[2, 2, 2])
    differs = [a != b for a, b in zip(first.class_images, second.class_images, strict=True)]
    assert differs == [False, True, False]


def test_names_that_are_not_utf_8(tmp_path, capsys):
    odd = os.fsdecode(b"b\xe9e")
    write_folder(tmp_path, classes=["ant", odd])
    (tmp_path / "train" / odd / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    with pytest.raises(UserError) as stop:
        load_data("imagefolder", tmp_path)
    assert r"b\xe9e/\xff.png: not a readable image" in str(stop.value)
    (tmp_path / "train" / odd / os.fsdecode(b"\xff.png")).rename(tmp_path / "train" / odd / os.fsdecode(b"\xff.txt"))
    data = load_data("imagefolder", tmp_path)
    assert data.class_names == ["ant", r"b\xe9e"] and r"b\xe9e/\xff.txt" in capsys.readouterr().out


@pytest.mark.parametrize("count", [9, 11])
def test_cifar10_with_another_number_of_class_folders(tmp_path, count):
    write_folder(tmp_path / "cifar10", classes=[f"class{k}" for k in range(count)])
    with pytest.raises(UserError, match=f"{count} class folders; cifar10 has 10 classes"):
        load_data("cifar10", tmp_path)


def test_tiny_imagenet(tmp_path, capsys):
    """train/<class>/images/*, and val/images/* with the classes in a file; test/images/* has none."""
    write_folder(tmp_path / "flat", classes=("n01", "n02"))
    for name in ("n01", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "flat" / "train" / name).rename(tmp_path / "train" / name / "images")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("x")
    save(tmp_path / "test" / "images" / "test_0.png", np.zeros((32, 32, 3), np.uint8))
    for number in range(3):
        save(tmp_path / "val" / "images" / f"val_{number}.png", np.full((32, 32, 3), number, np.uint8))
    lines = "val_2.png\tn01\t0\t0\nval_0.png\tn02\t0\t0\nval_1.png\tn02\t0\t0\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    data = load_data("imagefolder", tmp_path)
    assert data.class_counts == [4, 4] and data.class_names == ["n01", "n02"]
    assert data.test.labels.tolist() == [0, 1, 1] and data.test.pixels[:, 0, 0, 0].tolist() == [2, 0, 1]
    assert "val_annotations.txt gives the classes of the test set" in capsys.readouterr().out
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png n01\n")
    with pytest.raises(UserError, match=r"'val_0.png n01' is not a file and one of the classes"):
        load_data("imagefolder", tmp_path)


def test_val_where_test_is_missing(tmp_path, capsys):
    write_folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(load_data("imagefolder", tmp_path).test) == 6
    assert "has no folder test: val is the test set" in capsys.readouterr().out


def test_packed_archives_that_are_incomplete_are_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"the archive cifar-10-python.tar.gz in .* is incomplete or damaged"):
        load_data("cifar10", tmp_path, download=False)


def test_an_archive_in_another_folder_is_found(cifar10_archive, capsys):
    """One level too deep, or --data_dir is the archive itself."""
    folder, _ = cifar10_archive
    for below in ("cifar10", "cifar-10-python"):
        (folder / below).mkdir()
        (folder / "cifar-10-batches-py").rename(folder / below / "cifar-10-batches-py")
        for data_dir in (folder, folder / below, folder / below / "cifar-10-batches-py"):
            data = load_data("cifar10", data_dir, class_counts=COUNTS, download=False)
            assert data.class_names == list("abcdefghij")
        assert f"cifar10 is read from {folder / below}" in capsys.readouterr().out
        (folder / below / "cifar-10-batches-py").rename(folder / "cifar-10-batches-py")
        (folder / below).rmdir()


# ---------------------------------------------------------------------------------------------------------
# Lists of images, and FILE.npz
# ---------------------------------------------------------------------------------------------------------


def lists(folder, written, split):
    """A list of the images of a folder, with the labels 2, 1, 0 instead of 0, 1, 2, in another order than they lie."""
    lines = [
        f"{split}/{name}/{index:04d}.png {2 - 'abc'.index(name[0])}" for part, name, index in written if part == split
    ]
    path = folder / f"My {split}.txt"
    path.write_text("\n".join(lines[::-1]) + "\n\n")
    return str(path)


def test_lists(tmp_path, monkeypatch):
    """The images of the list, in its order, from a cache the second time."""
    written = write_folder(tmp_path)
    flags = {f"{split}_list": lists(tmp_path, written, split) for split in ("train", "test")}
    for _ in range(2):
        data = load_data("imagefolder", tmp_path, class_counts=[1, 2, 4], **flags)
        chosen = [written["train", *key] for key in [*(("cow", 3),), ("bee", 3), ("bee", 2)]]
        chosen += [written["train", "ant", index] for index in (3, 2, 1, 0)]
        assert np.array_equal(data.train.pixels.permute(0, 2, 3, 1), chosen)
        assert data.train.labels.tolist() == [0, 1, 1, 2, 2, 2, 2] and len(data.test) == 6
        assert data.class_names == ["cow", "bee", "ant"]
        monkeypatch.setattr(image_files, "decode_file", lambda path, size: pytest.fail(f"{path} was decoded again"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no line in it"),
        ("train/ant/0000.png\n", "is not the path of an image and its label"),
        ("train/ant/0000.png cat\n", "is not the path of an image and its label"),
        ("train/ant/0000.png -1\n", "is not the path of an image and its label"),
        (
            "train/ant/0000.png 0\ntrain/ant/9999.png 1\n",
            r"9999.png: cannot be read \(No such file.*relative to --data_dir",
        ),
        ("train/ant/0000.png 0\ntrain/ant/0001.png 2\n", "class 1 has no training images"),
        ("train/ant/0000.png 0\n", r"b.txt: label 1; .*a.txt has 1 classes"),
    ],
)
def test_bad_lists_are_named(tmp_path, text, message):
    write_folder(tmp_path)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("test/ant/0000.png 1\n")
    with pytest.raises(UserError, match=message):
        load_data("imagefolder", tmp_path, train_list=tmp_path / "a.txt", test_list=tmp_path / "b.txt")


def test_image_size(tmp_path):
    """As Pillow resizes; bytes on the device, and a cache for each size."""
    written = write_folder(tmp_path, size=(60, 50))
    for size in (48, 32, 48):
        data = load_data("imagefolder", tmp_path, image_size=size)
        image = Image.fromarray(written["train", "ant", 0]).resize((size, size), Image.Resampling.BILINEAR)
        assert data.train.pixels.dtype == torch.uint8 and data.shape == (3, size, size)
        assert np.array_equal(data.train.pixels[0].permute(1, 2, 0), image)
    assert len(list(tmp_path.glob(".decoded-train*"))) == 2
    shifts = random_shifts(12, epoch=1, seed=1)
    assert crop_and_flip(data.train.images, shifts, data.train.black).shape == (12, 3, 48, 48)


def write_npz(path, shape=(28, 28), dtype=np.uint8, **changes):
    random = np.random.default_rng(5)
    parts = {}
    for split, count in (("train", 9), ("test", 4)):
        parts[f"{split}_images"] = random.integers(0, 256, (count, *shape)).astype(dtype)
        parts[f"{split}_labels"] = np.arange(count)[:, None] % 3
    np.savez(path, **{name: part for name, part in (parts | changes).items() if part is not None})
    return parts


@pytest.mark.parametrize("shape", [(28, 28), (40, 28, 3), (32, 32, 1)])
def test_npz_of_images(tmp_path, shape):
    """As MedMNIST: grey or RGB, labels in a column; bytes, resized as Pillow does, to one level."""
    parts = write_npz(tmp_path / "x.npz", shape, class_names=np.array(["a", "b", "c"]))
    data = load_data(str(tmp_path / "x.npz"), "unused", class_counts=[1, 2, 3])
    assert data.class_names == ["a", "b", "c"] and data.train.pixels.dtype == torch.uint8
    chosen, labels = expected_subset(parts["train_images"], parts["train_labels"][:, 0], [1, 2, 3])
    assert data.train.labels.tolist() == labels.tolist() and len(data.test) == 4
    for found, image in zip(data.train.pixels, chosen, strict=True):
        resized = Image.fromarray(image.squeeze()).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(resized).astype(int)).max() <= 1


def test_npz_of_features(tmp_path):
    """Each feature gets mean 0 and deviation 1 over all training rows; a constant one is 0."""
    parts = write_npz(tmp_path / "x.npz", (5,), np.int32)
    parts["train_images"][:, 2] = 7
    np.savez(tmp_path / "x.npz", **parts)
    data = load_data(str(tmp_path / "x.npz"), "unused")
    rows = data.train.images.numpy()
    assert data.shape == (5,) and data.class_counts == [3, 3, 3]
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(rows.std(0), [1, 1, 0, 1, 1], atol=1e-6)
    mean, std = parts["train_images"].mean(0), parts["train_images"].std(0)
    expected = (parts["test_images"][:, 0] - mean[0]) / std[0]
    np.testing.assert_allclose(data.test.images[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_labels": None}, "train_labels"),
        ({"train_images": np.zeros((9, 28, 28))}, r"images of type float64 and shape \(9, 28, 28, 1\)"),
        ({"train_images": np.zeros((9, 28, 28, 28), np.uint8)}, r"shape \(9, 28, 28, 28\)"),
        ({"train_labels": np.zeros((9, 14), int)}, r"labels of type int64 and shape \(9, 14\)"),
        ({"train_labels": np.arange(8)}, r"for 9 images"),
        ({"train_labels": np.arange(9) - 1}, "labels of type int64"),
        ({"train_labels": np.arange(9) % 3 * 1.0}, "labels of type float64"),
        ({"train_labels": np.arange(9) % 2}, "label 2, train_labels 2 classes"),
        ({"train_images": np.full((9, 4), np.nan)}, "a feature is not finite"),
        ({"train_images": np.zeros((9, 4))}, "another shape"),
        ({"train_images": np.array([None] * 9)}, "not a data set"),
        ({"class_names": np.array(["a"])}, "class_names has the shape"),
        ({"train_labels": np.array([0] * 8 + [2])}, "class 1 has no training images"),
    ],
)
def test_bad_npz_files_are_named(tmp_path, changes, message):
    write_npz(tmp_path / "x.npz", **changes)
    with pytest.raises(UserError, match=rf"x.npz: .*{message}"):
        load_data(str(tmp_path / "x.npz"), "unused")


def test_an_npz_file_is_also_looked_for_in_the_data_folder(tmp_path):
    write_npz(tmp_path / "x.npz")
    assert load_data("x.npz", tmp_path).class_counts == [3, 3, 3]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 half"])
def test_damaged_npz_files_are_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x.npz: not a data set"):
        load_data(str(tmp_path / "x.npz"), "unused")


def test_truncated_image_is_named(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "test" / "cow" / "0001.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cow/0001\.png: not a readable image"):
        load_data("imagefolder", tmp_path)


def test_digits():
    from sklearn.datasets import load_digits

    data = load_data("digits", "unused")
    assert data.class_counts == [34, 34, 68, 68, 102, 102, 136, 136, 170, 170]
    assert len(data.train) == 1020 and len(data.test) == 1797 - 1020
    labels = load_digits().target
    assert np.array_equal(np.bincount(data.train.labels), data.class_counts)
    assert np.array_equal(np.bincount(np.concatenate([data.train.labels, data.test.labels])), np.bincount(labels))
    pixels = torch.cat([data.train.images, data.test.images])
    assert abs(pixels.mean()) < 0.01 and abs(pixels.std() - 1) < 0.15  # resizing lowers the deviation


def test_whitening_is_zca():
    """Inner products become x^T (C + eps v I)^(-1) y, times a factor; the map is symmetric, and as for test images."""
    data, eps = load_data("digits", None), 0.05
    found = whiten(data, eps)
    train, test, white_train, white_test = (
        split.images.flatten(1).double().numpy() for split in (data.train, data.test, found.train, found.test)
    )
    centred = train - train.mean(0)
    covariance = np.cov(centred.T, bias=True)
    covariance += eps * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    solved = scipy.linalg.solve(covariance, centred.T, assume_a="pos")
    solved *= centred.size / np.sum(solved * centred.T)  # the mean square is 1
    for found_rows, rows in ((white_train, centred), (white_test, test - train.mean(0))):
        expected = rows @ solved
        tolerance = 3072 * 2**-24 * np.abs(expected).max()  # sums of 3,072 products in fp32
        np.testing.assert_allclose(found_rows @ white_train.T, expected, rtol=0, atol=tolerance)
    product = centred.T @ white_train
    np.testing.assert_allclose(product, product.T, rtol=0, atol=3072 * 2**-24 * np.abs(product).max())
    assert found.class_counts == data.class_counts and torch.equal(found.test.labels, data.test.labels)


def test_images_too_large_to_whiten_are_refused():
    large = Split(torch.zeros(1, 3, 65, 65, dtype=torch.uint8), torch.zeros(1), torch.zeros(3))
    with pytest.raises(UserError, match="12675 values, more than 12288: lower --image_size"):
        whiten(datasets.Data(large, large, [1]), 0.1)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(UserError, match="digits: class 8 has 174 training images, 175 are wanted"):
        load_data("digits", "unused", class_counts=[10] * 8 + [175, 10])


# ---------------------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile, available, n_max, expected",
    [
        ("balanced", [5, 9, 7], None, [5, 5, 5]),
        ("balanced", [5, 9, 7], 4, [4, 4, 4]),
        ("all", [5, 9, 7], None, [5, 9, 7]),
        ("exp:10", [5000] * 10, 500, [500, 387, 299, 232, 179, 139, 107, 83, 64, 50]),
        ("exp:100", [5000] * 10, None, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        ("step:10", [5000] * 10, 500, [500] * 5 + [50] * 5),
        ("step:4", [40, 40, 40], None, [40, 10, 10]),
        ("exp:1", [7, 7], None, [7, 7]),
        ("step:4", [178, 182, 177, 183, 40], None, [160, 160, 40, 40, 40]),  # every class has enough
        ("exp:10", [100, 20, 9], None, [63, 19, 6]),
    ],
)
def test_profiles(profile, available, n_max, expected):
    assert profile_counts(profile, available, n_max) == expected


def test_paper_profiles():
    assert datasets.SOURCES["cifar10"].paper_counts == (1000, 1000, 2000, 2000, 3000, 3000, 4000, 4000, 5000, 5000)
    assert (
        datasets.SOURCES["cifar100"].paper_counts == (100,) * 20 + (200,) * 20 + (300,) * 20 + (400,) * 20 + (500,) * 20
    )
    for name in ("mnist", "fashionmnist", "svhn"):
        assert datasets.SOURCES[name].paper_counts == (100, 100, 200, 200, 300, 300, 400, 400, 500, 500)


def test_a_profile_that_leaves_a_class_empty_is_an_error():
    with pytest.raises(UserError, match="exp:1000 leaves class 7 without training images"):
        load_data("digits", "unused", imbalance="exp:1000", n_max=100)


# ---------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------


def numbered(count):
    images = torch.arange(count).float().view(count, 1, 1, 1).expand(count, 3, 32, 32).contiguous()
    return Split(images, torch.arange(count), torch.zeros(3))


def order(**options):
    return epoch_order(23, **{"epoch": 1, "seed": 1} | options).tolist()


def test_an_epoch_is_a_permutation():
    assert sorted(order()) == list(range(23))
    assert order() == order()
    assert order() != order(epoch=2) and order() != order(seed=2) and order(epoch=2) != order(seed=2)
    assert order(shuffle=False) == list(range(23))


def test_a_stratified_epoch_has_every_class_in_proportion():
    """Each batch is within two images of its share; each epoch permutes all images, within the classes too."""
    counts = torch.tensor([3, 10, 40, 97])
    labels = torch.arange(4).repeat_interleave(counts)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    orders = [epoch_order(150, epoch=epoch, seed=1, labels=labels) for epoch in (1, 2)]
    for found in orders:
        assert torch.equal(found.sort().values, torch.arange(150))
        for rows in found.split(30):
            share = counts * len(rows) / 150
            assert (labels[rows].bincount(minlength=4) - share).abs().max() <= 2
    for label in range(4):
        first, second = (found[labels[found] == label].tolist() for found in orders)
        assert first != second
    assert torch.equal(orders[0], epoch_order(150, epoch=1, seed=1, labels=labels))


@pytest.mark.parametrize("count, batch_size", [(23, 5), (20, 5), (21, 5), (3, 5), (1, 1), (2410, 200)])
def test_even_batches_are_as_many_as_uneven_ones(count, batch_size):
    """ceil(N/B) batches in order; the last one has the remainder, or (even) sizes differ by at most one."""
    usual, even = (epoch_batches(torch.arange(count), batch_size, even=even) for even in (False, True))
    assert len(usual) == len(even) == math.ceil(count / batch_size)
    assert torch.equal(torch.cat(usual), torch.arange(count)) and torch.equal(torch.cat(even), torch.arange(count))
    assert {len(rows) for rows in usual[:-1]} <= {batch_size}
    sizes = [len(rows) for rows in even]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size


def test_images_go_with_their_labels_in_both_memory_formats():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        split = numbered(23).to("cpu", memory_format)
        for rows in epoch_order(23, epoch=3, seed=1).split(5):
            images, labels = split.batch(rows)
            assert torch.equal(labels, rows)
            assert images.is_contiguous(memory_format=memory_format)
            assert torch.equal(images[:, 0, 0, 0], labels.float())


def test_the_order_is_the_same_on_every_machine():
    """Fixed numbers: another generator would break every comparison with earlier runs."""
    assert order()[:6] == FIRST_OF_SEED_1


FIRST_OF_SEED_1 = [12, 19, 9, 2, 18, 14]


def test_augmentation_is_crop_and_flip():
    """Against a slow loop over one image at a time."""
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    black = torch.tensor([-1.0, -2.0, -3.0])
    shifts = random_shifts(40, epoch=1, seed=1)
    assert shifts[:, :2].min() == 0 and shifts[:, :2].max() == 8 and set(shifts[:, 2].tolist()) == {0, 1}
    found = crop_and_flip(images, shifts, black)
    for image, (top, left, flip), crop in zip(images, shifts.tolist(), found, strict=True):
        padded = black.view(3, 1, 1).repeat(1, 40, 40)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, top : top + 32, left : left + 32]
        torch.testing.assert_close(crop, expected.flip(2) if flip else expected, rtol=1e-6, atol=1e-6)


def test_augmentation_differs_by_epoch_and_goes_with_the_image():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        split = Split(images, torch.arange(8), torch.zeros(3)).to("cpu", memory_format)
        shifts, others = random_shifts(8, epoch=1, seed=1), random_shifts(8, epoch=2, seed=1)
        rows = torch.tensor([5, 2])
        found = split.batch(rows, shifts)[0]
        assert torch.equal(found, crop_and_flip(split.images, shifts, split.black)[rows])
        assert found.is_contiguous(memory_format=memory_format)
        assert not torch.equal(found, split.batch(rows, others)[0])
