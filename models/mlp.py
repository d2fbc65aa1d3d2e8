"""Multilayer perceptron on flattened 32 x 32 RGB images."""

import torch
from torch import nn

from models.classifier import Classifier, linear_head


class RevivingReLU(torch.autograd.Function):
    """ReLU whose outputs at zero get the gradients that would raise them: the projected gradient of h >= 0.

    A feature at zero is stationary in min over h >= 0 only if the loss would not fall as it rises. ReLU's own gradient
    is zero there in any case, so an image, or a class, whose features are all zero stays so for good.
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


class MLP(Classifier):
    """`depth_relu` ReLU layers, one more whose output is the features, and a linear head, all `width` wide.

    revive: features at zero keep the gradient that would raise them (`RevivingReLU`).
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
