"""Flags of the two entry scripts, and the name, folder and config that they give a run.

Both scripts take the same flags, so that one command line trains and validates; each ignores what only the
other needs.
"""

import argparse
import hashlib
import json
import math
import os
import re
from pathlib import Path

from datasets import SOURCES
from models import MODELS
from utils import UserError

# The flags that change the trained weights: they name the run, and must agree with its config.json.
TRAINING_FLAGS = (
    "dataset imbalance n_max class_counts data_augmentation model depth_linear bias loss objective sep_decay "
    "weight_decay feature_decay_rate optimizer lr decay_type gamma patience batch_size no_shuffle stratified "
    "adam_beta2 adam_eps amsgrad warmup_epochs penalty_warmup_epochs clip_grad_norm precision seed init_from"
).split()
THEORY_SUFFIXES = {"objective": "", "nominal": "_nominal", "released": "_released"}  # of CSV and geometry
MLP_FLAGS = ["depth_relu", "width", "revive"]  # no other model has them
FOLDER_FLAGS = ["data_dir"]  # says which images they are only for --dataset imagefolder

# The flags that belong to one call, not to the run.
LOCAL_FLAGS = set(
    "data_dir download device gpu_id save_path load_path keep resume force theory watch recompute tensorboard wandb "
    "cuda_graph".split()
)


# ---------------------------------------------------------------------------------------------------------
# Types: each turns a word into a value or says in one line what it must be
# ---------------------------------------------------------------------------------------------------------


def number(cast, low, *, above=False, high=math.inf, below=False):
    """An argparse type: a finite `cast` from low to high, without low itself if `above`, without high if `below`."""
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


def true_or_false(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return text == "True"


def class_counts(text):
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) < 2 or min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of whole numbers >= 1, one a class, two classes or more"
        )
    return counts


def imbalance(text):
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
        raise argparse.ArgumentTypeError(
            f"{text!r} is not step (every --patience epochs), cosine (after --patience epochs), or milestones such as "
            "step_60_120"
        )
    return text


def folder(text):
    return str(Path(os.path.expanduser(text)))


# ---------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors in one line; of a file of flags, @FILE, what follows a # is a comment."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if "default" in action.help else super()._get_help_string(action)


