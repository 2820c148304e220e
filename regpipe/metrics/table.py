"""The metrics of many cases as a CSV, one line per case."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regpipe.metrics.measures import known, mean_of
from regpipe.utils.files import csv_bytes, replace_file


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a header, one line per case, then 'mean' and 'std' (n - 1), both without NaNs; NaN is what a case lacks.

    The file is written aside and renamed, so that an old one is replaced whole or not at all.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError(f"{path}: there are no cases to write")
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "case"]
    table = [[row["case"], *(float(row.get(name, math.nan)) for name in names)] for row in rows]
    columns = list(zip(*(line[1:] for line in table), strict=True))
    table.append(["mean", *map(mean_of, columns)])
    table.append(["std", *map(_std, columns)])
    replace_file(path, csv_bytes([["case", *names], *table]))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The cases of a ``metrics.csv``, without its ``mean`` and ``std`` lines."""
    with Path(path).open(newline="", encoding="utf-8") as stream:
        rows = [{k: v if k == "case" else float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    return [row for row in rows if row["case"] not in ("mean", "std")]


def _std(values: Iterable[float]) -> float:
    numbers = known(values)
    return float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
