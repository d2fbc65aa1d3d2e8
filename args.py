"""Parse and check the flags of the two entry scripts, and derive the name and the folder of a run from them.

Training and validation take the same flags, so that one command line serves both; each ignores the flags
that only the other needs.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

from datasets import SOURCES
from engine.run import BN_SUFFIXES, CALL_FLAGS, THEORY_SUFFIXES
from models import MODELS
from utils import UserError

# The flags that change the trained weights: they name the run and must agree with its config.json.
TRAINING_FLAGS = (
    "dataset imbalance n_max class_counts data_augmentation model depth_linear bias loss objective sep_decay "
    "weight_decay feature_decay_rate optimizer lr decay_type gamma patience batch_size no_shuffle stratified "
    "adam_beta2 adam_eps amsgrad warmup_epochs penalty_warmup_epochs clip_grad_norm precision seed init_from"
).split()
MLP_FLAGS = ["depth_relu", "width", "revive"]  # change the weights of an MLP only
LOSS_FLAGS = ["class_weights", "logit_adjustment", "logit_scaling", "ldam_margin", "label_smoothing"]
OPTIONAL_FLAGS = {  # flag: default. A default is no part of the name, so that runs older than the flag keep theirs
    "planes": None,
    "revive": False,
    "feature_relu": True,
    **dict.fromkeys(LOSS_FLAGS, 0.0),
    "penalty_start": 1.0,
    "penalty_hold_epochs": 0,
    "penalty_fall_epochs": 0,
}
PROFILE_FLAGS = ("imbalance", "n_max", "class_counts")  # three ways to say how many images each class has


# ---------------------------------------------------------------------------------------------------------
# Types: each converts a word of the command line, or raises ArgumentTypeError
# ---------------------------------------------------------------------------------------------------------


def bounded(cast, low, *, above=False, high=math.inf, below=False):
    """Return an argparse type: a finite number, from low (exclusive if `above`) to high (exclusive if `below`)."""
    kind = {int: "a whole number", float: "a number"}[cast]
    bound = f"{'>' if above else '>='} {low}" + (f" and {'<' if below else '<='} {high}" if high < math.inf else "")

    def parse(text):
        try:
            value = cast(text)
        except ValueError:
            value = math.nan
        inside = (value > low if above else value >= low) and (value < high if below else value <= high)
        if not (inside and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {bound}")
        return value

    return parse


def epochs_or_share(low):
    """Return an argparse type: a whole number of epochs >= low, or a share of --epochs such as 36%."""
    whole = bounded(int, low, high=2**31 - 1)

    def parse(text):
        if re.fullmatch(r"\d{1,2}(\.\d+)?%", text):
            return text
        try:
            return whole(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor a share of --epochs such as 36%") from None

    return parse


def true_or_false(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return text == "True"


def name_of(names):
    """Return an argparse type: one of the names, in upper or lower case."""
    by_lower = {name.lower(): name for name in names}

    def parse(text):
        if text.lower() not in by_lower:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}{did_you_mean(text, names)}")
        return by_lower[text.lower()]

    return parse


def class_count_list(text):
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) < 2 or min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of two or more whole numbers >= 1, one per class"
        )
    return counts


def imbalance_profile(text):
    if text in ("paper", "balanced"):
        return text
    kind, _, ratio = text.partition(":")
    try:
        valid = kind in ("exp", "step") and 1 <= float(ratio) < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not paper, balanced, exp:R or step:R with R >= 1")
    return f"{kind}:{float(ratio):g}"


def decay_type(text):
    if text not in ("step", "cosine") and not re.fullmatch(r"step(_[1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not step, cosine, or milestones such as step_60_120")
    return text


def existing_or_new_dir(text):
    return str(Path(os.path.expanduser(text)))


def real_path(text):
    return os.path.realpath(os.path.expanduser(text))


def run_label(text):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,79}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of up to 80 letters, digits and . _ = + -")
    return text


# ---------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------


def did_you_mean(word, known):
    """Return "; did you mean X?" for the known word closest to `word`, or "" if none is close."""
    closest = difflib.get_close_matches(word.lower(), [name.lower() for name in known], 1, 0.7)
    return "".join(f"; did you mean {name}?" for name in known if name.lower() in closest)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and whose @FILEs of flags may have comments after a #."""

    def error(self, message):
        if found := re.match(r"unrecognized arguments: (?:[^-]\S* )*(-[^ =]+)", message):
            message += did_you_mean(found[1], self._option_string_actions)
        raise UserError(message)

    def convert_arg_line_to_args(self, line):
        """Return a line's words; an @FILE in it that is not found from the current folder is looked for in ours."""
        words = line.split("#")[0].split()
        return [
            f"@{Path(__file__).parent / word[1:]}" if word[0] == "@" and not Path(word[1:]).exists() else word
            for word in words
        ]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" to every help text that does not state the default itself."""

    def _get_help_string(self, action):
        return action.help if "default" in action.help else super()._get_help_string(action)


