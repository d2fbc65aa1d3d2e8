"""The model zoo. Every model(images) returns (logits, features), features >= 0, and has a linear head `fc`."""

from functools import partial

from models.densenet import densenet121, densenet_cifar
from models.mlp import MLP
from models.resnet import resnet18, resnet34, resnet50
from models.vgg import VGG

MODELS = {
    "MLP": MLP,
    "ResNet18": resnet18,
    "ResNet34": resnet34,
    "ResNet50": resnet50,
    "VGG11": partial(VGG, "VGG11"),
    "VGG13": partial(VGG, "VGG13"),
    "VGG16": partial(VGG, "VGG16"),
    "VGG19": partial(VGG, "VGG19"),
    "densenet_cifar": densenet_cifar,
    "DenseNet121": densenet121,
}


def build_model(name, num_classes, *, bias=True, depth_linear=1, depth_relu=6, width=1024, revive=False):
    """A model with fresh weights; `depth_relu`, `width` and `revive` are of the MLP only."""
    own = {"depth_relu": depth_relu, "width": width, "revive": revive} if name == "MLP" else {}
    return MODELS[name](num_classes=num_classes, bias=bias, depth_linear=depth_linear, **own)