def make_parser(description=None):
    """The parser of both entry scripts."""
    parser = Parser(
        usage="%(prog)s [@FILE of flags] [flags]",
        description=description,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
        formatter_class=lambda prog: Help(prog, max_help_position=32, width=110),
    )
    yes_no = argparse.BooleanOptionalAction
    positive = number(float, 0, above=True)
    not_negative = number(float, 0)
    count = number(int, 1, high=2**31 - 1)

    def number_or_off(text):
        return not_negative(text) or None

    layers, units = number(int, 1, high=1000), number(int, 1, high=2**20)
    from_zero = number(int, 0, high=2**31 - 1)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=SOURCES, default="cifar10", help="images to train on")
    data.add_argument("--data_dir", type=folder, default=folder("~/data"), help="folder of the data sets")
    data.add_argument(
        "--download",
        action=yes_no,
        default=True,
        help="fetch a missing data set into --data_dir (default: on)",
    )
    data.add_argument(
        "--imbalance",
        type=imbalance,
        metavar="PROFILE",
        help="training images a class: paper, balanced, exp:R or step:R, with R = n_max/n_min "
        "(default: paper; for imagefolder, all images)",
    )
    data.add_argument(
        "--n_max",
        type=count,
        metavar="N",
        help="images of the largest class with balanced, exp:R and step:R (default: as many as there are)",
    )
    data.add_argument(
        "--class_counts",
        type=class_counts,
        metavar="N,N,...",
        help="training images of each class, instead of --imbalance (default: by --imbalance)",
    )
    data.add_argument(
        "--data_augmentation",
        action=yes_no,
        default=False,
        help="random crops (4 pixels of padding) and horizontal flips while training (default: off)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="MLP", help="network")
    model.add_argument("--depth_relu", type=layers, default=6, metavar="N", help="MLP: ReLU layers before the last")
    model.add_argument("--width", type=units, default=1024, metavar="N", help="MLP: units of a layer")
    model.add_argument("--depth_linear", type=layers, default=1, metavar="N", help="linear layers of the head")
    model.add_argument("--bias", action=yes_no, default=True, help="bias in the head (default: on)")

    goal = parser.add_argument_group("objective")
    goal.add_argument("--loss", choices=["CrossEntropy", "MSE"], default="CrossEntropy", help="loss of a sample")
    goal.add_argument(
        "--objective",
        choices=["paper", "released"],
        default="paper",
        help="paper: the unconstrained features problem; released: what the paper's released code minimises",
    )
    goal.add_argument(
        "--sep_decay",
        action=yes_no,
        default=False,
        help="penalise the head and the features only, as the theory does (default: off: weight decay on "
        "all parameters)",
    )
    goal.add_argument(
        "--weight_decay", type=not_negative, default=1e-4, metavar="X", help="lambda_W, factor of |W|^2 / 2"
    )
    goal.add_argument(
        "--feature_decay_rate",
        type=not_negative,
        default=1e-5,
        metavar="X",
        help="lambda_H, factor of |h|^2 / 2, with --sep_decay",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=count, default=4000, metavar="N", help="passes over the training set")
    training.add_argument("--batch_size", type=count, default=256, metavar="N", help="images of a step at most")
    training.add_argument("--optimizer", choices=["Adam", "SGD"], default="Adam", help="SGD has momentum 0.9")
    training.add_argument("--lr", type=positive, default=1e-4, metavar="X", help="first learning rate")
    training.add_argument(
        "--decay_type",
        type=decay_type,
        default="step",
        metavar="TYPE",
        help="step: lr times gamma every --patience epochs; step_60_120: at epochs 60 and 120; cosine: constant for "
        "--patience epochs, then a half cosine that would be zero after --epochs",
    )
    training.add_argument(
        "--patience", type=count, default=2000, metavar="N", help="epochs from lr drop to lr drop, or to the cosine"
    )
    training.add_argument("--gamma", type=positive, default=0.1, metavar="X", help="factor of an lr drop")
    training.add_argument(
        "--warmup_epochs",
        type=from_zero,
        default=0,
        metavar="N",
        help="first epochs, in which the learning rate rises linearly to --lr; 0: none",
    )
    training.add_argument(
        "--penalty_warmup_epochs",
        type=from_zero,
        default=0,
        metavar="N",
        help="first epochs, in which the penalties of --sep_decay rise linearly from nothing; 0: none",
    )
    training.add_argument(
        "--adam_beta2",
        type=number(float, 0, high=1, below=True),
        default=0.999,
        metavar="X",
        help="Adam: how slowly its mean of squared gradients forgets",
    )
    training.add_argument(
        "--adam_eps", type=positive, default=1e-8, metavar="X", help="Adam: added to the root of that mean"
    )
    training.add_argument(
        "--amsgrad",
        action=yes_no,
        default=False,
        help="Adam: divide by the largest such mean so far (default: off)",
    )
    training.add_argument(
        "--clip_grad_norm",
        type=number_or_off,
        metavar="X",
        help="largest norm of a gradient; 0: off (default: off)",
    )
    training.add_argument(
        "--revive",
        action=yes_no,
        default=False,
        help="MLP: features at zero, to which their ReLU gives no gradient, get the one that would raise them "
        "(default: off)",
    )
    training.add_argument(
        "--no_shuffle", action="store_true", help="batches in the order of the data set (default: off)"
    )
    training.add_argument(
        "--stratified",
        action=yes_no,
        default=False,
        help="shuffled batches that each have every class in proportion, equal in size but for one image "
        "(default: off)",
    )
    training.add_argument(
        "--seed", type=number(int, 0, high=2**63 - 1), default=1, metavar="N", help="of weights and batches"
    )
    training.add_argument(
        "--init_from",
        type=lambda text: os.path.realpath(os.path.expanduser(text)),
        metavar="FILE",
        help="checkpoint with the first weights (default: random)",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one"
    )
    machine.add_argument("--gpu_id", type=from_zero, default=0, metavar="N", help="index of the GPU")
    machine.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        default="fp32",
        help="of products and convolutions in the network's body; weights, head, loss and penalties stay fp32; "
        "tf32 needs a GPU",
    )
    machine.add_argument(
        "--cuda_graph", action=yes_no, default=True, help="on a GPU, replay a captured training step (default: on)"
    )

    files = parser.add_argument_group("files of a run")
    files.add_argument(
        "--save_path", type=folder, metavar="DIR", help="the run's folder (default: model_weights/<run name>)"
    )
    files.add_argument("--save_every", type=count, default=10, metavar="N", help="epochs between checkpoints")
    files.add_argument(
        "--keep",
        type=count,
        metavar="N",
        help="checkpoints to keep: the last N, and those of epochs 1, 2, 4, 8, ..., which are then saved too "
        "(default: all)",
    )
    files.add_argument("--resume", action="store_true", help="go on where the run stopped (default: off)")
    files.add_argument(
        "--force", action="store_true", help="delete an earlier run in the folder and start again (default: off)"
    )
    files.add_argument(
        "--tensorboard",
        action="store_true",
        help="log to tensorboard/ in the run's folder as well; the package is needed (default: off)",
    )
    files.add_argument(
        "--wandb",
        type=true_or_false,
        default=False,
        metavar="True|False",
        help="log to Weights & Biases as well (the package is needed; WANDB_MODE applies)",
    )

    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--nc_every",
        type=from_zero,
        default=0,
        metavar="N",
        help="epochs between measurements while training; 0: none",
    )
    measuring.add_argument(
        "--load_path", type=folder, metavar="DIR", help="folder to validate (default: as --save_path)"
    )
    measuring.add_argument(
        "--theory",
        choices=THEORY_SUFFIXES,
        default="objective",
        help="optimum to compare with: of the problem that is minimised; the closed form at the flags' own "
        "decays; the released code's formula",
    )
    measuring.add_argument("--watch", action="store_true", help="follow a training run until it ends (default: off)")
    measuring.add_argument("--recompute", action="store_true", help="measure again what is in the CSV (default: off)")
    return parser


