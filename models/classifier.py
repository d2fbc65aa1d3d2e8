"""What all models share: a body that gives non-negative features, and a linear head on them."""

import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """A body `embed`: images (B, 3, 32, 32) -> features (B, d) >= 0, and a head `fc`: features -> logits (B, K)."""

    fc: nn.Sequential

    def embed(self, images):
        raise NotImplementedError

    def forward(self, images):
        features = self.embed(images).float()
        with torch.autocast(images.device.type, enabled=False):  # the theory is about the head: it stays fp32
            return self.fc(features), features


class HeadLinear(nn.Linear):
    """A linear layer that is at least fp32, forward and backward, where TF32 is switched on for the network's body."""

    def forward(self, features):
        if torch.backends.cuda.matmul.fp32_precision != "tf32":
            return super().forward(features)
        bias = None if self.bias is None else self.bias.double()
        return F.linear(features.double(), self.weight.double(), bias).to(features.dtype)


def linear_head(dim, num_classes, depth_linear, bias):
    """`depth_linear` linear layers, the last one to the classes; only that one may have a bias."""
    hidden = [HeadLinear(dim, dim, bias=False) for _ in range(depth_linear - 1)]
    return nn.Sequential(*hidden, HeadLinear(dim, num_classes, bias=bias))


def head_weight(model):
    """The head's matrix W (K, d): the product of its layers' matrices."""
    weight = model.fc[0].weight
    for layer in model.fc[1:]:
        weight = layer.weight @ weight
    return weight
