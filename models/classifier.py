"""The base class of all models: a body that returns features, and a linear head."""

import torch
from torch import nn
from torch.nn import functional as F


class RevivingReLU(torch.autograd.Function):
    """ReLU that passes, at outputs of zero, the gradients that would raise them: the projected gradient of h >= 0.

    In min over h >= 0 a feature at zero is stationary only if the loss does not fall as the feature rises. The
    gradient of an ordinary ReLU is zero there in any case, so an image or a class whose features are all zero can
    never recover.
    """

    @staticmethod
    def forward(context, inputs):
        outputs = inputs.relu()
        context.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(context, gradient):
        (outputs,) = context.saved_tensors
        return gradient * ((outputs > 0) | (gradient < 0))


class RevivingRowReLU(RevivingReLU):
    """ReLU that passes, for images all of whose outputs (B, d) are zero, the gradients that would raise them.

    An image that no unit of a hidden layer responds to has the same features as every other such image, whatever its
    class, and an ordinary ReLU gives it no gradient that could separate them.
    """

    @staticmethod
    def backward(context, gradient):
        (outputs,) = context.saved_tensors
        dead = outputs.amax(1, keepdim=True) == 0
        passing = torch.where(dead, -gradient, outputs)  # the gradient passes where this is above zero
        return torch.ops.aten.threshold_backward(gradient, passing, 0)


class RevivableReLU(nn.Module):
    """A ReLU, or with `revive` the `reviving` one."""

    reviving = RevivingReLU

    def __init__(self, revive=False):
        super().__init__()
        self.relu = self.reviving.apply if revive else torch.relu

    def forward(self, inputs):
        return self.relu(inputs)


class HiddenReLU(RevivableReLU):
    """The ReLU of a hidden layer that is fully connected; with `revive`, a `RevivingRowReLU`."""

    reviving = RevivingRowReLU


class FeatureReLU(RevivableReLU):
    """The ReLU whose outputs, or their spatial averages, are the features; with `revive`, a `RevivingReLU`."""


class Classifier(nn.Module):
    """A body `embed`, images (B, 3, S, S) -> features (B, d), and a head `fc`, features -> logits (B, K)."""

    fc: nn.Sequential
    memory_format = torch.channels_last  # fastest for convolutions

    def embed(self, images):
        raise NotImplementedError

    def forward(self, images):
        features = self.embed(images).to(self.fc[0].weight.dtype)
        with torch.autocast(images.device.type, enabled=False):  # the head is what the theory is about: fp32
            return self.fc(features), features


class HeadLinear(nn.Linear):
    """A linear layer that computes in at least fp32, also when TF32 is switched on for the body of the network."""

    def forward(self, features):
        if torch.backends.cuda.matmul.fp32_precision != "tf32":
            return super().forward(features)
        bias = None if self.bias is None else self.bias.double()
        return F.linear(features.double(), self.weight.double(), bias).to(features.dtype)


def linear_head(dim, num_classes, depth_linear, bias):
    """Return a head of `depth_linear` linear layers; only the last one, to the classes, may have a bias."""
    hidden = [HeadLinear(dim, dim, bias=False) for _ in range(depth_linear - 1)]
    return nn.Sequential(*hidden, HeadLinear(dim, num_classes, bias=bias))
