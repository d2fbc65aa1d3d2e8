"""Flags: the paper's commands, one-line errors for wrong flags, and the run's name and config."""

import argparse
import json
import re
import shlex

import pytest

from args import THIS_CALL, flags_with, make_parser, notes, parse_args, run_folder, run_name, training_flags
from tests.conftest import PAPER, ROOT
from utils import UserError


def parse(text=""):
    return parse_args(argv=shlex.split(text))


def test_the_papers_command():
    args = parse(PAPER)
    assert (args.model, args.bias, args.depth_relu, args.depth_linear, args.width) == ("MLP", False, 6, 1, 1024)
    assert (args.sep_decay, args.weight_decay, args.feature_decay_rate) == (True, 1e-4, 1e-5)
    assert (args.optimizer, args.lr, args.epochs, args.patience, args.objective) == ("Adam", 1e-4, 4000, 2000, "paper")
    assert (args.wandb, args.save_every, args.clip_grad_norm) == (False, 10, None)
    assert parse(PAPER.replace("MLP", "ResNet18").replace("256", "32")).model == "ResNet18"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lr -1", ["--lr", "'-1' is not a number > 0"]),
        ("--lr nan", ["--lr", "not a number > 0"]),
        ("--lr fast", ["--lr", "not a number > 0"]),
        ("--epochs 0", ["--epochs", "not a whole number >= 1"]),
        ("--epochs 1.5", ["--epochs", "not a whole number >= 1"]),
        ("--batch_size 0", ["--batch_size", "not a whole number >= 1"]),
        ("--weight_decay -0.001", ["--weight_decay", "not a number >= 0"]),
        ("--seed -1", ["--seed", "not a whole number >= 0"]),
        ("--model LeNet", ["--model", "MLP", "ResNet18", "DenseNet121"]),
        ("--dataset imagenet", ["--dataset", "cifar10", "digits", "imagefolder", "FILE.npz"]),
        ("--loss Hinge", ["--loss", "CrossEntropy", "MSE", "FILE.py:function"]),
        ("--loss my_losses:focal", ["--loss", "FILE.py:function"]),
        ("--wandb yes", ["--wandb", "True or False"]),
        ("--imbalance exp", ["--imbalance", "exp:R or step:R"]),
        ("--imbalance exp:0.5", ["--imbalance", "R >= 1"]),
        ("--imbalance exp:0.01", ["--imbalance", "R = n_max/n_min: write exp:100"]),
        ("--train_list a.txt --dataset imagefolder", ["--train_list and --test_list: give both"]),
        ("--train_list a.txt --test_list b.txt", ["only with --dataset imagefolder"]),
        ("--image_size 64", ["--image_size", "cifar10 has 32 x 32 pixels"]),
        ("--image_size 64 --dataset a.npz --model VGG11", ["--image_size 64: VGG11", "32 to 63"]),
        ("--imbalance paper --dataset a.npz", ["no profile for", "a.npz"]),
        ("--imbalance linear:3", ["--imbalance", "paper, balanced, exp:R or step:R"]),
        ("--decay_type cliff", ["--decay_type", "step_60_120"]),
        ("--decay_type step_", ["--decay_type", "step_60_120"]),
        ("--decay_type cosine --epochs 50", ["--patience 2000", "--epochs 50"]),
        ("@nothing.flags", ["nothing.flags", "No such file"]),
        ("--adam_beta2 1", ["--adam_beta2", ">= 0 and < 1"]),
        ("--optimizer SGD --adam_beta2 0.5", ["--adam_beta2", "--optimizer Adam"]),
        ("--whiten 0.01 --data_augmentation", ["--whiten and --data_augmentation"]),
        ("--model MLP --planes 8", ["--planes", "--width"]),
        ("--model DenseNet121 --planes 7", ["--planes 7", "even"]),
        ("--model VGG11 --no-feature_relu", ["--no-feature_relu", "only with --model MLP"]),
        ("--no-feature_relu --objective released", ["--no-feature_relu", "--objective released"]),
        ("--logit_adjustment 1 --objective released", ["--logit_adjustment", "--objective released"]),
        ("--label_smoothing 0.1 --loss MSE", ["--label_smoothing", "only with --loss CrossEntropy"]),
        ("--label_smoothing 1", ["--label_smoothing", ">= 0 and < 1"]),
        ("--penalty_start 5", ["--penalty_start", "--penalty_fall_epochs"]),
        ("--penalty_start 5 --penalty_hold_epochs 60% --penalty_fall_epochs 40%", ["sum must be less than --epochs"]),
        ("--penalty_warmup_epochs 9 --epochs 9", ["--penalty_warmup_epochs 9", "less than --epochs 9"]),
        ("--until 0.01", ["--until", "--nc_every"]),
        ("--nc_layers fc", ["--nc_layers", "--nc_every"]),
        ("--nc_layers fc, --nc_every 1", ["'fc,' is not a list of layers"]),
        ("--until 0 --nc_every 1", ["--until", "not a number > 0"]),
        ("--stratified --no_shuffle", ["--stratified and --no_shuffle"]),
        ("--warmup_epochs -1", ["--warmup_epochs", ">= 0"]),
        ("--class_counts 1,2", ["--class_counts", "cifar10 has 10 classes, 2 counts were given"]),
        ("--class_counts 5", ["--class_counts", "two or more whole numbers"]),
        ("--class_counts 1,0,3", ["--class_counts", "whole numbers >= 1"]),
        ("--class_counts 1,x,3", ["--class_counts", "whole numbers >= 1"]),
        ("--class_counts 1,1,1,1,1,1,1,1,1,1 --imbalance paper", ["give one of them"]),
        ("--n_max 5", ["--n_max", "only with --imbalance balanced"]),
        ("--dataset imagefolder --imbalance paper", ["no profile for imagefolder"]),
        ("--resume --force", ["give one of them"]),
        ("--keep 0", ["--keep", "not a whole number >= 1"]),
        ("--precision fp16", ["--precision", "fp32", "tf32", "bf16"]),
        ("--optimizer Lion", ["--optimizer", "Adam", "SGD", "FILE.py:function"]),
        ("--optimizer LBFGS", ["--optimizer", "'LBFGS' is not one of"]),
        ("--optimizer_args lr=1", ["--optimizer_args lr", "--lr"]),
        ("--optimizer_args weight_decay=1", ["--optimizer_args weight_decay", "--weight_decay"]),
        ("--optimizer_args capturable=True", ["--optimizer_args capturable"]),
        ("--optimizer_args betas=(0.5,0.5) --adam_beta2 0.9", ["--adam_beta2 and --optimizer_args betas"]),
        ("--class_weights_from 5", ["--class_weights_from", "--class_weights"]),
        ("--objective both", ["--objective", "paper", "released"]),
        ("--theory none", ["--theory", "objective", "nominal", "released"]),
        ("--device tpu", ["--device", "auto", "cpu", "cuda"]),
        ("--learning_rate 1", ["unrecognized arguments: --learning_rate 1"]),
        ("--epoch 5", ["unrecognized arguments: --epoch 5"]),  # no abbreviations: a typo is not a flag
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flags, words):
    with pytest.raises(UserError) as stop:
        parse(flags)
    error = str(stop.value)
    assert stop.value.status == 2
    assert "\n" not in error and all(word in error for word in words), error


