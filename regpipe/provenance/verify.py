"""Checks results, and the images and weights that they came from, against their manifests.

This finds files that were damaged, exchanged or mixed up. Manifests are not signed: one that somebody wrote anew
together with its file is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from regpipe.data import manifest
from regpipe.io import images
from regpipe.metrics.table import read_rows
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.files import sha256

SHIPPED = ("2d", "3d")  # folders in ``models``: what the bundle came with
MODELS, EVALUATED = "models", "eval"  # of a bundle: the folders with its weights and with what they came to


class Checked(NamedTuple):
    """What ``verify`` looked at."""

    results: int
    files: int
    problems: dict[str, str]  # path, or result and file -> what is wrong


class Sources:
    """Files below a folder, found by name and hash; each is read once."""

    def __init__(self, folder: Path, patterns: Iterable[str] = ("**/*",)) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; --data wants the one that holds the images")
        self.folder, self._hashes = folder, dict[Path, str]()
        self._named: dict[str, list[Path]] = {}
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            self._named.setdefault(path.name, []).append(path)

    def find(self, source: Mapping[str, str]) -> str | None:
        """The path of an input that a manifest names, as regpipe takes it; None: it is not there.

        Raises:
            InputError: it is there by name, with other content.
        """
        name, _, frame = source["file"].partition("#")
        named = self._named.get(name, [])
        for path in named:
            if path not in self._hashes:
                self._hashes[path] = sha256(images.files(path))
            if self._hashes[path] == source["sha256"]:
                return f"{path}#{frame}" if frame else str(path)
        if named:
            raise InputError(f"{source['file']}: {source['role']}, changed since ({named[0]}); bring the old one back")
        return None


def verify(folder: Path, *, data: Path | None = None, bundle: Path | None = None) -> Checked:
    """Hold every file of the results in ``folder`` to their manifests.

    Args:
        folder: what registering wrote, one case of it, a trained bundle, a comparison's or a study's; or a manifest.
        data: below it the inputs are looked for, by name and hash.
        bundle: whose model's files are to be those that the cases were registered with.

    Raises:
        InputError: no such folder, or no result in it.
    """
    found, problems = manifests(folder)
    for inner in sorted(path for path in (folder / manifest.WITHIN).glob("*") if path.is_dir()):
        try:
            more, theirs = manifests(inner)
        except InputError as problem:  # of an unfinished one: what is wrong with the others is wanted, too
            more, theirs = [], {str(inner): str(problem)}
        found, problems = found + more, problems | theirs
    sources = None if data is None else Sources(data)
    files, named = 0, dict[str, Path]()
    for path in Progress(found, what="checking", unit="results"):
        try:
            content = manifest.read(path)
        except InputError as problem:
            problems[str(path)] = str(problem)
            continue
        files += len(content["files"])
        problems |= _of_files(path.parent, content["files"])
        if content["kind"] == "registration" and named.setdefault(content["case"], path) != path:
            problems[str(path)] = f"{path}: is of {content['case']}, as {named[content['case']]} is; remove one of them"
        if sources is not None:
            problems |= _of_inputs(path.parent, content["inputs"], sources)
        whose = (_around(path) or bundle) if content["kind"] == "evaluation" else bundle
        if whose is not None and content["kind"] in ("registration", "evaluation"):
            problems |= _of_model(path.parent, content["model"], whose)
    return Checked(len(found), files, problems)


def manifests(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The manifests of the results in a folder, and the results that have none.

    Raises:
        InputError: no such folder, or no result in it.
    """
    if folder.is_file():
        return [folder], {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give what regpipe register -o wrote, or a bundle")
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    places = [folder, *below, *(path / inner for path in below for inner in (MODELS, EVALUATED))]
    found = [path / manifest.NAME for path in places if (path / manifest.NAME).is_file()]
    bare = (path for path in places if path / manifest.NAME not in found)
    problems = dict(line for path in bare for line in _without(path)) | _gone(folder)
    if not found and not problems:
        raise InputError(f"{folder}: holds no result; give what regpipe register -o wrote, or a trained bundle")
    return found, problems


def _gone(folder: Path) -> dict[str, str]:
    """The cases of which only the table is left."""
    table = folder / "metrics.csv"
    try:
        of_cases = table.is_file() and not (folder / "summary.json").is_file()  # which goes with an evaluation's table
        names = [row["case"] for row in read_rows(table)] if of_cases else []
    except (OSError, ValueError, KeyError) as cause:
        return {str(table): f"{table}: damaged ({type(cause).__name__}); the command that registered makes it again"}
    gone = (folder / name for name in names if not (folder / name).is_dir())
    return {str(path): f"{path}: missing, and {table.name} tells of it; register it again" for path in gone}


def _without(place: Path) -> Iterator[tuple[str, str]]:
    """A result without a manifest."""
    missing = f"{place / manifest.NAME}: missing"
    if (place / "model.pt").is_file():
        yield str(place), f"{missing}; the training has not ended, or was an older version's: the same command goes on"
    elif any((place / name).is_file() for name in ("summary.json", "comparison.csv", "study.csv")):
        yield str(place), f"{missing}; it has not ended, or was an older version's: the same command writes it"
    elif (place / "metrics.json").is_file() or (place / "transform.json").is_file():
        yield str(place), f"{missing}; the case is unfinished, or was an older version's: register it again"


def _of_files(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    problems = {}
    for name, known in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems[str(path)] = f"{folder / manifest.NAME}: names {name}, outside its folder; it is not ours"
        elif not path.is_file():
            problems[str(path)] = f"{path}: missing; make the result again"
        elif sha256([path]) != known:
            problems[str(path)] = f"{path}: changed since it was written; make the result again"
    return problems


def _of_inputs(folder: Path, inputs: Iterable[Mapping[str, str]], sources: Sources) -> dict[str, str]:
    problems = {}
    for source in inputs:
        at = f"{folder}: {source['file']}"
        try:
            if sources.find(source) is None:
                problems[at] = f"{at}: {source['role']}, not in {sources.folder}; give the --data that it was made from"
        except InputError as problem:
            problems[at] = f"{folder}: {problem}"
    return problems


def unlike(files: Sequence[str]) -> str:
    """That these files are others, in words; empty for none."""
    return f"has another {', '.join(files)}" if files else ""


def nearest(used: Iterable[Mapping[str, str]], bundle: Path) -> tuple[Path, list[str]]:
    """The folder of the model that a manifest names, or of the one most like it; and which of its files differ.

    Raises:
        InputError: the bundle has no model.
    """
    from regpipe.bundle.run import bundle_in

    folder, used = bundle_in(bundle) / MODELS, list(used)
    found = [place for place in (folder, *(folder / name for name in SHIPPED)) if (place / "model.pt").is_file()]
    if not found:
        raise InputError(f"{folder / 'model.pt'}: missing; --bundle wants a trained bundle")
    here = {place: {item["file"]: item["sha256"] for item in manifest.bundle_files(place)} for place in found}
    other = {at: [one["file"] for one in used if held.get(one["file"]) != one["sha256"]] for at, held in here.items()}
    return min(other.items(), key=lambda each: len(each[1]))


def _around(path: Path) -> Path | None:
    """The trained bundle that the manifest of an evaluation lies in."""
    bundle = path.absolute().parent.parent
    return bundle if (bundle / MODELS / "model.pt").is_file() else None


def _of_model(folder: Path, used: Sequence[Mapping[str, str]], bundle: Path) -> dict[str, str]:
    problem = unlike(nearest(used, bundle)[1]) if used else "is not asked for, there was no network"
    mend = "bring the old one back, or make the result again" if used else "leave out --bundle"
    return {f"{folder}: model": f"{folder}: {bundle} {problem}; {mend}"} if problem else {}
