"""measure_model.py as a user runs it, against features collected by hand and SciPy."""

import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from engine.checkpoints import load_weights
from nc_layers import layer_statistics
from tests.conftest import TINY, full_nc1, python_examples, rows_of
from utils import UserError

SCRIPT = "measure_model.py"
OWN = """
import torch

def build(num_classes):
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(inplace=True))
    return torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, num_classes))

constant = 1
torch_module = torch.nn.Linear(2, 3)

def nothing():
    pass

def pair():
    return build(3), None

def broken():
    return 1 / 0

def once():
    return zip([1], [2])

def three():
    return [(1, 2, 3)]

def validation():
    return {"train": [], "validation": []}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 3 classes of coloured noise: 4, 6 and 3 training images, 2 test images of each."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in {"train": (4, 6, 3), "test": (2, 2, 2)}.items():
        for label, count in enumerate(counts):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{number}.png")
    return folder


def tensors(folder, split, size):
    """Images (N, 3, size, size) and labels (N,) as --size makes them."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    paths = sorted((folder / split).glob("*/*"))
    arrays = [np.asarray(Image.open(path).resize((size, size), Image.Resampling.BILINEAR)) for path in paths]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (pixels - mean) / std, np.array([int(path.parent.name[-1]) for path in paths])


def own_model(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    namespace = {}
    exec(OWN, namespace)
    return namespace["build"](3)


def test_a_model_from_a_file(run_script, images, tmp_path):
    model = own_model(tmp_path)
    flags = ["--model", "own.py:build", "--data_dir", images, "--size", 32, "--layers", "0.0,0,head", "--batch_size", 5]
    out, _ = run_script(SCRIPT, *flags, "--out", "out")
    assert "random weights: give --weights FILE" in out and "head: the input of 3" in out
    rows = {(row["layer"], row["split"]): row for row in rows_of(tmp_path / "out" / "layers.csv")}
    assert list(rows) == [(layer, split) for layer in ("0.0", "0", "3") for split in ("train", "test")]
    train, train_labels = tensors(images, "train", 32)
    test, test_labels = tensors(images, "test", 32)
    with torch.no_grad():
        for layer, body in {"0.0": model[0][0], "0": model[0], "3": model[0]}.items():
            h = body(train).mean((2, 3)).double().numpy()
            means = np.stack([h[train_labels == k].mean(0) for k in range(3)])
            found = {split: float(rows[layer, split]["NC1"]) for split in ("train", "test")}
            assert found["train"] == pytest.approx(full_nc1(h, train_labels, 3), rel=1e-3)
            t = body(test).mean((2, 3)).double().numpy()
            shift = means - h.mean(0)
            scatter = (t - means[test_labels]).T @ (t - means[test_labels]) / 6
            expected = np.trace(scatter @ np.linalg.pinv(shift.T @ shift / 3)) / 3
            assert found["test"] == pytest.approx(expected, rel=1e-3)
            nearest = ((t[:, None] - means) ** 2).sum(2).argmin(1)
            assert float(rows[layer, "test"]["NCM_acc1"]) == pytest.approx(100 * np.mean(nearest == test_labels))
    assert float(rows["3", "train"]["NC0"]) > 0 and rows["0", "train"]["NC0"] == ""
    assert float(rows["3", "train"]["self_duality"]) == float(rows["3", "test"]["self_duality"])
    picture = np.asarray(Image.open(tmp_path / "out" / "layers.png").convert("L"))
    assert picture.std() > 10 and (tmp_path / "out" / "layers.pdf").stat().st_size > 1000


WORDS = """
import torch

torch.manual_seed(0)
CLASSES = ["ant", "bee", "cow"]
words, labels = torch.randint(50, (40, 7)), torch.arange(40) % 3

def build(num_classes=9):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.EmbeddingBag(50, 5), torch.nn.Linear(5, num_classes))

def loaders():
    return {"train": [(words[:15], labels[:15]), (words[15:30], labels[15:30])], "test": [(words[30:], labels[30:])]}

def loader():
    return loaders()["train"]

def of_nine():
    return [(x, torch.tensor([8, 0, 4])[y]) for x, y in loader()]
"""


def test_inputs_that_are_no_images(run_script, tmp_path):
    """Words: the classes from CLASSES, counted, and as some of a larger head's."""
    (tmp_path / "words.py").write_text(WORDS)
    (tmp_path / "counted.py").write_text(WORDS.replace("CLASSES =", "names ="))
    exec(WORDS, names := {})
    model = names["build"](3)
    with torch.no_grad():
        h = model[0](names["words"][:30]).double().numpy()
    expected = full_nc1(h, names["labels"][:30].numpy(), 3)
    for file, function, splits in (("words", "loaders", 2), ("words", "loader", 1), ("counted", "loader", 1)):
        flags = ["--model", f"{file}.py:build", "--data", f"{file}.py:{function}", "--layers", "head"]
        run_script(SCRIPT, *flags)
        rows = rows_of(tmp_path / "layers" / "layers.csv")
        assert [row["split"] for row in rows] == ["train", "test"][:splits] and float(rows[0]["NC0"]) > 0
        assert float(rows[0]["NC1"]) == pytest.approx(expected, rel=1e-4)
    flags = ["--model", "words.py:build", "--data", "words.py:of_nine", "--layers", "head"]
    out, _ = run_script(SCRIPT, *flags, "--classes", "8,0,4")
    assert "note: 6 of the head's 9 classes have no samples here, and are left out" in out
    (row,) = rows_of(tmp_path / "layers" / "layers.csv")
    assert float(row["NC1"]) == pytest.approx(expected, rel=1e-4) and 0 <= float(row["NC4"]) <= 1
    weight = names["build"]()[1].weight.detach()
    assert float(row["NC0"]) == pytest.approx((weight.sum(0).norm() / weight.norm()).item(), rel=1e-4)
    assert float(row["cv_classifier_norms"]) == pytest.approx(
        (weight[[8, 0, 4]].norm(dim=1).std(correction=0) / weight[[8, 0, 4]].norm(dim=1).mean()).item(), rel=1e-4
    )


def test_folders_of_some_classes_of_the_head(run_script, images, tmp_path):
    (tmp_path / "own.py").write_text(OWN.replace("(num_classes)", "(num_classes=7)", 1))
    flags = ["--model", "own.py:build", "--data_dir", images, "--size", 32, "--layers", "head"]
    out, _ = run_script(SCRIPT, *flags, "--classes", "6,1,3")
    assert "note: 4 of the head's 7 classes" in out
    rows = rows_of(tmp_path / "layers" / "layers.csv")
    assert len(rows) == 2 and all(row["NC4"] and float(row["NC2_W"]) > 0 for row in rows)


def test_metrics_that_are_nan_in_all_rows_keep_their_columns_in_the_table(run_script, images, tmp_path):
    """Features that are all zero."""
    (tmp_path / "own.py").write_text(
        OWN.replace("Conv2d(3, 6, 3, 2)", "Threshold(1e9, 0), torch.nn.Conv2d(3, 6, 1, bias=False)")
    )
    flags = ["--model", "own.py:build", "--data_dir", images, "--size", 32, "--layers", "0"]
    out, _ = run_script(SCRIPT, *flags)
    assert re.search(r"layer split +d +NC1 +CDNV +NCM_acc1\n +0 train +6 +NaN +NaN +NaN\n", out)
    assert "NC1: variability within the classes over that between their means, 0 at full collapse" in out
    assert "all features are zero (dead ReLUs)" in out


THEIRS = """
from __future__ import annotations
from dataclasses import dataclass
import args, datasets, models, torch, utils

assert {of.WHOSE for of in (args, datasets, models, utils)} == {"theirs"}

@dataclass
class Size:
    width: int = 5

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, Size().width, 3)
        self.fc, self.turned = torch.nn.Linear(5, 3), torch.nn.Linear(5, 4)

    def forward(self, x):
        import utils
        assert utils.WHOSE == "theirs"
        h = self.body(x).mean((2, 3))
        return self.fc(h), self.turned(h)
"""


def test_a_file_is_imported_as_python_imports_it(run_script, images, tmp_path):
    """Neighbours with the names of our modules, a dataclass, and a model that returns the outputs of two heads."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("args", "datasets", "models", "utils"):
        (folder / f"{name}.py").write_text("WHOSE = 'theirs'")
    (folder / "build.py").write_text(THEIRS)
    flags = ["--data_dir", images, "--size", 9, "--layers", "head"]
    run_script(SCRIPT, "--model", "theirs/build.py:Two", *flags)
    row, *_ = rows_of(tmp_path / "layers" / "layers.csv")
    assert row["layer"] == "fc" and row["d"] == "5" and float(row["NC0"]) > 0


def test_torchvision_with_weights(run_script, images, tmp_path):
    model = torchvision.models.resnet18(num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = ["--model", "torchvision:resnet18", "--data_dir", images, "--layers", "layer1,avgpool,head"]
    out, _ = run_script(SCRIPT, *flags, "--weights", "weights.pth", "--size", 40)
    assert "random weights" not in out and "head: the input of fc" in out
    rows = {row["layer"]: row for row in rows_of(tmp_path / "layers" / "layers.csv") if row["split"] == "train"}
    x, labels = tensors(images, "train", 40)
    with torch.no_grad():
        h = torch.nn.Sequential(*list(model.eval().children())[:-1])(x).flatten(1).double().numpy()
    assert float(rows["fc"]["NC1"]) == pytest.approx(full_nc1(h, labels, 3), rel=2e-2)
    assert rows["fc"]["d"] == rows["avgpool"]["d"] == "512" and rows["layer1"]["d"] == "64"
    assert rows["fc"]["NC1"] == pytest.approx(rows["avgpool"]["NC1"])


def test_the_transforms_of_timm(run_script, images, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("test_vit", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = ["--model", "timm:test_vit", "--weights", "weights.pth", "--data_dir", images]
    run_script(SCRIPT, *flags, "--layers", "blocks.0,norm,head")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = sorted((images / "train").glob("*/*"))
    x = torch.stack([transform(Image.open(path)) for path in paths])
    labels = np.array([int(path.parent.name[-1]) for path in paths])
    with torch.no_grad():
        h = model.forward_head(model.forward_features(x), pre_logits=True).double().numpy()
    rows = {row["layer"]: row for row in rows_of(tmp_path / "layers" / "layers.csv") if row["split"] == "train"}
    assert float(rows["head"]["NC1"]) == pytest.approx(full_nc1(h, labels, 3), rel=1e-3)


