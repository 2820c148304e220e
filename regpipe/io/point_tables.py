"""Points in tables: .csv, Slicer's .fcsv, MNI's .tag; what their columns count in, and what their rows are called.

Points are (K, D) float64 in **LPS mm**, whatever the file counts in.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from regpipe.io.geometry import LPS
from regpipe.utils.errors import InputError
from regpipe.utils.files import csv_bytes

SPACES = {"0": LPS, "RAS": LPS, "1": np.ones(3), "LPS": np.ones(3)}  # Slicer wrote numbers up to 4.10
DECIMALS = 6  # of mm, in text
AXES = {
    "xyz": "LPS",
    "ras": "RAS",
    "lps": "LPS",
    "ijk": "LPS",
}  # of columns by their letters, in the order of preference
MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3}
VOXELS = {"vox", "voxel", "voxels", "px", "pixel", "pixels", "index"}
# of a column: its letter, and behind it what it counts in: x_mm, "X [mm]", x_ras, "y (voxel)"
COLUMN = re.compile(r"([a-z])((?:[\s_.,/()\[\]-]+[a-zµ]+)*)[\s)\]]*")
NAMES = ("label", "name", "landmark", "id", "point")  # columns of names, in the order of preference
WEIGHT = "weight"
HEADER = "needs the header x,y or x,y,z (LPS mm), r,a,s, l,p,s or i,j,k (voxels), and a row per point"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
TAG = re.compile(
    rf'^([ \t]*)({NUMBER})[ \t]+({NUMBER})[ \t]+({NUMBER})((?:[ \t]+{NUMBER})*[ \t]*(?:"([^"\n]*)")?[^\n"]*)$',
    re.MULTILINE,
)


class PointFile(NamedTuple):
    """The points of a file, and the file with other points in their place."""

    points: np.ndarray  # (K, 3) or (K, 2) LPS mm; NaN where the file has none
    render: Callable[[np.ndarray], bytes]
    names: tuple[str, ...] | None = None  # of the points, where the file has any
    voxels: bool = False  # whether the points are voxels of their image, counted from 0
    weights: np.ndarray | None = None  # (K,), where the file has any


class _Columns(NamedTuple):
    """Where the coordinates of a table are, and what makes LPS mm of them."""

    at: list[int]
    scale: np.ndarray  # (D,)
    voxels: bool


def read_csv(data: bytes) -> PointFile:
    """A table with a header; cells between commas, semicolons or tabs."""
    text = data.decode("utf-8-sig")
    first = text.lstrip().partition("\n")[0]
    between = max(",;\t", key=first.count)
    header, *rows = _rows(text, between) or [[]]
    columns = _columns(header)
    if columns is None or not rows:
        raise InputError(HEADER)

    def render(points: np.ndarray) -> bytes:
        return csv_bytes([header, *_replaced(rows, columns.at, points / columns.scale)], between)

    named = [cell.strip().lower() for cell in header]
    column = next((named.index(name) for name in NAMES if name in named), None)
    names = None if column is None else _names(row[column] if column < len(row) else "" for row in rows)
    weights = _numbers(rows, [named.index(WEIGHT)])[:, 0] if WEIGHT in named else None
    return PointFile(_numbers(rows, columns.at) * columns.scale, render, names, columns.voxels, weights)


def _columns(header: Sequence[str]) -> _Columns | None:
    """The columns of coordinates; those in mm where there are others, too."""
    groups: dict[frozenset[str], dict[str, int]] = {}
    for i, cell in enumerate(header):
        found = COLUMN.fullmatch(cell.strip().lower())
        words = frozenset(re.findall("[a-zµ]+", found[2])) if found else frozenset()
        if found and words <= MM.keys() | VOXELS | {"lps", "ras"}:
            groups.setdefault(words, {}).setdefault(found[1], i)
    fitting = [(words, axes) for axes in AXES for words, at in groups.items() if {*axes[:2]} <= at.keys()]
    if not fitting:
        return None
    words, axes = min(fitting, key=lambda one: bool(one[0] & VOXELS) or one[1] == "ijk")
    at = [groups[words][axis] for axis in axes if axis in groups[words]]
    space = "RAS" if "ras" in words else "LPS" if "lps" in words else AXES[axes]
    mm = next((MM[word] for word in words if word in MM), 1.0)
    return _Columns(at, mm * SPACES[space][: len(at)], bool(words & VOXELS) or axes == "ijk")


def _names(cells: Iterator[str]) -> tuple[str, ...] | None:
    """None where they tell no points apart."""
    names = tuple(cell.strip() for cell in cells)
    return names if len(set(names)) > 1 or (len(names) == 1 and names[0]) else None


def read_fcsv(data: bytes) -> PointFile:
    """Slicer's table; its comments say in which space it is and what its columns are."""
    lines = data.decode("utf-8-sig").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    rows = _rows("\n".join(line for line in lines if not line.startswith("#")))
    said = {key.strip(): value.strip() for key, _, value in (line[1:].partition("=") for line in comments)}
    flip = SPACES.get(said.get("CoordinateSystem", "").upper())
    if flip is None:
        raise InputError("does not say whether it is LPS or RAS; add the line '# CoordinateSystem = LPS' (or RAS)")
    columns = said.get("columns", "id,x,y,z").split(",")
    at = [columns.index(axis) for axis in "xyz"]

    def render(points: np.ndarray) -> bytes:
        return ("\n".join(comments) + "\n").encode() + csv_bytes(_replaced(rows, at, points * flip))

    label = columns.index("label") if "label" in columns else None
    names = None if label is None else _names(row[label] if label < len(row) else "" for row in rows)
    return PointFile(_numbers(rows, at) * flip, render, names)


