"""Define the published tables: what is trained for each, what to expect, and how the documents show it.

    python scripts/tables.py                                              (list the tables)
    python scripts/tables.py run TABLE DIR [OPTION of scripts/sweep.sh]...
    python scripts/tables.py reproduce DATASET [OPTION of scripts/sweep.sh]...

`run` and `reproduce` do the work of scripts/table.sh and scripts/reproduce.sh, which first find or install the packages
and describe the arguments. With --check before them, they only check the arguments, which needs no packages.
scripts/update_tables.py writes the tables into the documents.
"""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import STOP_SIGNALS, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "scripts" / "sweep.sh"
PYTHON = os.environ.get("PYTHON") or sys.executable  # of the commands


# ---------------------------------------------------------------------------------------------------------
# Definitions
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A row of a table: runs that differ by their seed."""

    flags: str  # added to the table's flags; where both give a flag, this one wins
    label: str = ""  # in the documents
    seeds: int | None = None  # default: the table's


@dataclass(frozen=True)
class Table:
    """A published table. The documents show it if it has `heads`, columns of `COLUMNS` in scripts/update_tables.py."""

    settings: dict  # name: Setting, in the order in which they are trained
    flags: str  # of all runs
    seeds: int = 1
    what: str = ""  # is trained, for the list of tables
    time: str = ""
    expected: str = ""
    one_at_a_time: bool = False  # on CPUs the default is a job per core
    part_of: str = ""  # the table whose runs this one shows in other columns
    title: str = ""  # of the first column
    heads: tuple = ()  # of the other columns
    worst: tuple = ()  # heads of the columns that also show the worst seed, in brackets
    spread: tuple = ()  # heads of the columns that also show the standard deviation over the seeds
    shown: tuple = ()  # names of settings, in the order of the rows; default: as in `settings`
    figures: dict = field(default_factory=dict)  # file name in docs/figures: figure of plot_nc.py
    drawn: tuple = ()  # names of the settings in these figures; default: all
    x: str = "epoch"  # the x axis of figures
    bn_statistics: str = "running"
    by_class: bool = False  # the documents also show a row per class: `TABLE_classes`


GEOMETRY = ("NC1", "NC2_H", "NC2_WWT", "NC3_WH", "margins", "norms")
UP_TO_500 = "--class_counts 100,100,200,200,300,300,400,400,500,500"  # N = 3,000
WIDE_MLP = f"{UP_TO_500} --width 512 --depth_relu 6 --batch_size 256"
UP_TO_50 = "--class_counts 10,10,20,20,30,30,40,40,50,50"  # N = 300

PAPER = (  # the paper's own flags for CIFAR-10
    "--no-bias --depth_relu 6 --depth_linear 1 --width 1024 --sep_decay --feature_decay_rate 0.00001 "
    "--loss CrossEntropy --lr 0.0001 --weight_decay 0.0001 --optimizer Adam --epochs 4000 --patience 2000"
)
PENALISED = "--sep_decay --head_init optimum --weight_decay 0.005 --feature_decay_rate 0.00005"
PLAIN_ADAM = (
    f"--no-bias {UP_TO_500} --depth_relu 6 --depth_linear 1 --width 512 --batch_size 256 --weight_decay 0.005 "
    "--feature_decay_rate 0.00005 --epochs 1000 --patience 500"
)
PLAIN_DIGITS = (
    "--dataset digits --depth_relu 3 --width 256 --weight_decay 0.01 --feature_decay_rate 0.0005 --clip_grad_norm 1 "
    "--batch_size 102"
)
LA = "--logit_adjustment 1"
RANDOM_HEAD_RESNET = "@scripts/random_head.flags --no-revive --lr 0.001 --batch_size 60 --epochs 600"
RANDOM_HEAD = "@scripts/random_head.flags --head_init random --no-head_fixed --whiten 0"
PAPER_DATASETS = ("cifar10", "cifar100", "mnist", "fashionmnist", "svhn")
PAPER_MODELS = Table(  # of scripts/reproduce.sh, which adds the data set and the objective
    flags=f"{PAPER} --batch_size 256",
    settings={
        **{model: Setting(f"--model {model}") for model in ("MLP", "ResNet18", "VGG11", "densenet_cifar")},
        "ResNet18_32": Setting("--model ResNet18 --batch_size 32"),  # as in the README of the paper's code
    },
)

TABLES = {
    "recipe": Table(
        what="The recipe of docs/recipe.md on six settings, five seeds each",
        time="8 minutes of training on one core, 1.3 GB",
        expected="every run ends within 0.1 % of the theorem",
        flags="@scripts/collapse.flags --width 256 --depth_relu 4 --batch_size 200 --weight_decay 0.004 "
        "--feature_decay_rate 0.0001 --save_every 60 --nc_every 2",
        seeds=5,
        settings={
            "readme": Setting(
                f"{WIDE_MLP} --weight_decay 0.005 --feature_decay_rate 0.00005",
                "CIFAR-10, 100 to 500 of a class, N = 3,000",
            ),
            "small_lambda": Setting(
                f"{WIDE_MLP} --weight_decay 0.0001 --feature_decay_rate 0.0001",
                "the same, lambda_W = lambda_H = 1e-4",
            ),
            "mixed": Setting(
                "--class_counts 420,60,350,120,280,90,500,240,150,200 --width 512",
                "CIFAR-10, 60 to 500 of a class, N = 2,410",
            ),
            "exp10": Setting("--imbalance exp:10 --n_max 500", "CIFAR-10, `exp:10`, n_max 500, N = 2,043"),
            "step10": Setting("--imbalance step:10 --n_max 500", "CIFAR-10, `step:10`, n_max 500, N = 2,750"),
            "digits": Setting(
                "--dataset digits --depth_relu 3 --batch_size 102 --weight_decay 0.01 --feature_decay_rate 0.0005",
                "digits, 34 to 170 of a class, N = 1,020",
            ),
        },
        title="five seeds each",
        heads=(*GEOMETRY, "steps to 0.01", "minutes"),
        worst=(*GEOMETRY, "steps to 0.01"),
        figures={"theorem": "theorem", "nc_curves": "nc_curves", "heatmaps": "heatmaps"},
        drawn=("readme",),
    ),
    "collapse": Table(  # drawn by scripts/collapse_figure.py
        what="Digits at four imbalances and five lambdas, for scripts/collapse_figure.py, three seeds each",
        time="2 to 31 seconds of training for each run on a core of a busy machine",
        expected="classes below the threshold end at zero, the other norms within 0.16 % of the theorem",
        flags="@scripts/collapse.flags --dataset digits --imbalance exp:10 --n_max 170 --depth_relu 3 --width 128 "
        "--batch_size 102 --save_every 60 --nc_every 60 --weight_decay 0.02 --feature_decay_rate 0.002",
        seeds=3,
        settings={
            **{f"R{ratio}": Setting(f"--imbalance exp:{ratio}") for ratio in (3, 10, 30, 100)},
            **{
                f"lambda{factor:g}": Setting(
                    f"--weight_decay {0.02 * factor:g} --feature_decay_rate {0.002 * factor:g}"
                )
                for factor in (0.25, 0.5, 2, 4)
            },
        },
    ),
    "small": Table(
        what="Imbalanced and balanced classes, an exponential and a step profile, and large lambdas, with which the "
        "minority classes collapse, three seeds each",
        time="13 minutes on 2 CPU cores, 1.1 GB",
        expected="within 0.1 % of the theorem; 100 % training accuracy unless classes collapse",
        flags="@scripts/random_head.flags --width 256 --depth_relu 4 --batch_size 200 --weight_decay 0.004 "
        "--feature_decay_rate 0.0001 --save_every 20",
        seeds=3,
        settings={
            "imbalanced": Setting(UP_TO_500, "imbalanced, 100 to 500 of a class"),
            "balanced": Setting("--imbalance balanced --n_max 300", "balanced, 300 of a class"),
            "exp10": Setting("--imbalance exp:10 --n_max 500", "`exp:10`, 500 to 50"),
            "step10": Setting("--imbalance step:10 --n_max 500", "`step:10`, 500 and 50"),
            "collapsed": Setting(  # by the theorem, classes of at most 108 images collapse
                "--class_counts 500,450,400,350,300,250,200,60,50,40 --weight_decay 0.024 --feature_decay_rate 0.0006",
                "collapsed, 500 to 200 and 60, 50, 40",
            ),
        },
        title="three seeds each, mean",
        heads=(*GEOMETRY, "train", "test"),
        figures={"small_theorem": "theorem", "small_nc_curves": "nc_curves"},
    ),
    "small_digits": Table(
        what="The same on digits; runs in place of small if DIR has no CIFAR-10",
        flags="@scripts/random_head.flags --dataset digits --width 256 --depth_relu 3 --batch_size 102 "
        "--weight_decay 0.01 --feature_decay_rate 0.0005 --save_every 20",
        seeds=3,
        settings={
            "imbalanced": Setting("--imbalance paper"),
            "balanced": Setting("--imbalance balanced --n_max 100"),
            "exp10": Setting("--imbalance exp:10 --n_max 170"),
            "step10": Setting("--imbalance step:10 --n_max 170"),
            "collapsed": Setting(  # by the theorem, classes of at most 35 images collapse
                "--class_counts 170,150,130,110,90,80,70,20,15,10 --weight_decay 0.03 --feature_decay_rate 0.0015"
            ),
        },
    ),
    "paper": Table(
        what="The recipe with the paper's MLP, lambdas and N = 30,000 images, and both objectives, three seeds each",
        time="8 minutes of training for each run on one core",
        expected="within 0.8 % of the theorem (`released`: 1.2 %)",
        one_at_a_time=True,
        seeds=3,
        flags="@scripts/collapse.flags --depth_relu 6 --width 1024 --batch_size 256 --feature_decay_rate 0.00001 "
        "--weight_decay 0.0001 --lr 0.0005 --epochs 25 --save_every 25 --nc_every 1",
        settings={
            "paper": Setting("--objective paper", "`--objective paper`"),
            "released": Setting("--objective released", "`--objective released`"),
        },
        title="three seeds each",
        heads=("train", *GEOMETRY, "optimality gap", "steps to 0.01", "minutes"),
        figures={"paper": "nc_curves"},
        worst=(*GEOMETRY, "steps to 0.01", "minutes"),
        x="step",
    ),
    "paper_command": Table(
        what="The paper's command with its MLP, for both objectives, in TF32 and in fp32; for a GPU",
        time="by the time of a step, 5 to 7 minutes for 4,000 epochs on an H100",
        expected="unknown: we have not run it",
        one_at_a_time=True,
        flags=f"{PAPER} --batch_size 256 --save_every 50 --nc_every 10",
        settings={
            "paper_tf32": Setting("--objective paper --precision tf32"),
            "released_tf32": Setting("--objective released --precision tf32"),
            "paper": Setting("--objective paper"),
            "released": Setting("--objective released"),
        },
    ),
    "paper_resnet18": Table(
        what="ResNet18 with N = 30,000: the recipe with a head at the optimum, and the paper's command; for a GPU",
        time="by the images a second, 5 minutes and 2.5 hours on an H100",
        expected="unknown: we have not run it",
        one_at_a_time=True,
        flags="--model ResNet18 --precision tf32 --save_every 50 --nc_every 10",
        settings={
            "optimum": Setting(
                "@scripts/collapse_resnet.flags --bn_statistics training_set --batch_size 256 --epochs 120 "
                "--feature_decay_rate 0.00001 --weight_decay 0.0001"
            ),
            "paper": Setting(f"{PAPER} --batch_size 256"),
        },
    ),
    "plain": Table(
        what="Plain Adam in fp32 and bf16 on 3,000 CIFAR-10 images; on digits a head with bias, and MSE; one seed each",
        time="11 minutes on one core in fp32, 6 in bf16, 1 to 2 on digits",
        expected="fp32 runs within 0.5 % of the optimum, bf16 within 2 %",
        flags="--model MLP --sep_decay --optimizer Adam --lr 0.001 --save_every 100",
        settings={
            "adam": Setting(PLAIN_ADAM, "(a) CIFAR-10, N = 3,000, plain Adam, 1,000 epochs"),
            "adam_bf16": Setting(f"{PLAIN_ADAM} --precision bf16", "(a) with `--precision bf16`"),
            "bias": Setting(f"--bias {PLAIN_DIGITS} --epochs 1000 --patience 800", "(b) digits, with bias"),
            "mse": Setting(f"--no-bias --loss MSE {PLAIN_DIGITS} --epochs 500 --patience 400", "(c) digits, MSE"),
        },
        title="one seed each",
        heads=(*GEOMETRY, "train", "test"),
    ),
    "losses": Table(
        what="Nine losses for imbalanced classes, each compared with its own optimum, three seeds each",
        time="43 minutes on one core",
        expected="within 0.05 % of the optimum",
        flags=f"@scripts/random_head.flags {UP_TO_500} --width 256 --depth_relu 4 --batch_size 200 "
        "--weight_decay 0.005 --feature_decay_rate 0.00005 --save_every 50",
        seeds=3,
        settings={
            "ce": Setting("--loss CrossEntropy", "cross entropy"),
            "weighted_half": Setting("--class_weights 0.5", "`--class_weights 0.5`"),
            "weighted": Setting("--class_weights 1", "`--class_weights 1`"),
            "la": Setting("--logit_adjustment 1 --epochs 500", "`--logit_adjustment 1`, 500 epochs"),
            "cdt": Setting("--logit_scaling 0.2", "`--logit_scaling 0.2`"),
            "vs": Setting(
                "--logit_adjustment 1 --logit_scaling 0.3 --epochs 500",
                "`--logit_adjustment 1 --logit_scaling 0.3`, 500 epochs",
            ),
            "ldam": Setting("--ldam_margin 0.5", "`--ldam_margin 0.5`"),
            "smoothing": Setting("--label_smoothing 0.1", "`--label_smoothing 0.1`"),
            "free": Setting("--no-feature_relu", "cross entropy, `--no-feature_relu`"),
        },
        title="three seeds each",
        heads=("optimality gap", "NC1", "NC2_H", "NC3_WH", "margins", "norms", "test", "test, few"),
        worst=("optimality gap", "NC3_WH"),
        figures={"free_features": "theorem"},
        drawn=("ce", "free"),
    ),
    "batch_norm": Table(
        what="The recipe with BatchNorm: ResNet18 and VGG11 on 300 images, three seeds each, measured with the "
        "statistics of the training set, and with running ones",
        time="1 and 3 minutes of training for each run on one core",
        expected="ResNet18 within 0.07 % of the theorem, VGG11 within 1.2 %",
        flags=f"@scripts/collapse_resnet.flags --planes 16 {UP_TO_50} --batch_size 300 --weight_decay 0.005 "
        "--feature_decay_rate 0.0005 --save_every 250 --nc_every 10",
        bn_statistics="training_set",
        seeds=3,
        settings={
            "resnet18": Setting("--model ResNet18", "ResNet18"),
            "vgg11": Setting("--model VGG11", "VGG11"),
        },
        title="three seeds each",
        heads=(*GEOMETRY, "optimality gap", "steps to 0.01", "minutes"),
        worst=(*GEOMETRY, "steps to 0.01"),
    ),
    "zoo": Table(
        what="Heads that start at random: ResNet18, ResNet50, VGG11 and DenseNet with BatchNorm, measured with "
        "statistics of the training set and with running ones",
        time="2 to 65 minutes for each run on one core. With more than six jobs, run it twice: two runs continue "
        "others",
        expected="norms within 0.5 % with statistics of the training set; with batches of 60, ResNet50 12 % and "
        "ResNet18 with 64 channels 8 %, until batches of all images continue them",
        flags=f"{RANDOM_HEAD_RESNET} --planes 16 --weight_decay 0.005 --feature_decay_rate 0.0005 --save_every 500",
        bn_statistics="training_set",
        settings={
            "resnet18_64": Setting(
                f"--model ResNet18 --planes 64 {UP_TO_50} --epochs 400", "ResNet18, 64 channels, N = 300, 400 epochs"
            ),
            "resnet18_3000": Setting(
                f"--model ResNet18 {UP_TO_500} --epochs 130 --feature_decay_rate 0.00005",
                "ResNet18, 100 to 500 of a class, N = 3,000",
                seeds=3,
            ),
            "densenet_cifar": Setting(
                f"--model densenet_cifar --planes 12 {UP_TO_50}", "DenseNet, 12 channels, N = 300"
            ),
            "resnet50": Setting(f"--model ResNet50 {UP_TO_50}", "ResNet50, N = 300, batches of 60"),
            "resnet18": Setting(f"--model ResNet18 {UP_TO_50}", "ResNet18, 10 to 50 of a class, N = 300", seeds=5),
            "resnet18_exp10": Setting(
                "--model ResNet18 --imbalance exp:10 --n_max 60 --batch_size 82 --epochs 1000",
                "ResNet18, `exp:10`, n_max 60, N = 240",
                seeds=5,
            ),
            "vgg11": Setting(f"--model VGG11 {UP_TO_50}", "VGG11, N = 300", seeds=5),
            "resnet50_full": Setting(
                f"--model ResNet50 {UP_TO_50} --batch_size 300 --epochs 160 --lr 0.0003 --patience 20 "
                "--warmup_epochs 10 --penalty_warmup_epochs 0 --init_from model_weights/zoo/resnet50/epoch_600.pth",
                "ResNet50, then 160 epochs with batches of 300",
            ),
            "resnet18_64_full": Setting(
                f"--model ResNet18 --planes 64 {UP_TO_50} --batch_size 300 --epochs 90 --lr 0.0005 --patience 30 "
                "--warmup_epochs 5 --penalty_warmup_epochs 0 --init_from model_weights/zoo/resnet18_64/epoch_400.pth",
                "the same, then 90 epochs with batches of 300",
            ),
        },
        title="statistics of the training set",
        heads=("seeds", *GEOMETRY, "optimality gap", "minutes"),
        worst=GEOMETRY,
        shown=(
            *("resnet18", "resnet18_exp10", "resnet18_3000", "vgg11", "densenet_cifar"),
            *("resnet50", "resnet50_full", "resnet18_64", "resnet18_64_full"),
        ),
        figures={"zoo_theorem": "theorem"},
        drawn=("resnet18", "vgg11", "densenet_cifar", "resnet50_full"),
    ),
}
TABLES["heads"] = Table(
    what="Heads that start at random, at a simplex ETF, or at the optimum, on `exp:10`, with the cross entropy and "
    "with logit adjustment, five seeds each",
    time="28 minutes of training on one core of a busy machine",
    expected="heads at the optimum within 0.2 % of the theorem; the others are far from it after as many steps",
    flags="@scripts/collapse.flags --imbalance exp:10 --n_max 500 --width 256 --depth_relu 4 --batch_size 200 "
    "--weight_decay 0.004 --feature_decay_rate 0.0001 --save_every 60 --nc_every 2",
    seeds=5,
    settings={
        "random_250": Setting(RANDOM_HEAD, "random, 250 epochs of `random_head.flags`"),
        "random": Setting("--head_init random --no-head_fixed", "random"),
        "etf_fixed": Setting("--head_init etf", "fixed at a simplex ETF"),
        "optimum": Setting("--no-head_fixed", "starts at the optimum"),
        "optimum_fixed": Setting("", "fixed at the optimum"),
        "not_whitened": Setting("--whiten 0", "fixed at the optimum, images not whitened"),
        "la_random_250": Setting(f"{RANDOM_HEAD} {LA}", "LA: random, 250 epochs of `random_head.flags`"),
        "la_etf_fixed": Setting(f"--head_init etf {LA}", "LA: fixed at a simplex ETF"),
        "la_optimum_fixed": Setting(LA, "LA: fixed at the optimum"),
        "la_not_whitened": Setting(f"--whiten 0 {LA}", "LA: fixed at the optimum, images not whitened"),
    },
    title="head, five seeds each",
    heads=(*GEOMETRY, "optimality gap", "steps to 0.01"),
    worst=(*GEOMETRY, "optimality gap"),
    shown=("random", "etf_fixed", "optimum", "optimum_fixed", "not_whitened"),
    figures={"heads": "nc_curves"},
    drawn=("random", "etf_fixed", "optimum", "optimum_fixed"),
    x="step",
)
TABLES["generalisation"] = replace(
    TABLES["heads"],
    part_of="heads",
    heads=("train", "test", "test, balanced", "test, few"),
    worst=(),
    spread=("test", "test, balanced", "test, few"),
    shown=(),
    figures={},
)
TABLES["optimizers"] = Table(
    what="Optimizers with the penalties in the loss and a head that starts at the optimum, and with weight decay on "
    "all parameters instead, coupled or decoupled, three seeds each",
    time="30 minutes on a busy core",
    expected="with the penalties in the loss gaps below 1 %; with weight decay, NC0 from 0.2 (SGD) to 0.6 (AdamW)",
    flags=f"--model MLP --no-bias {UP_TO_500} --width 256 --depth_relu 4 --batch_size 200 --stratified --revive "
    "--clip_grad_norm 0.5 --decay_type cosine --epochs 40 --patience 36% --save_every 40 --nc_every 4",
    seeds=3,
    settings={
        "sgd_penalised": Setting(f"{PENALISED} --optimizer SGD --lr 0.1", "penalties in the loss, SGD"),
        "adam_penalised": Setting(
            f"{PENALISED} --optimizer Adam --lr 0.0015 --adam_beta2 0.99", "penalties in the loss, Adam"
        ),
        "signum_penalised": Setting(f"{PENALISED} --optimizer Signum --lr 0.0002", "penalties in the loss, Signum"),
        "muon_penalised": Setting(f"{PENALISED} --optimizer Muon --lr 0.002", "penalties in the loss, Muon"),
        "sgd": Setting("--optimizer SGD --lr 0.1 --weight_decay 0.0025", "weight decay, SGD"),
        "sgdw": Setting("--optimizer SGDW --lr 0.1 --weight_decay 0.025", "decoupled, SGDW"),
        "adam": Setting("--optimizer Adam --lr 0.001 --weight_decay 0.005", "weight decay, Adam"),
        "adamw": Setting("--optimizer AdamW --lr 0.001 --weight_decay 2.5", "decoupled, AdamW"),
        "signum": Setting("--optimizer Signum --lr 0.0002 --weight_decay 12.5", "decoupled, Signum"),
        "muon": Setting("--optimizer Muon --lr 0.002 --weight_decay 1.25", "decoupled, Muon"),
    },
    title="three seeds each",
    heads=(
        *("NC0", "optimality gap", "NC1", "steps to 0.01"),
        *("train", "test", "test, few"),
    ),
    worst=("NC0", "optimality gap"),
)
LOSSES = {
    "ce": Setting("--loss CrossEntropy", "cross entropy"),
    "la": Setting("--logit_adjustment 1", "LA, `--logit_adjustment 1`"),
    "vs": Setting("--logit_adjustment 1 --logit_scaling 0.3", "VS, LA with `--logit_scaling 0.3`"),
    "ldam": Setting("--ldam_margin 0.5", "LDAM, `--ldam_margin 0.5`"),
}
TABLES["shuttle"] = Table(
    what="Four losses on Shuttle, 7 classes of 8 to 36,469 rows, with a head fixed at the optimum, three seeds each; "
    "DIR is that of `scripts/get_data.sh shuttle DIR`",
    time="2 to 5 minutes for a run on a core that others use as well",
    expected="with cross entropy, classes of 40 rows or more within 0.6 % of the optimum",
    flags="@scripts/collapse.flags --whiten 0 --dataset shuttle.npz --width 128 --depth_relu 3 --batch_size 512 "
    "--lr 0.002 --weight_decay 0.001 --feature_decay_rate 0.000001 --epochs 50 --save_every 50",
    seeds=3,
    settings=LOSSES,
    title="three seeds each",
    heads=(*GEOMETRY, "optimality gap", "train", "test", "test, balanced", "test, few"),
    worst=("margins", "norms"),
    spread=("test", "test, balanced", "test, few"),
    by_class=True,
)
TABLES["mnist"] = replace(
    TABLES["shuttle"],
    what="The same on digits of MNIST, 100 to 500 of a class; DIR is that of `scripts/get_data.sh mnist DIR`",
    time="a minute for a run on a core that others use as well",
    expected="every run within 0.12 % of the optimum",
    flags=f"@scripts/collapse.flags --whiten 0 --dataset imagefolder {UP_TO_500} --width 128 --depth_relu 3 "
    "--batch_size 200 --lr 0.0015 --epochs 80 --weight_decay 0.005 --feature_decay_rate 0.00005 --save_every 80",
)
TABLES["zoo_running"] = replace(
    TABLES["zoo"],
    part_of="zoo",
    bn_statistics="running",
    title="running statistics",
    heads=("seeds", *GEOMETRY, "optimality gap"),
    figures={},
)


def summary_of(name):
    """Return the table whose results/TABLE.csv a table shows: of the whole if that is measured in the same way."""
    whole = TABLES[name].part_of
    return whole if whole and TABLES[whole].bn_statistics == TABLES[name].bn_statistics else name


# ---------------------------------------------------------------------------------------------------------
# The list, and the commands
# ---------------------------------------------------------------------------------------------------------


def listing():
    """Return the tables that can be run, with their times and what to expect, as text."""
    lines = []
    for name, table in TABLES.items():
        if not table.part_of:
            time, expected = table.time and f" Time: {table.time}.", table.expected and f" Expected: {table.expected}."
            text = f"{name:<20}  {table.what}.{time}{expected}".replace(" %", "\N{NO-BREAK SPACE}%")
            lines += textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent=" " * 24)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def runs_of(table, out, extra):
    """Return {folder: command-line words} of a table's runs, which go into folders in `out`, with further words."""
    runs = {}
    for name, setting in table.settings.items():
        seeds = setting.seeds or table.seeds
        for seed in range(1, seeds + 1):
            folder = f"{out}/{name}-{seed}" if seeds > 1 else f"{out}/{name}"
            words = [*table.flags.split(), *bn_flags(table), *setting.flags.split(), "--seed", str(seed), *extra]
            runs[folder] = [*words, "--save_path", folder, "--resume"]
    return runs


