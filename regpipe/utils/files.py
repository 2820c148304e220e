"""Writes files whole or not at all, hashes and parses them, and checks torch archives for damage."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from regpipe.utils.errors import InputError

_later: ContextVar[dict[int, Path] | None] = ContextVar("later", default=None)  # open files, not yet written through


def sha256(paths: Iterable[Path]) -> str:
    """The hash of the bytes of these files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            _add(digest, file)
    return digest.hexdigest()


def sha256_of(file: BinaryIO) -> str:
    """The hash of the rest of an open file."""
    digest = hashlib.sha256()
    _add(digest, file)
    return digest.hexdigest()


def _add(digest: Any, file: BinaryIO) -> None:
    while block := file.read(1 << 20):
        digest.update(block)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a whole file, or leave the old one: to a temporary file, to the disk, then renamed. Folders are made.

    After it returns, or ``written_together`` around it, the file survives a crash of the machine.

    Raises:
        OSError: with the file's own name.
    """
    path, later = Path(path), _later.get()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            if later is None:
                os.fsync(file.fileno())
            else:
                later[os.dup(file.fileno())] = path
        os.replace(aside, path)
    except OSError as error:  # name the file itself, not the temporary one
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)
    if later is None:
        _folder_to_disk(path.parent)


@contextlib.contextmanager
def written_together() -> Iterator[None]:
    """Files that ``replace_file`` writes within are written through to the disk at the end: one wait, not one for each.

    Write what marks them as finished after it. Where an error leaves the block, none is waited for.

    Raises:
        OSError: with the name of the file that the disk did not take.
    """
    written: dict[int, Path] = {}
    token = _later.set(written)
    try:
        yield
        for handle, path in written.items():
            try:
                os.fsync(handle)
            except OSError as error:
                error.filename = str(path)
                raise
        for folder in dict.fromkeys(path.parent for path in written.values()):
            _folder_to_disk(folder)
    finally:
        _later.reset(token)
        for handle in written:
            os.close(handle)


def replace_hashed(path: str | Path, data: bytes) -> str:
    """``replace_file``, and the SHA-256 of what was written: none of it is read again for that."""
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _folder_to_disk(folder: Path) -> None:
    """Write a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: str | Path, *patterns: str) -> None:
    """Remove temporary files that a killed process left; call it only where no other process writes such files."""
    for pattern in patterns:
        for aside in Path(folder).glob(f".{pattern}.*"):
            if aside.suffix[1:].isdecimal():
                aside.unlink(missing_ok=True)


def save_tensors(path: str | Path, state: Any) -> None:
    """``torch.save`` by ``replace_file``; what it writes is an archive, see ``damage``."""
    import torch  # takes seconds to import

    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def damage(path: str | Path) -> str | None:
    """What is wrong with an archive of ``torch.save``; None where each part has its checksum.

    ``torch.load`` does not check: from a file with flipped bits it reads other weights. An archive with compressed
    parts is refused: torch writes none, and they could unpack to any size.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > Path(path).stat().st_size:
                return "its parts are compressed"
            bad = archive.testzip()
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file fails in many ways
        return str(error) or type(error).__name__
    return None if bad is None else f"the checksum of its part {Path(bad).name} does not hold"


def csv_bytes(rows: Iterable[Iterable[Any]], between: str = ",") -> bytes:
    """A table as text, a line for each row."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", delimiter=between).writerows(rows)
    return text.getvalue().encode()


def absolute(path: str | Path) -> Path:
    """The absolute path, links resolved. A loop of links or an unknown ``~user`` gives a path that does not exist."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def require_file(path: str | Path) -> Path:
    """The path of a file that ``opened`` opens."""
    opened(path).close()
    return Path(path)


def opened(path: str | Path) -> BinaryIO:
    """A regular, readable file, open.

    Raises:
        InputError: missing, not readable, or a folder, a pipe or a device (opening a pipe would wait for ever).
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; give an existing one")
    if not path.is_file():
        raise InputError(f"{path}: is no file but a folder, a pipe or a device; give a file")
    try:
        return path.open("rb")
    except OSError as cause:
        raise InputError(f"{path}: {cause.strerror}; make it readable") from cause


def parse_json(data: bytes) -> Any:
    """Parse JSON in any of its encodings, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python follows.
    """
    try:
        return json.loads(data)
    except RecursionError as cause:
        raise ValueError("nested too deeply") from cause
