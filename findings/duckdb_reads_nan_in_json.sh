#!/usr/bin/env bash
# DuckDB 2.0.1: read_json takes NaN and Infinity, which are no JSON.
# Guess: a log written by Python's json.dumps with a NaN loss is refused as malformed.
# Seen: the rows are read as (1, 0.5), (2, nan), (3, inf); Polars 2.1.0 refuses the same file.
source "$(dirname "$0")/pinned.sh"
pinned duckdb==2.0.1
check <<'CODE'
import json
import math
from pathlib import Path

import duckdb

rows = [{"epoch": 1, "NC1": 0.5}, {"epoch": 2, "NC1": math.nan}, {"epoch": 3, "NC1": math.inf}]
Path("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
found = duckdb.sql("select * from read_json('log.jsonl')").fetchall()
print(found)
assert found[0] == (1, 0.5) and math.isnan(found[1][1]) and found[2] == (3, math.inf)
CODE
