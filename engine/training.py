"""The training of one run: what the flags describe, built once, and the optimizer step."""

import math

import torch

from datasets import load_data, whiten
from engine.batches import Batches
from engine.checkpoints import TrainingState
from engine.comparison import solved
from engine.cuda_graph import GraphedStep
from engine.device import autocast
from engine.optim import Schedule, is_capturable, make_optimizer, set_learning_rate
from engine.ranks import OneProcess
from engine.step_log import new_rows
from models import build_model
from nc_theory import simplex_etf
from objective import Objective
from utils import UserError


class Training:
    """Objective, optimizer, batches, schedule, state and step of the run that the flags `args` describe.

    args: the flags, a namespace. data, model: a `datasets.Data` and a `models.Classifier` on the device. ranks: the
    `engine.ranks.Ranks` that share the run; default: this process alone. `step(indices)` makes an optimizer step.
    """

    def __init__(self, args, data, model, device, ranks=None):
        self.data, self.model, self.device, self.ranks = data, model, device, ranks or OneProcess()
        model.fc.requires_grad_(not args.head_fixed)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.precision, self.clip_grad_norm = args.precision, args.clip_grad_norm
        capturable = is_capturable(args.optimizer, args.optimizer_args)
        self.graphed = device.type == "cuda" and args.cuda_graph and capturable
        self.objective = make_objective(args, data.class_counts, model.fc[0].in_features)
        self.objective.check_loss()
        self.class_weights_from = args.class_weights_from
        self.optimizer = make_optimizer(
            self.parameters,
            optimizer=args.optimizer,
            arguments=args.optimizer_args,
            head=model.fc.parameters(),
            lr=args.lr,
            weight_decay=self.objective.optimizer_decay,
            adam_beta2=args.adam_beta2,
            for_cuda_graph=self.graphed,
        )
        self.batches = Batches(
            data.train.labels,
            batch_size=args.batch_size,
            seed=args.seed,
            no_shuffle=args.no_shuffle,
            stratified=args.stratified,
            data_augmentation=args.data_augmentation,
        )
        self.schedule = Schedule(
            epochs=args.epochs,
            lr=args.lr,
            decay_type=args.decay_type,
            patience=args.patience,
            gamma=args.gamma,
            warmup_epochs=args.warmup_epochs,
            penalty_warmup_epochs=args.penalty_warmup_epochs,
            penalty_start=args.penalty_start,
            penalty_hold_epochs=args.penalty_hold_epochs,
            penalty_fall_epochs=args.penalty_fall_epochs,
        )
        self.state = TrainingState(model, self.optimizer, new_rows(self.batches.sizes, device))
        self.penalty_scale, self.unit_gradient = torch.ones(2, device=device)
        self.step = self.make_step

    def initialise_head(self, kind, seed):
        """Set the head to the optimum of the run's own problem, or to a simplex ETF of the same norm ("etf").

        kind: as --head_init; "random" leaves the head as it is. The frame of directions is drawn from the seed. Raises
        UserError if the optimum is not known, or if the model has fewer features than the optimum has directions.
        """
        if kind == "random":
            return
        head, problem = self.model.fc[-1], self.objective.problem()
        if isinstance(problem, str):
            raise UserError(f"--head_init {kind}: {problem}")
        optimum, generator = solved(problem), torch.Generator().manual_seed(seed)
        try:
            weight = optimum.head(head.in_features, generator)
            if kind == "etf":
                etf = simplex_etf(problem.num_classes, head.in_features, problem.relu, generator)
                weight = etf * (weight.norm() / etf.norm())
        except ValueError as error:
            raise UserError(f"--head_init {kind}: {error}") from None
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(optimum.bias)

    def connect(self):
        """Connect the ranks; call it once the state is that from which training starts, and before the first step."""
        self.ranks.connect(self.state, self.data.train, self.batches.sizes)

    def capture(self):
        """On a GPU, replace `step` by a captured CUDA graph, unless --no-cuda_graph is given."""
        if self.graphed:
            self.step = GraphedStep(self.make_step, self.batches.sizes, self.state.tensors, self.device)

    def set_epoch(self, epoch):
        """Set learning rate, scale of the penalties and class weights for an epoch, from 1; return the former two."""
        if self.class_weights_from:
            self.objective.use_class_weights(epoch >= self.class_weights_from)
        scale = self.schedule.penalty_scale(epoch)
        self.penalty_scale.fill_(scale)
        return set_learning_rate(self.optimizer, self.schedule.learning_rate(epoch)), scale

    def make_step(self, indices):
        """Make one optimizer step on the images at `indices` (B,); return a tensor of `engine.step_log.MEASURED`.

        It never waits for a GPU.
        """
        images, labels = self.data.train.batch(self.ranks.rows(indices), self.batches.shifts)
        with autocast(self.precision, self.device):
            logits, features = self.model(images)
        loss, data_term = self.objective(logits, features, labels, self.model.fc, self.penalty_scale, len(indices))
        self.optimizer.zero_grad(set_to_none=self.ranks.count == 1)  # the gradients of several ranks share one buffer
        loss.backward(self.unit_gradient)  # backward() alone would make this tensor in every step
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum(dtype=loss.dtype)
            sums = self.ranks.sum_with_gradients(loss, data_term, correct)
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        if self.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, grad_norm)
        self.optimizer.step()
        return torch.stack([*sums, grad_norm]).detach()


# ---------------------------------------------------------------------------------------------------------
# From flags to what they describe
# ---------------------------------------------------------------------------------------------------------


def load_images(args):
    """Return the `datasets.Data` that the flags name, on the CPU."""
    return load_data(
        args.dataset,
        args.data_dir,
        imbalance=args.imbalance,
        n_max=args.n_max,
        class_counts=args.class_counts,
        download=args.download,
        train_list=args.train_list,
        test_list=args.test_list,
        image_size=args.image_size,
    )


def read_data(args, images=None):
    """Return the `datasets.Data` of a run, on the CPU: `images`, by default those of `load_images`, after --whiten."""
    images = images or load_images(args)
    return whiten(images, args.whiten) if args.whiten else images


def make_model(args, num_classes, shape=(3, 32, 32)):
    """Return the model of the flags with fresh weights, on the CPU. shape: of an image, or of features, (F,)."""
    if len(shape) == 1 and args.model != "MLP":
        raise UserError(f"--model {args.model}: {args.dataset} has features instead of images; give --model MLP")
    if len(shape) == 1 and args.data_augmentation:
        raise UserError(f"--data_augmentation: {args.dataset} has features instead of images")
    return build_model(
        args.model,
        num_classes,
        bias=args.bias,
        depth_linear=args.depth_linear,
        depth_relu=args.depth_relu,
        width=args.width,
        in_features=math.prod(shape),
        feature_relu=args.feature_relu,
        planes=args.planes,
        revive=args.revive,
    )


def make_objective(args, class_counts, feature_dim):
    """Return the `objective.Objective` of the flags, for class counts n_k (K,) and features in R^d."""
    return Objective(
        class_counts,
        args.batch_size,
        feature_dim,
        loss=args.loss,
        objective=args.objective,
        sep_decay=args.sep_decay,
        weight_decay=args.weight_decay,
        feature_decay_rate=args.feature_decay_rate,
        bias=args.bias,
        depth_linear=args.depth_linear,
        feature_relu=args.feature_relu,
        class_weights=args.class_weights,
        logit_adjustment=args.logit_adjustment,
        logit_scaling=args.logit_scaling,
        ldam_margin=args.ldam_margin,
        label_smoothing=args.label_smoothing,
    )
