"""Train a classifier on an imbalanced subset of a data set, far past zero training error.

The paper's MLP on CIFAR-10 (on a GPU; 401 checkpoints of 38 MB), and its measurement afterwards:

    CUDA_VISIBLE_DEVICES=0 python train_1st_order_unbalanced.py --model MLP \\
        --no-bias --dataset cifar10 --depth_relu 6 --depth_linear 1 --width 1024 --seed 1 \\
        --sep_decay --batch_size 256 --feature_decay_rate 0.00001 --loss CrossEntropy --lr 0.0001 \\
        --weight_decay 0.0001 --optimizer Adam --epochs 4000 --patience 2000
    CUDA_VISIBLE_DEVICES=0 python validate_NC_unbalanced.py   (the same flags)

Writes config.json, train_log.jsonl, epoch_*.pth and last.pt into model_weights/<run name>/.
"""

import time

import torch

from analysis import draw_heatmaps
from analysis.diagnosis import explain
from analysis.summary import divergence
from args import code_digests, notes, parse_args, recorded_flags, run_folder, training_flags
from engine.checkpoints import RESUME_SECONDS, Checkpoints, is_due, load_weights
from engine.device import describe, device_name, keep_freed_memory, pick_device, set_precision
from engine.loggers import open_loggers, require_packages
from engine.measurement import Measurement
from engine.ranks import get_ranks
from engine.run import Run
from engine.step_log import check_finite, epoch_means
from engine.tables import UNTIL, MeasuredRun
from engine.training import Training, make_model, read_data
from models import to_device
from nc_layers import find_layers
from utils import FAILED_WORK, Interrupted, Progress, UserError, is_first_rank, run_script


def main(argv=None, data=None):
    """Train the run of the command line, or of the words `argv`, on the images that it names, or on `data`."""
    with get_ranks() as ranks:
        with ranks.first_alone():
            args, run, training = prepare(argv or ranks.argv, data, ranks)
        with run.lock():
            run.check_startable(args.resume, args.force)  # again, now that the folder is locked
            train(args, run, training)


def prepare(argv, data, ranks):
    """Return (args, run, training) as the flags describe them, without changing a file."""
    args = parse_args(__doc__, argv)
    run = Run(run_folder(args))
    if args.resume and run.config:
        typed, args = args, parse_args(argv=argv, config=run.config, folder=run.folder)
        code_digests(args, typed, run.config)
    run.check_startable(args.resume, args.force)
    require_packages(vars(args))

    device = pick_device(args.device, args.gpu_id)
    set_precision(args.precision, device)
    keep_freed_memory()
    data = read_data(args, data)
    if args.resume:
        run.check_data(data)
        run.check_resumable()
    torch.manual_seed(args.seed)  # the weights are drawn on the CPU: the same on every device
    model, data = to_device(make_model(args, data.num_classes, data.shape), data, device)
    try:
        find_layers(model, [name for name in args.nc_layers or () if name != "head"])
    except ValueError as error:
        raise UserError(f"--nc_layers: {error}") from None
    training = Training(args, data, model, device, ranks)
    if args.until and isinstance(problem := training.objective.problem(), str):
        raise UserError(f"--until: {problem}")
    return args, run, training


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def train(args, run, training):
    """Train for the remaining epochs, and write the files of the run."""
    state = training.state
    checkpoints = Checkpoints(run, state, epochs=args.epochs, save_every=args.save_every, keep=args.keep)
    if args.resume and run.last.exists():
        checkpoints.load_state(training.device)
    elif args.resume and run.checkpoints():
        checkpoints.load_newest_weights(training.device)
    else:
        if args.init_from:
            load_weights(training.model, args.init_from, training.device)
        training.initialise_head(args.head_init, args.seed)
    training.connect()
    if not args.resume:
        run.delete()  # only now that the new run is ready to start
    run.repair(state.epoch)
    ended = until_reached(args, MeasuredRun(run, bn_statistics=args.bn_statistics), training)
    if ended and "ended_at_epoch" not in run.config:  # training was killed just before
        run.write_end(state.epoch)
    if state.epoch < args.epochs and not ended:
        run.write_config(
            recorded_flags(args, run.flags), training_flags(args), facts(args, training, code_digests(args))
        )
    measured = MeasuredRun(run, bn_statistics=args.bn_statistics)
    announce(args, measured, training, checkpoints, ended)
    if state.epoch >= args.epochs or ended:
        return
    training.capture()

    with (
        training.ranks.stop_flag() as stop,
        Progress(args.epochs, "epoch", state.epoch) as progress,
        open_loggers(vars(args), run.folder, "train", draw_heatmaps, first_epoch=state.epoch + 1) as loggers,
        checkpoints,
    ):
        measurement = Measurement(
            measured, training.model, training.data, args.precision, stop.check, training.ranks, args.nc_layers
        )
        try:
            batches = training.batches.draw(state.epoch + 1)
            for epoch in range(state.epoch + 1, args.epochs + 1):
                lr, penalty_scale = training.set_epoch(epoch)
                steps, batches = train_one_epoch(training, batches, checkpoints, stop)
                line = {"epoch": epoch, "lr": float(f"{lr:.7g}"), "penalty_scale": float(f"{penalty_scale:.7g}")}
                line |= epoch_means(steps, training.objective.criterion.column, state.seconds)
                line["seconds_waiting"] = checkpoints.seconds_waited()
                run.train_log.append(line)
                check_finite(steps, training.model, epoch)
                for logger in loggers:
                    logger.scalars("train", line)
                measures = args.nc_every and is_due(epoch, args.nc_every, args.epochs)
                if measures:
                    measurement.record(epoch, loggers)
                state.epoch, state.step, state.seconds = epoch, 0, 0.0
                ended = measures and until_reached(args, measured, training)
                if checkpoints.is_due(epoch) or ended:
                    checkpoints.save_weights()
                progress.step(
                    f"loss {line['loss']:.6f}  accuracy {line['train_acc1']:.2f} %  "
                    f"{line['images_per_second']:.0f} images/s"
                )
                if ended:
                    break
        except Interrupted:
            checkpoints.save_state()
            raise
        checkpoints.save_state()
    if ended:
        run.write_end(state.epoch)
        print(f"epoch {state.epoch}: {', '.join(UNTIL)} are at most {args.until:g}, as --until asks")
    if args.nc_every and is_first_rank():
        print(*explain(measured), sep="\n")
    if reason := divergence(measured):
        raise UserError(f"{run.folder} has diverged: {reason}", FAILED_WORK)
    print(f"finished: {run.folder}")


