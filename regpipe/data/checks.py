"""Checks pairs before anything runs; every file is read once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.data import channels
from regpipe.data.members import KINDS
from regpipe.data.pairs import SIDES, Case
from regpipe.io.geometry import flipped
from regpipe.io.landmarks import Landmarks, pairing
from regpipe.io.planes import Plane
from regpipe.io.source import Source
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError


class _Facts(NamedTuple):
    """What is compared between files once they have been read."""

    shape: tuple[int, ...] = ()
    affine: np.ndarray = np.eye(3)
    points: int = 0
    lps: Landmarks | None = None
    plane: Plane | None = None


def check_pairs(
    cases: Sequence[Case], *, landmark_channels: int | None = None, progress: bool = False, files: Source | None = None
) -> dict[str, str]:
    """case -> what is wrong with it, in one line that names the file; empty if all is well.

    Reads every distinct file once, and a label or landmarks once for each image that they stand beside; what they hold
    is kept only in ``files``, where that is given. Checks the file itself, a label's and a mask's grid against its
    image's, that a mask is not empty, the dimension of both images, and that landmarks fit the image and each other, by
    their names or in number.
    """
    keys = [(side, kind) for kind, side in itertools.product(KINDS, SIDES)]
    wanted = dict.fromkeys(
        (kind, c[f"{side}_{kind}"], c[f"{side}_image"]) for c in cases for side, kind in keys if f"{side}_{kind}" in c
    )
    wanted |= dict.fromkeys(
        ("image", c[key], c[key]) for c in cases for side in SIDES for key in channels.keys(c, side)
    )
    facts: dict[tuple[str, str, str], _Facts | InputError] = {}
    for kind, path, image in Progress(wanted, what="checking", unit="files") if progress else wanted:
        try:
            facts[kind, path, image] = _facts(kind, path, image, landmark_channels, files or Source())
        except InputError as problem:
            facts[kind, path, image] = problem
    problems = {c["case"]: _problem(c, facts) for c in cases}
    return {name: problem for name, problem in problems.items() if problem}


def _facts(kind: str, path: str, image_path: str, landmark_channels: int | None, files: Source) -> _Facts:
    if kind == "landmarks":
        found = files.landmarks(path, image_path)
        return _Facts((0,) * found.points.shape[1], points=len(found.points), lps=found)
    if kind == "image":
        image, channels = files.image(path), None
    else:
        image, channels = files.label(path, landmark_channels if kind == "label" else None, image=image_path)
    if kind == "mask" and not image.array.any():
        raise InputError(f"{path}: this mask is 0 everywhere; mark what shall count, or remove it")
    if kind == "ignore" and image.array.all():
        raise InputError(f"{path}: leaves nothing of {image_path} that counts; mark only what shall not")
    return _Facts(image.array.shape, image.affine, 0 if channels is None else len(channels), plane=image.plane)


def _problem(case: Case, facts: Mapping[tuple[str, str, str], _Facts | InputError]) -> str | None:
    """The first thing wrong with a case."""
    known: dict[str, _Facts] = {}
    for kind, side in itertools.product(KINDS, SIDES):
        fact = facts.get((kind, case.get(f"{side}_{kind}", ""), case[f"{side}_image"]))
        if isinstance(fact, InputError):
            return str(fact)
        if fact is not None:
            known[f"{side}_{kind}"] = fact
    fixed, moving = known["fixed_image"], known["moving_image"]
    if len(fixed.shape) != len(moving.shape):
        return f"{case['moving_image']}: 2-D with 3-D ({case['fixed_image']}); pair like with like"
    counts = {}
    for side in SIDES:
        image, label, points, mask, ignore = (known.get(f"{side}_{kind}") for kind in KINDS)
        assert image is not None
        beside = {f"{side}_label": label, f"{side}_mask": mask, f"{side}_ignore": ignore}
        for key in channels.keys(case, side):
            fact = facts["image", case[key], case[key]]
            if isinstance(fact, InputError):
                return str(fact)
            beside[key] = fact
        for key, drawn in beside.items():
            if drawn and not _same_grid(image, drawn):
                return f"{case[key]}: not on its image's grid; resample it onto the image"
        if points and len(points.shape) != len(image.shape):
            return f"{case[f'{side}_landmarks']}: points and image differ in dimension; mend it"
        if points and points.lps is not None and _outside(points.lps.points, image):
            return f"{case[f'{side}_landmarks']}: most points lie outside the image; are they RAS? LPS mm are wanted"
        counts[side] = sum(f.points for f in (label, points) if f)
    try:
        kept = _pairing(case, known)
    except InputError as wrong:
        return str(wrong)
    if kept is not None:
        counts = {side: counts[side] + kept - known[f"{side}_landmarks"].points for side in SIDES}
    return unlike_landmarks(case, counts)


def _pairing(case: Case, known: Mapping[str, _Facts]) -> int | None:
    """How many landmarks of the files pair by their names; None where they pair by rows, or there are none."""
    if not all(f"{side}_landmarks" in known for side in SIDES):
        return None
    fixed, moving = (known[f"{side}_landmarks"].lps for side in SIDES)
    assert fixed is not None and moving is not None
    order = pairing(fixed, moving, case["fixed_landmarks"], case["moving_landmarks"])
    return None if order is None else len(order[0])


def unlike_landmarks(case: Case, counts: Mapping[str, int]) -> str | None:
    """Message for landmarks that cannot correspond, else None; an image without any has none to compare."""
    if counts["fixed"] == counts["moving"] or not all(counts.values()):
        return None
    file = case.get("moving_landmarks") or case.get("moving_label") or case["moving_image"]
    held = f"{counts['moving']} landmarks, the fixed side {counts['fixed']}"
    return f"{file}: holds {held}; make them correspond one to one"


def _outside(lps: np.ndarray, image: _Facts) -> bool:
    """Whether more than half of the points are more than a voxel off the image."""
    known = lps[~np.isnan(lps).any(1)]
    at = apply_affine(np.linalg.inv(image.affine), flipped(known))
    off = ((at < -1) | (at > np.array(image.shape))).any(1)
    return bool(len(off) and off.mean() > 0.5)


def _same_grid(a: _Facts, b: _Facts) -> bool:
    planes = [np.delete(x.plane.lift, 2, axis=1) for x in (a, b) if x.plane is not None]  # of any thickness
    apart = len(planes) == 2 and not np.allclose(planes[0], planes[1], rtol=0, atol=1e-3)
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=1e-3) and not apart
