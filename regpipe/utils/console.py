"""What a command prints: results on stdout, all else on stderr, progress with the time left.

``session`` implements ``--json`` and ``--quiet``, for the process and for the processes that it starts. Any part of
regpipe calls ``tell`` to add to the result of ``--json``. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm

DELAY = 2.0  # seconds before progress is shown
LINE_EVERY = 10.0  # seconds between two lines, where there is no terminal
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"

_told: dict[str, Any] = {}


def tell(**facts: Any) -> None:
    """Add facts to the result that ``--json`` prints; docs/commandline.md has the names."""
    _told.update(facts)


def told() -> dict[str, Any]:
    """What was told since the session began, as JSON takes it."""
    return _plain(_told)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if getattr(value, "shape", None) == ():  # a number of numpy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@contextlib.contextmanager
def session(*, json: bool = False, quiet: bool = False) -> Iterator[None]:
    """With ``json`` output goes to stderr, with ``quiet`` nowhere; that of started processes too.

    ``quiet`` also hides progress and the log's INFO lines; warnings and errors stay.
    """
    _told.clear()
    with contextlib.ExitStack() as stack:
        if quiet:
            if "TQDM_DISABLE" not in os.environ:
                os.environ["TQDM_DISABLE"] = "1"
                stack.callback(os.environ.pop, "TQDM_DISABLE")
            logging.disable(logging.INFO)
            stack.callback(logging.disable, logging.NOTSET)
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(_stdout_to(nowhere, nowhere.fileno()))
        elif json:
            stack.enter_context(_stdout_to(sys.stderr, 2))
        yield


@contextlib.contextmanager
def _stdout_to(stream: TextIO, descriptor: int) -> Iterator[None]:
    """Python's stdout, and the file descriptor below it, which other processes and C++ write to."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(descriptor, 1)
        with contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def first() -> bool:
    """Whether this process prints: the only one, or rank 0 of those that ``torchrun`` started."""
    return int(os.environ.get("RANK", "0")) == 0


def print_json(facts: Mapping[str, Any]) -> None:
    """One object, on one line."""
    print(json.dumps(_plain(facts)), flush=True)


def say(line: str) -> None:
    """A line on stdout, above a bar that is shown there; of several processes rank 0 says it."""
    if first():
        tqdm.write(line)
        sys.stdout.flush()


def complain(kind: str, line: str) -> None:
    """Print ``error: ...`` or ``warning: ...`` on stderr; on a terminal with colours the word is red or yellow."""
    word = f"{kind}:"
    if coloured(sys.stderr):
        word = f"\x1b[{'31' if kind == 'error' else '33'};1m{word}\x1b[0m"
    tqdm.write(f"{word} {line}", file=sys.stderr)


def coloured(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colours, and the user did not switch them off (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ------------------------------------------------------------------------------------- progress


class _Lines:
    """A stream on which a bar cannot move: each state of the bar is a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n \x1b[A")
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


class Progress(tqdm):
    """A bar on stderr with the time left. It appears after ``DELAY`` seconds and disappears at the end.

    A file or a pipe gets a plain line every ``LINE_EVERY`` seconds instead. Of several processes rank 0 shows it.

    Args:
        items: what to iterate over; None: ``update`` reports the progress.
        what: the work, e.g. "registering".
        unit: what is counted, in the plural; "" shows per cent only.
        total: how many items there are, where ``items`` has no length.
        given: further arguments of tqdm.
    """

    monitor_interval = 0  # no thread: each update reads the clock

    def __init__(
        self, items: Iterable[Any] | None = None, *, what: str, unit: str, total: float | None = None, **given: Any
    ) -> None:
        terminal = sys.stderr.isatty()
        shape = BAR if terminal else LINE
        if not unit:
            shape = shape.replace(" {n_fmt}/{total_fmt}", "")
            shape = shape.replace("{n_fmt} of {total_fmt} {unit}", "{percentage:.0f} %")
        told: dict[str, Any] = {"file": sys.stderr if terminal else _Lines(sys.stderr), "bar_format": shape}
        told |= {"mininterval": 0.2 if terminal else LINE_EVERY, "miniters": 1, "delay": DELAY, "leave": False}
        if terminal:
            told["ncols"] = shutil.get_terminal_size().columns  # 80 where a terminal says 0, as in some containers
        if not first() or os.environ.get("TQDM_DISABLE"):  # tqdm itself reads it when it is imported
            told["disable"] = True
        super().__init__(items, desc=what, total=total, unit=unit, **{**told, **given})
