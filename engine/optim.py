"""The optimizers, and the schedules of the learning rate and of the penalties."""

import inspect
import math
from dataclasses import dataclass

import torch

from utils import UserError, load_function, message_of, read_arguments


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


# ---------------------------------------------------------------------------------------------------------
# Optimizers that torch.optim does not have
# ---------------------------------------------------------------------------------------------------------


class SGDW(torch.optim.Optimizer):
    """SGD with momentum and decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    buffer <- momentum buffer + gradient,   p <- (1 - lr weight_decay) p - lr buffer
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [parameter.grad for parameter in parameters])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, torch._foreach_mul(self.directions(buffers), group["lr"]))

    def directions(self, buffers):
        """Return the steps of the parameters at a learning rate of 1."""
        return buffers


class Signum(SGDW):
    """The sign of SGD's momentum, with decoupled weight decay (Bernstein et al. 2018, arXiv 1802.04434).

    buffer <- momentum buffer + gradient,   p <- (1 - lr weight_decay) p - lr sign(buffer)
    """

    def directions(self, buffers):
        return torch._foreach_sign(buffers)


class Joined(torch.optim.Optimizer):
    """Several optimizers, each of parameters of its own, as one."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.share()

    def share(self):
        """Have the parts use the groups and the state of the whole."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def muon(parameters, lr, weight_decay, head=(), **arguments):
    """Return torch.optim.Muon for the matrices of the body, and AdamW for the head and all other parameters.

    Steps are as long as AdamW's (adjust_lr_fn="match_rms_adamw"), so that one learning rate suits both. arguments: of
    Muon. Raises UserError if the body has no matrix, as that of a convolutional network.
    """
    outside = {id(parameter) for parameter in head}
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outside]
    if not matrices:
        raise UserError("--optimizer Muon: the model has no matrices, except in its head; give --model MLP")
    taken = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in taken]
    arguments = {"adjust_lr_fn": "match_rms_adamw"} | arguments
    body = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **arguments)
    return Joined(body, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True)) if others else body


# ---------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------

UNFIT = ("Optimizer", "LBFGS", "SparseAdam")  # of torch.optim: LBFGS needs a closure, SparseAdam sparse gradients
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNFIT
} | {"Muon": muon, "SGDW": SGDW, "Signum": Signum}
FUSED = ("Adam", "AdamW", "SGD")
CAPTURABLE = ("SGD", "SGDW", "Signum")  # without an argument `capturable`
NOT_FROM_ZERO = ("ASGD", "NAdam", "Rprop")  # their first step makes state other than zeros, which a capture would lose


def is_capturable(optimizer, arguments=None):
    """Return True if a CUDA graph can hold the steps of an optimizer, given as to `make_optimizer`."""
    if optimizer not in OPTIMIZERS or optimizer in NOT_FROM_ZERO:
        return False
    if "dampening" in read_arguments(arguments or ""):  # SGD's first step, which a graph does not have, leaves it out
        return False
    return optimizer in CAPTURABLE or "capturable" in inspect.signature(OPTIMIZERS[optimizer]).parameters


def make_optimizer(
    parameters, *, optimizer, lr, weight_decay, adam_beta2=0.999, arguments=None, head=(), for_cuda_graph=False
):
    """Return the optimizer of --optimizer, with fused steps where the paper's flags need them.

    optimizer: a name of OPTIMIZERS, or FILE.py:function, a function of (parameters, lr, weight_decay, **arguments).
    arguments: `key=value,...`. head: the parameters of the head. for_cuda_graph: keep the learning rate and the step
    counts on the device, where a captured step reads them. Raises UserError for arguments that it does not take.
    """
    parameters, given = list(parameters), read_arguments(arguments or "")
    if for_cuda_graph:
        lr = torch.tensor(lr, device=parameters[0].device)
    make = OPTIMIZERS.get(optimizer) or load_function(optimizer)
    known = inspect.signature(make).parameters
    chosen = {"lr": lr, "weight_decay": weight_decay}
    if optimizer in OPTIMIZERS and "weight_decay" not in known and chosen.pop("weight_decay"):
        raise UserError(f"--optimizer {optimizer}: has no weight decay; give --sep_decay or --weight_decay 0")
    if optimizer == "Muon":
        chosen["head"] = list(head)
    if optimizer in FUSED:
        chosen["fused"] = True
    if optimizer == "SGD":
        chosen["momentum"] = 0.9
    if optimizer in ("Adam", "AdamW"):
        chosen["betas"] = (0.9, adam_beta2)
    if optimizer in OPTIMIZERS and "capturable" in known:
        chosen["capturable"] = for_cuda_graph
    try:
        made = make(parameters, **chosen | given)
    except UserError:
        raise
    except Exception as error:  # of the checks of an optimizer, or of whatever is in a file
        raise UserError(f"--optimizer {optimizer} {arguments or ''}: {message_of(error)}") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"--optimizer {optimizer}: returns {type(made).__name__}, wanted a torch.optim.Optimizer")
    if {id(each) for group in made.param_groups for each in group["params"]} != {id(each) for each in parameters}:
        raise UserError(f"--optimizer {optimizer}: the optimizer does not have all parameters that it is given")
    return made


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
