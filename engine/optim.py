"""The optimizer, and the schedules of the learning rate and of the penalties."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """The learning rate and penalty scale of each epoch, counted from 1. The fields have the names of the flags.

    Both depend only on the epoch, so that a resumed run needs no scheduler state.
    """

    epochs: int
    lr: float
    decay_type: str  # "step", "cosine", or milestones such as "step_60_120"
    patience: int
    gamma: float
    warmup_epochs: int = 0
    penalty_warmup_epochs: int = 0
    penalty_start: float = 1.0
    penalty_hold_epochs: int = 0
    penalty_fall_epochs: int = 0

    def learning_rate(self, epoch):
        """Return the learning rate of an epoch."""
        if epoch <= self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        done = epoch - 1
        if self.decay_type == "cosine":
            progress = max(0, done - self.patience) / max(1, self.epochs - self.patience)
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        if self.decay_type == "step":
            return self.lr * self.gamma ** (done // self.patience)
        milestones = map(int, self.decay_type.split("_")[1:])
        return self.lr * self.gamma ** sum(done >= milestone for milestone in milestones)

    def penalty_scale(self, epoch):
        """Return the factor of both penalties in an epoch, which is 1 at the end of training.

        It stays at `penalty_start` for `penalty_hold_epochs` and then falls geometrically to 1 in
        `penalty_fall_epochs`. In `penalty_warmup_epochs` it is multiplied by a factor that rises linearly from 0 to 1.
        """
        done = epoch - 1
        scale = 1.0
        if self.penalty_start != 1:
            left = 1 - (done - self.penalty_hold_epochs) / self.penalty_fall_epochs
            scale = self.penalty_start ** min(1.0, max(0.0, left))
        return scale * min(1.0, done / self.penalty_warmup_epochs) if self.penalty_warmup_epochs else scale


def make_optimizer(parameters, *, optimizer, lr, weight_decay, adam_beta2, for_cuda_graph=False):
    """Return a fused Adam, or SGD with momentum 0.9.

    for_cuda_graph: keep the learning rate and the step counts on the device, where a captured step reads them.
    """
    parameters = list(parameters)
    if for_cuda_graph:
        lr = torch.tensor(lr, device=parameters[0].device)
    common = {"lr": lr, "weight_decay": weight_decay, "fused": True}
    if optimizer == "SGD":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    return torch.optim.Adam(parameters, betas=(0.9, adam_beta2), capturable=for_cuda_graph, **common)


def set_learning_rate(optimizer, lr):
    """Set the learning rate, in place if it is a tensor that a CUDA graph reads; return it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def optimizer_tensors(optimizer):
    """Return the tensors of an optimizer's state, which its first step creates."""
    return [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, torch.Tensor)]
