"""What the parser of every script needs: the parser itself, the types of its arguments, and flags that several have."""

import argparse
import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from utils import FILE_FUNCTION, UserError, read_arguments

# ---------------------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and whose @FILEs of flags may have comments after a #.

    doc: the script's docstring, whose first line is the description.
    """

    def __init__(self, doc=None, **options):
        description = doc.split("\n")[0] if doc else None
        options = {"formatter_class": Help} | options
        super().__init__(description=description, allow_abbrev=False, **options)

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


SYNONYMS = {  # what people type: our flag, or flags
    "--lambda_w": "--weight_decay",
    "--lambda_h": "--feature_decay_rate",
    "--lambda": "--weight_decay (lambda_W) or --feature_decay_rate (lambda_H)",
    "--wd": "--weight_decay",
    "--learning_rate": "--lr",
    "--momentum": "--optimizer_args momentum=X",
    "--num_epochs": "--epochs",
}


def did_you_mean(word, known):
    """Return "; did you mean X?" for the known word closest to `word`, or "" if none is close."""
    typed = word.lower().replace("-", "_").replace("__", "--", 1)
    for synonym in difflib.get_close_matches(typed, SYNONYMS, 1, 0.85):
        if SYNONYMS[synonym].split()[0] in known:
            return f"; did you mean {SYNONYMS[synonym]}?"
    closest = difflib.get_close_matches(word.lower(), [name.lower() for name in known], 1, 0.7)
    return "".join(f"; did you mean {name}?" for name in known if name.lower() in closest)


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


@dataclass(frozen=True)
class Share:
    """A share of --epochs, of at least `low` epochs."""

    percent: float
    low: int

    def of(self, epochs):
        """Return the number of epochs that the share stands for."""
        return max(round(self.percent / 100 * epochs), self.low)


def parsed_or(parse, text, other):
    """Return parse(text), an argparse type; where it fails, the error says that the text is no `other` either."""
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {other}") from None


def epochs_or_share(low):
    """Return an argparse type: a whole number of epochs >= low, or a `Share` of --epochs such as 36%."""
    whole = bounded(int, low, high=2**31 - 1)

    def parse(text):
        if re.fullmatch(r"\d{1,2}(\.\d+)?%", text):
            return Share(float(text[:-1]), low)
        return parsed_or(whole, text, "a share of --epochs such as 36%")

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


def name_or_function(names):
    """Return an argparse type: one of the names, in upper or lower case, or FILE.py:function."""
    named = name_of(names)

    def parse(text):
        if found := FILE_FUNCTION.fullmatch(text):
            return f"{existing_or_new_dir(found[1])}:{found[2]}"
        return parsed_or(named, text, "FILE.py:function")

    return parse


def keyword_arguments(text):
    """Return `key=value,...` with the keys sorted; values are numbers, True, False, None, words, or tuples of those."""
    try:
        arguments = read_arguments(text)
        written = ",".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))
        if read_arguments(written) != arguments:  # inf
            raise ValueError
        return written or None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not key=value,... with numbers, True, False, None, words or tuples, such as betas=(0.9,0.99)"
        ) from None


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


def layer_names(text):
    """An argparse type: names of layers, separated by commas, without repetitions."""
    names = list(dict.fromkeys(text.split(",")))
    if "" in names:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of layers like layers.1,layers.3,head")
    return names


def imbalance_profile(text):
    if text in ("paper", "balanced"):
        return text
    kind, _, ratio = text.partition(":")
    try:
        ratio = float(ratio)
    except ValueError:
        ratio = math.nan
    if not (kind in ("exp", "step") and 1 <= ratio < math.inf):
        hint = f"; R = n_max/n_min: write {kind}:{1 / ratio:g}" if kind in ("exp", "step") and 0 < ratio < 1 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not paper, balanced, exp:R or step:R with R >= 1{hint}")
    return f"{kind}:{ratio:g}"


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
# Flags that several scripts have
# ---------------------------------------------------------------------------------------------------------


def add_count_flags(add):
    """Add the flags that say how many training images each class has; `conflict_of_counts` judges them together."""
    add(
        "--imbalance",
        type=imbalance_profile,
        metavar="PROFILE",
        help="training images per class: paper, balanced, exp:R or step:R, with R = n_max/n_min "
        "(default: paper; for imagefolder and FILE.npz, all images)",
    )
    add(
        "--n_max",
        type=bounded(int, 1, high=2**31 - 1),
        metavar="N",
        help="images of the largest class with balanced, exp:R and step:R (default: the most that the data allow)",
    )
    add(
        "--class_counts",
        type=class_count_list,
        metavar="N,N,...",
        help="training images of each class, instead of --imbalance (default: set by --imbalance)",
    )


def conflict_of_counts(args):
    """Return the error message for flags of `add_count_flags` that exclude each other, or None."""
    if args.class_counts and args.imbalance:
        return "--class_counts and --imbalance: give one of them"
    if args.n_max and not (args.imbalance or "").startswith(("balanced", "exp", "step")):
        return "--n_max: only with --imbalance balanced, exp:R or step:R"
    return None


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
