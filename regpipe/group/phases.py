"""Work on each subject of a group, kept in a file each: what was stopped goes on, and several processes share it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from regpipe.group.subjects import Subject
from regpipe.inference import jobs
from regpipe.utils import console
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

Arrays = dict[str, np.ndarray]


class Phases:
    """The phases of a group in a folder: ``NAME/SUBJECT.npz`` of each subject, ``NAME.npz`` of all together.

    ``processes``: see ``inference.jobs``.
    """

    def __init__(self, folder: Path, subjects: Sequence[Subject], processes: int = 1) -> None:
        self.folder, self.subjects, self.processes = folder, list(subjects), processes

    def each(self, name: str, work: Callable[[Subject], Arrays]) -> None:
        """What ``work`` makes of each subject, kept in a file each; those that are there are not made again."""
        if self.left(name):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            with jobs.beside(self.processes) as taken:
                self._make(name, work, taken)
            leave()
            self._make(name, work, jobs.Taken())

    def left(self, name: str) -> list[Subject]:
        """The subjects that a phase has still to be done for."""
        return [one for one in self.subjects if not (self.folder / name / f"{one.name}.npz").is_file()]

    def _make(self, name: str, work: Callable[[Subject], Arrays], taken: jobs.Taken) -> None:
        left = [one for one in self.left(name) if taken.free(one.name)]
        for one in console.Progress(left, what=name, unit="subjects"):
            if not taken.take(one.name):
                continue
            try:
                _save(self.folder / name / f"{one.name}.npz", work(one))
            except InputError as problem:
                leave()  # the first process meets it again
                raise InputError(f"{one.name}: {problem}") from problem

    def once(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What the first process makes of a whole phase."""
        if not (self.folder / f"{name}.npz").is_file():
            leave()
            _save(self.folder / f"{name}.npz", make())
        return self.read(name)

    def read(self, name: str, one: Subject | None = None) -> Arrays:
        """What was made, of one subject or once."""
        with np.load(self.folder / (f"{name}/{one.name}.npz" if one else f"{name}.npz"), allow_pickle=False) as held:
            return {key: held[key] for key in held.files}


def leave() -> None:
    """A process that was started for a phase ends with it: what comes next is the first one's."""
    if jobs.started():
        raise SystemExit(0)


def _save(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    replace_file(path, data.getvalue())
