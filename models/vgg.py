"""VGG with batch normalisation for 32 x 32 images (Simonyan and Zisserman, 2015, table 1), without the fully
connected layers."""

from torch import nn

from models.classifier import Classifier, linear_head

# Planes of the convolutions, stage by stage; a stage ends with 2 x 2 max pooling.
STAGES = {
    "VGG11": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "VGG13": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "VGG16": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "VGG19": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


class VGG(Classifier):
    """Five pooled stages down to one pixel of 512 planes: the features."""

    def __init__(self, name, *, depth_linear, num_classes, bias):
        super().__init__()
        layers, in_planes = [], 3
        for stage in STAGES[name]:
            for planes in stage:
                layers += [nn.Conv2d(in_planes, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
                in_planes = planes
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = linear_head(in_planes, num_classes, depth_linear, bias)

    def embed(self, images):
        return self.features(images).flatten(1)