def add_loss_flags(add):
    """Add the flags of `nc_theory.LossVariant`, the variants of the cross entropy for imbalanced classes."""
    not_negative = bounded(float, 0)
    add(
        "--class_weights",
        type=not_negative,
        default=0.0,
        metavar="E",
        help="weight class k by n_k^-E, scaled to a mean of 1 over the samples; 1: inverse frequency; 0: off",
    )
    add(
        "--logit_adjustment",
        type=not_negative,
        default=0.0,
        metavar="TAU",
        help="add TAU log(n_j/N) to the logits (LA: Menon et al. 2021); 0: off",
    )
    add(
        "--logit_scaling",
        type=not_negative,
        default=0.0,
        metavar="GAMMA",
        help="multiply the logits by (n_j/n_max)^GAMMA (CDT: Ye et al. 2020; with LA, VS: Kini et al. 2021); 0: off",
    )
    add(
        "--ldam_margin",
        type=not_negative,
        default=0.0,
        metavar="C",
        help="subtract C (n_min/n_k)^(1/4) from the logit of the sample's class (LDAM: Cao et al. 2019, here without "
        "normalised features and their scale of 30); 0: off",
    )
    add(
        "--label_smoothing",
        type=bounded(float, 0, high=1, below=True),
        default=0.0,
        metavar="EPS",
        help="share of the label that is spread evenly over all classes (Szegedy et al. 2016); 0: off",
    )


