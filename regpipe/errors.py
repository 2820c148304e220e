"""Mistakes that a user can mend, told in a line."""

from __future__ import annotations

import sys
from types import TracebackType


class InputError(ValueError):
    """What a user can mend; the message is one line: the file or setting, what is wrong, what to do."""


def cause(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that ``error`` is or comes from: MONAI wraps what a configuration raises."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def one_line_errors() -> None:
    """Make an uncaught ``InputError`` end the process with its message alone, and exit status 1."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        problem = cause(error)
        if problem is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(f"error: {problem}", file=sys.stderr)

    sys.excepthook = show