def read_tag(data: bytes) -> PointFile:
    """MNI's tag points of one volume, RAS mm, each with its label."""
    text = data.decode("utf-8-sig")
    head, begun, rows = text.partition("Points")
    if not head.lstrip().startswith("MNI Tag Point File") or not begun:
        raise InputError("does not begin with 'MNI Tag Point File'")
    volumes = re.search(r"Volumes\s*=\s*(\d+)", head)
    if volumes and volumes[1] != "1":
        raise InputError(f"holds the points of {volumes[1]} volumes side by side; make a file for each")
    found = list(TAG.finditer(rows))
    if not found:
        raise InputError("holds no points")

    def render(points: np.ndarray) -> bytes:
        moved = iter(points * LPS)

        def replaced(row: re.Match[str]) -> str:
            place = next(moved)
            return row[1] + " ".join(number(mm) for mm in place) + row[5] if np.isfinite(place).all() else row[0]

        return (head + begun + TAG.sub(replaced, rows)).encode()

    points = np.array([[float(row[axis]) for axis in (2, 3, 4)] for row in found])
    return PointFile(points * LPS, render, _names(row[6] or "" for row in found))


def number(value: float) -> str:
    """Of mm, as text."""
    return f"{round(float(value), DECIMALS) + 0.0:.{DECIMALS}f}"  # + 0.0: not "-0.000000"


def _rows(text: str, between: str = ",") -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=between) if row]


def _numbers(rows: list[list[str]], columns: list[int]) -> np.ndarray:
    """The coordinates (K, D) in the named columns; an empty cell is NaN."""
    if any(len(row) <= max(columns) for row in rows):
        raise InputError("a row has fewer cells than the header; complete it")
    try:
        cells = [[float(row[column].strip() or "nan") for column in columns] for row in rows]
    except ValueError as cause:
        raise InputError(f"{cause}; coordinates are numbers") from cause
    return np.array(cells).reshape(-1, len(columns))


def _replaced(rows: list[list[str]], columns: list[int], points: np.ndarray) -> list[list[str]]:
    """The rows with other coordinates (K, D); where a point is NaN, its cells as they were."""
    moved = [list(row) for row in rows]
    for row, point in zip(moved, points, strict=True):
        if np.isfinite(point).all():
            for column, value in zip(columns, point, strict=True):
                row[column] = number(value)
    return moved