def make_parser(description=None):
    """Return the parser of both entry scripts."""
    parser = Parser(
        usage="%(prog)s [@FILE of flags] [flags]",
        description=description,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        formatter_class=lambda prog: Help(prog, max_help_position=32, width=110),
    )
    yes_no = argparse.BooleanOptionalAction
    positive, not_negative = bounded(float, 0, above=True), bounded(float, 0)
    count, from_zero = bounded(int, 1, high=2**31 - 1), bounded(int, 0, high=2**31 - 1)
    layers, units = bounded(int, 1, high=1000), bounded(int, 1, high=2**20)

    def number_or_off(text):
        return not_negative(text) or None

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=SOURCES, default="cifar10", help="images to train on")
    add("--data_dir", type=existing_or_new_dir, default=existing_or_new_dir("~/data"), help="folder of the data sets")
    add("--download", action=yes_no, default=True, help="download a missing data set into --data_dir (default: on)")
    add(
        "--imbalance",
        type=imbalance_profile,
        metavar="PROFILE",
        help="training images per class: paper, balanced, exp:R or step:R, with R = n_max/n_min "
        "(default: paper; for imagefolder, all images)",
    )
    add(
        "--n_max",
        type=count,
        metavar="N",
        help="images of the largest class with balanced, exp:R and step:R (default: the most that the data allow)",
    )
    add(
        "--class_counts",
        type=class_count_list,
        metavar="N,N,...",
        help="training images of each class, instead of --imbalance (default: set by --imbalance)",
    )
    add(
        "--data_augmentation",
        action=yes_no,
        default=False,
        help="train on random crops (4 pixels of padding) and horizontal flips (default: off)",
    )

    add = parser.add_argument_group("model").add_argument
    add("--model", type=name_of(MODELS), default="MLP", metavar="MODEL", help=f"network: {', '.join(MODELS)}")
    add("--depth_relu", type=layers, default=6, metavar="N", help="MLP: ReLU layers before the feature layer")
    add("--width", type=units, default=1024, metavar="N", help="MLP: units per layer")
    add(
        "--planes",
        type=bounded(int, 2, high=2**12),
        metavar="P",
        help="channels of the first stage of a ResNet or VGG; twice the growth rate of a DenseNet (default: 64; "
        "densenet_cifar: 24)",
    )
    add("--depth_linear", type=layers, default=1, metavar="N", help="number of linear layers in the head")
    add("--bias", action=yes_no, default=True, help="bias in the head (default: on)")
    add(
        "--feature_relu",
        action=yes_no,
        default=True,
        help="MLP: apply a ReLU to the features; without it they can have any sign (default: on)",
    )

    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=["CrossEntropy", "MSE"], default="CrossEntropy", help="loss per sample")
    add_loss_flags(add)
    add(
        "--objective",
        choices=["paper", "released"],
        default="paper",
        help="paper: the unconstrained features model; released: what the paper's released code minimises",
    )
    add(
        "--sep_decay",
        action=yes_no,
        default=False,
        help="penalise only the head and the features, as the theory does (default: off: weight decay on all "
        "parameters)",
    )
    add("--weight_decay", type=not_negative, default=1e-4, metavar="X", help="lambda_W, the factor of |W|^2 / 2")
    add(
        "--feature_decay_rate",
        type=not_negative,
        default=1e-5,
        metavar="X",
        help="lambda_H, the factor of |h|^2 / 2, with --sep_decay",
    )

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=4000, metavar="N", help="passes over the training set")
    add("--batch_size", type=count, default=256, metavar="N", help="largest number of images in a step")
    add("--optimizer", choices=["Adam", "SGD"], default="Adam", help="SGD has momentum 0.9")
    add("--lr", type=positive, default=1e-4, metavar="X", help="initial learning rate")
    add(
        "--decay_type",
        type=decay_type,
        default="step",
        metavar="TYPE",
        help="step: multiply lr by gamma every --patience epochs; step_60_120: at epochs 60 and 120; cosine: constant "
        "for --patience epochs, then a half cosine that reaches zero after --epochs",
    )
    add(
        "--patience",
        type=epochs_or_share(1),
        default=2000,
        metavar="N",
        help="epochs between lr drops, or before the cosine; a number or a share of --epochs such as 36%%",
    )
    add("--gamma", type=positive, default=0.1, metavar="X", help="factor of an lr drop")
    add(
        "--warmup_epochs",
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs in which the learning rate rises linearly to --lr; 0: none",
    )
    add(
        "--penalty_warmup_epochs",
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs in which the penalties of --sep_decay rise linearly from zero; 0: none",
    )
    add(
        "--penalty_start",
        type=positive,
        default=1.0,
        metavar="X",
        help="initial factor of the penalties of --sep_decay, which falls to 1 as set by the next two flags; 1: off",
    )
    add(
        "--penalty_hold_epochs",
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs at the start of training in which the factor stays at --penalty_start",
    )
    add(
        "--penalty_fall_epochs",
        type=epochs_or_share(0),
        default=0,
        metavar="N",
        help="epochs after those in which the factor falls geometrically to 1",
    )
    add(
        "--adam_beta2",
        type=bounded(float, 0, high=1, below=True),
        default=0.999,
        metavar="X",
        help="Adam: decay rate of the running mean of squared gradients",
    )
    add("--adam_eps", type=positive, default=1e-8, metavar="X", help="Adam: term added to the denominator")
    add("--amsgrad", action=yes_no, default=False, help="Adam: divide by the largest mean so far (default: off)")
    add(
        "--clip_grad_norm",
        type=number_or_off,
        metavar="X",
        help="clip the norm of the gradient to X; 0: no clipping (default: no clipping)",
    )
    add(
        "--revive",
        action=yes_no,
        default=False,
        help="pass gradients that raise features at zero and, in an MLP, hidden layers that are all zero for an image; "
        "an ordinary ReLU blocks them (default: off)",
    )
    add("--no_shuffle", action="store_true", help="take batches in the order of the data set (default: off)")
    add(
        "--stratified",
        action=yes_no,
        default=False,
        help="shuffle so that each batch has every class in proportion and sizes differ by at most one (default: off)",
    )
    add(
        "--seed",
        type=bounded(int, 0, high=2**63 - 1),
        default=1,
        metavar="N",
        help="seed of the initial weights and of the batches",
    )
    add("--init_from", type=real_path, metavar="FILE", help="checkpoint with the initial weights (default: random)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    add("--gpu_id", type=from_zero, default=0, metavar="N", help="index of the GPU")
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="arithmetic of the network's body; weights, head, loss and penalties stay fp32; "
        "tf32 needs a GPU (on an H100 the MLP is 1.5 times as fast as in fp32, and ResNet18 3 times)",
    )
    add(
        "--cuda_graph",
        action=yes_no,
        default=True,
        help="on a GPU, capture the training step and replay it (default: on)",
    )

    add = parser.add_argument_group("files of a run").add_argument
    add(
        "--save_path",
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
        type=count,
        metavar="N",
        help="keep the last N checkpoints and those of epochs 1, 2, 4, 8, ..., which are then saved too (default: all)",
    )
    add(
        "--resume", action="store_true", help="continue the run in the folder, or start if there is none (default: off)"
    )
    add("--force", action="store_true", help="delete the run in the folder and start again (default: off)")
    add(
        "--tensorboard",
        action="store_true",
        help="log to tensorboard/ in the run's folder; needs the package (default: off)",
    )
    add(
        "--wandb",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="log to Weights & Biases; needs the package; WANDB_MODE applies",
    )

    add = parser.add_argument_group("measuring").add_argument
    add("--nc_every", type=from_zero, default=0, metavar="N", help="epochs between measurements in training; 0: none")
    add("--load_path", type=existing_or_new_dir, metavar="DIR", help="folder to validate (default: as --save_path)")
    add(
        "--theory",
        choices=THEORY_SUFFIXES,
        default="objective",
        help="optimum to compare with; objective: of the problem that is minimised; nominal: of the problem without "
        "bias at the flags' own lambdas; released: the formula of the paper's released code",
    )
    add(
        "--bn_statistics",
        choices=BN_SUFFIXES,
        default="running",
        help="BatchNorm statistics when the network is measured: the running averages, or the exact statistics of the "
        "training set, computed layer by layer",
    )
    add("--watch", action="store_true", help="validate: follow a training run to its last epoch (default: off)")
    add("--recompute", action="store_true", help="validate: measure again the epochs already measured (default: off)")
    return parser


