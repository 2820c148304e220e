"""Several processes of one command register a folder together; a case belongs to the process that takes it first.

``regpipe register --jobs N`` starts its own command N - 1 more times. Each process has one thread and takes the next
free case. The first process waits for the others, repeats cases that failed or that a killed process left, and prints
and writes what a single process would.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess  # its own command  # nosec B404
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

TAKEN = "REGPIPE_TAKEN"  # the folder that says to a started process which cases are taken
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
BESIDE = "LOCAL_WORLD_SIZE"  # as torchrun says it: see ``utils.machine``


class Taken:
    """Which cases are taken: each has a file in a shared folder. Without a folder every case is free."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def free(self, case: str) -> bool:
        """Whether no process has taken the case."""
        return self.folder is None or not self._file(case).exists()

    def take(self, case: str) -> bool:
        """Take the case; False where another process was faster."""
        if self.folder is None:
            return True
        with contextlib.suppress(FileExistsError):
            self._file(case).touch(exist_ok=False)
            return True
        return False

    def _file(self, case: str) -> Path:
        assert self.folder is not None
        return self.folder / hashlib.sha256(case.encode(errors="surrogateescape")).hexdigest()


def started() -> bool:
    """Whether this process is one of those that the first one started."""
    return TAKEN in os.environ


def of_this_process() -> Taken:
    """The cases taken in the folder that the first process named; in the first process itself none."""
    return Taken(os.environ.get(TAKEN))


@contextlib.contextmanager
def beside(jobs: int) -> Iterator[Taken]:
    """A context in which ``jobs`` processes work, this one included; it ends when all have ended."""
    if jobs < 2 or started():
        yield of_this_process()
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        told = {**dict.fromkeys(THREADS, "1"), BESIDE: str(jobs), TAKEN: folder, "TQDM_DISABLE": "1"}
        command = [sys.executable, "-c", "from regpipe.cli.main import main; main()", *sys.argv[1:]]
        others = [
            subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.DEVNULL)  # nosec B603
            for _ in range(jobs - 1)
        ]
        os.environ[BESIDE] = str(jobs)
        try:
            yield Taken(folder)
        except BaseException:  # Ctrl-C too: no process is left behind
            for process in others:
                process.terminate()
            raise
        finally:
            del os.environ[BESIDE]
            for process in others:
                process.wait()
