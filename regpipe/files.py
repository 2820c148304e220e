"""Files that are there whole or not at all, and what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regpipe.errors import InputError


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a whole file or leave what was there: aside, to the disk, then renamed. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def absolute(path: str | Path) -> Path:
    """The whole path without links; one in a loop of links, or of an unknown ``~user``, stays and does not exist."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def require_file(path: str | Path) -> Path:
    """The path of a file that can be read to its end.

    Raises:
        InputError: nothing there, not readable, or a folder, a pipe, a device: opening a pipe would wait for ever.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; give an existing one")
    if not path.is_file():
        raise InputError(f"{path}: is no file but a folder, a pipe or a device; give a file")
    try:
        path.open("rb").close()
    except OSError as cause:
        raise InputError(f"{path}: {cause.strerror}; make it readable") from cause
    return path


def parse_json(data: bytes) -> Any:
    """What JSON says, in any of its encodings, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python follows.
    """
    try:
        return json.loads(data)
    except RecursionError as cause:
        raise ValueError("nested too deeply") from cause
