"""Files of points in and out, meshes too: the coordinates are replaced, all else stays.

Points are (K, D) float64 in **LPS mm**, whatever the file counts in. Meshes are changed in place and not through
ITK: it has no STL, and of a VTK file it loses the header's ``SPACE=RAS``, the names of arrays, and normals.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from regpipe.io.point_tables import DECIMALS, MM, SPACES, PointFile, number, read_csv, read_fcsv, read_tag
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import opened, parse_json, replace_file


def read_points(path: str | Path, file: BinaryIO | None = None) -> PointFile:
    """Read tables (see ``io.point_tables``), Slicer's .mrk.json, meshes .vtk (legacy) and .stl.

    ``file``: the same, open. Meshes are LPS unless their header says ``SPACE=RAS``. Of a mesh the points move, and an
    STL's normals with them; what a VTK file stores with the points (normals, scalars) stays as it is.

    Raises:
        InputError: missing, broken, or of another kind.
    """
    path = Path(path)
    try:
        with contextlib.nullcontext(file) if file else opened(path) as stream:
            limits.require_size(path)
            return READERS[_kind(path)](stream.read())
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem
    except UnicodeDecodeError as cause:
        raise InputError(f"{path}: not text in UTF-8 ({cause.reason} at byte {cause.start}); save it so") from cause
    except OSError as cause:
        raise InputError(f"{path}: {cause.strerror}; give an existing file") from cause
    except (csv.Error, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as cause:
        reason = " ".join(str(cause).split())[-120:] or type(cause).__name__
        raise InputError(f"{path}: not a readable {_kind(path)} ({reason}); export it again") from cause


def write_points(path: str | Path, file: PointFile, points: np.ndarray) -> None:
    """Write ``file`` with ``points`` (K, D) LPS mm in place of its own. Same input, same bytes."""
    replace_file(path, file.render(points))


def is_points(path: str | Path) -> bool:
    """Whether the suffix is one that ``read_points`` reads."""
    return str(path).lower().endswith(tuple(READERS))


def _kind(path: Path) -> str:
    found = [suffix for suffix in READERS if path.name.lower().endswith(suffix)]
    if not found:
        raise InputError(f"unknown format; use one of {' '.join(READERS)}")
    return found[0]


def _markups(data: bytes) -> PointFile:
    """Every control point of every markup; an undefined one is NaN and stays. Slicer measures lengths anew."""
    content = parse_json(data)
    placed = [
        (point, SPACES[str(markup.get("coordinateSystem", "LPS")).upper()] * _unit(markup))
        for markup in content["markups"]
        for point in markup.get("controlPoints", [])
    ]
    shaped = {markup.get("type") for markup in content["markups"]} & {"Plane", "ROI"}
    if shaped:
        raise InputError(f"holds a {min(shaped)}, which does not stay one when it is bent; convert it to a point list")
    rows = [_defined(point) * flip for point, flip in placed]

    def render(points: np.ndarray) -> bytes:
        moved = parse_json(data)
        targets = [point for markup in moved["markups"] for point in markup.get("controlPoints", [])]
        for point, place, (_, flip) in zip(targets, points, placed, strict=True):
            if np.isfinite(place).all():
                point["position"] = np.round(place / flip, DECIMALS).tolist()
        return (json.dumps(moved, indent=4, ensure_ascii=False) + "\n").encode(errors="backslashreplace")

    names = tuple(str(point.get("label", "")) for point, _ in placed)
    told = len(set(names)) > 1 or (len(names) == 1 and names[0])
    return PointFile(np.array(rows).reshape(-1, 3), render, names if told else None)


def _unit(markup: dict[str, Any]) -> float:
    """mm of Slicer's ``coordinateUnits``: a unit, or a list that begins with it."""
    said = markup.get("coordinateUnits", "mm")
    unit = str(said[0] if isinstance(said, list) and said else said)
    if unit not in MM:
        raise InputError(f"counts in {unit[:20]!r}; save it in mm")
    return MM[unit]


def _defined(point: dict[str, Any]) -> np.ndarray:
    if point.get("positionStatus", "defined") != "defined" or not point.get("position"):
        return np.full(3, np.nan)
    return np.array(point["position"], np.float64).reshape(3)


