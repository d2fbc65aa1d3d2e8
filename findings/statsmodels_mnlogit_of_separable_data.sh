#!/usr/bin/env bash
# statsmodels 0.15.0: multinomial logit of separable data returns coefficients that look insignificant.
# Guess: MNLogit raises PerfectSeparationError on three classes that lie ten standard deviations apart.
# Seen: a fit with log-likelihood -1e-9 and p values above 0.999 for every coefficient; the only sign is a warning that
# the maximum likelihood did not converge, not that the classes are separated.
source "$(dirname "$0")/pinned.sh"
pinned statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6 pandas==3.1.1
check <<'CODE'
import warnings

import numpy as np
import statsmodels.api as sm

labels = np.repeat(np.arange(3), [60, 30, 10])
samples = 10 * np.eye(3)[labels][:, :2] + np.random.default_rng(0).normal(size=(100, 2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fit = sm.MNLogit(labels, sm.add_constant(samples)).fit(disp=0)
print(fit.llf, fit.pvalues.min(), [warning.category.__name__ for warning in caught])
assert fit.llf > -1e-6 and fit.pvalues.min() > 0.99
assert not any("Separation" in warning.category.__name__ for warning in caught)
CODE
