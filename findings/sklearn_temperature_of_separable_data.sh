#!/usr/bin/env bash
# scikit-learn 1.9.1: the temperature of separable data is wherever the search became flat.
# Guess: temperature calibration (new in 1.8) of perfectly separated classes ends at the bound of its search, an inverse
# temperature of e^10 = 22026, whatever the logits, since the likelihood rises for ever.
# Seen: 10.6 for logistic regression with C = 10, 45.6 with C = 1 and 45.6 with C = 0.1, without a warning.
source "$(dirname "$0")/pinned.sh"
pinned scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression

labels = np.repeat(np.arange(5), 40)
samples = np.random.default_rng(2).normal(size=(5, 8))[labels]
found = []
for C in (10, 1, 0.1):
    model = CalibratedClassifierCV(LogisticRegression(C=C), method="temperature", ensemble=False).fit(samples, labels)
    found.append(float(model.calibrated_classifiers_[0].calibrators[0].beta_))
    assert model.score(samples, labels) == 1
print(found)
assert max(found) < 100 and found[0] < 0.5 * found[1]
CODE
