#!/usr/bin/env bash
# optax 0.2.8: a label of -1 is the last class.
# Guess: softmax_cross_entropy_with_integer_labels is NaN for every label that is no class: -100, -4, -1 and 3 of three.
# Seen: NaN for -100, -4 and 3; for -1 to -3 the loss of classes 2 to 0, without a warning, while jax.nn.one_hot(-1, 3)
# is zero. So data that mark padding or unlabelled samples with -1 train the last class.
source "$(dirname "$0")/pinned.sh"
pinned optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
check <<'CODE'
import numpy as np
import jax
import optax

labels = np.array([-100, -4, 3, -1, -2, -3, 2, 1, 0])
losses = np.array(optax.softmax_cross_entropy_with_integer_labels(np.tile([1.0, 2.0, 4.0], (9, 1)), labels))
print(dict(zip(labels.tolist(), losses.tolist())), jax.nn.one_hot(-1, 3))
assert np.isnan(losses[:3]).all() and (losses[3:6] == losses[6:]).all() and not jax.nn.one_hot(-1, 3).any()
CODE
