#!/usr/bin/env bash
# statsmodels 0.15.0: MANOVA of classes that have collapsed finds that they do not differ.
# Guess: Wilks' lambda is 0, and all four tests of four perfectly separated classes have p = 0.
# Seen: Pillai's trace is above its largest value, 3, by rounding, and has p = 1; with three of four seeds the
# Hotelling-Lawley trace is -3e14 and has p = 1 as well, without a warning. With noise of 1e-6 all four have p = 0.
source "$(dirname "$0")/pinned.sh"
pinned statsmodels==0.15.0 pandas==3.1.1 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import numpy as np
import pandas as pd
from statsmodels.multivariate.manova import MANOVA

counts = [30, 20, 10, 5]
p_values = []
for seed in range(4):
    random = np.random.default_rng(seed)
    samples = random.normal(size=(4, 3))[np.repeat(np.arange(4), counts)]
    for noise in (0, 1e-6):
        table = pd.DataFrame(samples + noise * random.normal(size=samples.shape), columns=list("abc"))
        table["label"] = np.repeat(list("wxyz"), counts)
        tests = MANOVA.from_formula("a + b + c ~ C(label)", table).mv_test().results["C(label)"]["stat"]
        print(seed, noise, tests["Value"].tolist(), tests["Pr > F"].tolist())
        p_values.append(float(tests["Pr > F"]["Pillai's trace"]))
assert p_values == [1, 0, 1, 0, 1, 0, 1, 0]
CODE
