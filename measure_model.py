"""Measure neural collapse in any layers of a model of torchvision, of timm or your own, on a folder of images.

    python measure_model.py --model torchvision:resnet18 --weights FILE --data_dir DIR --layers layer3,layer4,head
    python measure_model.py --model timm:vit_tiny_patch16_224 --weights FILE --data_dir DIR --layers blocks.5,norm,head
    python measure_model.py --model my_models.py:build --size 32 --data_dir DIR --layers body.2,head
    python measure_model.py --model my_models.py:build --data my_data.py:loader --layers body.2,head
    python measure_model.py --run model_weights/RUN --layers layer3,layer4,head
    python measure_model.py --run model_weights/RUN --layers layer3,layer4,head --epochs all

Writes layers.csv, layers.pdf and layers.png into --out, and prints a table. The columns are those of
`nc_metrics`, in a row for each layer and split. Test features are measured against the training means, so that only
NC1, CDNV, NC4 and NCM_acc1 differ. Layers are named as in `model.named_modules()`; `head` is the classifier,
measured at its input. With --epochs there is a row for each epoch, too, and the figure has curves over the epochs.
"""

import functools
import inspect
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path

import pandas as pd
import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from analysis.figures import add_layer_legend, draw_layers
from analysis.panels import LAYER_PANELS
from analysis.style import STYLE_FILE, TEXT_WIDTH
from cli import Parser, bounded, layer_names
from engine.checkpoints import load_weights
from engine.device import pick_device
from engine.measurement import SplitLoader, find_head, load_run, measure_layers
from engine.run import Run
from engine.tables import write_table
from image_files import list_folder, open_rgb
from nc_layers import head_weight
from nc_metrics import untrained_classes
from utils import UserError, atomic_write, message_of, run_file, run_script

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def main():
    args = make_parser().parse_args()
    device = pick_device(args.device, 0)
    if args.epochs and not args.run:
        raise UserError("--epochs are those of a --run")
    if args.run and (args.classes or args.data):
        raise UserError("--classes and --data are those of a --model")
    with warnings.catch_warnings(record=True) as caught:
        try:
            if args.run:
                table = pd.concat(measure_run(args, device), ignore_index=True)
            else:
                model, loaders, num_classes = load_model_and_data(args)
                table = measure(model.to(device), loaders, args.layers, num_classes, args.classes)
        except ValueError as error:
            raise UserError(error) from None
    for warning in caught:
        print(f"note: {warning.message}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(args.out / "layers.csv", table)
    draw(table, args.out)
    keys = table.columns.intersection(["epoch", "layer", "split", "d"]).tolist()
    print(table[[*keys, *LAYER_PANELS]].to_string(index=False, float_format="{:.4g}".format))
    print(
        "NC1: variability within the classes over that between their means, 0 at full collapse. Compare values only "
        "with the same data, images per class, split, preprocessing and layer"
    )
    print(f"all columns in {args.out / 'layers.csv'}, figure in {args.out / 'layers.pdf'} and .png")


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--model", metavar="MODEL", help="torchvision:NAME, timm:NAME, or FILE.py:FUNCTION that returns a model")
    what("--run", type=Path, metavar="RUN", help="folder of a run trained here, measured at its last checkpoint")
    add(
        "--layers",
        required=True,
        type=layer_names,
        metavar="L,L,...",
        help="names of the layers, in order of depth",
    )
    add(
        "--epochs",
        type=epochs_of_text,
        metavar="all|E,E,...",
        help="checkpoints of --run to measure (default: the last)",
    )
    add("--weights", type=Path, metavar="FILE", help="state dict of --model (default: random weights)")
    add(
        "--data_dir", type=Path, metavar="DIR", help="images as train/<class>/* and test/<class>/* (default: the run's)"
    )
    add(
        "--data",
        metavar="FILE.py:FUNCTION",
        help="function that returns a loader of batches (inputs, labels) of any kind, or a dict of two, train and "
        "test; the number of classes is CLASSES in the file, or else counted",
    )
    add(
        "--classes",
        type=lambda text: [bounded(int, 0)(word) for word in text.split(",")],
        metavar="N,N,...",
        help="numbers in the head's output of the classes that the data have: one for each folder of --data_dir, in "
        "order, or all labels of --data (default: all classes, in order)",
    )
    add(
        "--size", type=bounded(int, 1), metavar="N", help="images of N x N pixels (default: the model's own transforms)"
    )
    add(
        "--mean",
        type=channel_values,
        metavar="R,G,B",
        help="with --size: what is subtracted from pixels in [0, 1], a number for all channels or one for each; give "
        "those with which the model was trained, or 0 (default: ImageNet's, 0.485,0.456,0.406)",
    )
    add(
        "--std",
        type=channel_values,
        metavar="R,G,B",
        help="with --size: what the result is divided by, 1 for nothing (default: ImageNet's, 0.229,0.224,0.225)",
    )
    add(
        "--transform",
        metavar="FILE.py:FUNCTION",
        help="function of a PIL image that returns what the model takes, instead of --size (default: the model's own)",
    )
    add("--batch_size", type=bounded(int, 1), default=64, metavar="N", help="images per forward pass")
    add("--workers", type=bounded(int, 0), default=0, metavar="N", help="processes that decode images")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device to compute on")
    add("--out", type=Path, default="layers", metavar="DIR", help="folder for the table and the figure")
    return parser


# ---------------------------------------------------------------------------------------------------------
# The model and its data
# ---------------------------------------------------------------------------------------------------------


def epochs_of_text(text):
    """Return "all" or a list of epochs, as an argparse type."""
    return text if text == "all" else [bounded(int, 1)(word) for word in text.split(",")]


def measure_run(args, device):
    """Yield the rows of --run at its last checkpoint, or at each of --epochs, with the epoch in the first column."""
    _, data, model = load_run(args.run, data_dir=args.data_dir)
    splits = {"train": data.train, "test": data.test}
    loaders = {name: SplitLoader(split) for name, split in splits.items() if len(split)}
    if not args.epochs:
        yield measure(model.to(device), loaders, args.layers, data.num_classes)
        return
    checkpoints = Run(args.run).checkpoints()
    epochs = [*checkpoints] if args.epochs == "all" else args.epochs
    if missing := [str(epoch) for epoch in epochs if epoch not in checkpoints]:
        raise UserError(
            f"{args.run}: no checkpoint of epoch {missing[0]}, there are {', '.join(map(str, checkpoints))}"
        )
    for epoch in epochs:
        load_weights(model, checkpoints[epoch])
        table = measure(model.to(device), loaders, args.layers, data.num_classes, quiet=epoch != epochs[0])
        table.insert(0, "epoch", epoch)
        yield table


def load_model_and_data(args):
    """Return (model, {split: loader}, K) of --model, --weights and --data_dir or --data; K is None with --classes."""
    if bool(args.data_dir) == bool(args.data):
        raise UserError("--model needs --data_dir, a folder with train/<class>/* and test/<class>/*, or else --data")
    if args.data:
        loaders, num_classes = load_data(args.data)
    else:
        folders, splits = list_folder(args.data_dir)
        num_classes = len(folders)
        if args.classes and len(args.classes) != num_classes:
            raise UserError(f"--classes are {len(args.classes)}, and {args.data_dir}/train has {num_classes} folders")
    num_classes = None if args.classes else num_classes
    model, transform = build(args.model, num_classes)
    if args.weights:
        load_weights(model, args.weights)
    else:
        print("random weights: give --weights FILE to measure trained ones")
    if args.data:
        return model, loaders, num_classes
    transform = transform_of(args, transform)
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    images = {name: Images(split, transform, args.classes) for name, split in splits.items() if len(split.paths)}
    return model, {name: DataLoader(of_split, **options) for name, of_split in images.items()}, num_classes


def load_data(name):
    """Return ({split: loader}, K) of --data."""
    path, _, function = name.rpartition(":")
    make = load_function(path, function, "--data")
    try:
        made = make()
    except Exception as error:  # of whatever is in the file
        raise UserError(f"--data {name}: {type(error).__name__}: {message_of(error)}") from None
    loaders = dict(made) if isinstance(made, Mapping) else {"train": made}
    readable = all(isinstance(loader, Iterable) and not isinstance(loader, Iterator) for loader in loaders.values())
    if not readable or loaders.keys() not in ({"train"}, {"train", "test"}):
        raise UserError(
            f"--data {name}: the function returns a {type(made).__name__}, wanted a loader that can be read twice, "
            "such as a DataLoader or a list of batches, or a dict of such loaders, train and test"
        )
    known = getattr(load_module(path, "--data"), "CLASSES", None)
    if known is not None:
        return loaders, len(known) if isinstance(known, Sized) else int(known)
    try:
        largest = max(int(torch.as_tensor(labels).max()) for _, labels in loaders["train"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--data {name}: batches are not pairs (inputs, labels): {message_of(error)}") from None
    return loaders, largest + 1


def channel_values(text):
    """Return one number, or three, as a list of three, as an argparse type."""
    values = [bounded(float, -1e6)(word) for word in text.split(",")]
    if len(values) not in (1, 3):
        raise ArgumentTypeError(f"{text!r} is not a number or three, such as 0.485,0.456,0.406")
    return values * 3 if len(values) == 1 else values


def transform_of(args, own):
    """Return the transform of an image that the flags choose, and print it; own: the model's, or None."""
    if args.transform and (args.size or args.mean or args.std):
        raise UserError("--transform and --size, --mean or --std: give one of them")
    if (args.mean or args.std) and not args.size:
        raise UserError("--mean and --std: only with --size")
    if args.std and min(args.std) <= 0:
        raise UserError("--std: must be > 0")
    if args.transform:
        source, _, name = args.transform.rpartition(":")
        print(f"images: as {args.transform} returns them")
        return load_function(source, name, "--transform")
    if args.size:
        mean, std = args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD
        known = "" if args.mean and args.std else " (ImageNet's: give --mean and --std if the model had others)"
        print(f"images: {args.size} x {args.size} pixels, mean {listed(mean)}, std {listed(std)}{known}")
        resize = transforms.Resize((args.size, args.size), antialias=True)
        return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(mean, std)])
    if own is None:
        raise UserError(f"{args.model} has no transforms of its own: give --size, or --transform FILE.py:FUNCTION")
    print("images: as the model's own transforms return them")
    return own


def listed(values):
    return ",".join(f"{value:g}" for value in values)


def build(name, num_classes=None):
    """Return (model, transform of an image) of a --model with fresh weights; the transform is None if it has none.

    num_classes: outputs of its head; None for as many as the model has by default.
    """
    source, _, name_in_source = name.rpartition(":")
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if source == "torchvision":
            transform = models.get_model_weights(name_in_source).DEFAULT.transforms()
            return models.get_model(name_in_source, **options), transform
        if source == "timm":
            import timm

            model = timm.create_model(name_in_source, **options)
            return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"--model {name}: {message_of(error)}") from None
    function = load_function(source, name_in_source, "--model")
    model = function(**options) if "num_classes" in inspect.signature(function).parameters else function()
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name}: the function returns a {type(model).__name__}, wanted a torch.nn.Module")
    return model, None


