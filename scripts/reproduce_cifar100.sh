#!/usr/bin/env bash
# The paper's experiments on CIFAR-100: 30,000 training images, 100 to 500 of a class. See scripts/reproduce.sh.
#
#   scripts/reproduce_cifar100.sh
#   OBJECTIVE=released scripts/reproduce_cifar100.sh
#
# Time: not measured. A model takes 4,000 epochs: 472,000 steps of the MLP, 3,752,000 of each other model.
# Disk: 50 GB of checkpoints (MLP 15.3, ResNet18 18.0, VGG11 14.9, densenet_cifar 1.7), by the size of one.
# Expected: not measured. At the optimum no class collapses, and margins go from 6.86 for the smallest classes to
# 7.72 for the largest; with OBJECTIVE=released from 8.63 to 9.44 (MLP) and from 9.68 to 10.49 (the others).
exec "$(dirname "$0")/reproduce.sh" cifar100 "$@"
