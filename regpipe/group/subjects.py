"""The subjects of a group, in an order that is their content's: what comes out depends on no name and no folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from regpipe.data.checks import check_pairs
from regpipe.data.members import FOLDERS, KINDS, files_of
from regpipe.data.pairs import SIDES, Case, groups_of, list_pairs
from regpipe.io import images
from regpipe.utils.errors import InputError
from regpipe.utils.files import sha256

NO_FOLDER = ("", ".", "..")
BY_NAME = "subject"  # of ``by_subject``: no expression is given
BIDS = re.compile(r"sub-[^_]+")
LAST_WORD = re.compile(r"(.+)_[^_]*")  # what stands before it


class Subject(NamedTuple):
    """One image, and what belongs to it; or the mean of a subject's images."""

    name: str
    image: str
    sha256: str  # of the image
    beside: Mapping[str, str]  # kind -> file
    to_mean: str | None = None  # of an image: its way to the mean of its subject, a case's transform.json
    scans: tuple[Subject, ...] = ()  # of a mean: the images that it is of

    @property
    def label(self) -> str | None:
        """Its label map's file."""
        return self.beside.get("label")

    def files(self) -> dict[str, str]:
        """Kind -> file."""
        return {"image": self.image, **self.beside}

    def images(self) -> tuple[Subject, ...]:
        """Those that are somebody's own voxels."""
        return self.scans or (self,)

    def beside_sha256(self) -> dict[str, str]:
        """Kind -> hash of the file, of all but the image."""
        return {kind: sha256(images.files(path)) for kind, path in self.beside.items()}

    def as_moving(self) -> Case:
        """Its part of a case."""
        found = {f"moving_{kind}": path for kind, path in self.files().items()}
        return found if self.to_mean is None else {"initial_1": self.to_mean, **found}


def list_subjects(dataset: str | Path, *, film: bool = False) -> list[Subject]:
    """The images of a folder or datalist, see ``regpipe.list_pairs``, each once, by their hashes.

    ``film``: its frames in their order; ``dataset`` may be one file too, and ``labels/NAME_4.nii.gz``, ``landmarks/``
    and ``masks/`` beside it are of the frame ``NAME.nii.gz#4``.

    Raises:
        InputError: not two images at least; two of one name; one that cannot be read, or of another dimension.
    """
    root = Path(dataset).expanduser().absolute()  # beside a link to a film lie its labels, not beside the film
    if film and (images.is_series(root) if root.is_dir() else root.suffix.lower() != ".json"):
        found = _frames(root)
    else:
        found = {}
        for case in list_pairs(dataset, pairing="first"):
            for side in SIDES:
                kinds = {kind: case[f"{side}_{kind}"] for kind in KINDS if f"{side}_{kind}" in case}
                found.setdefault(kinds["image"], kinds)
    known: dict[tuple[Path, ...], str] = {}  # a film is one file for all its frames
    subjects = []
    for path, beside in found.items():
        files = tuple(images.files(path))
        known[files] = known.get(files) or sha256(files)
        of_image = {kind: file for kind, file in beside.items() if kind != "image"}
        subjects.append(Subject(images.stem(path), path, known[files], of_image))
    if not film:
        subjects.sort(key=lambda one: (one.sha256, one.name))
    _check(subjects)
    return subjects


def _frames(film: Path) -> dict[str, dict[str, str]]:
    """The frames of a film, each with its files."""
    with images.opened_image(film, film=True) as source:
        count = source.shape[3] if len(source.shape) == 4 else 1
    if count < 2:
        raise InputError(f"{film}: is one image; --sequence takes a film, or a folder of frames")
    beside = {kind: files_of(film.parent / FOLDERS[kind], suffixes) for kind, suffixes in KINDS.items()}
    frames = [f"{film}#{i}" for i in range(count)]
    return {
        frame: {kind: files[images.stem(frame)] for kind, files in beside.items() if images.stem(frame) in files}
        for frame in frames
    }


def by_subject(scans: Sequence[Subject], within: str, dataset: str | Path) -> dict[str, list[Subject]]:
    """The images of each subject, by its name: of ``groups.csv`` or as the images' names tell.

    Args:
        within: ``BY_NAME``: ``sub-...`` as BIDS has it, else what stands before the last ``_``; or an expression that
            finds the subject in a name: its first group, or all of it.

    Raises:
        InputError: no such expression; a name that it does not fit; all are one subject's, or no subject has two.
    """
    names = [one.name for one in scans]
    if within.lower() == BY_NAME:
        named = groups_of(Path(dataset), names)
        if named == {name: name for name in names}:
            named = {name: _found(name, BIDS) or _found(name, LAST_WORD) or name for name in names}
    else:
        try:
            asked = re.compile(within)
        except re.error as problem:
            raise InputError(f"--within {within}: no regular expression ({problem})") from problem
        named = {name: _found(name, asked) for name in names}
    nobody = next((name for name, subject in named.items() if subject in NO_FOLDER or set(subject) & {*"/\\"}), None)
    if nobody is not None:
        raise InputError(f"--within {within}: finds in the name {nobody} no subject that could name a folder")
    groups: dict[str, list[Subject]] = {}
    for one in scans:
        groups.setdefault(named[one.name], []).append(one)
    if len(groups) < 2 or len(groups) == len(scans):
        told = "all images are one subject's" if len(groups) < 2 else "no subject has two images"
        raise InputError(f"--within {within}: {told} ({', '.join(list(groups)[:3])}, ...); leave it out")
    return groups


def _found(name: str, expression: re.Pattern[str]) -> str:
    found = expression.search(name)
    return "" if found is None else found[1 if expression.groups else 0] or ""


def _check(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{twice}: two images have this name; a template's subjects need one each")
    first = subjects[0]
    pairs = [{"case": one.name, "fixed_image": first.image, **one.as_moving()} for one in subjects]
    problems = check_pairs(pairs, progress=True)
    if problems:
        name, problem = next(iter(problems.items()))
        more = f" ({len(problems)} subjects have such problems)" if len(problems) > 1 else ""
        raise InputError(f"{problem}; mend {name} or leave it out{more}")