def bn_flags(table):
    return [] if table.bn_statistics == "running" else ["--bn_statistics", table.bn_statistics]


def command_of(table, words):
    """Return the shell command that trains and measures a run, twice if not only with running statistics."""
    calls = [["train_1st_order_unbalanced.py", *words], ["validate_NC_unbalanced.py", *words]]
    if bn_flags(table):
        calls.append([*calls[1], "--bn_statistics", "running"])
    command = " && ".join(shlex.join([PYTHON, *call]) for call in calls)
    if "\n" in command:
        raise UserError("a folder or flag has a line break in it, and commands.txt one command per line")
    return command


# ---------------------------------------------------------------------------------------------------------
# Running a table
# ---------------------------------------------------------------------------------------------------------


def main():
    words = sys.argv[1:]
    check = words[:1] == ["--check"]
    match words[check:]:
        case [] | ["-h" | "--help"]:
            return print(f"{__doc__}\n{listing()}")
        case ["--list"]:
            return print(listing())
        case ["run", name, data, *options]:
            job = published_table(name, data, options)
        case ["reproduce", *rest]:
            job = paper_models(*rest)
        case _:
            raise UserError("wrong arguments: see --help")
    return None if check else run(*job)


def published_table(name, data, options):
    """Return (table, folder of its runs, further flags, options of sweep.sh) for scripts/table.sh."""
    if name == "small" and not any(Path(data, found).is_dir() for found in ("cifar10/train", "cifar-10-batches-py")):
        name = "small_digits"
    if name not in TABLES or TABLES[name].part_of:
        raise UserError(f"there is no table '{name}': see --help")
    check_options(options)
    table = TABLES[name]
    if not (table.one_at_a_time or options or os.environ.get("CUDA_VISIBLE_DEVICES")):
        options = ["-j", str(len(os.sched_getaffinity(0)))]
    return table, f"model_weights/{name}", ["--data_dir", data], options


