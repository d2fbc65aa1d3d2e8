"""The flags of the two entry scripts: what each one is, how they are checked, and the run that they name.

Training and validation take the same flags, so that one command line serves both; each ignores the flags
that only the other needs.
"""

import argparse
import hashlib
import json
import re
import sys
from functools import cache, partial
from pathlib import Path

from cli import (
    Help,
    Parser,
    Share,
    add_count_flags,
    add_loss_flags,
    bounded,
    conflict_of_counts,
    decay_type,
    epochs_or_share,
    existing_or_new_dir,
    keyword_arguments,
    layer_names,
    name_of,
    name_or_function,
    parsed_or,
    real_path,
    run_label,
    true_or_false,
)
from datasets import NPZ, SIZE, SOURCES, source_of
from engine.optim import OPTIMIZERS
from engine.tables import BN_SUFFIXES, THEORY_SUFFIXES
from models import MODELS
from objective import LOSSES
from utils import FILE_FUNCTION, UserError, file_digest, read_arguments, short_name

# The roles of a flag, given where it is added. A flag without a role is recorded in config.json and may change later.
NAMES_RUN = "changes the trained weights: it is part of the run's name, and must agree with config.json"
OFF_BY_DEFAULT = "changes the trained weights, and is part of the run's name only if it is not at its default"
THIS_CALL = "belongs to a call, not to the run: neither taken from config.json nor compared with it"
MLP_ONLY = "has no effect on other models"
ADAM_ONLY = "contradicts an --optimizer other than Adam and AdamW"
RUNS_CODE = "may name a function in a Python file, which training runs"
LOSS_VARIANT = "makes a variant of the cross entropy"
PROFILE = "says how many images each class has"
MEASURES_ONLY = "has no effect on training"
LOCATION = "says where the images are; config.json has a hash of the images, which must agree instead"

ADAMS = ("Adam", "AdamW")
RECIPE_STEPS = 2000  # of the recipe in docs/recipe.md, with fewer of which runs have ended far from the optimum


# ---------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------


def group(parser, title):
    """Return a function like `add_argument`, for a group of the help text, that takes the flag's `roles` as well."""
    add_argument = parser.add_argument_group(title).add_argument

    def add(*names, roles=(), **options):
        add_argument(*names, **options).roles = roles

    return add


def data_set(text):
    """An argparse type: one of SOURCES, in upper or lower case, or a FILE.npz, its real path if it is there."""
    if text.endswith(".npz"):
        path = real_path(text)
        return path if Path(path).exists() else text  # else it is looked for in --data_dir
    return parsed_or(name_of(SOURCES), text, "a FILE.npz")


