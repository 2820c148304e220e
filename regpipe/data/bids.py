"""A BIDS data set -> a datalist of pairs (layout 3 of ``regpipe.list_pairs``), read by pybids.

Images are those of one suffix, one for each subject and session. Label maps are derivatives' ``dseg`` on the image's
own grid: those in a template's space are left out.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regpipe.data.pairs import Case, Cut, natural
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

log = logging.getLogger(__name__)

PAIRINGS = ("sessions", "subjects", "modalities")
VOLUMES = (".nii.gz", ".nii")


class Scan(NamedTuple):
    """One image, and its label map where there is one."""

    subject: str
    session: str  # "" where the data set has none
    image: str
    label: str | None


def write_datalist(
    root: str | Path,
    out: str | Path,
    *,
    pairing: str = "sessions",
    suffix: str = "T1w",
    moving_suffix: str | None = None,
    desc: str | None = None,
    label_desc: str | None = None,
    fixed_session: str | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> dict[str, int]:
    """Write the datalist of a BIDS data set; returns how many pairs train, validate, and have labels on both sides.

    Args:
        root: the folder with ``dataset_description.json``.
        out: the ``.json``; its paths are absolute.
        pairing: ``sessions``: of each subject, every other session onto the fixed one; ``subjects``: all ordered pairs
            of different subjects in that session; ``modalities``: ``moving_suffix`` onto ``suffix`` in each session.
        suffix: of the images.
        moving_suffix: of the moving images of ``modalities``.
        desc: take derivatives' images with this ``desc`` instead of the raw ones.
        label_desc: which ``dseg``, where an image has several.
        fixed_session: whose images are fixed; None: each subject's first in natural order.
        holdout: subjects to validate with, of those that have a pair: a fraction below 1, or a number; 0: none.
        seed: of which subjects these are.

    Raises:
        InputError: pybids is missing, no BIDS data set, no pair in it, several label maps for one image.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"--pairing {pairing}: choose among {', '.join(PAIRINGS)}")
    if (moving_suffix is None) == (pairing == "modalities"):
        raise InputError("--moving-suffix T2w goes with --pairing modalities, and that needs it")
    layout = _layout(Path(root))
    fixed, moving = (_scans(layout, kind, desc, label_desc) for kind in (suffix, moving_suffix or suffix))
    pairs = list(_pairs(pairing, fixed, moving, fixed_session))
    if not pairs:
        raise InputError(f"{root}: {len(fixed)} {suffix} images make no pair of {pairing}; give another --pairing")
    subjects = sorted({scan.subject for pair in pairs for scan in pair}, key=natural)
    datalist = {}
    for split in ("training", "validation") if holdout else ("training",):
        kept = set(_kept(split, subjects, holdout, seed, least=2 if pairing == "subjects" else 1))
        datalist[split] = [_case(*pair) for pair in pairs if {scan.subject for scan in pair} <= kept]
    cases = [case for split in datalist.values() for case in split]
    replace_file(out, json.dumps(datalist, indent=1).encode())
    labelled = sum({"fixed_label", "moving_label"} <= case.keys() for case in cases)
    return {"training": 0, "validation": 0, **{k: len(v) for k, v in datalist.items()}, "labels": labelled}


def _layout(root: Path) -> Any:
    try:
        from bids import BIDSLayout
    except ImportError as cause:
        raise InputError('BIDS data sets are read by pybids: pip install "regpipe[bids]"') from cause
    if not (root / "dataset_description.json").is_file():
        raise InputError(f"{root}: no BIDS data set, it has no dataset_description.json; give its top folder")
    try:
        return BIDSLayout(root, derivatives=(root / "derivatives").is_dir())
    except (ValueError, TypeError, KeyError) as problem:  # pybids' own errors are ValueErrors
        raise InputError(f"{root}: pybids cannot read it ({str(problem).partition(chr(10))[0]})") from problem


