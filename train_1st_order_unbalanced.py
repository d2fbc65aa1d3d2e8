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
from functools import partial

import torch

from args import notes, parse_args, run_folder, training_flags
from datasets import load_data
from engine.batches import Batches
from engine.checkpoints import Checkpoints, TrainingState, is_due, load_weights
from engine.cuda_graph import GraphedStep
from engine.distributed import autocast, describe, device_name, get_ranks, keep_freed_memory, pick_device, set_precision
from engine.loggers import open_loggers, require_packages
from engine.measurement import Measurement
from engine.optim import Schedule, make_optimizer, set_learning_rate
from engine.run import Run
from engine.step_log import check_finite, epoch_means, new_rows
from models import build_model, to_device
from objective import Objective
from utils import Interrupted, Progress, from_flags, run_script


def main():
    with get_ranks() as ranks:
        with ranks.first_alone():
            args, run, data, model, device = prepare(ranks.argv)
        with run.lock():
            run.check_startable(args.resume, args.force)  # again, now that the folder is locked
            train(args, run, data, model, device, ranks)


def prepare(argv):
    """Return (args, run, data, model, device) as the flags describe them, without changing a file."""
    args = parse_args(__doc__.split("\n")[0], argv)
    run = Run(run_folder(args), bn_statistics=args.bn_statistics)
    if args.resume and run.config:
        args = parse_args(argv=argv, config=run.config, folder=run.folder)
    run.check_startable(args.resume, args.force)
    require_packages(vars(args))

    device = pick_device(args.device, args.gpu_id)
    set_precision(args.precision, device)
    keep_freed_memory()
    data = from_flags(load_data, vars(args))
    if args.resume:
        run.check_class_counts(data.class_counts)
    torch.manual_seed(args.seed)  # the weights are drawn on the CPU: the same on every device
    model = from_flags(build_model, vars(args), num_classes=data.num_classes)
    model, data = to_device(model, data, device)
    return args, run, data, model, device


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def train(args, run, data, model, device, ranks):
    """Train for the remaining epochs, and write the files of the run."""
    objective = from_flags(Objective, vars(args), class_counts=data.class_counts, feature_dim=model.fc[0].in_features)
    graphed = device.type == "cuda" and args.cuda_graph
    decay = {"weight_decay": objective.optimizer_decay, "for_cuda_graph": graphed}
    optimizer = from_flags(make_optimizer, vars(args), parameters=model.parameters(), **decay)
    batches = from_flags(Batches, vars(args), labels=data.train.labels)
    state = TrainingState(model, optimizer, new_rows(batches.sizes, device))
    checkpoints = Checkpoints(run, state, epochs=args.epochs, save_every=args.save_every, keep=args.keep)
    if args.resume and run.last.exists():
        checkpoints.load_state(device)
    elif args.init_from:
        load_weights(model, args.init_from, device)
    ranks.connect(state, data.train, batches.sizes)
    if not args.resume:
        run.delete()  # only now that the new run is ready to start
    run.repair(state.epoch)
    if state.epoch < args.epochs:
        run.write_config(vars(args), training_flags(args), **facts(data, model, objective, device, ranks))
    announce(args, run, data, model, device, ranks, checkpoints)
    if state.epoch >= args.epochs:
        return
    schedule = from_flags(Schedule, vars(args))
    penalty_scale, one = torch.ones(2, device=device)
    step = partial(
        train_step, split=data.train, model=model, objective=objective, optimizer=optimizer, shifts=batches.shifts,
        penalty_scale=penalty_scale, one=one, precision=args.precision, clip_norm=args.clip_grad_norm, ranks=ranks,
    )  # fmt: skip
    if graphed:
        step = GraphedStep(step, batches.sizes, state.tensors, device)

    with (
        ranks.stop_flag() as stop,
        Progress(args.epochs, "epoch", state.epoch) as progress,
        open_loggers(vars(args), run.folder, "train", first_epoch=state.epoch + 1) as loggers,
        checkpoints,
    ):
        measurement = Measurement(run, model, data, args.precision, stop.check, ranks)
        try:
            indices = batches.draw(state.epoch + 1)
            for epoch in range(state.epoch + 1, args.epochs + 1):
                lr = set_learning_rate(optimizer, schedule.learning_rate(epoch))
                scale = schedule.penalty_scale(epoch)
                penalty_scale.fill_(scale)
                meanwhile = partial(batches.draw, epoch + 1)
                rows, indices = train_one_epoch(step, indices, state, checkpoints, stop, meanwhile)
                line = {"epoch": epoch, "lr": float(f"{lr:.7g}"), "penalty_scale": float(f"{scale:.7g}")}
                line |= epoch_means(rows, args.loss, state.seconds)
                line["seconds_waiting"] = checkpoints.seconds_waited()
                run.append_log(line)
                check_finite(rows, model, epoch)
                for logger in loggers:
                    logger.scalars("train", line)
                if args.nc_every and is_due(epoch, args.nc_every, args.epochs):
                    measurement.record(epoch, loggers)
                state.epoch, state.step, state.seconds = epoch, 0, 0.0
                if checkpoints.is_due(epoch):
                    checkpoints.save_weights()
                progress.step(
                    f"loss {line['loss']:.6f}  accuracy {line['train_acc1']:.2f} %  "
                    f"{line['images_per_second']:.0f} images/s"
                )
        except Interrupted:
            checkpoints.save_state()
            raise
        checkpoints.save_state()
    print(f"finished: {run.folder}")


