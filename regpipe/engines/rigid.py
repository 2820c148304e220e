"""What must stay rigid, a bone or an implant: within each label the deformation becomes one rigid motion.

Of a registration ``phi`` (fixed point -> moving point, mm, affine stage included) the rigid motion ``R`` of each label
is the one closest to it in the least squares. On the label, and ``AROUND`` voxels further, it takes the place of
``phi``; beyond, it is blended back,

    phi'(x) = phi(x) + w(x) sum_i s_i(x) (R_i(x) - phi(x)),

``s_i`` the shares of the labels by their distances (Shepard's, inverse squares: 1 on label i itself) and ``w`` falling
from 1 to 0 over a reach that is doubled until nothing folds. As polyrigid transforms (Arsigny et al., MICCAI 2003), but
of displacements, so that it is rigid to the last digit where it has to be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nibabel.affines import apply_affine
from scipy import ndimage

from regpipe.fields.algebra import warp_both
from regpipe.fields.folds import folded_cells, repair
from regpipe.io.geometry import flipped
from regpipe.transforms.affine import from_landmarks
from regpipe.transforms.initial import back
from regpipe.utils.errors import InputError

AROUND = 2.0  # voxels: what differences and interpolation within the label see of its surroundings
REACHES = (6.0, 12.0, 24.0, 48.0)  # voxels over which it is blended back, the first that does
ALL = "all"

log = logging.getLogger(__name__)


class Motion(NamedTuple):
    """How one label moves as a whole."""

    matrix: np.ndarray  # (D+1, D+1) RAS mm, fixed point -> moving point
    angle: float  # degrees
    off: float  # mm, the largest distance of a place of the label from it; 0 unless folds had to be removed


def labels_of(which: str | Sequence[Any], option: str = "--rigid") -> list[Any]:
    """``1,2`` as ids, ``all`` as itself where that is rigid. Raises ``InputError`` for anything else."""
    words = which.split(",") if isinstance(which, str) else [str(word) for word in which]
    words = [word.strip() for word in words]
    all_of_them = words == [ALL] and option == "--rigid"
    if not all_of_them and not (words and all(word.isdecimal() and int(word) for word in words)):
        told = "all, or " if option == "--rigid" else ""
        raise InputError(f"{option} {','.join(words)}: give {told}labels of the fixed image: 1,2")
    return words if words == [ALL] else [int(word) for word in words]


def held(
    prediction: Mapping[str, Any], batch: Mapping[str, Any], which: Sequence[Any]
) -> tuple[dict[str, Any], dict[int, Motion]]:
    """A registration of one pair, on the working grid, with these labels of its fixed image rigid; and their motions.

    Raises:
        InputError: the fixed image has no such label; a label too flat for a motion; a start that is not linear.
    """
    if {"moving_bend", "moving_field"} & batch.keys():
        raise InputError("--rigid goes with affine starts: leave out --affine projective, or --initial of a field")
    labels = batch["fixed_label"][0, 0].cpu().numpy()
    present = set(np.unique(labels).tolist()) - {0}
    ids = sorted(present) if list(which) == [ALL] else list(which)
    missing = sorted(set(ids) - present)
    if missing or not ids:
        told = ", ".join(map(str, missing)) or "that is not 0"
        raise InputError(f"--rigid: the fixed image has no label {told}; give --fixed-label with it, or leave it out")
    frames = tuple(batch[f"{side}_affine"][0].cpu().numpy() for side in ("fixed", "moving"))
    device = prediction["displacement"].device
    u, inverse = (prediction[name][0].cpu().numpy().astype(np.float64) for name in ("displacement", "inverse"))
    motions = {i: _motion(i, labels == i, u, *frames) for i in ids}
    # of working voxels, fixed -> moving
    pulls = {i: np.linalg.inv(frames[1]) @ matrix @ frames[0] for i, matrix in motions.items()}
    u, taken = _blended(u, labels, pulls)
    inverse = _inverse(u, inverse, taken, pulls)
    fields = [torch.from_numpy(x).float()[None].to(device) for x in (u, inverse)]
    images = (batch[f"{side}_image"].float() for side in ("moving", "fixed"))
    warped = warp_both(*images, *fields)
    names = ("displacement", "inverse", "warped_moving", "warped_fixed")
    found = {i: Motion(m, _angle(m), _off(labels == i, u, m, *frames)) for i, m in motions.items()}
    return {**prediction, **dict(zip(names, (*fields, *warped), strict=True))}, found


def _motion(label: int, inside: np.ndarray, u: np.ndarray, fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    x = np.argwhere(inside)
    one, other = apply_affine(fixed, x), apply_affine(moving, x + u[:, inside].T)
    try:
        return from_landmarks(flipped(one), flipped(other), "rigid")
    except InputError as problem:
        raise InputError(f"--rigid {label}: {problem}") from None


def _blended(u: np.ndarray, labels: np.ndarray, pulls: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """phi' as a displacement, and the label whose motion alone each voxel has, 0 elsewhere."""
    x = np.indices(u.shape[1:]).astype(np.float64)
    beyond = {i: ndimage.distance_transform_edt(labels != i) for i in pulls}
    nearest = np.min(list(beyond.values()), axis=0)
    taken = np.zeros(labels.shape, labels.dtype)
    total, target = np.zeros(labels.shape), np.zeros_like(u)
    for i, pull in pulls.items():
        alone = (beyond[i] == nearest) & (nearest <= AROUND) & (taken == 0)
        taken[alone] = i
        share = 1 / np.maximum(beyond[i] - AROUND, 1e-3) ** 2
        motion = np.moveaxis(apply_affine(pull, np.moveaxis(x, 0, -1)), -1, 0) - x
        total += share
        target += share * motion
    target /= total
    for i, pull in pulls.items():
        at = taken == i
        target[:, at] = (apply_affine(pull, x[:, at].T) - x[:, at].T).T
    for reach in REACHES:
        fall = np.clip((nearest - AROUND) / reach, 0, 1)
        weight = 0.5 * (1 + np.cos(math.pi * fall))
        found = u + weight * (target - u)
        if not folded_cells(torch.from_numpy(found)).any():
            return found, taken
    log.warning("--rigid: these motions collide or shear what lies between them; folds are removed")
    return repair(torch.from_numpy(found)[None]).displacement[0].double().numpy(), taken


def _inverse(u: np.ndarray, inverse: np.ndarray, taken: np.ndarray, pulls: Mapping[int, np.ndarray]) -> np.ndarray:
    """Of phi', point by point; where a label's motion alone comes to, by that."""
    y = np.indices(u.shape[1:]).astype(np.float64)
    found = back(u, y, "--rigid", start=y + inverse) - y
    for i, pull in pulls.items():
        from_there = np.moveaxis(apply_affine(np.linalg.inv(pull), np.moveaxis(y, 0, -1)), -1, 0)
        at = ndimage.map_coordinates((taken == i).astype(np.float32), from_there, order=1, mode="constant") > 0.999
        found[:, at] = (from_there - y)[:, at]
    return found


def _off(inside: np.ndarray, u: np.ndarray, matrix: np.ndarray, fixed: np.ndarray, moving: np.ndarray) -> float:
    x = np.argwhere(inside)
    apart = apply_affine(moving, x + u[:, inside].T) - apply_affine(matrix @ fixed, x)
    return float(np.linalg.norm(apart, axis=1).max())


def _angle(matrix: np.ndarray) -> float:
    dim = len(matrix) - 1
    cosine = (np.trace(matrix[:dim, :dim]) - (dim - 2)) / 2
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))
