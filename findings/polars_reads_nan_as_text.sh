#!/usr/bin/env bash
# Polars 2.1.0: a column of numbers with one nan, as Python prints it, is read as text.
# Guess: read_csv makes a Float64 column of each of nan, NaN, inf and -inf below 0.5, as pandas and DuckDB do.
# Seen: Float64 with NaN, inf and -inf, String with nan and Infinity, without a warning; with schema_overrides it reads
# them all as numbers. So a log of a run that had one NaN loss has another type than the others.
source "$(dirname "$0")/pinned.sh"
pinned polars==2.1.0
check <<'CODE'
import math
import polars as pl

texts = ("nan", "NaN", "inf", "-inf", "Infinity")
logs = [f"loss\n0.5\n{text}\n".encode() for text in texts]
found = {text: str(pl.read_csv(log)["loss"].dtype) for text, log in zip(texts, logs)}
print(found)
assert found == {"nan": "String", "NaN": "Float64", "inf": "Float64", "-inf": "Float64", "Infinity": "String"}
numbers = [pl.read_csv(log, schema_overrides={"loss": pl.Float64})["loss"][1] for log in logs]
assert math.isnan(numbers[0]) and numbers[4] == math.inf
CODE