@pytest.mark.parametrize(
    "text",
    ["eps", "1", "eps=", "eps=1,eps=2", "a=b(1)", "a=__import__('os')", "a=1), print(1", "**{}", "a=[1]", "a=1e999"],
)
def test_arguments_of_an_optimizer_are_plain_values(text):
    with pytest.raises(UserError, match="is not key=value"):
        parse_args(argv=[f"--optimizer_args={text}"])


def test_arguments_of_an_optimizer_are_recorded_in_one_way():
    written = "betas=(0.9, 0.99),eps=1e-06,kind='word',nesterov=True"
    for text in ("nesterov=True,eps=1e-6,betas=(.9,.99),kind=word", written):
        assert parse_args(argv=[f"--optimizer_args={text}"]).optimizer_args == written
    assert parse_args(argv=["--optimizer_args="]).optimizer_args is None


def numeric_flags():
    """Return the flags whose type is a number, or a number among other things."""
    kinds = ("bounded", "epochs_or_share", "number_or_off")
    types = {action.dest: getattr(action.type, "__qualname__", "") for action in make_parser()._actions}
    return [name for name, kind in types.items() if kind.startswith(kinds) or "number_or_off" in kind]


@pytest.mark.parametrize("text", ["-1", "", "x", "1,2", "nan", "inf", "9" * 400, "1e999"])
@pytest.mark.parametrize("flag", numeric_flags())
def test_every_number_is_checked(flag, text):
    with pytest.raises(UserError) as stop:
        parse_args(argv=[f"--{flag}={text}", "--imbalance", "balanced"])
    error = str(stop.value)
    assert stop.value.status == 2 and "\n" not in error
    assert f"--{flag}: {text!r} is not a" in error


