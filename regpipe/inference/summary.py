"""The outcome of a folder: ``metrics.csv`` and the lines at the end of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regpipe.losses.contrast import FIXED, MOVING
from regpipe.metrics.measures import mean_ratios
from regpipe.metrics.table import write_csv
from regpipe.utils import console
from regpipe.utils.files import csv_bytes, replace_file, sweep

NOTHING = "nothing beyond the affine stage"  # found: no part of a deformation paid
SAID = (  # an entry of a case, its value, and what the last lines say of such cases
    ("start", "zero", "refined from zero: no part of the network's answer paid"),
    ("contrast", FIXED, "had the fixed image's grey values mapped to the moving one's: no line relates them"),
    ("contrast", MOVING, "had the moving image's grey values mapped to the fixed one's: no line relates them"),
    ("found", NOTHING, "have nothing to find beyond the affine stage; --similarity mi looks past unlike contrasts"),
)
NO_METRICS = ("to_fit_memory", "volumes", "rigid", *(key for key, *_ in SAID))  # entries of a case


def tell(
    folder: Path, rows: Sequence[Mapping[str, Any]], *, cases: int, failures: Mapping[str, str], finished: int
) -> None:
    """Write ``metrics.csv`` over the finished ``rows``, and print how many of ``cases`` they are and which failed.

    Of labels ``volumes.csv``, too. ``finished``: how many of them were finished before.
    """
    if rows:
        sweep(folder, "metrics.csv")
        kept = [{k: v for k, v in row.items() if k not in NO_METRICS} for row in rows]
        table = [{**row, "warnings": len(row["warnings"])} for row in kept]
        write_csv(folder / "metrics.csv", [{k: math.nan if v is None else v for k, v in row.items()} for row in table])
    ratios = mean_ratios(rows)
    if ratios:
        lines = [[label, n, *(f"{x:.6g}" for x in told)] for label, (n, *told) in ratios.items()]
        replace_file(folder / "volumes.csv", csv_bytes([["label", "cases", "ratio", "low", "high"], *lines]))
    console.tell(folder=folder, finished_before=finished, cases=rows, failures=failures)
    print(f"{len(rows)} of {cases} pairs registered; results in {folder}")
    for key, value, text in SAID:
        count = sum(value in (row.get(key) or "") for row in rows)  # of several channels by commas
        if count:
            print(f"{count} of them {text} (see metrics.json)")
    spared = Counter(", ".join(row.get("to_fit_memory", [])) for row in rows)
    for how, count in sorted(spared.items()):
        if how:
            print(f"{count} of them not as asked for, to fit into memory: {how} (see metrics.json)")
    warned = sum(bool(row["warnings"]) for row in rows)
    if warned:
        print(f"{warned} with warnings, in their metrics.json: look at them (regpipe report {folder})")
    if failures:
        print(f"{len(failures)} failed:")
        print("\n".join(f"  {name}: {problem}" for name, problem in failures.items()))