def load_function(path, name, flag):
    """Return a function of a Python file; raise UserError, with the name of the flag, if there is none."""
    if not (path.endswith(".py") and Path(path).is_file()):
        others = "torchvision:NAME, timm:NAME, or " if flag == "--model" else ""
        raise UserError(f"{flag} {path}:{name}: wanted {others}FILE.py:FUNCTION of a file")
    module = load_module(path, flag)
    if not hasattr(module, name):
        raise UserError(f"{flag} {path}:{name}: the file has no function {name}")
    function = getattr(module, name)
    if not callable(function) or isinstance(function, nn.Module):
        raise UserError(f"{flag} {path}:{name}: a {type(function).__name__}, wanted a function")
    return function


@functools.cache
def load_module(path, flag):
    """Return a Python file as a module, imported as Python imports it from its own folder; raise UserError if it fails.

    The modules of this repository are hidden from then on, so that its neighbours and installed packages of the same
    names, such as `models` or `datasets`, are found.
    """
    folder, ours = Path(path).resolve().parent, Path(__file__).resolve().parent
    hide_modules(ours, folder)
    sys.path.insert(0, str(folder))
    stem = Path(path).stem
    try:
        return run_file(path, stem if stem not in sys.modules else f"file_of_{stem}")
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def hide_modules(ours, folder):
    """Forget the imported modules in `ours`, except the installed nc_*, and where to find them from another folder."""
    if folder == ours:
        return
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/").resolve()
        inner = file.relative_to(ours).parts if file.is_relative_to(ours) else ()
        if inner and "site-packages" not in inner and not name.startswith(("__", "nc_")):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ours]