def until_reached(args, measured, training):
    """Return True, on all ranks, if the last measurements of training are those at which --until ends it."""
    if not args.until:
        return False
    epochs = [epoch for epoch in range(1, training.state.epoch + 1) if is_due(epoch, args.nc_every, args.epochs)]
    reached = is_first_rank() and measured.has_reached(args.until, epochs)
    return bool(training.ranks.sum(torch.tensor(float(reached))))


def train_one_epoch(training, batches, checkpoints, stop):
    """Make the remaining steps of an epoch; return the rows of all its steps, and the batches of the next epoch.

    A signal stops the epoch between steps.
    """
    state = training.state
    state.model.train()
    began = time.perf_counter() - state.seconds
    for number in range(state.step, len(batches)):
        state.rows[number, 1:] = training.step(batches[number])
        state.step, state.seconds = number + 1, time.perf_counter() - began
        stop.check()
        checkpoints.save_state_if_due()
    following = training.batches.draw(state.epoch + 2)  # while a GPU still works on the last steps
    rows = state.rows.cpu()  # waits for the device
    state.seconds = time.perf_counter() - began
    return rows, following


# ---------------------------------------------------------------------------------------------------------
# Facts about the run
# ---------------------------------------------------------------------------------------------------------


def facts(args, training, code):
    """Return what config.json records besides the flags."""
    objective = training.objective
    decays = objective.effective_decays() or (None, None)
    return {
        "class_counts": training.data.class_counts,
        "epochs_of_shares": args.epochs,
        "loss_at_zero": objective.loss_at_zero(),
        "code": code,
        "class_names": training.data.class_names,
        "class_images": training.data.class_images,
        "num_test": len(training.data.test),
        "problems": objective.problems(),
        "data_column": objective.criterion.column,
        "data_factor": objective.data_factor,
        "effective_weight_decay": decays[0],
        "effective_feature_decay": decays[1],
        "num_parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "device": device_name(training.device),
        "ranks": training.ranks.count,
    }


def announce(args, run, training, checkpoints, ended):
    """Print the settings of a `MeasuredRun` and the disk space that it needs."""
    data, epoch, ranks = training.data, training.state.epoch, training.ranks.count
    resumed = f"resumes {run.folder} after epoch {epoch}" if epoch else f"no run in {run.folder} yet: starts at epoch 1"
    if args.resume and epoch and run.run.last.exists():
        resumed += f", the state in last.pt, which is saved every {RESUME_SECONDS} seconds"
    elif args.resume and epoch:
        resumed += f", from epoch_{epoch:03d}.pth: last.pt is missing, so the optimizer starts afresh"
    print(resumed if args.resume else f"run        {run.folder}")
    print(
        f"data       {args.dataset}: {len(data.train)} training images in {data.num_classes} classes, "
        f"{min(data.class_counts)} to {max(data.class_counts)} each; {len(data.test)} test images"
    )
    print(f"model      {args.model}, {sum(p.numel() for p in training.model.parameters()):,} parameters")
    if args.head_fixed or args.head_init != "random":
        print(f"head       {'fixed' if args.head_fixed else 'starts'}: {args.head_init}")
    shared = f", {ranks} ranks, each with its rows of every batch" if ranks > 1 else ""
    print(f"device     {describe(training.device, args.precision)}{shared}")
    for note in notes(args, len(data.train)):
        print(f"note       {note}")
    if training.device.type == "cuda" and args.cuda_graph and not training.graphed:
        print(f"note       no CUDA graph can hold --optimizer {args.optimizer}: its steps are launched one by one")
    if ended:
        print(f"epochs     {epoch} are done, with which --until {args.until:g} was reached", flush=True)
        return
    if epoch >= args.epochs:
        print(f"epochs     {epoch} are done; give a larger --epochs to continue", flush=True)
        return
    print(f"theory     {run.comparison.summary()}")
    print(f"epochs     {epoch + 1} to {args.epochs}, {len(training.batches.sizes)} steps each")
    print(f"disk       {checkpoints.disk_summary()}", flush=True)


if __name__ == "__main__":
    run_script(main, resume_hint="run the same command with --resume", takes_ranks=True)