def _vtk(data: bytes) -> PointFile:
    """Legacy VTK: the block after ``POINTS n type`` is exchanged (binary: big-endian, of the file's own type)."""
    lines = data.split(b"\n", 3)
    block = re.search(rb"^POINTS[ \t]+(\d+)[ \t]+(float|double)[ \t]*\r?\n", data, re.MULTILINE)
    if not lines[0].startswith(b"# vtk DataFile") or block is None or len(lines) < 4:
        raise InputError("not a legacy VTK mesh with POINTS in float or double; export it as .vtk (legacy)")
    binary, flip = lines[2].strip().upper() == b"BINARY", _mesh_space(lines[1])
    kind, start = np.dtype(">f4" if block[2] == b"float" else ">f8"), block.end()
    size = 3 * int(block[1])
    if size > len(data) - start:  # more numbers than bytes
        raise InputError(f"says {size // 3} points and holds fewer; export it again")
    if binary:
        end = start + size * kind.itemsize
        values = np.frombuffer(data[start:end], kind, count=min(size, (len(data) - start) // kind.itemsize))
    else:
        numbers = re.match(rb"\s*(?:[^\s]+\s+){%d}" % size, data[start:] + b"\n")
        end = start + (numbers.end() if numbers else 0)
        values = np.array(data[start:end].split(), np.float64)
    if values.size != size:
        raise InputError(f"says {block[1].decode()} points and holds fewer; export it again")

    def render(points: np.ndarray) -> bytes:
        moved = np.asarray(points * flip)
        text = "".join(f"{_words(row)}\n" for row in moved).encode()
        return data[:start] + (moved.astype(kind).tobytes() if binary else text) + data[end:]

    return PointFile(values.astype(np.float64).reshape(-1, 3) * flip, render)


FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def _stl(data: bytes) -> PointFile:
    """STL, binary or text: three corners per facet; its normals follow from them and are made anew."""
    count = int.from_bytes(data[80:84], "little")
    if len(data) >= 84 and len(data) == 84 + count * FACET.itemsize:
        return _binary_stl(data, _mesh_space(data[:80]))
    if not re.match(rb"\s*solid\b", data) or not re.search(rb"\bendsolid\b", data):
        raise InputError("neither a whole binary nor a whole text STL; export it again")
    flip, vertex = _mesh_space(data.split(b"\n", 1)[0]), rb"vertex\s+(\S+)\s+(\S+)\s+(\S+)"
    corners = np.array(re.findall(vertex, data)).astype(np.float64).reshape(-1, 3, 3)
    normal = rb"facet\s+normal\s+\S+\s+\S+\s+\S+"
    if len(re.findall(normal, data)) > len(corners):
        raise InputError("has facets without three corners; export it again")

    def render(points: np.ndarray) -> bytes:
        moved = (points * flip).reshape(-1, 3, 3)
        places, normals = iter(moved.reshape(-1, 3)), iter(_normals(moved))
        text = re.sub(vertex, lambda _: f"vertex {_words(next(places))}".encode(), data)
        return re.sub(normal, lambda _: f"facet normal {_words(next(normals))}".encode(), text)

    return PointFile(corners.reshape(-1, 3) * flip, render)


def _binary_stl(data: bytes, flip: np.ndarray) -> PointFile:
    facets = np.frombuffer(data[84:], FACET)

    def render(points: np.ndarray) -> bytes:
        moved = facets.copy()
        moved["corners"] = (points * flip).reshape(-1, 3, 3)
        moved["normal"] = _normals(moved["corners"].astype(np.float64))
        return data[:84] + moved.tobytes()

    return PointFile(facets["corners"].reshape(-1, 3).astype(np.float64) * flip, render)


def _normals(corners: np.ndarray) -> np.ndarray:
    """Unit normals (N, 3) of triangles (N, 3, 3), right-handed; 0 of one without area."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)


def _mesh_space(header: bytes) -> np.ndarray:
    """Slicer's mark in a mesh's header comment; LPS, as all of ITK's files, without one."""
    said = re.search(rb"SPACE=(\w+)", header)
    name = said[1].decode().upper() if said else "LPS"
    if name not in SPACES:
        raise InputError(f"its header says SPACE={name[:20]}; export it as LPS or RAS")
    return SPACES[name]


def _words(values: np.ndarray) -> str:
    return " ".join(number(value) for value in values)


READERS: dict[str, Callable[[bytes], PointFile]] = {
    ".mrk.json": _markups,
    ".fcsv": read_fcsv,
    ".csv": read_csv,
    ".tag": read_tag,
    ".vtk": _vtk,
    ".stl": _stl,
}
