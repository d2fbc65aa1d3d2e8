"""VGG with batch normalisation for 32 x 32 images (Simonyan and Zisserman, 2015, table 1), without the fully
connected layers."""

from torch import nn

from models.classifier import Classifier, FeatureReLU, linear_head

# Output channels of the convolutions, stage by stage, in units of `planes`.
STAGES = {
    "VGG11": [[1], [2], [4] * 2, [8] * 2, [8] * 2],
    "VGG13": [[1] * 2, [2] * 2, [4] * 2, [8] * 2, [8] * 2],
    "VGG16": [[1] * 2, [2] * 2, [4] * 3, [8] * 3, [8] * 3],
    "VGG19": [[1] * 2, [2] * 2, [4] * 4, [8] * 4, [8] * 4],
}


class VGG(Classifier):
    """Five stages, each ending in 2 x 2 max pooling, down to one pixel of 8 `planes` channels: the features."""

    def __init__(self, name, *, depth_linear, num_classes, bias, planes=64, revive=False):
        super().__init__()
        layers, in_planes = [], 3
        for stage in STAGES[name]:
            for width in stage:
                layers += [
                    nn.Conv2d(in_planes, width * planes, 3, padding=1),
                    nn.BatchNorm2d(width * planes),
                    nn.ReLU(),
                ]
                in_planes = width * planes
            layers.append(nn.MaxPool2d(2))
        layers[-2] = FeatureReLU(revive)
        self.features = nn.Sequential(*layers)
        self.fc = linear_head(in_planes, num_classes, depth_linear, bias)

    def embed(self, images):
        return self.features(images).flatten(1)
