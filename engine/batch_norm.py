"""BatchNorm layers that normalise with the statistics of the whole training set."""

import contextlib

import torch
from torch import nn


class _Reached(Exception):
    """Raised by a hook to end a forward pass at the layer whose input is wanted."""


@contextlib.contextmanager
def training_set_statistics(model, batches):
    """Within it, every BatchNorm layer in eval mode uses the mean and variance of its input over the training set.

    Layer after layer, each with the layers before it normalised in the same way, so that the model is the function
    that it would be in training mode on one batch of all images. Averages of batch statistics are not: they miss the
    variance between batches. On leaving, the running statistics are what they were.

    model: in eval mode. batches: a function that returns an iterator of the images (B, ...) of the training set; it is
    called once for each layer, and no more than one batch is in memory.
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
    """Return the BatchNorm layers of a model in the order in which a forward pass reaches them."""
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

    Batches are merged by their counts, means and sums of squared deviations (Chan, Golub, LeVeque, 1983), which does
    not cancel when the mean is large.
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
