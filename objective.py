"""The training objective, and the unconstrained features model (UFM) that it corresponds to.

    min_{W, H >= 0}  (1/N) sum_i loss(W h_i, y_i) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_i |h_i|^2     (UFM)

where loss is the cross entropy or a variant of it (`nc_theory.LossVariant`), |W h - e_y|^2 / 2 for MSE (arXiv
2401.02058, section 3), or another function, of which no optimum is known. This file alone knows how the flags become
the lambdas of (UFM).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.nn import functional as F

import nc_theory
from nc_theory import UFM, LossVariant, VariantLoss, solve
from utils import UserError, load_function, message_of, short_name


class PenalisedLoss(torch.autograd.Function):
    """loss + scale * sum_j (factor_j / 2) |x_j|^2, in fewer operations than autograd needs for it.

    loss and scale are scalar tensors, the factors are numbers. There is no gradient for the scale.
    """

    @staticmethod
    def forward(context, loss, scale, factors, *tensors):
        context.factors = factors
        context.save_for_backward(scale, *tensors)
        for factor, tensor in zip(factors, tensors, strict=True):
            loss = torch.addcmul(loss, scale, tensor.square().sum(), value=0.5 * factor)
        return loss

    @staticmethod
    def backward(context, gradient):
        scale, *tensors = context.saved_tensors
        scaled = torch._foreach_mul(tensors, context.factors)
        torch._foreach_mul_(scaled, gradient * scale)
        return gradient, None, None, *scaled


def half_squared_error(logits, labels):
    """Return |z - e_y|^2 / 2 (B,) of logits z (B, K) and labels y (B,)."""
    return 0.5 * (logits - F.one_hot(labels, logits.shape[1])).square().sum(1)


@dataclass(frozen=True)
class Loss:
    """A value of --loss. `Objective` does the rest: the mean over a batch, both objectives, ranks, precision."""

    function: Callable  # logits (B, K), labels (B,) -> the losses of the samples (B,), or their sum
    column: str  # of its mean in train_log.jsonl, and its name in figures
    mean_over_classes: bool = False  # True if the paper's released code also divides by K


LOSSES = {
    "CrossEntropy": Loss(partial(F.cross_entropy, reduction="none"), "ce"),
    "MSE": Loss(half_squared_error, "mse", mean_over_classes=True),
}


@dataclass(frozen=True)
class Objective:
    """The loss of a minibatch of B of the N training samples. Fields are named as the flags that set them.

    With --sep_decay, `head` being the linear layers of the model's head and W their matrices:

        paper     data term                                 + (lambda_W/2) |W|^2 + (N/B) (lambda_H/2) sum_batch |h|^2
        released  (1/2) data term (MSE: (1/K))              + (lambda_W/2) |W|^2 + (lambda_H/2) sum_batch |h|^2

    The data term is the mean of the loss over the batch, for MSE (1/2B) sum |W h - e_y|^2. The MSE of the paper's
    released code is 1/2 of the mean over samples and classes, hence 1/K times that data term. `paper` is an unbiased
    estimate of (UFM). Without --sep_decay there is only the data term; the optimizer then applies weight decay to all
    parameters.
    """

    class_counts: list  # n_k
    batch_size: int
    feature_dim: int  # d
    loss: str = "CrossEntropy"  # a name of LOSSES, or FILE.py:function
    objective: str = "paper"  # or released
    sep_decay: bool = False
    weight_decay: float = 1e-4  # lambda_W
    feature_decay_rate: float = 1e-5  # lambda_H
    bias: bool = False
    depth_linear: int = 1
    feature_relu: bool = True  # H >= 0
    class_weights: float = 0.0
    logit_adjustment: float = 0.0
    logit_scaling: float = 0.0
    ldam_margin: float = 0.0
    label_smoothing: float = 0.0

    def __call__(self, logits, features, labels, head, penalty_scale=1.0, batch_size=None):
        """Return (the loss to minimise, the data term) of a batch, both scalars.

        logits: (B, K). features: (B, d). labels: (B,). head: the layers of `model.fc`. penalty_scale: a number or
        scalar tensor that multiplies both penalties. batch_size: size of the whole batch, if the arguments
        are only some of its rows, or none. The results are then these rows' shares of the batch's.
        """
        batch_size = batch_size or len(labels)
        if self.variant.is_plain and self.loss == "CrossEntropy" and len(labels) == batch_size:
            data = F.cross_entropy(logits, labels)  # in one operation
        elif self.variant.is_plain:
            data = self.criterion.function(logits, labels).sum() / batch_size
        else:
            data = self.variant_loss.to(logits)(logits, labels).sum() / batch_size
        total = self.data_factor * data if self.objective == "released" else data
        if self.sep_decay:
            share = self.num_samples / batch_size if self.objective == "paper" else 1.0
            weight_decay = self.weight_decay * (len(labels) / batch_size)
            matrices = [layer.weight for layer in head]
            factors = [weight_decay] * len(matrices) + [self.feature_decay_rate * share]
            scale = torch.as_tensor(penalty_scale, dtype=total.dtype, device=total.device)
            total = PenalisedLoss.apply(total, scale, factors, *matrices, features)
        return total, data

    @cached_property
    def criterion(self):
        """The `Loss` of --loss. Raises UserError if its file has no such function."""
        return LOSSES.get(self.loss) or Loss(load_function(self.loss), short_name(self.loss))

    def check_loss(self):
        """Raise UserError if a loss of a file is not a differentiable sum of finite losses of the samples."""
        if self.loss in LOSSES:
            return
        num_classes = len(self.class_counts)
        logits = torch.randn(5, num_classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
        labels = torch.arange(5) % num_classes
        try:
            whole = self.criterion.function(logits, labels)
            parts = sum(self.criterion.function(logits[i : i + 1], labels[i : i + 1]).sum() for i in range(5))
            shape, total = tuple(whole.shape), whole.sum()
            (gradient,) = torch.autograd.grad(total, logits)
            finite = bool(total.isfinite() and gradient.isfinite().all())
        except Exception as error:  # of whatever is in the file
            raise UserError(f"--loss {self.loss}: {type(error).__name__}: {message_of(error)}") from None
        if shape not in ((5,), ()):
            raise UserError(f"--loss {self.loss}: returns shape {shape} for 5 samples; return (5,), or their sum, ()")
        if not finite:
            raise UserError(f"--loss {self.loss}: the loss of random logits, or its gradient, is not finite")
        if not torch.allclose(total, parts, rtol=1e-3):
            raise UserError(
                f"--loss {self.loss}: 5 samples cost {total:.4g} together and {parts:.4g} one by one: return the "
                "losses of the samples, or their sum (no mean)"
            )

    @cached_property
    def variant(self):
        """The `LossVariant` of the cross entropy that the flags describe."""
        return LossVariant(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LossVariant)})

    @cached_property
    def variant_loss(self):
        return VariantLoss(self.variant, self.class_counts, torch.float64)

    def use_class_weights(self, use):
        """Give each class its weight, or all classes the weight 1; in place, since a CUDA graph reads the weights."""
        weights = torch.as_tensor(self.variant.parameters(self.class_counts).weights)
        self.variant_loss.weights.copy_(weights if use else torch.ones_like(weights))

    def loss_at_zero(self):
        """Return the objective of a network whose logits, features and head are all zero: log K for cross entropy."""
        num_classes, counts = len(self.class_counts), torch.tensor(self.class_counts, dtype=torch.float64)
        logits, labels = torch.zeros(1, num_classes), torch.arange(num_classes)
        criterion = self.criterion.function if self.variant.is_plain else self.variant_loss.to(logits)
        losses = torch.stack([criterion(logits, label[None]).sum() for label in labels])
        factor = self.data_factor if self.objective == "released" else 1.0
        return factor * float(counts @ losses.double() / counts.sum())

    @property
    def num_samples(self):
        return sum(self.class_counts)

    @property
    def data_factor(self):
        """The factor of the data term."""
        if self.objective == "paper":
            return 1.0
        return 1.0 / len(self.class_counts) if self.criterion.mean_over_classes else 0.5

    @property
    def optimizer_decay(self):
        """The weight decay that the optimizer applies to all parameters."""
        return 0.0 if self.sep_decay else self.weight_decay

    def effective_decays(self):
        """Return the (lambda_W, lambda_H) of the (UFM) that the objective minimises, or None without --sep_decay.

        The mean over an epoch of b = ceil(N/B) batches, divided by the data term's factor, is (UFM). `released` adds
        the penalty of the features once per epoch instead of N/B times, so its lambda_H is divided by b.
        """
        if not self.sep_decay:
            return None
        batches = 1 if self.objective == "paper" else math.ceil(self.num_samples / self.batch_size)
        return self.weight_decay / self.data_factor, self.feature_decay_rate / self.data_factor / batches

    def problem(self):
        """Return the `UFM` that the objective minimises, or a sentence that says why its optimum is not known."""
        if not self.sep_decay:
            return "without --sep_decay no optimum is known (--theory nominal compares with one anyway)"
        if self.depth_linear > 1 and (self.loss != "MSE" or self.bias):
            return (
                "with --depth_linear > 1 an optimum is known only for --loss MSE with --no-bias (--theory nominal "
                "compares with one anyway)"
            )
        return self._problem(self.effective_decays(), self.bias)

    def nominal_problem(self):
        """Return the `UFM` without bias at the flags' own lambdas, or a sentence that says why there is none."""
        return self._problem((self.weight_decay, self.feature_decay_rate), False)

    def _problem(self, decays, bias):
        if min(decays) <= 0:
            return "without a positive --weight_decay and --feature_decay_rate there is no optimum"
        if self.loss not in nc_theory.LOSSES:
            return f"no optimum is known for --loss {short_name(self.loss)}; docs/losses.md bounds it from below"
        problem = UFM(
            tuple(self.class_counts),
            *decays,
            loss=self.loss,
            relu=self.feature_relu,
            bias=bias,
            variant=self.variant,
            depth_linear=self.depth_linear if self.loss == "MSE" else 1,
        )
        if self.feature_dim < len(self.class_counts) and (needed := solve(problem).directions) > self.feature_dim:
            return f"the optimum has features in {needed} directions, and the model has {self.feature_dim} features"
        return problem

    def problems(self):
        """Return {objective, nominal: the fields of the problem, or why there is none}, which config.json records."""
        named = {"objective": self.problem(), "nominal": self.nominal_problem()}
        return {name: dataclasses.asdict(entry) if isinstance(entry, UFM) else entry for name, entry in named.items()}
