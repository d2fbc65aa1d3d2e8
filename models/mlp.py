"""Multilayer perceptron on flattened 32 x 32 RGB images."""

import torch
from torch import nn

from models.classifier import Classifier, linear_head


class RevivingReLU(torch.autograd.Function):
    """ReLU of (B, d), with a gradient for samples that it leaves without one: those whose d outputs are all zero.

    A feature at zero is a minimum of the constraint h >= 0 only if the loss would not fall as it rises. Of the samples
    that are zero throughout, the features that the loss would raise get its gradient as if there were no ReLU.
    """

    @staticmethod
    def forward(context, inputs):
        outputs = inputs.relu()
        context.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(context, gradient):
        active = context.saved_tensors[0] > 0
        dead = ~active.any(1, keepdim=True)
        return gradient * (active | (dead & (gradient < 0)))


class MLP(Classifier):
    """`depth_relu` ReLU layers, one more whose output is the features, and a linear head, all `width` wide.

    revive: samples whose features are all zero keep a gradient (`RevivingReLU`).
    """

    def __init__(self, *, depth_relu, width, depth_linear, num_classes, bias, revive=False):
        super().__init__()
        layers = [nn.Linear(3 * 32 * 32, width), nn.ReLU()]
        for _ in range(depth_relu - 1):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.intermediate_layer = nn.Linear(width, width)
        self.fc = linear_head(width, num_classes, depth_linear, bias)
        self.feature_relu = RevivingReLU.apply if revive else torch.relu

    def embed(self, images):
        return self.feature_relu(self.intermediate_layer(self.layers(images.flatten(1))))
