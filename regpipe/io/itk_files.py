"""Images as NRRD and MetaImage, of any type of voxels: ITK's Python has no images of some, and no writer of others.

Arrays are (*S), and affines voxel index -> RAS mm (D+1, D+1), as in ``io.images``; the files are LPS. Same input, same
bytes.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from regpipe.io.formats import SEGMENTS
from regpipe.io.geometry import voxel_size
from regpipe.io.headers import LARGEST_TEXT

META = {"u1": "UCHAR", "i1": "CHAR", "u2": "USHORT", "i2": "SHORT", "u4": "UINT", "i4": "INT"}
META |= {"u8": "ULONG_LONG", "i8": "LONG_LONG", "f4": "FLOAT", "f8": "DOUBLE"}
NRRD = {f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)} | {f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)}
NRRD |= {"f4": "float", "f8": "double"}


def image_bytes(
    suffix: str, array: np.ndarray, affine: np.ndarray, *, values: str = "", notes: Mapping[str, str] | None = None
) -> bytes:
    """The ``.nrrd`` or ``.mha`` file of an image (*S), or of several values at each place (*S, C).

    ``values``: what they are, as a NRRD has it: ``list``, ``vector``, ``RGB-color``, ...; empty of one. ``notes``: a
    NRRD's keys and values.
    """
    array = array.astype(np.uint8) if array.dtype == bool else array
    array = array.astype(np.float32) if array.dtype == np.float16 else array
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    place = affine * np.r_[-1, -1, np.ones(len(affine) - 2)][:, None]  # LPS, of any dimension
    array = np.moveaxis(array, -1, 0) if values else array  # values run fastest
    return _nrrd(array, place, values, notes or {}) if suffix == ".nrrd" else _mha(array, place)


def segment_notes(path: Path) -> dict[str, str]:
    """What a ``.seg.nrrd`` says of its segments: names, colours, layers; not where they lie in its own grid."""
    if not path.name.lower().endswith(SEGMENTS) or not path.is_file():
        return {}
    with path.open("rb") as file:
        head = file.read(LARGEST_TEXT).replace(b"\r\n", b"\n").partition(b"\n\n")[0].decode("utf-8", "replace")
    found = (line.split(":=", 1) for line in head.splitlines() if line.startswith("Segment") and ":=" in line)
    return {key: value for key, value in found if not key.endswith(("_Extent", "ExtentOffset"))}


def _nrrd(array: np.ndarray, place: np.ndarray, values: str, notes: Mapping[str, str]) -> bytes:
    dim = len(place) - 1
    kinds, none = ([values], ["none"]) if values else ([], [])
    lines = ["NRRD0004", f"type: {NRRD[array.dtype.str[1:]]}", f"dimension: {array.ndim}"]
    lines += ["space: left-posterior-superior" if dim == 3 else f"space dimension: {dim}"]
    lines += [f"sizes: {_words(array.shape)}"]
    lines += [f"space directions: {' '.join([*none, *(_vector(column) for column in place[:-1, :-1].T)])}"]
    lines += [f"kinds: {' '.join([*kinds, *['domain'] * dim])}", "endian: little", "encoding: gzip"]
    lines += [f"space origin: {_vector(place[:-1, -1])}", *(f"{key}:={value}" for key, value in notes.items())]
    return "\n".join([*lines, "", ""]).encode() + gzip.compress(array.tobytes("F"), compresslevel=1, mtime=0)


def _mha(array: np.ndarray, place: np.ndarray) -> bytes:
    dim, size = len(place) - 1, voxel_size(place)
    data = zlib.compress(array.tobytes("F"), 1)
    said = {
        "ObjectType": "Image",
        "NDims": str(dim),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(len(data)),
        "TransformMatrix": _words((place[:-1, :-1] / size).T.ravel()),
        "Offset": _words(place[:-1, -1]),
        "CenterOfRotation": _words([0] * dim),
        "ElementSpacing": _words(size),
        "DimSize": _words(array.shape[-dim:]),
        **({"ElementNumberOfChannels": str(len(array))} if array.ndim > dim else {}),
        "ElementType": f"MET_{META[array.dtype.str[1:]]}",
        "ElementDataFile": "LOCAL",
    }
    return "".join(f"{key} = {value}\n" for key, value in said.items()).encode() + data


def _words(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:.17g}" for number in numbers)


def _vector(numbers: Iterable[float]) -> str:
    return f"({','.join(f'{number:.17g}' for number in numbers)})"