def test_help_is_grouped_and_says_every_default():
    parser = make_parser()
    text = " ".join(parser.format_help().split())
    for group in ("data:", "model:", "objective:", "training:", "machine:", "files of a run:", "measuring:"):
        assert group in text
    described = [action for action in parser._actions if action.dest != "help"]
    assert text.count("(default: ") == len(described)


def test_a_flag_changes_the_name_exactly_if_it_changes_training():
    """Settings that train differently never share a folder; settings that train alike do."""
    values = {
        "data_augmentation": "", "model": "VGG11", "depth_linear": "2", "loss": "MSE", "objective": "released",
        "sep_decay": "", "weight_decay": "0.5", "feature_decay_rate": "0.5", "optimizer": "SGD", "lr": "0.5",
        "decay_type": "step_5", "gamma": "0.5", "patience": "5", "batch_size": "5", "no_shuffle": "",
        "clip_grad_norm": "5", "adam_beta2": "0.5",
        "warmup_epochs": "5", "penalty_warmup_epochs": "5", "stratified": "", "revive": "",
        "precision": "bf16", "seed": "5", "init_from": "x.pth", "depth_relu": "5", "width": "5",
        "planes": "8", "imbalance": "exp:5", "class_counts": "1,1,1,1,1,1,1,1,1,1", "dataset": "mnist",
        "class_weights": "1", "logit_adjustment": "1", "logit_scaling": "1", "ldam_margin": "1",
        "label_smoothing": "0.5", "class_weights_from": "5", "optimizer_args": "eps=1e-6",
        "head_init": "etf", "head_fixed": "", "whiten": "0.5", "until": "5",
        "train_list": "a.txt", "test_list": "b.txt", "image_size": "64",
        "penalty_start": "5", "penalty_hold_epochs": "5", "penalty_fall_epochs": "5",
    }  # fmt: skip
    needed = {
        "planes": "--model VGG19 ",
        "penalty_start": "--penalty_fall_epochs 7 ",
        "class_weights_from": "--class_weights 2 ",
        "train_list": "--dataset imagefolder --test_list c.txt ",
        "test_list": "--dataset imagefolder --train_list c.txt ",
        "image_size": "--dataset imagefolder ",
        "until": "--nc_every 1 ",
    }
    names = {run_name(parse())} | {run_name(parse(f"{needed.get(f, '')}--{f} {v}")) for f, v in values.items()}
    names |= {run_name(parse(flags)) for flags in ("--no-bias", "--no-feature_relu", "--imbalance exp:5 --n_max 50")}
    assert len(names) == len(values) + 4
    assert "_my_losses.focal-paper_" in run_name(parse("--loss folder/my_losses.py:focal"))
    assert run_name(parse("--loss ./my_losses.py:focal")) == run_name(parse("--loss my_losses.py:focal"))
    same = "--epochs 5 --save_every 3 --nc_every 7 --nc_layers fc --device cpu --data_dir x"
    same += " --recompute --watch --theory nominal --resume"
    assert run_name(parse(same)) == run_name(parse())
    others = {"bias", "feature_relu", "n_max", "epochs", "save_every", "run_name", "nc_every", "nc_layers"}
    others |= {*flags_with(THIS_CALL)}
    covered = {*values, *others}
    assert covered == {action.dest for action in make_parser()._actions} - {"help"}


