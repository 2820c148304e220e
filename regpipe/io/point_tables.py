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
SIGNS = ({"l": 1, "r": -1}, {"p": 1, "a": -1}, {"s": 1, "i": -1})  # of columns by their letters, for LPS
MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "nm": 1e-6, "inch": 25.4}
MM |= {"millimeter": 1.0, "millimetre": 1.0}
VOXELS = {"vox", "voxel", "px", "pixel", "index"}
# of a column: its letter, and what it counts in: x_mm, "X [mm]", x_ras, "y (voxel)", pos_x, CenterX
BESIDES = {"coord", "coordinate", "pos", "position", "center", "centre", "world", "lps", "ras", "in"}
NAMES = ("label", "name", "landmark", "id", "point")  # columns of names, in the order of preference
UNKNOWN = ("", "na", "n/a", "none", "null", "-")  # cells without a number
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
    text = data.decode("utf-8-sig").lstrip()
    notes = re.match(r"(?:[ \t]*#.*(?:\r\n?|\n))*", text)
    above = notes[0] if notes else ""
    text = text[len(above) :]
    first, second = (text.lstrip().splitlines() + ["", ""])[:2]
    between = max(",;\t", key=lambda cut: (min(first.count(cut), second.count(cut)), first.count(cut)))
    header, *rows = _rows(text, between) or [[]]
    columns = _columns(header)
    if columns is None or not rows:
        raise InputError(HEADER)
    commas = between != "," and any(re.fullmatch(r"\s*[-+]?\d+,\d+\s*", row[i]) for row in rows for i in columns.at[:1])

    def render(points: np.ndarray) -> bytes:
        moved = _replaced(rows, columns.at, points / columns.scale, commas=commas)
        return above.encode() + csv_bytes([header, *moved], between)

    column = _of_names(header)
    names = None if column is None else _names(row[column] if column < len(row) else "" for row in rows)
    weights = None
    if WEIGHT in (named := [cell.strip().lower() for cell in header]):
        weights = _numbers(rows, [named.index(WEIGHT)], commas=commas)[:, 0]
    return PointFile(_numbers(rows, columns.at, commas=commas) * columns.scale, render, names, columns.voxels, weights)


def _words_of(cell: str) -> list[str]:
    """In lower case and the singular: CenterX, "X [mm; RAS]", landmark_ids."""
    words = [word.lower() for word in re.findall("[A-ZÄÖÜ]?[a-zµμ]+|[A-Z]+", cell)]
    split = [[word[0], word[1:]] if word[1:] in ("mm", "cm") else [word] for word in words]
    return [word.removesuffix("s") if len(word) > 3 else word for part in split for word in part]


def _of_names(header: Sequence[str]) -> int | None:
    """The column of names: one called so, else one of several such words, ``landmark_id``."""
    named = [_words_of(cell) for cell in header]
    found = (i for name in NAMES for i, words in enumerate(named) if words == [name])
    other = (i for i, words in enumerate(named) if words and set(words) <= {*NAMES})
    return next(found, next(other, None))


def _columns(header: Sequence[str]) -> _Columns | None:
    """The columns of coordinates; those in mm where there are others, too."""
    groups: dict[frozenset[str], dict[str, int]] = {}
    for i, cell in enumerate(header):
        words = _words_of(cell)
        letters = [word for word in words if len(word) == 1 and word != "m"]
        about = frozenset(word for word in words if word not in letters)
        if len(letters) == 1 and about <= MM.keys() | VOXELS | BESIDES:
            groups.setdefault(about, {}).setdefault(letters[0], i)
    fitting = [(about, *axes) for about, at in groups.items() for axes in _axes(at)]
    if not fitting:
        return None
    about, at, signs, voxels = min(fitting, key=lambda one: bool(one[0] & VOXELS) or one[3])
    if "ras" in about:
        signs = [-1.0, -1.0, 1.0][: len(at)]
    mm = next((MM[word] for word in about if word in MM), 1.0)
    return _Columns(at, mm * np.array(signs), bool(about & VOXELS) or voxels)


def _axes(at: dict[str, int]) -> Iterator[tuple[list[int], list[float], bool]]:
    """Columns, signs for LPS, and whether they count voxels, of what letters there are."""
    for known in ("xyz", "ijk"):
        if {*known[:2]} <= at.keys():
            columns = [at[letter] for letter in known if letter in at]
            yield columns, [1.0] * len(columns), known == "ijk"
    at = {letter: i for letter, i in at.items() if letter != "i" or "j" not in at}  # i of i,j,k is not inferior
    found = [[(at[letter], float(sign)) for letter, sign in axis.items() if letter in at] for axis in SIGNS]
    if all(len(axis) == 1 for axis in found[:2]) and len(found[2]) < 2:
        column = [axis[0] for axis in found if axis]
        yield [i for i, _ in column], [sign for _, sign in column], False


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


def _numbers(rows: list[list[str]], columns: list[int], *, commas: bool = False) -> np.ndarray:
    """The coordinates (K, D) in the named columns; an empty cell is NaN. ``commas``: 1,5 is 1.5."""
    if any(len(row) <= max(columns) for row in rows):
        raise InputError("a row has fewer cells than the header; complete it")
    try:
        texts = [[row[column].strip().replace(*(",." if commas else "..")) for column in columns] for row in rows]
        cells = [[float("nan" if text.lower() in UNKNOWN else text) for text in row] for row in texts]
    except ValueError as cause:
        raise InputError(f"{cause}; coordinates are numbers") from cause
    return np.array(cells).reshape(-1, len(columns))


def _replaced(
    rows: list[list[str]], columns: list[int], points: np.ndarray, *, commas: bool = False
) -> list[list[str]]:
    """The rows with other coordinates (K, D); where a point is NaN, its cells as they were."""
    moved = [list(row) for row in rows]
    for row, point in zip(moved, points, strict=True):
        if np.isfinite(point).all():
            for column, value in zip(columns, point, strict=True):
                row[column] = number(value).replace(*(".," if commas else ".."))
    return moved