def _scans(layout: Any, suffix: str, desc: str | None, label_desc: str | None) -> list[Scan]:
    """One image for each subject and session, in natural order."""
    asked = {"scope": "raw"} if desc is None else {"scope": "derivatives", "desc": desc}
    images = defaultdict(list)
    for file in _on_own_grid(layout.get(suffix=suffix, extension=VOLUMES, **asked), suffix):
        images[_of(file)].append(file)
    if not images:
        where = "raw data" if desc is None else f"derivatives with desc-{desc}"
        raise InputError(f"{layout.root}: no {suffix} image in its {where}; give another --suffix or --desc")
    labels = defaultdict(list)
    chosen = {"desc": label_desc} if label_desc else {}
    for file in _on_own_grid(layout.get(suffix="dseg", extension=VOLUMES, scope="derivatives", **chosen), suffix):
        labels[_of(file)].append(file)
    order = sorted(images, key=lambda key: [natural(part) for part in key])
    return [Scan(*key, *_chosen(images[key], labels[key])) for key in order]


def _of(file: Any) -> tuple[str, str]:
    entities = file.get_entities()
    return entities["subject"], str(entities.get("session", ""))


def _on_own_grid(files: Iterable[Any], suffix: str) -> Iterator[Any]:
    """Without templates, which are no subject's, and what was resampled to one: ``space-MNI152NLin6Asym``."""
    known = ((file, file.get_entities()) for file in files)
    return (file for file, of in known if "subject" in of and of.get("space", suffix) in (suffix, "orig"))


def _chosen(images: Sequence[Any], labels: Sequence[Any]) -> tuple[str, str | None]:
    """The first of the images (runs, acquisitions), and its label map."""
    image = min(images, key=lambda file: natural(file.path))
    if len(images) > 1:
        log.warning("%s: is taken of %d images of this session", image.path, len(images))
    own = image.get_entities()
    fitting = [file for file in labels if file.get_entities().get("run", own.get("run")) == own.get("run")]
    if len(fitting) > 1:
        alike = [file for file in fitting if file.get_entities().get("acquisition") == own.get("acquisition")]
        fitting = alike or fitting
    paths = [file.path for file in fitting]
    if len(paths) > 1:
        raise InputError(f"{image.path}: has {len(paths)} label maps ({', '.join(paths)}); give --label-desc")
    return image.path, paths[0] if paths else None


def _kept(split: str, subjects: Sequence[str], holdout: float, seed: int, *, least: int) -> list[str]:
    """The subjects of a split."""
    try:
        cut = Cut(split if holdout else "all", holdout, seed)
        return cut.draw(subjects, {name: name for name in subjects}, least)
    except InputError as problem:
        raise InputError(f"{problem} subjects; give --holdout 0 to validate with none") from problem


def _pairs(
    pairing: str, fixed: Sequence[Scan], moving: Sequence[Scan], session: str | None
) -> Iterator[tuple[Scan, Scan]]:
    """(fixed, moving)."""
    if pairing == "modalities":
        there = {(scan.subject, scan.session): scan for scan in moving}
        yield from ((scan, there[scan[:2]]) for scan in fixed if scan[:2] in there)
        return
    begin = _fixed_scans(fixed, session)
    if pairing == "subjects":
        yield from itertools.permutations(begin.values(), 2)
    else:
        yield from (
            (begin[scan.subject], scan)
            for scan in moving
            if scan.subject in begin and scan.session != begin[scan.subject].session
        )


def _fixed_scans(scans: Sequence[Scan], session: str | None) -> Mapping[str, Scan]:
    """subject -> its scan of the session, or its first."""
    found: dict[str, Scan] = {}
    for scan in scans:
        if session is None or scan.session == session:
            found.setdefault(scan.subject, scan)
    return found


def _case(fixed: Scan, moving: Scan) -> Case:
    case = {"fixed_image": fixed.image, "moving_image": moving.image}
    labels = {"fixed_label": fixed.label, "moving_label": moving.label}
    return case | {key: path for key, path in labels.items() if path}