def test_names_ignore_what_a_model_or_data_set_does_not_use():
    assert run_name(parse("--model VGG11 --width 5")) == run_name(parse("--model VGG11"))
    assert run_name(parse("--imbalance paper")) == run_name(parse())
    assert run_name(parse("--dataset imagefolder --data_dir x")) != run_name(
        parse("--dataset imagefolder --data_dir y")
    )


def test_flags_from_a_file_and_later_ones_win(tmp_path):
    (tmp_path / "some.flags").write_text("# a comment\n--lr 0.5 --no-bias  # and another\n--width 7\n")
    args = parse(f"@{tmp_path}/some.flags --width 8")
    assert (args.lr, args.bias, args.width) == (0.5, False, 8)


def test_flag_files_that_extend_others_work_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse(shlex.quote(f"@{ROOT}/scripts/collapse_resnet.flags")).head_fixed
    (tmp_path / "own.flags").write_text("--lr 0.5\n")
    (tmp_path / "both.flags").write_text("@scripts/collapse.flags\n@own.flags\n")
    args = parse("@both.flags")
    assert args.revive and args.lr == 0.5


def test_every_switch_of_the_recipe_can_be_turned_off():
    recipe = shlex.quote(f"@{ROOT}/scripts/collapse.flags")
    default = vars(parse())
    switched = {name for name, value in vars(parse(recipe)).items() if value is True and default[name] is False}
    assert switched == {"sep_decay", "revive", "stratified", "head_fixed"}
    plain = parse(f"{recipe} --no-sep_decay --no-revive --no-stratified --no-head_fixed --whiten 0 --model ResNet18")
    assert not (plain.sep_decay or plain.revive or plain.stratified or plain.head_fixed or plain.whiten)


def test_folder(tmp_path):
    assert run_folder(parse(f"--save_path {tmp_path}")) == tmp_path
    assert run_folder(parse()).parts[0] == "model_weights"


def config_of(text):
    """The config.json that a run with these flags leaves."""
    args = parse(text)
    return json.loads(json.dumps({"flags": vars(args), "class_counts": args.class_counts or [1] * 10}))


def adopt(text, config):
    """The flags of a call with `text` on a run with this config."""
    return parse_args(argv=shlex.split(text), config=config, folder="x")


def test_config_gives_the_defaults():
    args = adopt("--load_path x --recompute --device cpu", config_of(PAPER + " --width 77 --save_path y --device cuda"))
    assert (args.width, args.bias, args.save_path, args.recompute, args.device) == (77, False, None, True, "cpu")


def test_config_names_each_contradiction():
    with pytest.raises(UserError) as error:
        adopt("--width 5 --lr 1 --epochs 3 --device cpu --seed 1", config_of("--width 77"))
    assert "--width is 5, in the run 77" in str(error.value) and "--lr is 1.0, in the run 0.0001" in str(error.value)
    assert "epochs" not in str(error.value) and "seed" not in str(error.value)


def test_epochs_are_part_of_a_run_only_if_its_learning_rate_depends_on_them():
    cosine = "--decay_type cosine --patience 5 --epochs"
    assert run_name(parse(f"{cosine} 10")) != run_name(parse(f"{cosine} 20"))
    with pytest.raises(UserError, match="--epochs is 20, in the run 10"):
        adopt("--epochs 20", config_of(f"{cosine} 10"))


@pytest.mark.parametrize(
    "flag, value",
    [
        ("width", "wide"), ("width", 0), ("lr", "x"), ("lr", None), ("model", "LeNet"), ("class_counts", [1, 0]),
        ("bias", "yes"), ("revive", None), ("no_shuffle", "yes"),
    ],
)  # fmt: skip
def test_a_config_with_impossible_flags_is_an_error(flag, value):
    config = config_of(PAPER)
    config["flags"][flag] = value
    with pytest.raises(UserError, match=rf"x/config.json: damaged, argument --{flag}[:/]"):
        adopt("", config)


