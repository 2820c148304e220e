"""Files, folders and datalists -> pairs, split by subject; the grid they are worked on.

A *case* is a plain dict of strings: ``case`` (its name), ``fixed_image``, ``moving_image`` and,
where there are any, ``fixed_label``, ``fixed_landmarks``, ``fixed_mask``, the same of ``moving``, ``initial_1`` ...
(``transforms.initial``), ``fixed_image_2`` ... (``data.channels``), ``displacement`` (the true one, of phantoms):
absolute paths, as ``io.images`` reads them.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.data import channels as several
from regpipe.data.members import KINDS, files_of, natural, report, subjects_of
from regpipe.io import images
from regpipe.io.formats import warn_once
from regpipe.io.images import Grid, PathLike, is_series
from regpipe.io.source import Source
from regpipe.transforms import initial
from regpipe.utils import limits
from regpipe.utils.errors import InputError, printable
from regpipe.utils.files import absolute, parse_json

Case = dict[str, str]
SIDES = ("fixed", "moving")
LARGEST_GRID = 12_000_000  # voxels


def list_pairs(
    dataset_dir: PathLike,
    *,
    split: str = "all",
    holdout: float = 0.2,
    pairing: str = "all",
    seed: int = 0,
    max_pairs: int | None = None,
    channels: str | int | Sequence[int] | None = None,
    problems: dict[str, str] | None = None,
) -> list[Case]:
    """The pairs of a dataset, as cases.

    Three layouts. (1) ``fixed_images/`` and ``moving_images/``, and ``fixed_labels/``, ``moving_landmarks/``,
    ``fixed_masks/`` ... where there are any; files of one stem belong together; an image is a file,
    or a sub-folder with one DICOM series. (2) ``images/`` with ``labels/``, ``landmarks/`` and ``masks/``, or a plain
    folder of images: pairs are made of them. (3) A ``.json`` datalist with ``training`` and ``validation`` (or
    ``test``), lists of cases, or one list; paths relative to the file; ``film.nii.gz#4`` is a frame, counted from 0.

    Args:
        dataset_dir: the folder or the ``.json``.
        split: ``all``, ``training`` or ``validation``. Held out are whole groups (``groups.csv``
            with columns ``case,group``), else cases (1, 3) or subjects (2), never one of them in
            part; with ``pairing="first"`` the last frames. A datalist's own split is kept.
        holdout: a fraction below 1, or a number of groups, cases, subjects or frames.
        pairing: of layout 2: ``all`` ordered pairs of different subjects, or each file onto the
            ``first`` in natural order (a sequence).
        seed: of the split and of ``max_pairs``.
        max_pairs: keep at most so many, drawn at random, in order.
        channels: of images of several values at each place, which are channels: ``data.channels.spread``.
        problems: where given, takes what is wrong with single cases (case -> message) instead of an error.

    Raises:
        InputError: for anything that is not as above, naming the file.
    """
    for value, known in ((split, ("all", "training", "validation")), (pairing, ("all", "first"))):
        if value not in known:
            raise InputError(f"{value!r} is not one of {', '.join(known)}")
    root = absolute(dataset_dir)
    cut = Cut(split, holdout, seed)
    if root.is_file() and root.suffix.lower() == ".json":
        cases = _from_datalist(root, cut, problems)
    elif not root.is_dir():
        raise InputError(f"{root}: no such folder or .json datalist")
    elif any((root / f"{side}_images").is_dir() for side in SIDES):
        cases = _from_two_folders(root, cut, problems)
    else:
        cases = _from_one_folder(root, cut, pairing, problems)
    if max_pairs is not None and max_pairs < len(cases):
        kept = np.random.default_rng(seed).choice(len(cases), max_pairs, replace=False)
        cases = [cases[i] for i in sorted(kept)]
    return cases if channels is None else several.spread(cases, channels, problems=problems)


class Cut(NamedTuple):
    """How a dataset is split."""

    split: str
    holdout: float
    seed: int

    def held(self, n: int, least: int) -> int:
        """How many of n units are held out, such that each side has at least ``least``."""
        share = max(least, round(self.holdout * n)) if self.holdout < 1 else int(self.holdout)
        held = share if self.holdout else 0
        if self.holdout < 0 or (held and not least <= held <= n - least):
            raise InputError(f"holdout={self.holdout:g} of {n}: a side would have less than {least}")
        return held

    def keep(self, units: Sequence[str], held: set[str]) -> list[str]:
        """The units of this side, in order."""
        kept = [u for u in units if (u in held) == (self.split == "validation")]
        if not kept:
            raise InputError(f"holdout={self.holdout:g} leaves nothing for {self.split}")
        return kept

    def draw(self, names: Sequence[str], groups: Mapping[str, str], least: int = 1) -> list[str]:
        """The names of this side after a seeded shuffle of their groups."""
        if self.split == "all":
            return list(names)
        units = sorted({groups[n] for n in names}, key=natural)
        order = np.random.default_rng(self.seed).permutation(len(units))
        held = {units[i] for i in order[: self.held(len(units), least)]}
        return self.keep(names, {n for n in names if groups[n] in held})


def _case(name: str, fixed: Case, moving: Case) -> Case:
    case = {"case": name}
    for side, files in zip(SIDES, (fixed, moving), strict=True):
        case |= {f"{side}_{kind}": path for kind, path in files.items()}
    return case


def groups_of(root: Path, names: Iterable[str]) -> dict[str, str]:
    """case -> group from groups.csv; without one every case is its own group."""
    file = root / "groups.csv"
    if not file.is_file():
        return {n: n for n in names}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as cause:
        raise InputError(f"{file}: not a table ({cause}); save it as CSV in UTF-8") from cause
    if not rows or not {"case", "group"} <= rows[0].keys():
        raise InputError(f"{file}: needs the columns case,group")
    groups = {row["case"]: row["group"] for row in rows if row["group"]}
    for name in names:
        if name not in groups:
            raise InputError(f"{file}: has no row for the case {name}; add one")
    return groups


def _from_two_folders(root: Path, cut: Cut, problems: dict[str, str] | None) -> list[Case]:
    fixed, moving = (subjects_of(root, f"{side}_", root / f"{side}_images", problems) for side in SIDES)
    for one, other, where in ((fixed, moving, "moving"), (moving, fixed, "fixed")):
        for name in one:
            if name not in other:
                file = one[name]["image"]
                report(problems, name, f"{file}: no partner in {where}_images; add it or remove this")
    paired = [name for name in fixed if name in moving and name not in (problems or {})]
    kept = cut.draw(paired, groups_of(root, paired))
    true = files_of(root / "displacements", (".nii", ".nii.gz"))
    return [_case(n, fixed[n], moving[n]) | ({"displacement": true[n]} if n in true else {}) for n in kept]


def _from_one_folder(root: Path, cut: Cut, pairing: str, problems: dict[str, str] | None) -> list[Case]:
    inner = root / "images"
    if not inner.is_dir() and is_series(root):
        raise InputError(f"{root}: DICOM slices are one image; for pairs put each image's in a folder of its own")
    subjects = subjects_of(root, "", inner if inner.is_dir() else root, problems)
    names = [name for name in subjects if name not in (problems or {})]
    if len(names) < 2:
        raise InputError(f"{next(iter(subjects.values()))['image']}: is the only image of use; a pair needs two")
    if pairing == "first":
        frames = names[1:]
        if cut.split != "all":
            frames = cut.keep(frames, set(frames[len(frames) - cut.held(len(frames), 1) :]))
        pairs = [(names[0], n) for n in frames]
    else:
        pairs = list(itertools.permutations(cut.draw(names, groups_of(root, names), 2), 2))
    cases = [_case(f"{m}_to_{f}", subjects[f], subjects[m]) for f, m in pairs]
    twice = _twice(cases)
    if twice:  # a_to_b onto c, and a onto b_to_c
        raise InputError(f"{root}: two pairs are named {twice}; rename images, so that no name holds _to_")
    return cases


def _twice(cases: Iterable[Case]) -> str | None:
    """A name that several cases have."""
    return next((name for name, n in collections.Counter(c["case"] for c in cases).items() if n > 1), None)


def _from_datalist(file: Path, cut: Cut, problems: dict[str, str] | None) -> list[Case]:
    try:
        limits.require_size(file)
        data = parse_json(file.read_bytes())
        data = {"training": data} if isinstance(data, list) else data
        lists = [data.get("training", []), data.get("validation", data.get("test", []))]
        training, validation = (_entries(entries, file, problems) for entries in lists)
    except (ValueError, AttributeError, TypeError) as cause:
        if isinstance(cause, InputError):
            raise
        raise InputError(f"{file}: not a datalist ({cause}); see the layouts") from cause
    cases = {c["case"]: c for c in training + validation}
    if not (cases or problems):
        raise InputError(f"{file}: has no case under training, validation or test; add some")
    twice = _twice(training + validation)
    if twice:
        raise InputError(f"{file}: has two cases named {twice}; give each its own 'case'")
    if validation and cut.split != "all":
        return training if cut.split == "training" else validation
    return [cases[n] for n in cut.draw(list(cases), {n: n for n in cases})]


def _entries(entries: Iterable[Mapping[str, str]], file: Path, problems: dict[str, str] | None) -> list[Case]:
    cases = []
    for i, entry in enumerate(entries):
        try:
            cases.append(_entry(entry, file))
        except InputError as problem:
            name = entry.get("case") if isinstance(entry, Mapping) else None
            report(problems, name if isinstance(name, str) else f"entry {i}", str(problem))
    return cases


def _entry(entry: Mapping[str, str], file: Path) -> Case:
    """One dict of a datalist, its files absolute and there (MONAI lets a missing one pass)."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{file}: a case is a dict of paths, not {json.dumps(entry)[:120]}; see the layouts")
    case = {}
    try:
        entry = several.flat(entry)
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None
    keys = [f"{side}_{kind}" for side, kind in itertools.product(SIDES, KINDS)] + initial.keys(entry)
    keys += [key for side in SIDES for key in several.keys(entry, side)]
    wrong = [key for key in entry if key.startswith((*SIDES, "initial")) and key not in keys]
    if wrong:
        raise InputError(f"{file}: unknown key '{wrong[0][:40]}'; known are {', '.join(keys)}, initial_1, ...")
    for key in keys:
        if key in entry:
            if not isinstance(entry[key], str):
                raise InputError(f"{file}: {key} is a path, not {json.dumps(entry[key])[:120]}; see the layouts")
            case[key] = str(file.parent / entry[key])
            if not _is_there(case[key]):
                raise InputError(f"{case[key][-300:]}: no such file, but {file.name} lists it as {key}")
        elif key.endswith("_image"):
            raise InputError(f"{file}: a case without {key}: {json.dumps(entry)[:120]}; add it")
    fixed, moving = (images.stem(case[f"{side}_image"]) for side in SIDES)
    name = fixed if fixed == moving else f"{moving}_to_{fixed}"
    given = entry.get("case", name)
    if not isinstance(given, str | int) or str(given) in ("", ".", "..") or {"/", "\\"} & {*printable(str(given))}:
        raise InputError(f"{file}: {given!r} cannot name a case and the folder of its results; give another name")
    return {"case": str(given), **case}


