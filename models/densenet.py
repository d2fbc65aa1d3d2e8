"""DenseNet-BC for 32 x 32 images (Huang et al., 2017), compression 0.5."""

import torch
from torch import nn
from torch.nn import functional as F

from models.classifier import Classifier, FeatureReLU, linear_head


class DenseLayer(nn.Module):
    """A 1 x 1 bottleneck and a 3 x 3 convolution whose `growth` new channels are prepended to the input."""

    def __init__(self, in_planes, growth):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], dim=1)


class Transition(nn.Module):
    """A 1 x 1 convolution to half the channels, and average pooling to half the side."""

    def __init__(self, in_planes):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_planes)
        self.conv = nn.Conv2d(in_planes, in_planes // 2, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(Classifier):
    """Four dense blocks of growth rate `planes` / 2; the features are the spatial average of the last ReLU."""

    def __init__(self, num_layers, *, planes, depth_linear, num_classes, bias, revive=False):
        super().__init__()
        growth = planes // 2
        self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        for block, count in enumerate(num_layers, start=1):
            layers = [DenseLayer(planes + index * growth, growth) for index in range(count)]
            setattr(self, f"dense{block}", nn.Sequential(*layers))
            planes += count * growth
            if block < len(num_layers):
                setattr(self, f"trans{block}", Transition(planes))
                planes //= 2
        self.bn = nn.BatchNorm2d(planes)
        self.feature_relu = FeatureReLU(revive)
        self.fc = linear_head(planes, num_classes, depth_linear, bias)

    def embed(self, images):
        out = self.trans1(self.dense1(self.conv1(images)))
        out = self.trans2(self.dense2(out))
        out = self.trans3(self.dense3(out))
        return self.feature_relu(self.bn(self.dense4(out))).mean((2, 3))


def densenet121(planes=64, **options):
    return DenseNet([6, 12, 24, 16], planes=planes, **options)


def densenet_cifar(planes=24, **options):
    return DenseNet([6, 12, 24, 16], planes=planes, **options)
