"""What a file may claim before it is believed.

A header of a few hundred bytes can say that 60000 x 60000 x 60000 voxels follow, a compressed file can hold gigabytes
of zeros, and a header can name any other file as its voxels. Each is refused here, before memory is given for it.
"""

from __future__ import annotations

import math
import mmap
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import nibabel as nib

from regpipe.errors import InputError

GIB = 2**30
UNASKED = GIB  # bytes that are read without asking what is free
LARGEST_EXTENSIONS = 16 << 20  # bytes between a NIfTI's header and its voxels
LARGEST_TEXT = 1 << 20  # bytes of a NRRD's or MetaImage's header
# the line that names where the voxels are: of NRRD; and of MetaImage, which ITK finds in places where no line begins
NRRD_DATA = re.compile(rb"^[ \t]*data ?file[ \t]*[=:][ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)
META_DATA = re.compile(rb"ElementDataFile(?:[ \t]*[=:][ \t]*([^\0-\x08\n-\x1f]+)(?:\r?\n|\Z))?")
# one file for each slice: name, first, last, step; and of NRRD the axes of one
NUMBERED = re.compile(r"[^%]*%0?\d{0,2}d[^%\s]*(\s+-?\d+\s+-?\d+(\s+-?0*[1-9]\d*(\s+\d+)?)?)?")
MOST_AXES = 5  # of NRRD and MetaImage: for more than 10 or 12 ITK writes beyond the ends of its arrays
LONGEST_FIELD = 500  # bytes of a line of NRRD's; of 1000 it writes beyond the end of its message


def require_room(path: object, shape: Sequence[int], itemsize: int = 8) -> None:
    """Raises ``InputError`` where more values are claimed than the free memory can hold; ``itemsize`` in bytes."""
    needed = math.prod(int(n) for n in shape) * itemsize
    if needed <= UNASKED:
        return
    from regpipe.memory import free  # torch: takes seconds, and most files are small

    if needed > free():
        raise InputError(
            f"{path}: says that it holds {' x '.join(str(n) for n in shape)} values; that does not fit into memory "
            f"({needed / GIB:.3g} GiB); mend its header, or save it coarser"
        )


def require_size(path: str | Path) -> None:
    """Raises ``InputError`` where a file, read whole, is more than the free memory can hold."""
    require_room(path, [Path(path).stat().st_size], 4)  # with what is made of it


def check_nifti(path: Path) -> None:
    """Raises ``InputError`` where header extensions are said to be huge: nibabel reads them with the header."""
    try:
        with nib.openers.ImageOpener(str(path)) as file:
            longest = _longest(file)
    except (OSError, EOFError, zlib.error):  # who reads it next says what is wrong
        return
    if not longest <= LARGEST_EXTENSIONS:
        raise InputError(f"{path}: its header is said to have {longest:.3g} bytes; export it again")


def _longest(file: Any) -> float:
    """Bytes of the longest extension of a NIfTI header, or of all of them where that is too much; else 0."""
    head = file.read(nib.Nifti2Header.sizeof_hdr)
    kind = next((k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.may_contain_header(head)), None)
    if kind is None:
        return 0
    file.seek(kind.sizeof_hdr)
    if file.read(4)[:1] in (b"", b"\0"):
        return 0
    header = kind(head[: kind.sizeof_hdr], check=False)
    end = float(header["vox_offset"])
    if not end <= LARGEST_EXTENSIONS:
        return end
    return max(_extensions(file, kind.sizeof_hdr + 4, end, "big" if header.endianness == ">" else "little"), default=0)


def _extensions(file: Any, at: int, end: float, order: Any) -> Iterator[int]:
    """The lengths that the extensions of a NIfTI header claim, up to the first that cannot be."""
    while at + 8 <= end:
        file.seek(at)
        size = int.from_bytes(file.read(4), order, signed=True)
        yield size
        if size < 8:
            return
        at += size


def check_header(path: Path) -> None:
    """Raises ``InputError`` where a NRRD or MetaImage takes its voxels from outside its own folder, or would end ITK.

    ITK reads whatever the header names: ``ElementDataFile = /etc/passwd``.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _require_few_axes(path, data[: LARGEST_TEXT + 1])
        for name in (*_of_nrrd(path, data[: LARGEST_TEXT + 1]), *_of_meta(path, data)):
            if _outside(name):
                raise InputError(f"{path}: takes its voxels from another folder, {name}; put that file beside it")
            if "%" in name and not NUMBERED.fullmatch(name):  # ITK hands it to printf, and divides by the step
                raise InputError(f"{path}: takes its voxels from {name}; name each file, or number them by %d")


def _require_few_axes(path: Path, head: bytes) -> None:
    for said in re.finditer(rb"(?:NDims\s*[=:]|^dimension:)([^\r\n]*)", head, re.MULTILINE | re.IGNORECASE):
        if not re.fullmatch(rb"\s*[1-%d]\s*" % MOST_AXES, said[1]):
            told = said[0].decode("ascii", "replace")[:20]
            raise InputError(f"{path}: {told}; an image has at most {MOST_AXES} axes: mend its header")


def _of_nrrd(path: Path, head: bytes) -> Iterator[str]:
    """The files that a NRRD header names."""
    if not head.startswith(b"NRRD"):
        return
    text = head.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    header, blank, _ = text.partition(b"\n\n")
    fields = (line for line in header.split(b"\n") if not line.startswith((b"#", b"content:")) and b":=" not in line)
    if any(len(line) > LONGEST_FIELD for line in fields):
        raise InputError(f"{path}: a line of its header is longer than {LONGEST_FIELD} bytes; export it again")
    found = None
    for found in NRRD_DATA.finditer(header):
        yield from _named(found[1], text[found.end() :])
    if found is None and len(head) > LARGEST_TEXT and not blank:
        raise InputError(f"{path}: its header is longer than {LARGEST_TEXT} bytes; export it again")


def _of_meta(path: Path, data: mmap.mmap) -> Iterator[str]:
    """The files that a MetaImage names wherever its header might end: ITK's idea of a line is not everybody's."""
    for found in META_DATA.finditer(data):
        if found[1] is None:
            raise InputError(f"{path}: does not say in a line of its own where its voxels are; export it again")
        yield from _named(found[1], data[found.end() : found.end() + LARGEST_TEXT])


def _named(named: bytes, after: bytes) -> Iterator[str]:
    """The file that is named, or of a list all of them."""
    names = after.splitlines() if named.strip().upper().startswith(b"LIST") else [named]
    return (name.decode("utf-8", "replace").strip() for name in names)


def _outside(name: str) -> bool:
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return any(kind.anchor or ".." in kind.parts for kind in kinds)
