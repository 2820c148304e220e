"""How often files are opened, by whatever code: the kernel says, so that libraries' own openings count."""

from __future__ import annotations

import collections
import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ, CLOSED, OPENED = 0x1, 0x18, 0x20  # of <sys/inotify.h>; what happens between two openings keeps them apart


@contextmanager
def opens(folder: Path) -> Iterator[collections.Counter[str]]:
    """Counts, by their ways in ``folder``, the openings of the files that are in it now; there once the block ends."""
    libc, counted = ctypes.CDLL(None, use_errno=True), collections.Counter[str]()
    watch = libc.inotify_init1(os.O_NONBLOCK)
    names = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        names[libc.inotify_add_watch(watch, os.fsencode(path), READ | CLOSED | OPENED)] = str(path.relative_to(folder))
    try:
        yield counted
        for number, happened in _events(watch):
            counted[names[number]] += happened == OPENED
    finally:
        os.close(watch)


def _events(watch: int) -> Iterator[tuple[int, int]]:
    while True:
        try:
            data = os.read(watch, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, happened, _, length = struct.unpack_from("iIII", data, at)
            at += 16 + length
            if number >= 0:  # else so many that some were lost
                yield number, happened