def parse_args(description=None, argv=None):
    """Parses the command line (or `argv`) into a namespace; `args.given` names the flags that were typed."""
    parser = make_parser(description)
    absent = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    given = {name for name in names if getattr(args, name) is not absent}
    for name in set(names) - given:
        setattr(args, name, parser.get_default(name))
    args.given = given
    if message := contradiction(args):
        parser.error(message)
    return args


def contradiction(args):
    """What is wrong with flags that are right one by one, or None."""
    if args.resume and args.force:
        return "--resume and --force: give one of them"
    if args.class_counts and args.imbalance:
        return "--class_counts and --imbalance: give one of them"
    if args.n_max and not (args.imbalance or "").startswith(("balanced", "exp", "step")):
        return "--n_max: only with --imbalance balanced, exp:R or step:R"
    if args.revive and args.model != "MLP":
        return "--revive: only with --model MLP"
    for name in ("adam_beta2", "adam_eps", "amsgrad"):
        if args.optimizer != "Adam" and name in args.given:
            return f"--{name}: only with --optimizer Adam"
    if args.stratified and args.no_shuffle:
        return "--stratified and --no_shuffle: give one of them"
    if args.decay_type == "cosine" and args.patience >= args.epochs:
        return f"--decay_type cosine begins after --patience {args.patience}: give less than --epochs {args.epochs}"
    expected = SOURCES[args.dataset].num_classes
    if args.class_counts and expected and len(args.class_counts) != expected:
        return f"--class_counts: {args.dataset} has {expected} classes, {len(args.class_counts)} counts were given"
    if args.imbalance == "paper" and not SOURCES[args.dataset].paper_counts:
        return f"--imbalance paper: the paper has no profile for {args.dataset}; give balanced, exp:R or step:R"
    return None


