#!/usr/bin/env bash
# scikit-learn 1.9.1: the tuned threshold of perfectly separated classes is just above the scores of the majority.
# Guess: TunedThresholdClassifierCV finds a threshold near 0.5 for 95 samples at -1 and 5 at 1, all right at 0.5.
# Seen: 0.023, 0.0105 and 0.0101 for logistic regression with C = 1, 100, 10000: of all thresholds between 0 and 1 that
# are right for every sample it takes the smallest on its grid of 100. A sample half way between the classes, of
# probability 0.17 to 0.23, is then of the minority.
source "$(dirname "$0")/pinned.sh"
pinned scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import TunedThresholdClassifierCV

labels = np.repeat([0, 1], [95, 5])
samples = np.where(labels, 1.0, -1.0)[:, None]
for C in (1, 100, 10000):
    model = LogisticRegression(C=C)
    tuned = TunedThresholdClassifierCV(model).fit(samples, labels)
    print(C, tuned.best_threshold_, tuned.best_score_, tuned.estimator_.predict_proba([[0.0]])[0, 1])
    assert model.fit(samples, labels).score(samples, labels) == tuned.best_score_ == 1
    assert tuned.best_threshold_ < 0.05 and tuned.predict([[0.0]]) == 1
CODE
