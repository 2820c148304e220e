"""Files that are there whole or not at all, and archives that can be told from damaged ones."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a whole file or leave what was there: aside, to the disk, then renamed. Folders are made.

    Once it returns, the file outlasts a crash of the machine.

    Raises:
        OSError: with the file's own name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # a write that fails names no file, and what lies aside is no name for a user
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)
    _folder_to_disk(path.parent)


def _folder_to_disk(folder: Path) -> None:
    """Make a rename in it last; not every system and file system knows how."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: str | Path, *patterns: str) -> None:
    """Remove what a killed process left aside of files with such names; call it where no other process writes them."""
    for pattern in patterns:
        for aside in Path(folder).glob(f".{pattern}.*"):
            if aside.suffix[1:].isdecimal():
                aside.unlink(missing_ok=True)


def save_tensors(path: str | Path, state: Any) -> None:
    """``torch.save`` by ``replace_file``; what it writes is an archive, see ``damage``."""
    import torch  # takes seconds, and most of those who write files need none

    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def damage(path: str | Path) -> str | None:
    """What is wrong with an archive of ``torch.save``'s; None where each part of it has the checksum it was given.

    ``torch.load`` does not look at the checksums: of a file with some bits turned over it gives other weights.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file fails in many ways
        return str(error) or type(error).__name__
    return None if bad is None else f"the checksum of its part {Path(bad).name} does not hold"