def paper_models(dataset="", *options):
    """Return the same for scripts/reproduce.sh."""
    objective = os.environ.get("OBJECTIVE") or "paper"
    if dataset not in PAPER_DATASETS:
        raise UserError(f"'{dataset}' is not a data set of the paper")
    if objective not in ("paper", "released"):
        raise UserError(f"OBJECTIVE: '{objective}' is not paper or released")
    try:
        flags = shlex.split(os.environ.get("FLAGS", ""))
    except ValueError as error:
        raise UserError(f"FLAGS: {error}") from None
    check_options(options)
    extra = ["--dataset", dataset, "--objective", objective, *flags]
    settings = {name: s for name, s in PAPER_MODELS.settings.items() if dataset == "cifar10" or name != "ResNet18_32"}
    return replace(PAPER_MODELS, settings=settings), f"model_weights/{dataset}_{objective}", extra, options


def check_options(options):
    """Exit with the message and the status of sweep.sh if it does not take these options."""
    status = subprocess.run([SWEEP, *options, "--count", SWEEP], stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(status)


def run(table, out, extra, options):
    """Train and measure the runs of a table in `out`, then write its summary and figures; return the exit status."""
    os.chdir(ROOT)
    runs = runs_of(table, out, extra)
    for folder in runs:
        Path(folder).mkdir(parents=True, exist_ok=True)
    commands = Path(out) / "commands.txt"
    commands.write_text("".join(f"{command_of(table, words)}\n" for words in runs.values()))
    if "--count" in options:
        return subprocess.run([SWEEP, *options, commands]).returncode
    read_data(next(iter(runs.values())))
    status = sweep(*options, commands)
    if "--line" in options:  # one of many tasks: the others may not have begun
        runs = [folder for folder in runs if (Path(folder) / "config.json").exists()]
        if not runs:
            return status
    if table.bn_statistics != "running":
        call("summarize.py", *runs, "--worst", "--out", f"{out}_running")
    call("summarize.py", *runs, "--worst", "--out", out, *bn_flags(table))
    measured = [folder for folder in runs if (Path(folder) / "nc_metrics.csv").exists()]
    x = [] if table.x == "epoch" else ["--x", table.x]
    if measured:
        call("plot_nc.py", *measured, *x, *bn_flags(table), "--out", f"{out}/figures")
    return status


def read_data(words):
    """Download or decode the images of a run once, rather than in every job; raise UserError if that fails."""
    from args import parse_args  # here, because these need the packages
    from engine import training

    training.load_images(parse_args(argv=words))


def sweep(*arguments):
    """Run sweep.sh, passing signals on to it, and return its exit status; exit here if it was stopped."""
    received, process = [], None

    def pass_on(number, frame):
        received.append(number)
        if process:
            process.send_signal(number)

    signals = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    handlers = {number: signal.signal(number, pass_on) for number in signals}
    # In a process group of its own, it gets Ctrl-C once, from here: a second signal would end it before its jobs have.
    process = subprocess.Popen([SWEEP, *arguments], process_group=0)
    if received:  # while it was started
        process.send_signal(received[0])
    status = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if status not in (0, 1):
        sys.exit(status if status > 0 else 128 - status)
    if received:
        sys.exit(128 + received[0])
    return status


def call(*words):
    """Run a script of this repository; exit with its status if it fails."""
    status = subprocess.run([PYTHON, *words]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    typed = {"run": "table.sh", "reproduce": "reproduce.sh"}  # errors bear the name that the user typed
    sys.argv[0] = next((typed[word] for word in sys.argv[1:3] if word in typed), sys.argv[0])
    run_script(main)