def parse_args(description=None, argv=None, config=None, folder=None):
    """Parse the command line (or `argv`) into a namespace.

    config: the config.json of the run in `folder`. Its flags are the defaults. Raises UserError if a flag of the
    command line would train other weights; the folder of the data and the device may differ.
    """
    parser = make_parser(description)
    args = resolve_shares(parser.parse_args(argv))
    if config:
        args = merge_config(parser, argv, args, config, folder)
    if message := contradiction(args, parser):
        raise UserError(f"{folder}/config.json and the flags: {message}" if config else message)
    return args


def resolve_shares(args):
    """Replace each share of --epochs, such as 36%, by a number of epochs; return args."""
    for name in ("patience", "warmup_epochs", "penalty_warmup_epochs", "penalty_hold_epochs", "penalty_fall_epochs"):
        value = getattr(args, name)
        if isinstance(value, str):
            setattr(args, name, max(round(float(value[:-1]) / 100 * args.epochs), int(name == "patience")))
    return args


def merge_config(parser, argv, typed, config, folder):
    """Parse the command line again, after the flags of a run's config.json; raise UserError if it contradicts them."""
    flags = {name: value for name, value in config["flags"].items() if name not in CALL_FLAGS}
    data_dir = config["flags"].get("data_dir")
    if isinstance(data_dir, str) and Path(data_dir).is_dir():
        flags["data_dir"] = data_dir
    try:
        then = parser.parse_args(words_of(parser, flags))
    except UserError as error:
        raise UserError(f"{folder}/config.json: damaged, {error}") from None
    replaced = ("imbalance", "n_max") if typed.class_counts else ("class_counts",) if typed.imbalance else ()
    words = words_of(parser, {name: value for name, value in flags.items() if name not in replaced})
    args = resolve_shares(make_parser().parse_args([*words, *(argv if argv is not None else sys.argv[1:])]))
    if args.class_counts == config["class_counts"]:  # the same images
        for name in PROFILE_FLAGS:
            setattr(args, name, getattr(then, name))
    flags_now, flags_then = (
        training_flags(found) | {name: getattr(found, name) for name in OPTIONAL_FLAGS} for found in (args, then)
    )
    contradictions = [
        f"--{name} is {value}, in the run {flags_then.get(name)}"
        for name, value in flags_now.items()
        if name != "data_dir" and value != flags_then.get(name)
    ]
    if contradictions:
        raise UserError(f"{folder}/config.json contradicts the flags: {'; '.join(contradictions)}")
    return args


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


