"""The batches of each epoch, drawn on the CPU and sent to the device while it trains on the previous epoch."""

import torch

from datasets import epoch_batches, epoch_order, random_shifts
from engine.device import send


class Batches:
    """The batches of a training set with `labels` (N,) on the device; the other arguments have the names of the flags.

    sizes: the batch sizes of an epoch, in order.
    shifts: the random crops and flips (N, 3) of the last epoch drawn, always in the same tensor; None if there are none
    """

    def __init__(self, labels, *, batch_size, seed, no_shuffle=False, stratified=False, data_augmentation=False):
        self.device, self.count, self.batch_size, self.seed = labels.device, len(labels), batch_size, seed
        self.shuffle, self.stratified = not no_shuffle, stratified
        self.labels = labels.cpu() if stratified else None
        self.shifts = labels.new_zeros(len(labels), 3) if data_augmentation else None
        self.sizes = [len(batch) for batch in self.split(torch.empty(len(labels)))]

    def split(self, order):
        return epoch_batches(order, self.batch_size, even=self.stratified)

    def draw(self, epoch):
        """Return the indices (B,) of each batch of an epoch and set `shifts`, without waiting for the device."""
        if self.shifts is not None:
            self.shifts.copy_(send(random_shifts(self.count, epoch=epoch, seed=self.seed), self.device))
        order = epoch_order(self.count, epoch=epoch, seed=self.seed, shuffle=self.shuffle, labels=self.labels)
        return self.split(send(order, self.device))