def test_every_possible_config_is_accepted(tmp_path):
    for flags in (PAPER, "--class_counts 1,1,1,1,1,1,1,1,1,2", "--imbalance exp:1234567 --n_max 5", "--wandb False"):
        adopt("", config_of(flags + f" --init_from {tmp_path}/x --decay_type step_1_2 --lr 1 --run_name mine"))
    with pytest.raises(UserError, match=r"x/config.json and the flags: --n_max: only with"):
        adopt("", config_of(PAPER) | {"flags": config_of(PAPER)["flags"] | {"n_max": 5}})


def test_config_and_profiles():
    counts = "--class_counts 1,1,1,1,1,1,1,1,1,2"
    with pytest.raises(UserError, match="--imbalance is exp:5, in the run"):
        adopt("--imbalance exp:5", config_of(counts))
    with pytest.raises(UserError, match="--class_counts is"):
        adopt(counts, config_of("--imbalance exp:5"))
    args = adopt("--class_counts 1,1,1,1,1,1,1,1,1,1", config_of("--imbalance exp:5"))  # the same images
    assert (args.imbalance, args.class_counts) == ("exp:5", None)
    for text in ("--imbalance exp:5", "--n_max 50", "--imbalance exp:5 --n_max 50"):  # each agrees with the run
        args = adopt(text, config_of("--imbalance exp:5 --n_max 50"))
        assert (args.imbalance, args.n_max) == ("exp:5", 50)
    with pytest.raises(UserError, match="--n_max is 60, in the run 50"):
        adopt("--n_max 60", config_of("--imbalance exp:5 --n_max 50"))


def test_config_and_shares_of_the_epochs():
    """Shares are compared as numbers of epochs; the total number of epochs may come from the config."""
    config = config_of("--epochs 250 --patience 36% --penalty_warmup_epochs 20%")
    for text in ("--epochs 250 --patience 36% --penalty_warmup_epochs 20%", "--patience 36%", "--patience 90", ""):
        args = adopt(text, config)
        assert (args.epochs, args.patience, args.penalty_warmup_epochs) == (250, 90, 50)
    with pytest.raises(UserError, match="--patience is 100, in the run 90"):
        adopt("--patience 40%", config)


def test_a_longer_run_keeps_its_shares_of_the_epochs():
    """Also the second time, when config.json has the new --epochs; a cosine has ended, and the error says so."""
    for epochs in (250, 3000):
        config = config_of(f"--epochs {epochs} --patience 90 --penalty_warmup_epochs 50") | {"epochs_of_shares": 250}
        args = adopt("--resume --epochs 4000 --patience 36% --penalty_warmup_epochs 20%", config)
        assert (args.epochs, args.patience, args.penalty_warmup_epochs) == (4000, 90, 50)
    config = config_of("--epochs 250 --decay_type cosine --patience 36%") | {"epochs_of_shares": 250}
    with pytest.raises(UserError, match="in the run 250, where its cosine ends: train a new run with --init_from"):
        adopt("--resume --epochs 3000 --decay_type cosine --patience 36%", config)


@pytest.mark.parametrize("model", ["MLP", "ResNet18"])
def test_a_switch_turned_off_contradicts_the_config(model):
    """Also for a flag that is part of the run's name only when it is on."""
    with pytest.raises(UserError, match="--revive is False, in the run True"):
        adopt("--no-revive", config_of(f"--model {model} --revive"))
    with pytest.raises(UserError, match="--revive is True, in the run False"):
        adopt("--revive", config_of(f"--model {model}"))
    assert adopt("--no-revive", config_of(f"--model {model}")).revive is False
    assert adopt("", config_of(f"--model {model} --revive")).revive is True


def test_the_recipe_is_resumed_by_the_same_command():
    recipe = shlex.quote(f"@{ROOT}/scripts/collapse.flags") + " --model ResNet18 --planes 8 --seed 3"
    assert training_flags(adopt(f"{recipe} --resume", config_of(recipe))) == training_flags(parse(recipe))
    with pytest.raises(UserError, match="--planes is 16, in the run 8"):
        adopt("--planes 16", config_of(recipe))