def make_parser(doc=None):
    """Return the parser of both entry scripts. doc: the script's docstring."""
    parser = Parser(
        doc,
        usage="%(prog)s [@FILE of flags] [flags]",
        fromfile_prefix_chars="@",
        formatter_class=lambda prog: Help(prog, max_help_position=32, width=110),
    )
    yes_no = argparse.BooleanOptionalAction
    positive, not_negative = bounded(float, 0, above=True), bounded(float, 0)
    count, from_zero = bounded(int, 1, high=2**31 - 1), bounded(int, 0, high=2**31 - 1)
    layers, units = bounded(int, 1, high=1000), bounded(int, 1, high=2**20)

    def number_or_off(text):
        return not_negative(text) or None

    add = group(parser, "data")
    add(
        "--dataset",
        roles=(NAMES_RUN,),
        type=data_set,
        default="cifar10",
        metavar="NAME",
        help=f"images to train on: {', '.join(SOURCES)}, or a FILE.npz, also in --data_dir, with train_images, "
        "train_labels, test_images and test_labels (with 2-D arrays: features, for the MLP)",
    )
    add(
        "--data_dir",
        roles=(THIS_CALL, LOCATION),
        type=existing_or_new_dir,
        default=existing_or_new_dir("~/data"),
        help="folder of the data sets",
    )
    add(
        "--download",
        roles=(THIS_CALL,),
        action=yes_no,
        default=True,
        help="download a missing data set into --data_dir (default: on)",
    )
    for split in ("train", "test"):
        add(
            f"--{split}_list",
            roles=(OFF_BY_DEFAULT, LOCATION),
            type=real_path,
            metavar="FILE",
            help=f"{split} images of --dataset imagefolder: a line `path label` for each, with paths relative to "
            "--data_dir (default: class folders)",
        )
    add(
        "--image_size",
        roles=(OFF_BY_DEFAULT,),
        type=bounded(int, 8, high=1024),
        default=SIZE,
        metavar="S",
        help="resize the images of imagefolder or FILE.npz to S x S pixels",
    )
    add_count_flags(partial(add, roles=(NAMES_RUN, PROFILE)))
    add(
        "--data_augmentation",
        roles=(NAMES_RUN,),
        action=yes_no,
        default=False,
        help="train on random crops (4 pixels of padding) and horizontal flips (default: off)",
    )

    add(
        "--whiten",
        roles=(OFF_BY_DEFAULT,),
        type=not_negative,
        default=0.0,
        metavar="EPS",
        help="whiten the images by ZCA, with EPS times the mean eigenvalue added to each eigenvalue of their "
        "covariance: an MLP then fits them in fewer steps (default: 0, off)",
    )

    add = group(parser, "model")
    add(
        "--model",
        roles=(NAMES_RUN,),
        type=name_of(MODELS),
        default="MLP",
        metavar="MODEL",
        help=f"network: {', '.join(MODELS)}",
    )
    add(
        "--depth_relu",
        roles=(NAMES_RUN, MLP_ONLY),
        type=layers,
        default=6,
        metavar="N",
        help="MLP: ReLU layers before the feature layer",
    )
    add("--width", roles=(NAMES_RUN, MLP_ONLY), type=units, default=1024, metavar="N", help="MLP: units per layer")
    add(
        "--planes",
        roles=(OFF_BY_DEFAULT,),
        type=bounded(int, 2, high=2**12),
        metavar="P",
        help="channels of the first stage of a ResNet or VGG; twice the growth rate of a DenseNet (default: 64; "
        "densenet_cifar: 24)",
    )
    add(
        "--depth_linear",
        roles=(NAMES_RUN,),
        type=layers,
        default=1,
        metavar="N",
        help="number of linear layers in the head",
    )
    add("--bias", roles=(NAMES_RUN,), action=yes_no, default=True, help="bias in the head (default: on)")
    add(
        "--feature_relu",
        roles=(OFF_BY_DEFAULT,),
        action=yes_no,
        default=True,
        help="MLP: apply a ReLU to the features; without it they can have any sign (default: on)",
    )

    add(
        "--head_init",
        roles=(OFF_BY_DEFAULT,),
        choices=["random", "optimum", "etf"],
        default="random",
        help="initial head: random; the optimum of the run's own problem; or a simplex ETF of the same norm",
    )
    add(
        "--head_fixed",
        roles=(OFF_BY_DEFAULT,),
        action=yes_no,
        default=False,
        help="keep the head as it is at the start (default: off)",
    )

    add = group(parser, "objective")
    add(
        "--loss",
        roles=(NAMES_RUN, RUNS_CODE),
        type=name_or_function(LOSSES),
        default="CrossEntropy",
        metavar="LOSS",
        help=f"loss of a sample: {', '.join(LOSSES)}, or FILE.py:function of logits and labels (docs/extending.md)",
    )
    add_loss_flags(partial(add, roles=(OFF_BY_DEFAULT, LOSS_VARIANT)))
    add(
        "--class_weights_from",
        roles=(OFF_BY_DEFAULT,),
        type=epochs_or_share(0),
        default=0,
        metavar="EPOCH",
        help="deferred re-weighting: the first epoch with --class_weights, as a number or a share of --epochs such as "
        "80%%; before it all classes weigh 1; 0: all epochs",
    )
    add(
        "--objective",
        roles=(NAMES_RUN,),
        choices=["paper", "released"],
        default="paper",
        help="paper: the unconstrained features model; released: what the paper's released code minimises",
    )
    add(
        "--sep_decay",
        roles=(NAMES_RUN,),
        action=yes_no,
        default=False,
        help="penalise only the head and the features, as the theory does (default: off: weight decay on all "
        "parameters)",
    )
    add(
        "--weight_decay",
        roles=(NAMES_RUN,),
        type=not_negative,
        default=1e-4,
        metavar="X",
        help="lambda_W, the factor of |W|^2 / 2",
    )
    add(
        "--feature_decay_rate",
        roles=(NAMES_RUN,),
        type=not_negative,
        default=1e-5,
        metavar="X",
        help="lambda_H, the factor of |h|^2 / 2, with --sep_decay",
    )

    add = group(parser, "training")
    add("--epochs", type=count, default=4000, metavar="N", help="passes over the training set")
    add(
        "--batch_size",
        roles=(NAMES_RUN,),
        type=count,
        default=256,
        metavar="N",
        help="largest number of images in a step",
    )
    add(
        "--optimizer",
        roles=(NAMES_RUN, RUNS_CODE),
        type=name_or_function(OPTIMIZERS),
        default="Adam",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}, or FILE.py:function that makes one (docs/extending.md); SGD, SGDW and Signum "
        "have momentum 0.9",
    )
    add(
        "--optimizer_args",
        roles=(OFF_BY_DEFAULT,),
        type=keyword_arguments,
        metavar="KEY=VALUE,...",
        help="further arguments of the optimizer, such as betas=(0.9,0.99),eps=1e-6 (default: its own)",
    )
    add("--lr", roles=(NAMES_RUN,), type=positive, default=1e-4, metavar="X", help="initial learning rate")
    add(
        "--decay_type",
        roles=(NAMES_RUN,),
        type=decay_type,
        default="step",
        metavar="TYPE",
        help="step: multiply lr by gamma every --patience epochs; step_60_120: at epochs 60 and 120; cosine: constant "
        "for --patience epochs, then a half cosine that reaches zero after --epochs",
    )
    add(
        "--patience",
        roles=(NAMES_RUN,),
        type=epochs_or_share(1),
        default=2000,
        metavar="N",
        help="epochs between lr drops, or before the cosine; a number or a share of --epochs such as 36%%",
    )
    add("--gamma", roles=(NAMES_RUN,), type=positive, default=0.1, metavar="X", help="factor of an lr drop")
    add(
        "--warmup_epochs",
        roles=(NAMES_RUN,),
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs in which the learning rate rises linearly to --lr; 0: none",
    )
    add(
        "--penalty_warmup_epochs",
        roles=(NAMES_RUN,),
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs in which the penalties of --sep_decay rise linearly from zero; 0: none",
    )
    add(
        "--penalty_start",
        roles=(OFF_BY_DEFAULT,),
        type=positive,
        default=1.0,
        metavar="X",
        help="initial factor of the penalties of --sep_decay, which falls to 1 as set by the next two flags; 1: off",
    )
    add(
        "--penalty_hold_epochs",
        roles=(OFF_BY_DEFAULT,),
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs at the start of training in which the factor stays at --penalty_start",
    )
    add(
        "--penalty_fall_epochs",
        roles=(OFF_BY_DEFAULT,),
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs after those in which the factor falls geometrically to 1",
    )
    add(
        "--adam_beta2",
        roles=(NAMES_RUN, ADAM_ONLY),
        type=bounded(float, 0, high=1, below=True),
        default=0.999,
        metavar="X",
        help="Adam: decay rate of the running mean of squared gradients",
    )
    add(
        "--clip_grad_norm",
        roles=(NAMES_RUN,),
        type=number_or_off,
        metavar="X",
        help="clip the norm of the gradient to X; 0: no clipping (default: no clipping)",
    )
    add(
        "--revive",
        roles=(OFF_BY_DEFAULT,),
        action=yes_no,
        default=False,
        help="pass gradients that raise features at zero and, in an MLP, hidden layers that are all zero for an image; "
        "an ordinary ReLU blocks them (default: off)",
    )
    add(
        "--no_shuffle",
        roles=(NAMES_RUN,),
        action="store_true",
        help="take batches in the order of the data set (default: off)",
    )
    add(
        "--stratified",
        roles=(NAMES_RUN,),
        action=yes_no,
        default=False,
        help="shuffle so that each batch has every class in proportion and sizes differ by at most one (default: off)",
    )
    add(
        "--seed",
        roles=(NAMES_RUN,),
        type=bounded(int, 0, high=2**63 - 1),
        default=1,
        metavar="N",
        help="seed of the initial weights and of the batches",
    )
    add(
        "--init_from",
        roles=(NAMES_RUN,),
        type=real_path,
        metavar="FILE",
        help="checkpoint with the initial weights (default: random)",
    )

    add = group(parser, "machine")
    add(
        "--device",
        roles=(THIS_CALL,),
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: the GPU if there is one",
    )
    add("--gpu_id", roles=(THIS_CALL,), type=from_zero, default=0, metavar="N", help="index of the GPU")
    add(
        "--precision",
        roles=(NAMES_RUN,),
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="arithmetic of the network's body; weights, head, loss and penalties stay fp32; "
        "tf32 needs a GPU (on an H100 the MLP is 1.5 times as fast as in fp32, and ResNet18 3 times)",
    )
    add(
        "--cuda_graph",
        roles=(THIS_CALL,),
        action=yes_no,
        default=True,
        help="on a GPU, capture the training step and replay it (default: on)",
    )

    add = group(parser, "files of a run")
    add(
        "--save_path",
        roles=(THIS_CALL,),
        type=existing_or_new_dir,
        metavar="DIR",
        help="the run's folder (default: model_weights/<run name>)",
    )
    add(
        "--run_name",
        type=run_label,
        metavar="NAME",
        help="name of the run for its folder, legends and tables (default: made from the flags)",
    )
    add("--save_every", type=count, default=10, metavar="N", help="epochs between checkpoints")
    add(
        "--keep",
        roles=(THIS_CALL,),
        type=count,
        metavar="N",
        help="keep the last N checkpoints and those of epochs 1, 2, 4, 8, ..., which are then saved too (default: all)",
    )
    add(
        "--resume",
        roles=(THIS_CALL,),
        action="store_true",
        help="continue the run in the folder, or start if there is none (default: off)",
    )
    add(
        "--force",
        roles=(THIS_CALL,),
        action="store_true",
        help="delete the run in the folder and start again (default: off)",
    )
    add(
        "--tensorboard",
        roles=(THIS_CALL,),
        action="store_true",
        help="log to tensorboard/ in the run's folder; needs the package (default: off)",
    )
    add(
        "--wandb",
        roles=(THIS_CALL,),
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="log to Weights & Biases; needs the package; WANDB_MODE applies",
    )

    add = group(parser, "measuring")
    add("--nc_every", type=from_zero, default=0, metavar="N", help="epochs between measurements in training; 0: none")
    add(
        "--nc_layers",
        type=layer_names,
        metavar="L,L,...",
        help="layers that --nc_every measures, too, named as in model.named_modules(); head: the head (default: none)",
    )
    add(
        "--until",
        roles=(OFF_BY_DEFAULT,),
        type=positive,
        metavar="X",
        help="end training once NC2_H, NC3_WH, margin_rel_err and norm_rel_err are all at most X in two measurements "
        "in a row; needs --nc_every (default: off)",
    )
    add(
        "--load_path",
        roles=(THIS_CALL, MEASURES_ONLY),
        type=existing_or_new_dir,
        metavar="DIR",
        help="folder to validate (default: as --save_path)",
    )
    add(
        "--theory",
        roles=(THIS_CALL, MEASURES_ONLY),
        choices=THEORY_SUFFIXES,
        default="objective",
        help="optimum to compare with; objective: of the problem that is minimised; nominal: of the problem without "
        "bias at the flags' own lambdas; released: the formula of the paper's released code",
    )
    add(
        "--bn_statistics",
        roles=(THIS_CALL,),
        choices=BN_SUFFIXES,
        default="running",
        help="BatchNorm statistics when the network is measured: the running averages, or the exact statistics of the "
        "training set, computed layer by layer",
    )
    add(
        "--watch",
        roles=(THIS_CALL, MEASURES_ONLY),
        action="store_true",
        help="validate: follow a training run to its last epoch (default: off)",
    )
    add(
        "--recompute",
        roles=(THIS_CALL, MEASURES_ONLY),
        action="store_true",
        help="validate: measure again the epochs already measured (default: off)",
    )
    return parser


