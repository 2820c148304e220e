"""Several processes of one command that register a folder together, each case by the one that takes it first.

``regpipe register --jobs N`` starts its own command N - 1 times more. Each process, of one thread, takes the next case
that nobody took; the first one waits for the others, does again what failed or was left behind by one that ended, and
says and writes what one process alone would.
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
    """Which cases are taken: by a file each in a folder; without a folder none is, and each can be taken."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def free(self, case: str) -> bool:
        """Whether nobody has it."""
        return self.folder is None or not self._file(case).exists()

    def take(self, case: str) -> bool:
        """Take it; False where another process was faster."""
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
    """What the first process says is taken; in the first one nothing is."""
    return Taken(os.environ.get(TAKEN))


@contextlib.contextmanager
def beside(jobs: int) -> Iterator[Taken]:
    """Within it ``jobs`` processes work, this one among them; it ends when all have ended."""
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
        except BaseException:
            for process in others:
                process.terminate()
            raise
        finally:
            del os.environ[BESIDE]
            for process in others:
                process.wait()