class Images(Dataset):
    """`image_files.ImageFiles` as pairs (transformed image, label), or (transformed image, classes[label])."""

    def __init__(self, files, transform, classes=None):
        self.files, self.transform = files.paths, transform
        self.labels = [classes[label] for label in files.labels] if classes else files.labels

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return self.transform(open_rgb(self.files[index])), self.labels[index]
        except UserError as error:  # it could not leave a process of --workers
            raise ValueError(error) from None


# ---------------------------------------------------------------------------------------------------------
# Rows and figure
# ---------------------------------------------------------------------------------------------------------


def measure(model, loaders, layers, num_classes, classes=None, quiet=False):
    """Return a row of metrics for each layer and split, as a DataFrame; raise ValueError as `layer_statistics`.

    num_classes: outputs of the head; None for as many as it has.
    """
    if "head" in layers or num_classes is None:
        head = find_head(model, loaders["train"])
        weight = head_weight(model.get_submodule(head))
        num_classes = num_classes or len(weight)
        layers = [head if name == "head" else name for name in layers]
        if not quiet:
            print(f"head: the input of {head}")
            note_untrained(weight, head)
    if classes and (absent := num_classes - len(classes)):
        print(f"note: {absent:,} of the head's {num_classes:,} classes have no samples here, and are left out")
    table = pd.DataFrame(measure_layers(model, loaders, layers, num_classes, classes))
    return table.drop(columns=[column for column in table if column not in LAYER_PANELS and table[column].isna().all()])


def note_untrained(weight, head):
    """Say which classes of a head W (K, d) look untrained, if any do."""
    untrained = untrained_classes(weight)
    more = f" and {len(untrained) - 10:,} more" if len(untrained) > 10 else ""
    if untrained:
        shown = ", ".join(map(str, untrained[:10]))
        print(f"note: classes {shown}{more} look untrained: their rows of {head} are nearly parallel, and short")


@style.context(STYLE_FILE)
def draw(table, folder):
    """Draw the figure of layers as layers.pdf and layers.png in `folder`."""
    figure = Figure(figsize=(TEXT_WIDTH, 2.4))
    draw_layers(figure.subplots(1, len(LAYER_PANELS)), table)
    add_layer_legend(figure)
    for kind in ("pdf", "png"):
        with atomic_write(folder / f"layers.{kind}") as file:
            figure.savefig(file, format=kind)


if __name__ == "__main__":
    run_script(main)
