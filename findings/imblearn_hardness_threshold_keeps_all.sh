#!/usr/bin/env bash
# imbalanced-learn 0.14.2: InstanceHardnessThreshold removes nothing from collapsed classes.
# Guess: it keeps as many samples of each class as the smallest has, 15, 15, 15.
# Seen: 100, 30, 15 stay 100, 30, 15 without a warning: all samples of a class are equally hard, and none is above the
# percentile. NearMiss returns 15, 15, 15.
source "$(dirname "$0")/pinned.sh"
pinned imbalanced-learn==0.14.2 scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from imblearn.under_sampling import InstanceHardnessThreshold, NearMiss

labels = np.repeat(np.arange(3), [100, 30, 15])
samples = 50 * np.eye(3, 6)[labels]
found = [np.bincount(s.fit_resample(samples, labels)[1]).tolist()
         for s in (InstanceHardnessThreshold(random_state=0), NearMiss())]
print(found)
assert found == [[100, 30, 15], [15, 15, 15]]
CODE