@cache
def flags_with(role):
    """Return the names of the flags that have a role, in the order of the help text."""
    return [action.dest for action in make_parser()._actions if role in getattr(action, "roles", ())]


def parse_args(doc=None, argv=None, config=None, folder=None):
    """Parse the command line (or `argv`) into a namespace.

    doc: the script's docstring. config: the config.json of the run in `folder`. Its flags are the defaults. Raises
    UserError if a flag of the command line would train other weights; the folder of the data and the device may differ.
    """
    parser = make_parser(doc)
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    typed = given_flags(parser, argv)
    of_files = typed.keys() - given_flags(parser, without_files(argv)).keys()
    if typed.get("optimizer", "Adam") not in ADAMS:  # a recipe for Adam with another optimizer
        typed = {name: value for name, value in typed.items() if name not in of_files & {*flags_with(ADAM_ONLY)}}
    args = merge_config(parser, defaults, typed, config, folder) if config else with_epochs(defaults | typed)
    if message := contradiction(args, defaults):
        named = [f"--{name}" for name in sorted(of_files) if re.search(rf"--(no-)?{name}\b", message)]
        message += f" ({', '.join(named)}: from the @FILE)" if named else ""
        raise UserError(f"{folder}/config.json and the flags: {message}" if config else message)
    return args


