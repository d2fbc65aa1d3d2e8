#!/usr/bin/env bash
# imbalanced-learn 0.14.2: SVMSMOTE leaves separated classes imbalanced.
# Guess: fit_resample returns as many samples of each class as of the largest, 100, 100, 100.
# Seen: 100, 30, 15 become 100, 58, 40 without a warning; SMOTE makes them 100, 100, 100.
source "$(dirname "$0")/pinned.sh"
pinned imbalanced-learn==0.14.2 scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from imblearn.over_sampling import SMOTE, SVMSMOTE

labels = np.repeat(np.arange(3), [100, 30, 15])
samples = 50 * np.eye(3, 6)[labels] + np.random.default_rng(0).normal(size=(145, 6))
found = {c.__name__: np.bincount(c(random_state=0).fit_resample(samples, labels)[1]).tolist() for c in (SMOTE, SVMSMOTE)}
print(found)
assert found["SMOTE"] == [100, 100, 100] and found["SVMSMOTE"][0] == 100 and max(found["SVMSMOTE"][1:]) < 100
CODE