def test_a_run_of_ours(train, measure, run_script, tmp_path):
    train(*TINY, "--save_path", "run")
    measure(*TINY, "--load_path", "run")
    out, _ = run_script(SCRIPT, "--run", "run", "--layers", "layers.1,head")
    assert "head: the input of fc" in out
    rows = {(row["layer"], row["split"]): row for row in rows_of(tmp_path / "layers" / "layers.csv")}
    last = rows_of(tmp_path / "run" / "nc_metrics.csv")[-1]
    for name in ("NC1", "NC0", "NC2_W", "CDNV", "NC4", "GNC2", "NCM_acc1"):
        assert float(rows["fc", "train"][name]) == pytest.approx(float(last[name]), rel=1e-5), name
    assert ("layers.1", "test") in rows


def test_layers_over_the_epochs_of_a_run(train, measure, run_script, tmp_path):
    train(*TINY, "--save_every", 1, "--save_path", "run")
    measure("--load_path", "run")
    flags = ["--run", "run", "--layers", "layers.1,head"]
    out, _ = run_script(SCRIPT, *flags, "--epochs", "all", "--out", "all")
    assert out.count("head: the input of fc") == 1
    rows = rows_of(tmp_path / "all" / "layers.csv")
    keys = [(row["epoch"], row["layer"], row["split"]) for row in rows]
    assert keys == [(e, name, split) for e in "12" for name in ("layers.1", "fc") for split in ("train", "test")]
    for measured in rows_of(tmp_path / "run" / "nc_metrics.csv"):
        (row,) = (r for r in rows if (r["epoch"], r["layer"], r["split"]) == (measured["epoch"], "fc", "train"))
        for name in ("NC1", "NC0", "CDNV", "NC4"):
            assert float(row[name]) == pytest.approx(float(measured[name]), rel=1e-5), name
    run_script(SCRIPT, *flags, "--epochs", 2, "--out", "second")
    assert rows_of(tmp_path / "second" / "layers.csv") == rows[4:]
    _, error = run_script(SCRIPT, *flags, "--epochs", 7, status=2)
    assert "no checkpoint of epoch 7, there are 1, 2" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--layers fc", "one of the arguments --model --run is required"),
        ("--model torchvision:resnet18 --layers fc", "--model needs --data_dir, a folder with train/<class>/*"),
        ("--model torchvision:resnet19 --data_dir IMAGES --layers fc", "--model torchvision:resnet19: Unknown model"),
        ("--model resnet18 --data_dir IMAGES --layers fc", "wanted torchvision:NAME, timm:NAME, or FILE.py:FUNCTION"),
        ("--model own.py:make --data_dir IMAGES --layers 0", "--model own.py:make: the file has no function make"),
        ("--model own.py:torch --data_dir IMAGES --layers 0", "own.py:torch: a module, wanted a function"),
        (
            "--model own.py:torch_module --data_dir IMAGES --layers 0",
            "a Linear, wanted a function",
        ),
        (
            "--model own.py:nothing --data_dir IMAGES --layers 0",
            "the function returns a NoneType",
        ),
        ("--model own.py:pair --data_dir IMAGES --layers 0", "the function returns a tuple, wanted a torch.nn.Module"),
        ("--model own.py:build --data_dir IMAGES --layers 0", "own.py:build has no transforms of its own: give --size"),
        (
            "--model own.py:build --data_dir IMAGES --size 9 --layers 0.2",
            "no layer '0.2'; the nearest names are 0.1, 0.0, 2",
        ),
        ("--model own.py:build --data_dir nowhere --size 9 --layers 0", "nowhere/train: no such folder"),
        (
            "--model own.py:build --data_dir IMAGES --size 9 --weights other.pth --layers 0",
            "size mismatch for 3.weight",
        ),
        ("--model own.py:build --data_dir IMAGES --size 9 --layers 0 --epochs all", "--epochs are those of a --run"),
        ("--run nowhere --layers 0 --epochs all", "nowhere: no config.json with epoch_*.pth files beside it"),
        ("--run nowhere --layers 0 --epochs 1,x", "'x' is not a whole number >= 1"),
        ("--run nowhere --layers 0 --classes 1,2", "--classes and --data are those of a --model"),
        ("--model own.py:build --data_dir IMAGES --size 9 --layers 0 --classes 1,2", "--classes are 2, and"),
        ("--model own.py:build --data_dir IMAGES --size 9 --layers 0 --classes 1,2,x", "'x' is not a whole number"),
        ("--model own.py:build --data_dir IMAGES --data own.py:nothing --layers 0", "or else --data"),
        ("--model own.py:build --data own.txt:nothing --layers 0", "--data own.txt:nothing: wanted FILE.py:FUNCTION"),
        ("--model own.py:build --data own.py:make --layers 0", "--data own.py:make: the file has no function make"),
        ("--model own.py:build --data own.py:constant --layers 0", "a int, wanted a function"),
        ("--model own.py:build --data own.py:nothing --layers 0", "the function returns a NoneType, wanted a loader"),
        ("--model own.py:build --data own.py:broken --layers 0", "--data own.py:broken: ZeroDivisionError: division"),
        ("--model own.py:build --data own.py:once --layers 0", "returns a zip, wanted a loader that can be read twice"),
        ("--model own.py:build --data own.py:three --layers 0", "--data own.py:three: batches are not pairs"),
        ("--model own.py:build --data own.py:validation --layers 0", "a dict of such loaders, train and test"),
        ("--run nowhere --layers 0", "nowhere: no config.json with epoch_*.pth files beside it"),
    ],
)
def test_bad_input_is_one_line(run_script, images, tmp_path, flags, message):
    own_model(tmp_path)
    state = own_model(tmp_path).state_dict() | {"3.weight": torch.zeros(1000, 6), "3.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "other.pth")
    _, error = run_script(SCRIPT, *flags.replace("IMAGES", str(images)).split(), status=2)
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "layers").exists()


