"""Errors that a user can correct, explained in one line."""

from __future__ import annotations

import errno
import sys
import threading
import unicodedata
from collections.abc import Iterator
from types import TracebackType

from regpipe.utils.console import complain

ENDED_TOGETHER = (
    "stopped, for another process of this job ended or the job was told to: "
    "what ended first says why, if it could; the same command goes on from what is finished"
)


class InputError(ValueError):
    """An error that a user can correct. Its message is one line: the file or setting, what is wrong, what to do.

    Further arguments are lines below it. Control characters are escaped: anyone may have named the files.
    """

    def __str__(self) -> str:
        return "\n  ".join(printable(str(line)) for line in self.args)


def printable(text: str) -> str:
    r"""The text with control characters and broken Unicode escaped: ``\n``, ``\x1b``, ``\udcff`` ..."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it comes from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def cause(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that ``error`` is or comes from: MONAI wraps what a configuration raises."""
    return next((one for one in chain(error) if isinstance(one, InputError)), None)


def root(error: BaseException) -> str:
    """The first line of what an error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0] or type(error).__name__


OUT_OF_MEMORY = (  # torch on the CPU and on GPUs; ITK and other C++
    "not enough memory",
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
    "bad_alloc",
)
REMEDIES = "free some, or take a coarser working grid (regpipe doctor --shape says what a grid needs)"
LESS_MEMORY = "take --amp true, then --checkpointing true, then a smaller --grid_shape or a larger --grid_spacing"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this is, or comes from, memory that was asked for and not given, by torch, numpy, ITK or Python."""
    return any(
        isinstance(one, MemoryError)
        or type(one).__name__ == "OutOfMemoryError"
        or (isinstance(one, RuntimeError) and any(text in str(one) for text in OUT_OF_MEMORY))
        for one in chain(error)
    )


MONAI_SAYS = (  # of a configuration
    "Cannot locate class or function path",
    "the referring item `",
    "doesn't exist in the config file",
)


FULL = (errno.ENOSPC, errno.EDQUOT)
SYSTEM = dict.fromkeys(FULL, "free some space, or write to another disk")
SYSTEM |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "ask for the right to it, or take another folder")


def explain(error: BaseException) -> str | None:
    """The line for a user; None for an error that is not known.

    Known are an ``InputError``, missing memory, a lost process, a name in a configuration that does not exist, and a
    file that the system refuses.
    """
    known = cause(error)
    if known is not None:
        return str(known)
    if out_of_memory(error):
        return f"out of memory: {REMEDIES}"
    if _lost(error):
        return ENDED_TOGETHER
    misconfigured = next((text for text in map(str, chain(error)) if any(said in text for said in MONAI_SAYS)), None)
    if misconfigured is not None:
        return f"configuration: {printable(misconfigured)[:300]}; mend the file that says so, or copy the bundle anew"
    refused = next((one for one in chain(error) if isinstance(one, OSError)), None)
    if refused is None or refused.strerror is None:
        return None
    if refused.errno == errno.ENOENT and refused.filename is None:  # of os.getcwd
        return "the current folder: was deleted; change to one that is there"
    remedy = SYSTEM.get(refused.errno or 0)
    return f"{refused.filename or 'writing'}: {refused.strerror}" + (f"; {remedy}" if remedy else "")


def disk_full(error: OSError) -> bool:
    """Whether the disk is full, or the user's share of it."""
    return error.errno in FULL


def _lost(error: BaseException) -> bool:
    """Whether torch.distributed says that another process is gone, by gloo's text or a type of its own."""
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return any("gloo/" in str(one) or type(one).__name__ in names for one in chain(error))


def one_line_errors() -> None:
    """Let an error that ``explain`` knows end the process with one line and exit status 1."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        told = explain(error)
        if told is None:
            sys.__excepthook__(kind, error, trace)
        else:
            complain("error", told)

    shown = threading.excepthook

    def show_of_thread(about: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread; what stops it is raised there and here
        if about.exc_value is None or explain(about.exc_value) is None:
            shown(about)

    sys.excepthook, threading.excepthook = show, show_of_thread
