"""BatchNorm layers that normalise with the statistics of the whole training set, or of the batches of all ranks."""

import contextlib

import torch
from torch import nn


class _Reached(Exception):
    """Raised by a forward hook to end the forward pass at the layer whose input statistics are computed."""


@contextlib.contextmanager
def training_set_statistics(model, batches):
    """Make every BatchNorm layer in eval mode use the mean and variance of its input over the training set.

    The statistics are computed layer by layer, after those of all earlier layers. The model then computes what it
    would compute in training mode on a single batch of all images. Averaged batch statistics would not give this,
    because they miss the variance between batches. On leaving the context, the running statistics are restored.

    model: in eval mode. batches: a function that returns an iterator over the images (B, ...) of the training set; it
    is called once per layer, and only one batch is in memory at a time.
    """
    layers = _layers_in_order(model, next(iter(batches())))
    before = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    try:
        for layer in layers:
            mean, variance = _input_statistics(model, layer, batches())
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        yield
    finally:
        for layer, (mean, variance) in zip(layers, before, strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)


@torch.no_grad()
def _layers_in_order(model, images):
    """Return the BatchNorm layers of a model in the order of the forward pass."""
    reached = []
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(lambda module, _: reached.append(module)) for layer in layers]
    try:
        model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return reached


@torch.no_grad()
def _input_statistics(model, layer, batches):
    """Return the mean and biased variance (C,) of a layer's input over all batches, in float64.

    Batches are merged by their counts, means and sums of squared deviations (Chan, Golub, LeVeque, 1983), which
    avoids cancellation when the mean is large.
    """
    count, mean, squares = 0, 0.0, 0.0

    def add(module, inputs):
        nonlocal count, mean, squares
        values = inputs[0].double().transpose(0, 1).flatten(1)  # (C, everything else)
        new, shift = values.shape[1], values.mean(1) - mean
        total = count + new
        squares = squares + values.var(1, correction=0) * new + shift.square() * (count * new / total)
        mean = mean + shift * (new / total)
        count = total
        raise _Reached

    hook = layer.register_forward_pre_hook(add)
    try:
        for images in batches:
            with contextlib.suppress(_Reached):
                model(images)
    finally:
        hook.remove()
    return mean, squares / count


# ---------------------------------------------------------------------------------------------------------
# Training on several ranks
# ---------------------------------------------------------------------------------------------------------


def synchronise_batch_norm(model, all_reduce, fused):
    """Make the BatchNorm2d layers of a model, in training mode, normalise over the batches of all ranks.

    all_reduce(tensor): a function that sums a tensor over the ranks, in place. fused: use nn.SyncBatchNorm, which is
    faster, but trains only on GPUs, and in a CUDA graph only if every rank has images of every batch.
    """
    if fused:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.all_reduce = SynchronisedBatchNorm, all_reduce


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks, in two passes: first the mean, then the squared deviations from it."""

    def forward(self, inputs):
        if not self.training:
            return super().forward(inputs)
        values = inputs.to(self.weight.dtype)
        count = values.new_full((1,), values[:, 0].numel())
        sums = SumOverRanks.apply(torch.cat([values.sum((0, 2, 3)), count]), self.all_reduce)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1]
        centred = values - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum((0, 2, 3)), self.all_reduce) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(inputs.dtype)


class SumOverRanks(torch.autograd.Function):
    """Sum a tensor over the ranks; the gradient is summed over the ranks as well."""

    @staticmethod
    def forward(context, tensor, all_reduce):
        context.all_reduce = all_reduce
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(context, gradient):
        return context.all_reduce(gradient.clone()), None