# ---------------------------------------------------------------------------------------------------------
# Name, folder, config
# ---------------------------------------------------------------------------------------------------------


def training_flags(args):
    """The flags that change the trained weights, with their values."""
    names = list(TRAINING_FLAGS)
    if args.model == "MLP":
        names += MLP_FLAGS
    if args.dataset == "imagefolder":
        names += FOLDER_FLAGS
    if args.decay_type == "cosine":
        names += ["epochs"]  # the learning rate of each epoch depends on how many there will be
    flags = {name: getattr(args, name) for name in names}
    if not args.class_counts:
        flags["imbalance"] = args.imbalance or ("paper" if SOURCES[args.dataset].paper_counts else "all")
    for name in ("data_dir", "init_from"):
        if flags.get(name):
            flags[name] = str(Path(flags[name]).resolve())
    return flags


def run_name(args):
    """A name that two different settings never share: the main flags to read, and a hash of all of them."""
    flags = training_flags(args)
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    model = f"MLP-relu{args.depth_relu}-width{args.width}" if args.model == "MLP" else args.model
    profile = "counts" if args.class_counts else flags["imbalance"].replace(":", "")
    return f"{model}_{args.dataset}-{profile}_{args.loss}-{args.objective}_seed{args.seed}_{digest}"


def run_folder(args):
    """The folder that training writes: --save_path, or one by the run's name."""
    return Path(args.save_path or Path("model_weights") / run_name(args))


def config_flags(args):
    """Every flag, for config.json."""
    return {name: value for name, value in sorted(vars(args).items()) if name != "given"}


def check_config(config, folder):
    """Stops at a flag in a run's config that the command line would not take."""
    for action in make_parser()._actions:
        if action.dest in config["flags"] and not takes(action, config["flags"][action.dest]):
            value = config["flags"][action.dest]
            raise UserError(f"{folder}/config.json: damaged, --{action.dest} cannot be {value!r}")


def takes(action, value):
    """Whether an argparse action could have given this value."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        parsed = action.type(text) if action.type else text
        os.fsencode(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    same = parsed == value or (isinstance(parsed, str) and isinstance(value, str))  # a path may be another one today
    return same and (action.choices is None or parsed in action.choices)


def adopt_config(args, config, folder):
    """Takes the flags that were not typed from a run's config; stops at typed ones that contradict it.

    Only flags that change the trained weights can contradict: where the data lie, or which device measures, is free.
    """
    check_config(config, folder)
    then = argparse.Namespace(**{**vars(args), **config["flags"]})
    for name in set(config["flags"]) & set(vars(args)) - args.given - LOCAL_FLAGS:
        setattr(args, name, getattr(then, name))
    if "data_dir" not in args.given and Path(then.data_dir).is_dir():
        args.data_dir = then.data_dir
    if "imbalance" in args.given:
        args.class_counts = None  # the typed profile stands instead of the config's counts
    if args.class_counts == config["class_counts"]:
        args.class_counts, args.imbalance, args.n_max = then.class_counts, then.imbalance, then.n_max  # the same images
    flags_now, flags_then = training_flags(args), training_flags(then)
    contradictions = [
        f"--{name} is {flags_now[name]} here and {flags_then.get(name)} there"
        for name in flags_now
        if name in args.given and name not in LOCAL_FLAGS and flags_now[name] != flags_then.get(name)
    ]
    if contradictions:
        raise UserError(f"{folder}/config.json contradicts the flags: {'; '.join(contradictions)}")
    if message := contradiction(args):
        raise UserError(f"{folder}/config.json and the flags: {message}")