def train_one_epoch(step, batches, state, checkpoints, stop, meanwhile):
    """Make the remaining steps of an epoch; return the rows of all its steps, and the result of `meanwhile()`.

    `meanwhile` is called while the device works. A signal stops the epoch between steps.
    """
    state.model.train()
    began = time.perf_counter() - state.seconds
    for number in range(state.step, len(batches)):
        state.rows[number, 1:] = step(batches[number])
        state.step, state.seconds = number + 1, time.perf_counter() - began
        stop.check()
        checkpoints.save_state_if_due()
    following = meanwhile()
    rows = state.rows.cpu()  # waits for the device
    state.seconds = time.perf_counter() - began
    return rows, following


def train_step(indices, *, ranks, split, model, objective, optimizer, shifts, penalty_scale, one, precision, clip_norm):
    """Make one optimizer step on the images at `indices` (B,), not waiting for a GPU; return a tensor of MEASURED."""
    images, labels = split.batch(ranks.rows(indices), shifts)
    with autocast(precision, indices.device):
        logits, features = model(images)
    loss, data_term = objective(logits, features, labels, model.fc, penalty_scale, len(indices))
    optimizer.zero_grad(set_to_none=ranks.count == 1)  # the gradients of several ranks share one buffer
    loss.backward(one)  # made once: backward() would make this tensor in every step
    with torch.no_grad():
        correct = (logits.argmax(1) == labels).sum(dtype=loss.dtype)
        sums = ranks.sum_with_gradients(loss, data_term, correct)
    grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, grad_norm)
    optimizer.step()
    return torch.stack([*sums, grad_norm]).detach()


# ---------------------------------------------------------------------------------------------------------
# Facts about the run
# ---------------------------------------------------------------------------------------------------------


def facts(data, model, objective, device, ranks):
    """Return what config.json records besides the flags."""
    decays = objective.effective_decays() or (None, None)
    return {
        "class_counts": data.class_counts,
        "num_test": len(data.test),
        "problems": objective.problems(),
        "data_factor": objective.data_factor,
        "effective_weight_decay": decays[0],
        "effective_feature_decay": decays[1],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": device_name(device),
        "ranks": ranks.count,
    }


def announce(args, run, data, model, device, ranks, checkpoints):
    """Print the run's settings and the disk space that it needs."""
    epoch = checkpoints.state.epoch
    resumed = f"resumes {run.folder} after epoch {epoch}" if epoch else f"no run in {run.folder} yet: starts at epoch 1"
    print(resumed if args.resume else f"run        {run.folder}")
    print(
        f"data       {args.dataset}: {len(data.train)} training images in {data.num_classes} classes, "
        f"{min(data.class_counts)} to {max(data.class_counts)} each; {len(data.test)} test images"
    )
    print(f"model      {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"device     {describe(device, args.precision, ranks)}")
    for note in notes(args, len(data.train)):
        print(f"note       {note}")
    if epoch >= args.epochs:
        print(f"epochs     {epoch} are done; give a larger --epochs to continue", flush=True)
        return
    print(f"theory     {run.theory_summary()}")
    print(f"epochs     {epoch + 1} to {args.epochs}, {len(checkpoints.state.rows)} steps each")
    print(f"disk       {checkpoints.disk_summary()}", flush=True)


if __name__ == "__main__":
    run_script(main, resume_hint="run the same command with --resume", takes_ranks=True)