def contradiction(args, parser):
    """Return the error message for flags that are valid one by one but not together, or None."""
    if args.resume and args.force:
        return "--resume and --force: give one of them"
    if args.class_counts and args.imbalance:
        return "--class_counts and --imbalance: give one of them"
    if args.n_max and not (args.imbalance or "").startswith(("balanced", "exp", "step")):
        return "--n_max: only with --imbalance balanced, exp:R or step:R"
    if args.planes and args.model == "MLP":
        return "--planes: not with --model MLP, whose layers have --width units"
    if args.planes and args.planes % 2 and "dense" in args.model.lower():
        return f"--planes {args.planes}: {args.model} needs an even number, twice its growth rate"
    if not args.feature_relu and args.model != "MLP":
        return f"--no-feature_relu: only with --model MLP; the features of {args.model} come from ReLUs by construction"
    for name in (name for name in LOSS_FLAGS if getattr(args, name)):
        if args.loss != "CrossEntropy":
            return f"--{name}: only with --loss CrossEntropy, of which it is a variant"
        if args.objective == "released":
            return f"--{name}: not with --objective released, which is what the paper's code minimises"
    if not args.feature_relu and args.objective == "released":
        return "--no-feature_relu: not with --objective released, which is what the paper's code minimises"
    if args.penalty_start != 1 and not args.penalty_fall_epochs:
        return "--penalty_start: also give --penalty_fall_epochs, in which the factor falls to 1"
    if args.penalty_hold_epochs + args.penalty_fall_epochs >= args.epochs and args.penalty_start != 1:
        return "--penalty_hold_epochs and --penalty_fall_epochs: their sum must be less than --epochs"
    if args.penalty_warmup_epochs >= args.epochs:
        return f"--penalty_warmup_epochs {args.penalty_warmup_epochs}: must be less than --epochs {args.epochs}"
    for name in ("adam_beta2", "adam_eps", "amsgrad"):
        if args.optimizer != "Adam" and getattr(args, name) != parser.get_default(name):
            return f"--{name}: only with --optimizer Adam"
    if args.stratified and args.no_shuffle:
        return "--stratified and --no_shuffle: give one of them"
    if args.decay_type == "cosine" and args.patience >= max(args.epochs, 2):
        return f"--decay_type cosine: --patience {args.patience} must be less than --epochs {args.epochs}"
    expected = SOURCES[args.dataset].num_classes
    if args.class_counts and expected and len(args.class_counts) != expected:
        return f"--class_counts: {args.dataset} has {expected} classes, {len(args.class_counts)} counts were given"
    if args.imbalance == "paper" and not SOURCES[args.dataset].paper_counts:
        return f"--imbalance paper: the paper has no profile for {args.dataset}; give balanced, exp:R or step:R"
    return None


