"""``cases.csv`` and the page made of it: means with intervals, paired differences from a reference."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from judging import SPLIT_DICE
from scipy.stats import wilcoxon

from regpipe import InputError
from regpipe.engines.evaluation import interval
from regpipe.metrics.measures import bootstrap_interval, known
from regpipe.metrics.metric import columns, heading
from regpipe.utils.files import replace_file

COSTS = ("seconds", "cpu_seconds", "peak_mib")
TEXT = ("method", "case", "made_from")
COLUMNS = (*TEXT, *COSTS, *columns(), *SPLIT_DICE)
HEADINGS = {
    name: (heading(name), metric.digits)
    for name, metric in columns("table").items()
    if not name.endswith("_before") and name != "ncc"
} | {
    "dice_subcortical": ("Dice subcortical", 3),
    "dice_cortical": ("Dice cortical", 3),
    "seconds": ("s / pair", 2),
    "cpu_seconds": ("processor s / pair", 2),
}
TESTED = ("dice", *SPLIT_DICE, "hd95", "tre", "sdlogj")

Row = dict[str, Any]


def read_cases(path: Path, columns: Sequence[str] = COLUMNS, text: Sequence[str] = TEXT) -> list[Row]:
    """The lines of ``cases.csv``; none where there is no such file. All ``columns`` but those of ``text`` are numbers.

    Raises:
        InputError: other columns, from another version.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise InputError(f"{path}: has other columns; give another -o")
        return [{key: value if key in text else float(value) for key, value in row.items()} for row in reader]


def write_cases(path: Path, rows: Sequence[Row]) -> None:
    """All lines anew, the file replaced whole: it is small, and a kill leaves the old one."""
    replace_file(path, csv_lines([COLUMNS, *(cells_of(row, COLUMNS) for row in rows)]).encode())


def cells_of(row: Row, columns: Sequence[str]) -> list[str]:
    return [f"{row[k]:.6g}" if isinstance(row[k], float) else str(row[k]) for k in columns]


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run, as text; none where there is no file."""
    with path.open(newline="") if path.is_file() else io.StringIO() as stream:
        return list(csv.DictReader(stream))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def csv_lines(lines: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue()


def page(rows: Sequence[Row], methods: Sequence[str], reference: str) -> str:
    """``accuracy.md``: a line per method, then paired differences from the reference on the pairs both have."""
    shown = [name for name in HEADINGS if len(known(row[name] for row in rows))]
    head = ["method", "pairs", *(HEADINGS[name][0] for name in shown), "peak GiB", "made from"]
    lines = [line(head), "|---" * len(head) + "|"]
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = [mean_cell([row[name] for row in own], HEADINGS[name][1]) for name in shown]
            peak = max(row["peak_mib"] for row in own) / 1024
            lines.append(line([method, str(len(own)), *cells, f"{peak:.2f}", own[0]["made_from"]]))
    notes = (
        "Mean [95 % bootstrap interval over pairs]. Pairs share subjects, so intervals and p values are optimistic. "
        "Labels warped by nearest neighbour; one thread; seconds without imports, reading and writing; an empty cell: "
        "the method gives no inverse, or the pairs hold no such labels or landmarks."
    )
    return "\n".join([*lines, "", notes, "", *_differences(rows, methods, reference)])


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def mean_cell(values: Sequence[float], digits: int) -> str:
    return interval(bootstrap_interval(values), digits) if len(known(values)) else ""


def _differences(rows: Sequence[Row], methods: Sequence[str], reference: str) -> list[str]:
    lines = [
        f"Method minus {reference}, paired; p of Wilcoxon's signed-rank test, two-sided.",
        "",
        "| method | metric | pairs | difference | p |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        for name in TESTED if method != reference else ():
            a, b = paired(rows, method, reference, name)
            if len(a):
                digits = HEADINGS[name][1] + 1
                cells = [method, HEADINGS[name][0], str(len(a)), mean_cell((a - b).tolist(), digits)]
                lines.append(line([*cells, f"{signed_rank(a - b):.2g}"]))
    return lines


def paired(rows: Sequence[Row], method: str, reference: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The metric of both methods on the pairs for which both have a number, in one order."""
    values: dict[str, dict[str, float]] = {name: {} for name in (method, reference)}
    for row in rows:
        if row["method"] in values and not math.isnan(row[metric]):
            values[row["method"]][row["case"]] = row[metric]
    common = sorted(values[method].keys() & values[reference].keys())
    return np.array([values[method][c] for c in common]), np.array([values[reference][c] for c in common])


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs."""
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0