def without_files(argv):
    """Return the words `argv` (None: the command line) without @FILEs of flags."""
    return [word for word in (sys.argv[1:] if argv is None else argv) if not str(word).startswith("@")]


def given_flags(parser, argv):
    """Return {name: value} of the flags that the words `argv` (None: the command line) give, without the defaults."""
    absent = object()
    start = argparse.Namespace(**{action.dest: absent for action in parser._actions if action.dest != "help"})
    return {name: value for name, value in vars(parser.parse_args(argv, start)).items() if value is not absent}


def with_epochs(flags, epochs=None):
    """Return a namespace of flags {name: value}, with each share of --epochs, such as 36%, as a number of epochs.

    epochs: those that the shares are of; default: --epochs.
    """
    epochs = epochs or flags["epochs"]
    return argparse.Namespace(
        **{name: value.of(epochs) if isinstance(value, Share) else value for name, value in flags.items()}
    )


def merge_config(parser, defaults, typed, config, folder):
    """Return the namespace of the flags of a run's config.json and the typed ones; UserError if they contradict it."""
    names = {name for name in config["flags"] if name not in flags_with(THIS_CALL)}
    data_dir = config["flags"].get("data_dir")
    if isinstance(data_dir, str) and Path(data_dir).is_dir():
        names.add("data_dir")
    try:
        recorded = given_flags(parser, words_of(parser, {name: config["flags"][name] for name in names}))
    except UserError as error:
        raise UserError(f"{folder}/config.json: damaged, {error}") from None
    replaced = ("imbalance", "n_max") if typed.get("class_counts") else ("class_counts",) * bool(typed.get("imbalance"))
    kept = {name: value for name, value in recorded.items() if name not in replaced}
    of_epochs = config.get("epochs_of_shares")  # of the run's first call: a longer one keeps its schedules
    then, now = with_epochs(defaults | recorded), with_epochs(defaults | kept | typed, of_epochs)
    if now.class_counts == config["class_counts"]:  # the same images
        vars(now).update({name: getattr(then, name) for name in flags_with(PROFILE)})
    optional = flags_with(OFF_BY_DEFAULT)
    flags_then, flags_now = (
        training_flags(args) | {name: getattr(args, name) for name in optional} for args in (then, now)
    )
    if NPZ == source_of(then.dataset) == source_of(now.dataset):
        flags_then["dataset"] = now.dataset  # the file may have been moved
    if typed.get("resume") and now.decay_type == then.decay_type == "cosine" and now.epochs != then.epochs:
        raise UserError(
            f"{folder}: --epochs is {now.epochs}, in the run {then.epochs}, where its cosine ends: train a new run "
            "with --init_from and the last checkpoint of this one, or this one again with --force instead of --resume"
        )
    contradictions = [
        f"--{name} is {value}, in the run {flags_then.get(name)}"
        for name, value in flags_now.items()
        if name not in flags_with(LOCATION) and value != flags_then.get(name)
    ]
    if contradictions:
        way_on = "; to go on with other flags, train a new run with --init_from and the last checkpoint of this one"
        raise UserError(
            f"{folder}/config.json contradicts the flags: {'; '.join(contradictions)}{way_on if now.resume else ''}"
        )
    return now