def notes(args, num_images):
    """Return a sentence for each flag that has no effect on this training run."""
    found = [
        f"--{name} has no effect on training" for name in ("load_path", "watch", "recompute") if getattr(args, name)
    ]
    if args.theory != "objective":
        found.append("--theory has no effect on training, only on validate_NC_unbalanced.py")
    if args.batch_size > num_images:
        found.append(
            f"--batch_size {args.batch_size} is more than the {num_images} images: every step takes all of them"
        )
    if (args.penalty_warmup_epochs or args.penalty_start != 1 or args.objective == "released") and not args.sep_decay:
        found.append("without --sep_decay, --objective and the schedules of the penalties have no effect")
    if args.penalty_start == 1:
        found += [
            f"--{name} has no effect without --penalty_start"
            for name in ("penalty_hold_epochs", "penalty_fall_epochs")
            if getattr(args, name)
        ]
    if args.revive and not args.feature_relu:
        found.append("--revive has no effect with --no-feature_relu")
    return found


# ---------------------------------------------------------------------------------------------------------
# The run's name and folder
# ---------------------------------------------------------------------------------------------------------


def training_flags(args):
    """Return the flags that change the trained weights, with their values."""
    names = list(TRAINING_FLAGS)
    if args.model == "MLP":
        names += MLP_FLAGS
    if args.dataset == "imagefolder":
        names += ["data_dir"]  # it determines the images
    if args.decay_type == "cosine":
        names += ["epochs"]  # the learning rate of each epoch depends on how many there will be
    names += [name for name, default in OPTIONAL_FLAGS.items() if getattr(args, name) != default]
    flags = {name: getattr(args, name) for name in names}
    if not args.class_counts:
        flags["imbalance"] = args.imbalance or ("paper" if SOURCES[args.dataset].paper_counts else "all")
    for name in ("data_dir", "init_from"):
        if flags.get(name):
            flags[name] = str(Path(flags[name]).resolve())
    return flags


def run_name(args):
    """Return the run's name: the main flags, and a hash of all training flags, so that no two settings share it."""
    flags = training_flags(args)
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    if args.run_name:
        return f"{args.run_name}_{digest}"
    model = f"MLP-relu{args.depth_relu}-width{args.width}" if args.model == "MLP" else args.model
    profile = "counts" if args.class_counts else flags["imbalance"].replace(":", "")
    rates = f"lr{args.lr:g}-wd{args.weight_decay:g}-fd{args.feature_decay_rate:g}"
    return f"{model}_{args.dataset}-{profile}_{args.loss}-{args.objective}_{rates}_seed{args.seed}_{digest}"


def run_folder(args):
    """Return the folder of the run: --save_path, or the one in model_weights/ whose name ends with the flags' hash."""
    if args.save_path:
        return Path(args.save_path)
    name = run_name(args)
    older = sorted(Path("model_weights").glob(f"*_{name[-8:]}"))  # named by an earlier version, or by --run_name
    return older[0] if older and not args.run_name else Path("model_weights") / name
