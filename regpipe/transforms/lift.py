"""Brings the registration of two slices that are stored in 3-D from their planes back into space.

In 2-D points have coordinates in the planes, see ``io.planes``. In space, off its plane a point moves as the one below
it does: by the fields as far as a slice's thickness, then less, and not at all from twice that. For 2-D images and
volumes the functions return what they are given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import itk_bridge
from regpipe.io.geometry import flipped
from regpipe.io.images import Image
from regpipe.io.planes import Plane, as_stored, laid_flat, placed, raised, with_axis
from regpipe.transforms.affine import matrix_of
from regpipe.transforms.export import ImageFile, PairTransform
from regpipe.utils.errors import InputError

LAYERS = np.array([0.0, 1.0, 1.0, 1.0, 0.0])  # shares of the field at -2 to 2 slices from the plane
BESIDE = 0.5  # slices that a transform may take the fixed slice off the moving one's plane
AROUND = 4  # a grid's side by what it is wider at each end, for the places around it

log = logging.getLogger(__name__)


def alike(case: str, fixed: Image, moving: Image) -> tuple[Image, Image]:
    """Both as slices in space where both are; else as 2-D images, which have no place there."""
    if (fixed.plane is None) == (moving.plane is None):
        return fixed, moving
    log.warning("%s: one slice stored in 3-D with a 2-D image: the results are 2-D, without a place in space", case)
    return fixed._replace(plane=None), moving._replace(plane=None)


def matrix_in_space(matrix: np.ndarray, fixed: Image, moving: Image) -> np.ndarray:
    """A map of points (3, 3) from the fixed plane to the moving one, RAS mm -> (4, 4)."""
    if fixed.plane is None or moving.plane is None:
        return matrix
    return moving.plane.lift @ raised(matrix) @ np.linalg.inv(fixed.plane.lift)


def pair_in_space(pair: PairTransform, fixed: Image, moving: Image) -> PairTransform:
    """A pair's transform; of slices in space its fields are a few slices thick."""
    if fixed.plane is None:
        return pair
    frame = fixed.plane.lift @ raised(pair.frame)
    frame[:3, 3] -= (len(LAYERS) // 2) * frame[:3, 2]
    turn = fixed.plane.lift[:3, :2]
    forward, inverse = ((_turned(d, turn)[..., None] * LAYERS).astype(np.float32) for d in (pair.forward, pair.inverse))
    return PairTransform(matrix_in_space(pair.matrix, fixed, moving), forward, inverse, frame)


def displacement_in_space(d: np.ndarray, onto: Image, of: Image) -> tuple[np.ndarray, np.ndarray]:
    """A displacement (D, *S) LPS mm on the grid of ``onto`` to points of ``of``, and its affine, as written."""
    if onto.plane is None or of.plane is None:
        return d, onto.affine
    here = apply_affine(onto.affine, np.moveaxis(np.indices(d.shape[1:]), 0, -1))
    there = here + flipped(np.moveaxis(d, 0, -1))
    start, end = (_in_space(points, side.plane) for points, side in ((here, onto), (there, of)))
    return as_stored(np.moveaxis(flipped(end - start), -1, 0), onto.affine, onto.plane)


def displacement_in_planes(d: np.ndarray, affine: np.ndarray, of: Image) -> tuple[np.ndarray, np.ndarray]:
    """The reverse: d (3, *S) LPS mm on one slice stored in 3-D, ``affine`` (4, 4) -> (2, *S) in the planes, (3, 3).

    An image without a plane is left as it is. How far a point gets off its plane is lost.
    """
    flat = laid_flat(d.shape[1:], affine)
    if flat is None or of.plane is None:
        return d, affine
    sides, in_plane, plane = flat
    d = d.transpose(0, *(1 + np.array(plane.order[:3]))).reshape(3, *sides)
    here = apply_affine(in_plane, np.moveaxis(np.indices(sides), 0, -1))
    there = _in_space(here, plane) + flipped(np.moveaxis(d, 0, -1))
    moved = apply_affine(np.linalg.inv(of.plane.lift), there)[..., :2] - here
    return np.moveaxis(flipped(moved), -1, 0), in_plane


def in_planes(transform: Any, shape: Sequence[int], affine: np.ndarray, fixed: Plane, moving: Plane) -> Any:
    """A map of space, ``itk.Transform`` in 3-D, as one from the fixed slice's plane to the moving one's, in 2-D.

    A linear one stays that. Any other is sampled on the fixed slice and around it.

    Args:
        shape: (2,), of the fixed slice.
        affine: (3, 3), of it in its plane.

    Raises:
        InputError: it takes the slice off the moving one's plane.
    """
    back = np.linalg.inv(moving.lift)
    if transform.IsLinear():
        whole = back @ matrix_of(transform, 3) @ fixed.lift
        ends = np.array(np.meshgrid(*([0, n - 1] for n in shape))).reshape(2, -1).T
        corners = apply_affine(affine, ends)
        _require_near(np.c_[corners, np.zeros(4)] @ whole[2, :3] + whole[2, 3], moving)
        return itk_bridge.itk_affine(whole[np.ix_([0, 1, 3], [0, 1, 3])])
    more = np.array(shape) // AROUND
    wide, around = np.array(shape) + 2 * more, affine.copy()
    around[:2, 2] = apply_affine(affine, -more)
    d = itk_bridge.sampled(transform, with_axis(wide, fixed), placed(around, fixed)).squeeze(1 + fixed.axis)
    here = apply_affine(around, np.moveaxis(np.indices(wide), 0, -1))
    there = apply_affine(back, _in_space(here, fixed) + flipped(np.moveaxis(d.astype(np.float64), 0, -1)))
    inner = tuple(slice(m, m + n) for m, n in zip(more, shape, strict=True))
    _require_near(there[inner][..., 2], moving)
    known = np.c_[here[inner].reshape(-1, 2), np.ones(np.prod(shape))]
    linear = np.vstack([np.linalg.lstsq(known, there[inner][..., :2].reshape(-1, 2), rcond=None)[0].T, [0, 0, 1]])
    left = apply_affine(np.linalg.inv(linear), there[..., :2]) - here
    return itk_bridge.composite(
        itk_bridge.itk_field(np.moveaxis(flipped(left), -1, 0), around), itk_bridge.itk_affine(linear)
    )


def _require_near(across: np.ndarray, moving: Plane) -> None:
    """Slices off the plane, of any shape."""
    if np.abs(across).max() > BESIDE:
        mm = np.abs(across).max() * np.linalg.norm(moving.lift[:3, 2])
        raise InputError(
            f"takes the fixed slice up to {mm:.3g} mm off the plane of the moving one; give one that keeps it"
        )


def file_in_space(file: ImageFile, image: Image) -> ImageFile:
    """An image's file, its shape and affine in space."""
    file = file._replace(stored=image.stored)
    if image.plane is None:
        return file
    affine, stored = (None if m is None else placed(m, image.plane) for m in (file.affine, file.stored))
    assert affine is not None
    return file._replace(shape=with_axis(file.shape, image.plane), affine=affine, stored=stored)


def _in_space(points: np.ndarray, plane: Plane | None) -> np.ndarray:
    """Points (..., 2) of a plane -> (..., 3), RAS mm."""
    assert plane is not None
    return points @ plane.lift[:3, :2].T + plane.lift[:3, 3]


def _turned(d: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Vectors (2, *S) LPS mm of a plane -> (3, *S) LPS mm; ``turn`` (3, 2) RAS."""
    return np.moveaxis(flipped(flipped(np.moveaxis(d.astype(np.float64), 0, -1)) @ turn.T), -1, 0)