def words_of(parser, flags):
    """Return the command line of flags {name: value}; the parser rejects it if they have values that it cannot give."""
    words = []
    for action in (action for action in parser._actions if action.dest in flags):
        value = flags[action.dest]
        if isinstance(action, argparse.BooleanOptionalAction) and isinstance(value, bool):
            words.append(action.option_strings[not value])
        elif action.nargs == 0 and isinstance(value, bool):
            words += [action.option_strings[0]] * value
        elif value is not None or action.default is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{action.option_strings[0]}={text}")
    return words


def contradiction(args, defaults):
    """Return the error message for flags that are valid one by one but not together, or None."""
    if args.resume and args.force:
        return "--resume and --force: give one of them"
    if message := conflict_of_counts(args):
        return message
    if args.whiten and args.data_augmentation:
        return "--whiten and --data_augmentation: give one of them; images are whitened once, before training"
    if args.planes and args.model == "MLP":
        return "--planes: not with --model MLP, whose layers have --width units"
    if args.planes and args.planes % 2 and "dense" in args.model.lower():
        return f"--planes {args.planes}: {args.model} needs an even number, twice its growth rate"
    if not args.feature_relu and args.model != "MLP":
        return f"--no-feature_relu: only with --model MLP; the features of {args.model} come from ReLUs by construction"
    for name in (name for name in flags_with(LOSS_VARIANT) if getattr(args, name)):
        if args.loss != "CrossEntropy":
            return f"--{name}: only with --loss CrossEntropy, of which it is a variant"
        if args.objective == "released":
            return f"--{name}: not with --objective released, which is what the paper's code minimises"
    if not args.feature_relu and args.objective == "released":
        return "--no-feature_relu: not with --objective released, which is what the paper's code minimises"
    if args.head_init != "random" and args.depth_linear > 1:
        return f"--head_init {args.head_init}: only with --depth_linear 1"
    if args.penalty_start != 1 and not args.penalty_fall_epochs:
        return "--penalty_start: also give --penalty_fall_epochs, in which the factor falls to 1"
    if args.penalty_hold_epochs + args.penalty_fall_epochs >= args.epochs and args.penalty_start != 1:
        return "--penalty_hold_epochs and --penalty_fall_epochs: their sum must be less than --epochs"
    if args.penalty_warmup_epochs >= args.epochs:
        return f"--penalty_warmup_epochs {args.penalty_warmup_epochs}: must be less than --epochs {args.epochs}"
    given = read_arguments(args.optimizer_args or "")
    for name in flags_with(ADAM_ONLY):
        if args.optimizer not in ADAMS and getattr(args, name) != defaults[name]:
            return f"--{name}: only with --optimizer Adam or AdamW"
        if "betas" in given and getattr(args, name) != defaults[name]:
            return f"--{name} and --optimizer_args betas: give one of them"
    for name in {"lr", "weight_decay"} & given.keys():
        return f"--optimizer_args {name}: give --{name} instead"
    for name in {"params", "capturable", "differentiable"} & given.keys():
        return f"--optimizer_args {name}: is set by the training loop"
    if args.class_weights_from and not args.class_weights:
        return "--class_weights_from: also give --class_weights"
    if args.nc_layers and not args.nc_every:
        return "--nc_layers: also give --nc_every, the epochs between measurements"
    if args.until and not args.nc_every:
        return "--until: also give --nc_every, the epochs between the measurements that it looks at"
    if args.stratified and args.no_shuffle:
        return "--stratified and --no_shuffle: give one of them"
    if args.decay_type == "cosine" and args.patience >= max(args.epochs, 2):
        return f"--decay_type cosine: --patience {args.patience} must be less than --epochs {args.epochs}"
    if bool(args.train_list) != bool(args.test_list):
        return "--train_list and --test_list: give both"
    if args.train_list and args.dataset != "imagefolder":
        return "--train_list: only with --dataset imagefolder, to whose --data_dir its paths are relative"
    if args.image_size != SIZE and source_of(args.dataset) not in (SOURCES["imagefolder"], NPZ):
        return f"--image_size: only with --dataset imagefolder or FILE.npz; {args.dataset} has {SIZE} x {SIZE} pixels"
    if args.model.startswith("VGG") and not 32 <= args.image_size < 64:
        return f"--image_size {args.image_size}: {args.model} halves the side five times, down to one pixel: 32 to 63"
    expected = source_of(args.dataset).num_classes
    if args.class_counts and expected and len(args.class_counts) != expected:
        return f"--class_counts: {args.dataset} has {expected} classes, {len(args.class_counts)} counts were given"
    if args.imbalance == "paper" and not source_of(args.dataset).paper_counts:
        return f"--imbalance paper: the paper has no profile for {args.dataset}; give balanced, exp:R or step:R"
    return None