def _is_there(path: str) -> bool:
    try:
        return any(file.is_file() for file in images.files(path))
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def fixed_grid(case: Case, files: Source | None = None) -> Grid:
    """The grid for one pair alone: the fixed image's extent and spacing, coarser where that is too much to work on.

    Without ``files`` only the header is read.
    """
    shape, spacing = images.on_own_axes(*(files or Source()).header(case["fixed_image"]))
    given, extent, least = shape, shape * spacing, spacing.min()
    while math.prod(shape) > LARGEST_GRID:  # the finest axes first
        least *= 1.02
        spacing = np.maximum(spacing, least)
        shape = tuple(int(n) for n in np.ceil(extent / spacing - 1e-4))
    if shape != given:
        sizes = "x".join(map(str, given)), "x".join(f"{mm:.3g}" for mm in spacing)
        about = "{}: {} voxels are more than can be worked on; the working grid has {} mm"
        warn_once(about.format(case["fixed_image"], *sizes))
    return images.make_grid([4 * math.ceil(n / 4) for n in shape], spacing.round(6).tolist())


def working_grid(
    cases: Sequence[Case], *, shape: Sequence[int] | None = None, spacing: Sequence[float] | None = None
) -> Grid:
    """The grid for a cohort: median spacing (mm), the largest extent, a multiple of 4 voxels.

    Reads headers only, on the axes closest to RAS (2-D: as stored).
    """
    if shape is not None and spacing is not None:
        return images.make_grid(shape, spacing)
    paths = dict.fromkeys(c[f"{side}_image"] for side in SIDES for c in cases)
    found = {path: images.geometry(path) for path in paths}
    dims = {len(n): path for path, (n, _) in found.items()}
    if len(dims) != 1:
        raise InputError(f"{' and '.join(dims.values()) or 'no case'}: not images of one dimension")
    sizes = np.array([mm for _, mm in found.values()])
    extent = (np.array([n for n, _ in found.values()]) * sizes).max(axis=0)
    step = np.array(spacing) if spacing else np.median(sizes, axis=0).round(6)
    if len(step) != len(extent):
        raise InputError(f"spacing {step.tolist()} is not for {len(extent)}-D images")
    # The small number keeps a rounded spacing from adding four voxels.
    enough = 4 * np.ceil(extent / step / 4 - 1e-4)
    return images.make_grid(shape or enough.astype(int).tolist(), step.tolist())


class Split(NamedTuple):
    """The choices of ``regpipe.list_pairs``, for both parts of a data set."""

    dataset_dir: str
    holdout: float = 0.2
    pairing: str = "all"
    seed: int = 0
    max_val_pairs: int | None = None  # of all but the training pairs
    channels: str | int | Sequence[int] | None = None  # as of ``list_pairs``, or in numbers

    def pairs(self, part: str) -> list[Case]:
        """``training``, ``validation`` or ``all``."""
        most = None if part == "training" else self.max_val_pairs
        return list_pairs(self.dataset_dir, split=part, max_pairs=most, **self.chosen())

    def chosen(self) -> dict[str, Any]:
        """What decides on which side a pair is, and which channels it has."""
        several_of = {} if self.channels is None else {"channels": several.worded(self.channels)}
        return {"holdout": self.holdout, "pairing": self.pairing, "seed": self.seed, **several_of}