def test_a_recipe_works_with_another_optimizer():
    """Its flags of Adam have no effect then; what else contradicts a typed flag is said to come from the file."""
    recipe = shlex.quote(f"@{ROOT}/scripts/collapse.flags")
    assert parse(f"{recipe} --optimizer SGD").adam_beta2 == 0.999 and parse(recipe).adam_beta2 == 0.99
    with pytest.raises(UserError, match="--adam_beta2: only with --optimizer Adam or AdamW"):
        parse(f"{recipe} --optimizer SGD --adam_beta2 0.9")
    with pytest.raises(UserError, match=r"give one of them.* \(--whiten: from the @FILE\)"):
        parse(f"{recipe} --data_augmentation")


def test_parser_leaves_no_flag_without_a_group():
    parser = make_parser()
    grouped = {action.dest for group in parser._action_groups[2:] for action in group._group_actions}
    assert grouped == {action.dest for action in parser._actions} - {"help"}
    assert isinstance(parser, argparse.ArgumentParser)


@pytest.mark.parametrize(
    "flags, suggestion",
    [("--epoch 5", "did you mean --epochs?"), ("--weigth_decay 1", "did you mean --weight_decay?"), ("--qqq", None),
     ("stray -epochs 3", "did you mean --epochs?"), ("--lambda_w 1", "did you mean --weight_decay?"),
     ("--lamda 1", "did you mean --weight_decay (lambda_W) or --feature_decay_rate (lambda_H)?"),
     ("--model ResNet81", "did you mean ResNet18?"), ("--model LeNet", None)],
)  # fmt: skip
def test_a_typo_gets_a_suggestion(flags, suggestion):
    with pytest.raises(UserError) as error:
        parse(flags)
    assert suggestion in str(error.value) if suggestion else "did you mean" not in str(error.value)


def test_model_names_in_any_case_and_wandb_alone():
    assert [parse(f"--model {name}").model for name in ("mlp", "RESNET18", "densenet121")] == [
        "MLP",
        "ResNet18",
        "DenseNet121",
    ]
    assert parse("--wandb").wandb is True and parse("--wandb False").wandb is False


def test_shares_of_the_epochs():
    args = parse("--epochs 250 --patience 36% --penalty_warmup_epochs 20% --warmup_epochs 0.4%")
    assert (args.patience, args.penalty_warmup_epochs, args.warmup_epochs) == (90, 50, 1)
    assert parse("--epochs 3 --patience 1%").patience == 1
    assert run_name(args) == run_name(parse("--epochs 250 --patience 90 --penalty_warmup_epochs 50 --warmup_epochs 1"))


def test_flags_without_effect_are_noted():
    found = notes(parse("--watch --batch_size 500 --objective released"), num_images=499)
    assert [re.search(r"--\w+", note)[0] for note in found] == ["--watch", "--batch_size", "--sep_decay"]
    assert notes(parse("--sep_decay --objective released --batch_size 500"), num_images=500) == []
    falling = "--sep_decay --epochs 9 --penalty_hold_epochs 1 --penalty_fall_epochs 3"
    assert [note.split()[0] for note in notes(parse(falling), 1000)] == [
        "--penalty_hold_epochs",
        "--penalty_fall_epochs",
    ]
    assert notes(parse(falling + " --penalty_start 5"), 1000) == []


def test_fewer_steps_than_the_recipe_needs_are_noted():
    recipe = shlex.quote(f"@{ROOT}/scripts/random_head.flags")
    (note,) = notes(parse(f"{recipe} --batch_size 110"), 242)
    assert "after 750 steps" in note and "2,000" in note
    assert notes(parse(f"{recipe} --batch_size 100"), 800) == []


def test_a_run_name_is_part_of_the_folder(tmp_path, monkeypatch):
    """With the hash, so that no two settings share a folder; a folder with another name but this hash is found."""
    monkeypatch.chdir(tmp_path)
    a, b = run_folder(parse("--run_name mine")), run_folder(parse("--run_name mine --lr 1"))
    assert a.name.startswith("mine_") and b.name.startswith("mine_") and a != b
    named = tmp_path / "model_weights" / f"mine_{run_name(parse())[-8:]}"
    named.mkdir(parents=True)
    assert run_folder(parse()).name == named.name
    with pytest.raises(UserError, match="is not a name"):
        parse("--run_name a/b")