def notes(args, num_images):
    """Return a sentence for each flag that has no effect on this training run, and one if its steps may be too few."""
    found = [
        f"--{name} has no effect on training, only on validate_NC_unbalanced.py"
        for name in flags_with(MEASURES_ONLY)
        if getattr(args, name) not in (None, False, "objective")
    ]
    if args.batch_size > num_images:
        found.append(
            f"--batch_size {args.batch_size} is more than the {num_images} images: every step takes all of them"
        )
    if (args.penalty_warmup_epochs or args.penalty_start != 1 or args.objective == "released") and not args.sep_decay:
        found.append("without --sep_decay, --objective and the schedules of the penalties have no effect")
    if args.class_weights_from > args.epochs:
        found.append(f"--class_weights_from {args.class_weights_from} is after the last epoch: all classes weigh 1")
    if args.penalty_start == 1:
        found += [
            f"--{name} has no effect without --penalty_start"
            for name in ("penalty_hold_epochs", "penalty_fall_epochs")
            if getattr(args, name)
        ]
    steps = args.epochs * -(-num_images // args.batch_size)
    if args.sep_decay and args.decay_type == "cosine" and args.head_init == "random" and steps < RECIPE_STEPS:
        found.append(
            f"the learning rate is at zero after {steps:,} steps, and the recipe needs {RECIPE_STEPS:,} or more: give "
            "more --epochs or a smaller --batch_size"
        )
    if args.revive and not args.feature_relu:
        found.append("--revive has no effect with --no-feature_relu")
    return found


# ---------------------------------------------------------------------------------------------------------
# The run's name and folder
# ---------------------------------------------------------------------------------------------------------


def training_flags(args):
    """Return the flags that change the trained weights, with their values."""
    parser = make_parser()
    names = [name for name in flags_with(NAMES_RUN) if args.model == "MLP" or name not in flags_with(MLP_ONLY)]
    if source_of(args.dataset) in (SOURCES["imagefolder"], NPZ):
        names += ["data_dir"]  # it determines the images
    if args.decay_type == "cosine":
        names += ["epochs"]  # the learning rate of each epoch depends on how many there will be
    names += [name for name in flags_with(OFF_BY_DEFAULT) if getattr(args, name) != parser.get_default(name)]
    flags = {name: getattr(args, name) for name in names}
    if not args.class_counts:
        flags["imbalance"] = args.imbalance or ("paper" if source_of(args.dataset).paper_counts else "all")
    for name in ("data_dir", "init_from"):
        if flags.get(name):
            flags[name] = str(Path(flags[name]).resolve())
    return flags


def code_digests(args, typed=None, config=None):
    """Return {flag: SHA-256 of its Python file} for the flags that name a function in one.

    typed: the flags of the command line. config: the config.json of the run that they resume. Raises UserError if only
    config.json names a file, which a call must do itself for it to be run, and if the file is not the one of the run.
    """
    values = {name: getattr(args, name) for name in flags_with(RUNS_CODE)}
    digests = {name: file_digest(value) for name, value in values.items() if FILE_FUNCTION.fullmatch(value)}
    for name, digest in digests.items() if config else ():
        if getattr(typed, name) != values[name]:
            raise UserError(
                f"--{name} {values[name]}: also give this flag, which runs a file; only config.json names it"
            )
        if config.get("code", {}).get(name) != digest:
            raise UserError(f"--{name} {values[name]}: the file has changed since the run began: restore it")
    return digests


def recorded_flags(args, before):
    """Return the flags that config.json records; a resumed run keeps those of its first call that belong to a call.

    before: the flags {name: value} of the run's config.json; {} if it is new.
    """
    return vars(args) | {name: value for name, value in before.items() if name in flags_with(THIS_CALL)}


def run_name(args):
    """Return the run's name: the main flags, and a hash of all training flags, so that no two settings share it."""
    flags = training_flags(args)
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    if args.run_name:
        return f"{args.run_name}_{digest}"
    model = f"MLP-relu{args.depth_relu}-width{args.width}" if args.model == "MLP" else args.model
    dataset = re.sub(r"[^\w.-]+", "-", Path(args.dataset).stem)
    profile = "counts" if args.class_counts else flags["imbalance"].replace(":", "")
    rates = f"lr{args.lr:g}-wd{args.weight_decay:g}-fd{args.feature_decay_rate:g}"
    return f"{model}_{dataset}-{profile}_{short_name(args.loss)}-{args.objective}_{rates}_seed{args.seed}_{digest}"


def run_folder(args):
    """Return the folder of the run: --save_path, or the one in model_weights/ whose name ends with the flags' hash."""
    if args.save_path:
        return Path(args.save_path)
    name = run_name(args)
    named = sorted(Path("model_weights").glob(f"*_{name[-8:]}"))  # perhaps by --run_name
    return named[0] if named and not args.run_name else Path("model_weights") / name
