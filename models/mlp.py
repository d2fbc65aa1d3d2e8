"""Multilayer perceptron on flattened images, or on features."""

import torch
from torch import nn

from models.classifier import Classifier, FeatureReLU, HiddenReLU, linear_head


class MLP(Classifier):
    """`depth_relu` ReLU layers, one more whose output is the features, and a linear head, all `width` wide.

    in_features: numbers in an image, or features. feature_relu: without it, the last layer is linear and the features
    are free. revive: let a gradient raise features at zero (`RevivingReLU`), and hidden layers that are zero for an
    image (`RevivingRowReLU`).
    """

    memory_format = torch.contiguous_format

    def __init__(
        self,
        *,
        depth_relu,
        width,
        depth_linear,
        num_classes,
        bias,
        in_features=3 * 32 * 32,
        feature_relu=True,
        revive=False,
    ):
        super().__init__()
        layers = [nn.Linear(in_features, width), HiddenReLU(revive)]
        for _ in range(depth_relu - 1):
            layers += [nn.Linear(width, width), HiddenReLU(revive)]
        self.layers = nn.Sequential(*layers)
        self.intermediate_layer = nn.Linear(width, width)
        self.fc = linear_head(width, num_classes, depth_linear, bias)
        self.feature_relu = FeatureReLU(revive) if feature_relu else nn.Identity()

    def embed(self, images):
        return self.feature_relu(self.intermediate_layer(self.layers(images.flatten(1))))
