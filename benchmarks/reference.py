"""The usual way, for comparison: a training script for this paper that is not optimised for speed."""

from functools import cache
from itertools import islice

import numpy as np
import scipy.linalg
import torch
from common import paper_args, random_images
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from engine.training import make_model


class Images(Dataset):
    """One image at a time, as torchvision's data sets give them: from bytes to a picture to a normalised tensor."""

    def __init__(self, split):
        from torchvision import transforms  # takes seconds, which every process of a benchmark would spend

        low, high = split.images.min(), split.images.max()
        pixels = ((split.images - low) * (255 / (high - low))).round().byte().cpu()
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        mean, std = (-low / (high - low)).item(), (1 / (high - low)).item()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def run_usual_training(steps, *setting):
    """Run the next `steps` steps of `usual_training` in this setting."""
    for _ in islice(usual_training(*setting), steps):
        pass


@cache  # calls of a setting continue one generator
def usual_training(model, batch_size, width, fraction, device):
    """Train without end, yielding the loss and the number of correct images of each step.

    A loader in another process (on a GPU, in four), Adam, two penalties, and a second forward pass for the accuracy.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # by default, convolutions in fp32 are in TF32
    args, split = paper_args(model, batch_size, width), random_images(fraction).train
    torch.manual_seed(args.seed)
    model = make_model(args, num_classes=10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    # Fork, as in a script that a user starts: in a spawned process, workers would import everything in every epoch.
    loading = {"num_workers": 4 if device.type == "cuda" else 1, "multiprocessing_context": "fork"}
    loader = DataLoader(Images(split), batch_size, shuffle=True, **loading)
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            model.train()
            logits, features = model(images)
            loss = F.cross_entropy(logits, labels)
            loss = loss + 0.5 * args.weight_decay * torch.sum(model.fc[0].weight ** 2)
            loss = loss + 0.5 * args.feature_decay_rate * len(split) / len(labels) * torch.sum(features**2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                correct = (model(images)[0].argmax(1) == labels).sum().item()
            yield loss.item(), correct


@torch.no_grad()
def usual_nc1(model, data, device):
    """Return NC1, from outer products (d, d) of every sample and a pseudo-inverse; count correct images on the way."""
    model.eval()
    train, test = (DataLoader(Images(split), 64) for split in (data.train, data.test))
    sums, sigma_w, correct = 0.0, 0.0, 0
    for images, labels in train:
        logits, features = model(images.to(device))
        sums = sums + F.one_hot(labels, data.num_classes).float().to(device).T @ features
        correct += (logits.argmax(1).cpu() == labels).sum().item()
    means = sums / torch.tensor(data.class_counts, device=device)[:, None]
    for images, labels in train:
        centred = model(images.to(device))[1] - means[labels.to(device)]
        sigma_w = sigma_w + torch.matmul(centred[:, :, None], centred[:, None, :]).sum(0)
    sigma_w = (sigma_w / len(data.train)).cpu().numpy()
    shift = (means - sums.sum(0) / len(data.train)).cpu().numpy()
    for images, labels in test:
        correct += (model(images.to(device))[0].argmax(1).cpu() == labels).sum().item()
    return np.trace(sigma_w @ scipy.linalg.pinv(shift.T @ shift / data.num_classes)) / data.num_classes
