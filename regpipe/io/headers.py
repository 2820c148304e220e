"""Checks headers before GDCM and ITK open a file: they believe them, and false ones do harm.

A DICOM file of a few hundred bytes can claim gigabytes, a NRRD or MetaImage can name any other file as its voxels, and
what ITK complains of can run over the end of its buffers.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from regpipe.utils.errors import InputError

DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM's transfer syntax that is packed as a whole
LONG = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # types whose lengths have 4 bytes; of the others 2
SHORT = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
UNKNOWN = (b"??", b"  ", b"--", b"\0\0")  # what some scanners write for a type
ENDLESS, PIXELS, END = 0xFFFFFFFF, (0x7FE0, 0x10), (0xFFFE, 0xE0DD)  # ends with a delimiter; a sequence's
LARGEST_TEXT = 1 << 20  # bytes of a NRRD's or MetaImage's header
MOST_AXES = 5  # of NRRD and MetaImage: for more than 10 or 12 ITK writes beyond the ends of its arrays
LONGEST_LINE = 500  # bytes of one in a NRRD's header; a message of ITK's has 1024, and it writes beyond them
BLANK = re.compile(rb"\n\r?\n")
IN_TEXT = re.compile(rb"^[ \t]*encoding[ \t]*:[ \t]*(ascii|txt|text)", re.MULTILINE | re.IGNORECASE)
NO_NUMBER = re.compile(rb"[^\s,]{%d}" % LONGEST_LINE)
# the line that names where the voxels are: of NRRD; and of MetaImage, which ITK finds in places where no line begins
NRRD_DATA = re.compile(rb"^[ \t]*data ?file[ \t]*[=:][ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)
META_DATA = re.compile(rb"ElementDataFile(?:[ \t]*[=:][ \t]*([^\0-\x08\n-\x1f]+)(?:\r?\n|\Z))?")
# one file for each slice: name, first, last, step; and of NRRD the axes of one
NUMBERED = re.compile(r"[^%]*%0?\d{0,2}d[^%\s]*(\s+-?\d+\s+-?\d+(\s+-?0*[1-9]\d*(\s+\d+)?)?)?")


def check_dicom(path: Path) -> None:
    """Raises ``InputError`` where a DICOM file's elements do not end within it, or lead nowhere.

    GDCM would try other ways to read them, and ask for whatever memory such lengths claim: gigabytes for a few bytes.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return  # mmap takes no such file; who reads it next says what is wrong
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            wrong = _astray(data)
    if wrong is not None:
        raise InputError(f"{path}: not DICOM, or cut off ({wrong}); export it again")


def _astray(data: mmap.mmap) -> str | None:
    """Where a DICOM file cannot be followed; None where it can, or only by those who know its private parts.

    Sequences are walked through with what is around them (PS3.5, 7.1 and 7.5), the pieces of packed pixels are not.
    """
    at = 132 * (data[128:132] == b"DICM")
    if DEFLATED in data[at : at + 1024]:
        return None
    order, explicit, begun, packed = "<", True, False, False
    while at + 8 <= len(data):
        tag, vr = struct.unpack(f"{order}HH", data[at : at + 4]), data[at + 4 : at + 6]
        if not begun and tag[0] != 2:  # what comes before is always explicit and little-endian
            begun, explicit, order = True, vr in SHORT + LONG, ">" if tag[0] > 0xFF else "<"
            continue
        item = tag[0] == 0xFFFE
        if explicit and not item and vr not in SHORT + LONG:
            return None if vr in UNKNOWN else f"no element at byte {at}"
        short = explicit and not item and vr in SHORT
        start = at + (12 if explicit and not item and not short else 8)
        length = int.from_bytes(data[start - (2 if short else 4) : start], "big" if order == ">" else "little")
        if length == ENDLESS and not short:
            if vr == b"UN" and explicit and not item:  # in an encoding of its own
                return None
            length, packed = 0, tag == PIXELS or (packed and item)
        elif start + length > len(data):
            return f"its element ({tag[0]:04X},{tag[1]:04X}) is longer than the file"
        elif tag == END:
            packed = False
        inside = (explicit and vr == b"SQ") if not item else not packed
        at = start if inside else start + length
    return None


def check_header(path: Path, file: BinaryIO) -> None:
    """Raises ``InputError`` where a NRRD or MetaImage takes its voxels from outside its own folder, or would end ITK.

    ITK reads whatever the header names: ``ElementDataFile = /etc/passwd``. ``file``: open, at any place.
    """
    if not path.stat().st_size:
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _require_few_axes(path, data[: LARGEST_TEXT + 1])
        for name in (*_of_nrrd(path, data), *_of_meta(path, data)):
            if _outside(name):
                raise InputError(f"{path}: takes its voxels from another folder, {name}; put that file beside it")
            if "%" in name and not NUMBERED.fullmatch(name):  # ITK hands it to printf, and divides by the step
                raise InputError(f"{path}: takes its voxels from {name}; name each file, or number them by %d")


def _require_few_axes(path: Path, head: bytes) -> None:
    for said in re.finditer(rb"(?:NDims\s*[=:]|^dimension:)([^\r\n]*)", head, re.MULTILINE | re.IGNORECASE):
        if not re.fullmatch(rb"\s*[1-%d]\s*" % MOST_AXES, said[1]):
            told = said[0].decode("ascii", "replace")[:20]
            raise InputError(f"{path}: {told}; an image has at most {MOST_AXES} axes: mend its header")


def _of_nrrd(path: Path, data: mmap.mmap) -> Iterator[str]:
    """The files that a NRRD header names, once none of its lines is longer than ITK has room for."""
    if data[:4] != b"NRRD":
        return
    blank = BLANK.search(data)
    end = blank.end() if blank else LARGEST_TEXT
    lines = data[:end].split(b"\n")
    # lines that are notes are not told in messages
    long = any(len(line) > LONGEST_LINE and not (b":=" in line or line[:1] == b"#") for line in lines)
    if long:
        raise InputError(f"{path}: a line of its header is longer than {LONGEST_LINE} bytes; export it again")
    if blank is None and len(data) > LARGEST_TEXT:
        raise InputError(f"{path}: its header is longer than {LARGEST_TEXT} bytes; export it again")
    text = data[: end + LARGEST_TEXT].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    header = text.partition(b"\n\n")[0]
    found = list(NRRD_DATA.finditer(header))
    if IN_TEXT.search(header):
        if found:
            raise InputError(f"{path}: its voxels are text in another file; save them with it, or raw")
        if NO_NUMBER.search(data, end):
            raise InputError(f"{path}: holds text where numbers should be; export it again")
    for line in found:
        yield from _named(line[1], text[line.end() :])


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
