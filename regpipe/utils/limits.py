"""Refuses files that claim more than fits into memory, before memory is allocated for them.

A header of a few hundred bytes can claim 60000 x 60000 x 60000 voxels; a compressed file can hold gigabytes of zeros.
For files that GDCM and ITK read see ``io.headers``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from regpipe.utils import machine
from regpipe.utils.errors import InputError

GIB = 2**30
UNASKED = GIB  # bytes that are read without looking at the free memory
LARGEST_EXTENSIONS = 16 << 20  # bytes between a NIfTI's header and its voxels


def require_room(path: object, shape: Sequence[int], itemsize: int = 8) -> None:
    """Raises ``InputError`` where more values are claimed than the free memory can hold; ``itemsize`` in bytes."""
    needed = math.prod(int(n) for n in shape) * itemsize
    if needed <= UNASKED:
        return
    if needed > machine.free():
        raise InputError(
            f"{path}: says that it holds {' x '.join(str(n) for n in shape)} values; that does not fit into memory "
            f"({needed / GIB:.3g} GiB); mend its header, or save it coarser"
        )


def require_size(path: str | Path) -> None:
    """Raises ``InputError`` where a whole file does not fit into the free memory."""
    require_room(path, [Path(path).stat().st_size], 4)  # with what is made of it


def check_nifti(path: str | Path, file: Any) -> None:
    """Raises ``InputError`` where header extensions claim to be huge: nibabel reads them with the header.

    ``file``: open, at its beginning, and unpacked where it is packed.
    """
    try:
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
    """The lengths that the extensions of a NIfTI header claim, up to the first impossible one."""
    while at + 8 <= end:
        file.seek(at)
        size = int.from_bytes(file.read(4), order, signed=True)
        yield size
        if size < 8:
            return
        at += size
