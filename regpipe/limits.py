"""What a file may claim before it is believed.

A header of a few hundred bytes can say that 60000 x 60000 x 60000 voxels follow, a compressed file can hold gigabytes
of zeros, and a header can name any other file as its voxels. Each is refused here, before memory is given for it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
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
DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM's transfer syntax that is packed as a whole
LONG = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # types whose lengths have 4 bytes; of the others 2
SHORT = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
UNKNOWN = (b"??", b"  ", b"--", b"\0\0")  # what some scanners write for a type
ENDLESS, PIXELS, END = 0xFFFFFFFF, (0x7FE0, 0x10), (0xFFFE, 0xE0DD)  # ends with a delimiter; a sequence's
LONGEST_LINE = 500  # bytes of one in a NRRD's header
BLANK = re.compile(rb"\n\r?\n")
IN_TEXT = re.compile(rb"[ \t]*encoding[ \t]*:[ \t]*(ascii|txt|text)", re.IGNORECASE)
NO_NUMBER = re.compile(rb"[^\s,]{%d}" % LONGEST_LINE)
# of NRRD and MetaImage: the line that names where the voxels are
DATA_FILE = re.compile(rb"^[ \t]*(?:ElementDataFile|data ?file)[ \t]*[=:][ \t]*([^\n]*)", re.MULTILINE | re.IGNORECASE)


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


def check_data_file(path: Path) -> None:
    """Raises ``InputError`` where a NRRD or MetaImage takes its voxels from outside its own folder.

    ITK reads whatever the header names: ``ElementDataFile = /etc/passwd``.
    """
    with path.open("rb") as file:
        head = file.read(LARGEST_TEXT + 1)
    text = head.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    header, blank, _ = text.partition(b"\n\n") if text.startswith(b"NRRD") else (text, b"", b"")
    found = DATA_FILE.search(header)
    if found is None:
        if len(head) > LARGEST_TEXT and not blank:
            raise InputError(f"{path}: its header is longer than {LARGEST_TEXT} bytes; export it again")
        return
    named = found[1].strip()
    names = text[found.end() :].splitlines() if named.upper().startswith(b"LIST") else [named]
    for name in (name.decode("utf-8", "replace").strip() for name in names):
        if _outside(name):
            raise InputError(f"{path}: takes its voxels from another folder, {name}; put that file beside it")


def check_nrrd(path: Path) -> None:
    """Raises ``InputError`` where a line of a NRRD's header, or a number in its text, is longer than ITK has room for.

    Its messages go into 1024 bytes, and it writes beyond them. Lines that are notes are not told in messages.
    """
    with path.open("rb") as file:
        if file.read(4) != b"NRRD":
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            blank = BLANK.search(data)
            lines = data[: blank.end() if blank else LARGEST_TEXT].split(b"\n")
            long = any(len(line) > LONGEST_LINE and not (b":=" in line or line[:1] == b"#") for line in lines)
            if long or (blank is None and len(data) > LARGEST_TEXT):
                raise InputError(f"{path}: its header has lines of more than {LONGEST_LINE} bytes; export it again")
            in_text = next((line for line in lines if IN_TEXT.match(line)), None)
            if in_text and any(DATA_FILE.match(line) for line in lines):
                raise InputError(f"{path}: its voxels are text in another file; save them with it, or raw")
            if in_text and NO_NUMBER.search(data, blank.end() if blank else 0):
                raise InputError(f"{path}: holds text where numbers should be; export it again")


def _outside(name: str) -> bool:
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return any(kind.anchor or ".." in kind.parts for kind in kinds)
