#!/usr/bin/env bash
# SciPy 1.17.1: Welch's ANOVA of perfectly separated classes has p = NaN.
# Guess: f_oneway of three constant, different groups gives statistic inf and p = 0, with equal_var=False as without.
# Seen: (inf, 0.0) with equal variances, (inf, nan) with equal_var=False; Welch's t test of two of them gives p = 0.
source "$(dirname "$0")/pinned.sh"
pinned scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
from scipy.stats import f_oneway, ttest_ind

groups = [np.full(40, value) for value in (0.0, 1.0, 3.0)]
equal, welch = f_oneway(*groups), f_oneway(*groups, equal_var=False)
two = ttest_ind(groups[0], groups[1], equal_var=False)
print(equal, welch, two)
assert equal.pvalue == 0 and np.isinf(welch.statistic) and np.isnan(welch.pvalue) and two.pvalue == 0
CODE
