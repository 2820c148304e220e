"""The subjects of a group, in an order that is their content's: what comes out depends on no name and no folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from regpipe.data.checks import check_pairs
from regpipe.data.pairs import SIDES, Case, list_pairs
from regpipe.io import images
from regpipe.utils.errors import InputError
from regpipe.utils.files import sha256


class Subject(NamedTuple):
    """One image, and what belongs to it."""

    name: str
    image: str
    label: str | None
    mask: str | None
    sha256: str  # of the image

    def files(self) -> dict[str, str]:
        """Kind -> file."""
        found = {"image": self.image, "label": self.label, "mask": self.mask}
        return {kind: path for kind, path in found.items() if path is not None}

    def beside_sha256(self) -> dict[str, str]:
        """Kind -> hash of the file, of all but the image."""
        return {kind: sha256(images.files(path)) for kind, path in self.files().items() if kind != "image"}

    def as_moving(self) -> Case:
        """Its part of a case."""
        return {f"moving_{kind}": path for kind, path in self.files().items()}


def list_subjects(dataset: str | Path) -> list[Subject]:
    """The images of a folder or datalist, see ``regpipe.list_pairs``, each once, by their hashes.

    Raises:
        InputError: not two images at least; two of one name; one that cannot be read, or of another dimension.
    """
    cases = list_pairs(dataset, pairing="first")
    found: dict[str, Subject] = {}
    for case in cases:
        for side in SIDES:
            image, label, mask = (case.get(f"{side}_{kind}") for kind in ("image", "label", "mask"))
            assert image is not None
            if image not in found:
                found[image] = Subject(images.stem(image), image, label, mask, sha256(images.files(image)))
    subjects = sorted(found.values(), key=lambda one: (one.sha256, one.name))
    _check(subjects)
    return subjects


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