def test_a_damaged_image_is_named(run_script, images, tmp_path):
    own_model(tmp_path)
    (tmp_path / "data").symlink_to(images)
    damaged = images / "test" / "class1" / "9.png"
    damaged.write_bytes(b"no image")
    flags = ["--model", "own.py:build", "--data_dir", "data", "--size", 9, "--layers", "0"]
    _, error = run_script(SCRIPT, *flags, status=2)
    damaged.unlink()
    assert "data/test/class1/9.png: not a readable image" in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------
# docs/measuring.md
# ---------------------------------------------------------------------------------------------------------

DATA, *EXAMPLES = python_examples("docs/measuring.md")
TITLES = "torchvision optimum test classes timm transformers lightning torchmetrics".split()


@pytest.mark.parametrize("title, code", [*zip(TITLES, EXAMPLES, strict=True)], ids=TITLES)
def test_the_examples_of_the_docs_run(title, code, capsys, monkeypatch, tmp_path):
    if title not in ("optimum", "test", "classes"):
        pytest.importorskip(title, reason=f"{title} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for part in [DATA, *(EXAMPLES[: EXAMPLES.index(code)] if title in ("optimum", "test", "classes") else [])]:
        exec(part, namespace)
    capsys.readouterr()
    exec(code, namespace)
    out = capsys.readouterr().out
    unknown = title in ("torchvision", "torchmetrics")  # no optimum is given; few samples
    assert re.search(r"\d\.\d", out) and ("nan" in out) == unknown, out


# ---------------------------------------------------------------------------------------------------------
# Checkpoints of other people
# ---------------------------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap, printed",
    [
        (lambda state: {"state_dict": state, "epoch": 3}, "the weights of its state_dict"),
        (lambda state: {"model": prefixed(state, "module.")}, "of its model, without 'module.' before their names"),
        (lambda state: {"net": state, "acc": 0.9, "epoch": 1}, "the weights of its net"),
        (lambda state: {"model_state_dict": state, "optimizer": {"state": {}}}, "the weights of its model_state_dict"),
        (lambda state: {"state_dict": prefixed(state, "model._orig_mod.")}, "without 'model._orig_mod.' before"),
        (lambda state: prefixed(state, "module."), "the weights, without 'module.' before their names"),
    ],
)
def test_weights_are_unwrapped_where_one_entry_fits(wrap, printed, tmp_path, capsys):
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save(wrap(model.state_dict()), tmp_path / "their.pth")
    load_weights(other, tmp_path / "their.pth")
    assert torch.equal(other.weight, model.weight) and printed in capsys.readouterr().out


