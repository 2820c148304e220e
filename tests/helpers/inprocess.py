"""A command that would have a process of its own, in this one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_if_in_its_own_process() -> Iterator[None]:
    """Brings back what a bundle's run changes for the rest of its process: error hook, loggers, import path."""
    hook, path, root = sys.excepthook, list(sys.path), logging.getLogger()
    ours = logging.getLogger("regpipe")
    state = [(log, list(log.handlers), log.level, log.propagate) for log in (root, ours)]
    try:
        yield
    finally:
        sys.excepthook, sys.path[:] = hook, path
        for log, handlers, level, propagate in state:
            log.handlers[:], log.level, log.propagate = handlers, level, propagate
