"""The model zoo. Every model(images) returns (logits, features) and has a linear head `fc`."""

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


def build_model(
    model,
    num_classes,
    *,
    bias=True,
    depth_linear=1,
    depth_relu=6,
    width=1024,
    in_features=3 * 32 * 32,
    feature_relu=True,
    planes=None,
    revive=False,
):
    """Return a model with fresh weights, by its name in MODELS; parameters are named as the flags that set them.

    num_classes: K. bias, depth_linear: of the head. depth_relu, width, in_features, feature_relu: of the MLP. planes:
    channels of the first stage of a convolutional model (a DenseNet: twice its growth rate); None is its own default.
    """
    if model == "MLP":
        own = {"depth_relu": depth_relu, "width": width, "in_features": in_features, "feature_relu": feature_relu}
    else:
        own = {"planes": planes} if planes else {}
    return MODELS[model](num_classes=num_classes, bias=bias, depth_linear=depth_linear, revive=revive, **own)


def to_device(model, data, device):
    """Return a model and its images on the device, in the memory format in which the model is fastest."""
    return model.to(device, memory_format=model.memory_format), data.to(device, model.memory_format)