STATE = torch.nn.Linear(2, 3).state_dict()


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"epoch": 3, "state_dict": STATE, "model": STATE},
            "it holds epoch, state_dict, model; give one of state_dict",
        ),
        (
            {"state_dict": prefixed(STATE, "encoder.")},
            "no entry fits the model: keys of its state_dict begin with encod",
        ),
        (torch.nn.Linear(2, 3), "not a plain checkpoint: it holds a torch.nn.modules.linear.Linear; save model.state_"),
        (b"\x1f\x8bgz", "a gzip archive, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML"),
        (bytes(257) + b"ustar" + bytes(250), "a tar archive"),
        ("npz", r"arrays of NumPy \(.npz\)"),
    ],
)
def test_files_that_are_no_such_weights_are_named(content, message, tmp_path):
    path = tmp_path / "their.pth"
    if content == "npz":
        np.savez(tmp_path / "a.npz", w=np.ones(3))
        (tmp_path / "a.npz").rename(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        load_weights(torch.nn.Linear(2, 3), path)
    assert error.value.status == 2


# docs/runtimes.md


def test_a_model_of_onnxruntime_is_measured_as_its_pytorch_twin(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from nc_layers import head_input, layer_statistics
    from nc_metrics import nc_metrics

    torch.manual_seed(0)
    twin = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    values = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in twin.state_dict().items()]
    make, float_ = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("Gemm", ["x", "0.weight", "0.bias"], ["a"], transB=1),
        make.make_node("Relu", ["a"], ["h"]),
        make.make_node("Gemm", ["h", "2.weight", "2.bias"], ["z"], transB=1),
    ]
    ends = [make.make_tensor_value_info(name, float_, ["N", size]) for name, size in (("x", 6), ("z", 3))]
    graph = make.make_graph(nodes, "twin", ends[:1], ends[1:], values)
    file = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    onnx.save(file, tmp_path / "model.onnx")

    (recipe,) = python_examples("docs/runtimes.md")
    exec(recipe, names := {})
    model, inputs = names["OnnxModel"](str(tmp_path / "model.onnx")), torch.randn(40, 6)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    np.testing.assert_allclose(model(inputs).detach(), session.run(None, {"x": inputs.numpy()})[0], atol=1e-6)

    batches = [(inputs[:25], torch.arange(25) % 3), (inputs[25:], torch.arange(15) % 3)]
    assert head_input(model) == "fc"
    found = nc_metrics(layer_statistics(model, batches, ["fc"], 3)["fc"], model.fc.weight.detach())
    wanted = nc_metrics(layer_statistics(twin, batches, ["2"], 3)["2"], twin[2].weight.detach())
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("how", ["--mean", "--transform"])
def test_the_normalisation_is_chosen_and_said(run_script, images, tmp_path, how):
    """With other numbers than ImageNet's, and with the same by a function of the user's own."""
    own_model(tmp_path)
    flags = ["--model", "own.py:build", "--data_dir", images, "--layers", "0", "--batch_size", 5]
    (tmp_path / "mine.py").write_text(
        "from torchvision import transforms as t\n"
        "half = t.Compose([t.Resize((32, 32)), t.ToTensor(), t.Normalize([0.5] * 3, [0.25] * 3)])\n"
    )
    chosen = ["--size", 32, "--mean", 0.5, "--std", "0.25,0.25,0.25"] if how == "--mean" else [how, "mine.py:half"]
    out, _ = run_script(SCRIPT, *flags, *chosen, "--out", "mine")
    assert ("mean 0.5,0.5,0.5, std 0.25,0.25,0.25\n" if how == "--mean" else "images: as mine.py:half returns") in out
    out, _ = run_script(SCRIPT, *flags, "--size", 32, "--out", "imagenet")
    assert "mean 0.485,0.456,0.406, std 0.229,0.224,0.225 (ImageNet's: give --mean and --std" in out
    found = [float(rows_of(tmp_path / name / "layers.csv")[0]["NC1"]) for name in ("mine", "imagenet")]
    with torch.no_grad():
        pixels, labels = tensors(images, "train", 32)
        back = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        pixels = (pixels * back[1] + back[0] - 0.5) / 0.25
        h = own_model(tmp_path)[0](pixels).mean((2, 3)).double().numpy()
    assert found[0] == pytest.approx(full_nc1(h, labels, 3), rel=1e-3) and found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--mean", 0], "--mean and --std: only with --size"),
        (["--size", 32, "--std", 0], "--std: must be > 0"),
        (["--size", 32, "--mean", "1,2"], "is not a number or three"),
        (["--transform", "none.py:f"], "--transform none.py:f: wanted FILE.py:FUNCTION of a file"),
        (["--transform", "own.py:build", "--size", 32], "--transform and --size, --mean or --std: give one of them"),
    ],
)
def test_a_wrong_normalisation_is_one_line(run_script, images, tmp_path, flags, words):
    own_model(tmp_path)
    base = ["--model", "own.py:build", "--data_dir", images, "--layers", "0"]
    _, error = run_script(SCRIPT, *base, *flags, status=2)
    assert words in error and error.count("\n") == 1


def test_the_name_of_one_layer_is_a_layer():
    model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    loader = [(torch.rand(4, 2), torch.tensor([0, 1, 2, 0]))]
    assert list(layer_statistics(model, loader, "2", 3)) == ["2"]
