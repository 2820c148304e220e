"""Brings the registration of two slices that are stored in 3-D from their planes back into space.

In 2-D points have coordinates in the planes, see ``io.planes``. In space, off its plane a point moves as the one below
it does: by the fields as far as a slice's thickness, then less, and not at all from twice that. For 2-D images and
volumes the functions return what they are given.
"""

from __future__ import annotations

import logging

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io.geometry import flipped
from regpipe.io.images import Image
from regpipe.io.planes import Plane, as_stored, laid_flat, placed, raised, with_axis
from regpipe.transforms.export import ImageFile, PairTransform

LAYERS = np.array([0.0, 1.0, 1.0, 1.0, 0.0])  # shares of the field at -2 to 2 slices from the plane

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
