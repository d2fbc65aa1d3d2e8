"""The usual loop, written for comparison: what a training script for this paper does without thought of speed."""

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Images(Dataset):
    """One image at a time, as torchvision's data sets give them: from bytes to a picture to a normalised tensor."""

    def __init__(self, split):
        low, high = split.images.min(), split.images.max()
        pixels = ((split.images - low) * (255 / (high - low))).byte().cpu()
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        mean, std = (-low / (high - low)).item(), (1 / (high - low)).item()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class UsualTraining:
    """run(steps): that many steps of a loader in another process, Adam, two penalties, and an accuracy a batch."""

    def __init__(self, args, split, model, device):
        self.args, self.model, self.device, self.count = args, model, device, len(split)
        self.loader = DataLoader(Images(split), args.batch_size, shuffle=True, num_workers=1)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.batches = iter(self.loader)

    def run(self, steps):
        total = 0.0
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            images, labels = batch[0].to(self.device), batch[1].to(self.device)
            self.model.train()
            logits, features = self.model(images)
            loss = F.cross_entropy(logits, labels)
            loss = loss + 0.5 * self.args.weight_decay * torch.sum(self.model.fc[0].weight ** 2)
            scale = 0.5 * self.args.feature_decay_rate * self.count / len(labels)
            loss = loss + scale * torch.sum(features**2)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.model.eval()
            with torch.no_grad():
                correct = (self.model(images)[0].argmax(1) == labels).sum().item()
            total += loss.item() + correct
        return total


@torch.no_grad()
def usual_measurement(model, data, device):
    """NC1 and accuracies by batches of 64, a d x d outer product of every sample, and a pseudo-inverse."""
    model.eval()
    num_classes = data.num_classes
    sums, counts, correct = 0.0, torch.zeros(num_classes), 0
    for images, labels in DataLoader(Images(data.train), 64):
        logits, features = model(images.to(device))
        one_hot = F.one_hot(labels, num_classes).float().to(device)
        sums = sums + one_hot.T @ features
        counts += one_hot.sum(0).cpu()
        correct += (logits.argmax(1).cpu() == labels).sum().item()
    means = sums / counts.to(device)[:, None]
    total_mean = sums.sum(0) / counts.sum().item()
    sigma_w = 0.0
    for images, labels in DataLoader(Images(data.train), 64):
        _, features = model(images.to(device))
        centred = features - means[labels.to(device)]
        sigma_w = sigma_w + torch.matmul(centred[:, :, None], centred[:, None, :]).sum(0)
    sigma_w = (sigma_w / counts.sum().item()).cpu().numpy()
    shift = (means - total_mean).cpu().numpy()
    nc1 = np.trace(sigma_w @ scipy.linalg.pinv(shift.T @ shift / num_classes)) / num_classes
    for images, labels in DataLoader(Images(data.test), 64):
        logits, _ = model(images.to(device))
        correct += (logits.argmax(1).cpu() == labels).sum().item()
    return nc1, correct
