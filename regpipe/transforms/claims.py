"""Checks what a transform file claims before ITK reads it: ITK allocates any grid, or crashes.

A displacement grid has its size among the fixed parameters and its vectors among the parameters; a file that claims
60000 x 60000 x 60000 and holds three numbers is refused. HDF5 may refer to other files; ITK's files never do.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from regpipe.io.itk_bridge import wrapped
from regpipe.utils import limits

BASE = "MatrixOffsetTransformBase"  # the class of affines, by which c3d, lta_convert and old ANTs name theirs
MOST_FIXED = 1000  # numbers; of a grid there are 20


class Claim(NamedTuple):
    """One transform of a file."""

    kind: str  # as ITK writes it: AffineTransform_double_3_3
    numbers: int  # of parameters
    fixed: list[float]


def check(path: Path) -> None:
    """Raises ``ValueError`` where parts do not fit each other, ``InputError`` where they do not fit into memory."""
    limits.require_size(path)
    suffix = path.suffix.lower()
    claims = _h5 if suffix in (".h5", ".hdf5") else _mat if suffix == ".mat" else _text
    for claim in claims(path):
        limits.require_room(path, [claim.numbers])
        axes = _axes(claim.kind)
        if not axes and claim.numbers < _needed(claim.kind):
            raise ValueError(f"holds {claim.numbers} numbers for a {claim.kind}, which has more")
        sides = [int(n) if math.isfinite(n) else -1 for n in claim.fixed[:axes]]
        if axes and (len(sides) < axes or min(sides) < 1 or math.prod(sides) > claim.numbers):
            grid = " x ".join(map(str, sides))
            raise ValueError(f"its grid of {grid} points and its {claim.numbers} numbers do not fit")


def _needed(kind: str) -> int:
    """How many parameters a transform class without a grid has.

    Many of ITK's classes read that many without checking how many there are; ITK does not check the class's name.
    """
    named = re.fullmatch(r"(\w+Transform)_(?:double|float)_(\d)_\d", kind.replace(BASE, "AffineTransform"))
    if named is None:
        raise ValueError(f"holds a transform of no known kind, {kind[:40]!r}")
    for dims in ("", named[2], named[2] * 2):  # some are of one dimension only
        try:
            return int(wrapped(named[1], f"D{dims}").New().GetNumberOfParameters())
        except ModuleNotFoundError:
            raise ValueError(f"holds a transform of no known kind, {kind[:40]!r}") from None
        except AttributeError:
            continue
    raise ValueError(f"holds a transform of no known dimension, {kind}")


def _axes(kind: str) -> int:
    """How many of the fixed parameters are the size of a grid."""
    dim = re.search(r"_(?:double|float)_(\d)_\d$", kind)
    if dim is None or not re.search("DisplacementField|VelocityField|BSpline", kind):
        return 0
    return int(dim[1]) + ("VelocityField" in kind)  # and time


def _h5(path: Path) -> Iterator[Claim]:
    import h5py

    with h5py.File(path) as file:
        for group in _own(_own(file)["TransformGroup"]).values():
            held = _own(group)
            kind = next((str(held[name].asstr()[0]) for name in held if name.endswith("Type")), "")
            fixed = next((held[name] for name in held if name.endswith("FixedParameters")), None)
            counts = [held[name].size for name in held if re.search("(?<!Fixed)Parameters$", name)]
            if fixed is not None and fixed.size > MOST_FIXED:
                raise ValueError(f"{fixed.size} fixed parameters")
            yield Claim(kind, sum(counts), [] if fixed is None else fixed[()].ravel().tolist())


def _own(group: Any) -> Mapping[str, Any]:
    """The members of an HDF5 group that lie in this file; a link to another file is refused."""
    import h5py

    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} refers to another place")
        part = group[name]
        if isinstance(part, h5py.Dataset) and (part.external or part.is_virtual):
            raise ValueError(f"{name} refers to another file")
    return group


def _text(path: Path) -> Iterator[Claim]:
    claim: Claim | None = None
    for line in path.read_bytes().decode("ascii", "replace").split("\n"):
        key, _, value = line.partition(":")
        key = key.strip()
        if key == "Transform":
            if claim is not None:
                yield claim
            claim = Claim(value.strip(), 0, [])
        elif claim is None:
            continue
        elif key == "Parameters":
            claim = claim._replace(numbers=sum(math.isfinite(float(n)) for n in value.split()))
        elif key == "FixedParameters":
            claim = claim._replace(fixed=[float(n) for n in value.split()[:MOST_FIXED]])
    if claim is not None:
        yield claim


def _mat(path: Path) -> Iterator[Claim]:
    """MATLAB 4: of a transform two arrays, each five integers, a name and the numbers."""
    data, at = path.read_bytes(), 0
    arrays: list[tuple[str, int, list[float]]] = []
    while at < len(data):
        order = "<" if 0 <= struct.unpack_from("<i", data, at)[0] < 5000 else ">"
        kind, rows, columns, _, length = struct.unpack_from(f"{order}5i", data, at)
        number, count, begin = "f" if kind // 10 % 10 else "d", rows * columns, at + 20 + length
        at = begin + count * struct.calcsize(number)
        if min(rows, columns, length) < 0 or at > len(data):
            raise ValueError(f"says that it holds {rows} x {columns} numbers")
        name = data[begin - length : begin].split(b"\0")[0].decode("ascii", "replace")
        arrays.append((name, count, list(struct.unpack_from(f"{order}{min(count, MOST_FIXED)}{number}", data, begin))))
    if len(arrays) % 2:
        raise ValueError(f"holds {len(arrays)} arrays, a transform two of them")
    for (name, count, _), (_, _, fixed) in zip(arrays[::2], arrays[1::2], strict=True):
        yield Claim(name, count, fixed)
