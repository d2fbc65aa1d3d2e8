#!/usr/bin/env bash
# Polars 2.1.0: Spearman's correlation takes a NaN for the largest number.
# Guess: pl.corr(method="spearman") of a column with a NaN is NaN, as Pearson's is.
# Seen: of [1, NaN, 2, 3] with [1, 2, 3, 4] Pearson's is NaN, Spearman's 0.4; SciPy 1.17.1 says NaN. So a metric that
# became NaN at one epoch still correlates.
source "$(dirname "$0")/pinned.sh"
pinned polars==2.1.0 scipy==1.17.1 numpy==2.4.6
check <<'CODE'
import math
import polars as pl
from scipy.stats import spearmanr

table = pl.DataFrame({"a": [1.0, math.nan, 2.0, 3.0], "b": [1.0, 2.0, 3.0, 4.0]})
pearson, spearman = (table.select(pl.corr("a", "b", method=m)).item() for m in ("pearson", "spearman"))
scipys = spearmanr(table["a"].to_numpy(), table["b"].to_numpy()).statistic
print(pearson, spearman, scipys)
assert math.isnan(pearson) and math.isnan(scipys) and abs(spearman - 0.4) < 1e-12
CODE
