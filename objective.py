"""The objective that is trained, and the unconstrained features problem (UFM) that it stands for.

    min_{W, H >= 0}  (1/N) sum_i loss(W h_i, y_i) + (lambda_W/2) |W|^2 + (lambda_H/2) sum_i |h_i|^2     (UFM)

with loss the cross entropy, or |W h - e_y|^2 / 2 for MSE (arXiv 2401.02058, section 3). Nothing but this file
knows how flags become the lambdas of (UFM).
"""

import math
from dataclasses import dataclass

from torch.nn import functional as F


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of B of the N samples, `head` the linear layers of the model's head, W theirs:

    paper     data term                                 + (lambda_W/2) |W|^2 + (N/B) (lambda_H/2) sum_batch |h|^2
    released  (1/2) data term (MSE: also divided by K)  + (lambda_W/2) |W|^2 + (lambda_H/2) sum_batch |h|^2

    The data term is (1/B) sum CE or (1/2B) sum |W h - e_y|^2; in the released code's MSE, which is (1/2) of the
    mean over samples and classes, 1/B sum |W h - e_y|^2 / (2K). `paper` is an unbiased estimate of (UFM). Without
    sep_decay there is the data term alone: weight decay is the optimizer's, for all parameters.
    """

    loss: str  # CrossEntropy or MSE
    kind: str  # paper or released
    weight_decay: float  # lambda_W
    feature_decay: float  # lambda_H
    sep_decay: bool
    num_samples: int  # N
    num_classes: int  # K
    batch_size: int

    def __call__(self, logits, features, labels, head, penalty_strength=1.0):
        """Loss of a batch: (what is minimised, the mean loss of a sample: CE, or |W h - e_y|^2 / 2), scalars.

        logits (B, K), features (B, d), labels (B,), head: the layers of `model.fc`; penalty_strength: a number or
        scalar tensor that both penalties are multiplied with, for schedules that end at 1.
        """
        if self.loss == "CrossEntropy":
            data = F.cross_entropy(logits, labels)
        else:
            data = 0.5 * (logits - F.one_hot(labels, self.num_classes)).square().sum(1).mean()
        total = self.data_factor * data
        if self.sep_decay:
            share = self.num_samples / len(labels) if self.kind == "paper" else 1.0
            penalty = 0.5 * self.weight_decay * sum(layer.weight.square().sum() for layer in head)
            penalty = penalty + 0.5 * self.feature_decay * share * features.square().sum()
            total = total + penalty_strength * penalty
        return total, data

    @property
    def data_factor(self):
        """What the mean loss of a sample is multiplied with."""
        if self.kind == "paper":
            return 1.0
        return 0.5 if self.loss == "CrossEntropy" else 1.0 / self.num_classes

    @property
    def optimizer_decay(self):
        """Weight decay that the optimizer applies to all parameters."""
        return 0.0 if self.sep_decay else self.weight_decay

    def effective_decays(self):
        """(lambda_W', lambda_H') of the (UFM) that the objective minimises, or None without sep_decay.

        An epoch's mean over b = ceil(N/B) batches, divided by the data term's factor, is (UFM); `released` adds
        the features' penalty once an epoch, not N/B times, so its lambda_H is divided by b.
        """
        if not self.sep_decay:
            return None
        steps = 1 if self.kind == "paper" else math.ceil(self.num_samples / self.batch_size)
        return self.weight_decay / self.data_factor, self.feature_decay / self.data_factor / steps


def make_objective(args, data):
    """The Objective of the flags on a data set."""
    return Objective(
        loss=args.loss,
        kind=args.objective,
        weight_decay=args.weight_decay,
        feature_decay=args.feature_decay_rate,
        sep_decay=args.sep_decay,
        num_samples=len(data.train),
        num_classes=data.num_classes,
        batch_size=args.batch_size,
    )
