"""One slice stored in 3-D, (X, Y, 1), (X, 1, Z) or (1, Y, Z): worked on as a 2-D image, and where its plane lies.

A slice has coordinates in its plane, mm: along the two anatomical axes that the plane is closest to, (R, A), (R, S) or
(A, S). Those are what the affine (3, 3) of the 2-D image gives. ``Plane.lift`` (4, 4) takes them, and the distance
from the slice in slices, to RAS mm; by it results and transforms come back into space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from regpipe.io.images import Image


class Plane(NamedTuple):
    """Where the plane of a slice lies, and how it is stored."""

    axis: int  # of the file's array, along which it is one voxel thick
    lift: np.ndarray  # (4, 4): x and y in the plane (mm), slices off it -> RAS mm

    @property
    def order(self) -> list[int]:
        """The axes of the file's array in the order x, y, across, and that of the affine's last column."""
        return [*(i for i in range(3) if i != self.axis), self.axis, 3]


def laid_flat(shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray, Plane] | None:
    """Shape (A, B), or (A, B, 1, T) of a film, affine (3, 3) and plane of a slice stored in 3-D; None of all else.

    Args:
        shape: as stored, singleton axes at the end included.
        affine: (4, 4), voxel index -> RAS mm.
    """
    sides, frames = shape[:3], shape[3:]
    if [*sides].count(1) != 1 or len(sides) < 3:
        return None
    axis = [*sides].index(1)
    order = Plane(axis, affine).order
    columns = affine[:3, order]  # x, y, across, origin
    normal, thickness = _normal(*columns.T[:3])
    x, y = _anatomical(normal)
    flat = np.eye(3)
    flat[:2] = np.stack([x, y]) @ columns[:, [0, 1, 3]]
    lift = np.eye(4)
    lift[:3] = np.stack([x, y, normal * thickness, normal * (normal @ columns[:, 3])], axis=1)
    kept = tuple(int(sides[i]) for i in order[:2])
    return kept if math.prod(frames) == 1 else (*kept, 1, *map(int, frames)), flat, Plane(axis, lift)


def _normal(x: np.ndarray, y: np.ndarray, across: np.ndarray) -> tuple[np.ndarray, float]:
    """The plane's unit normal, towards right, front or up; and the step across along it, mm, 1 where it is none."""
    normal = np.cross(x, y)
    with np.errstate(invalid="ignore", divide="ignore"):  # of axes that are parallel: refused with the affine
        normal = normal / np.linalg.norm(normal)
    normal = normal * math.copysign(1, normal[np.abs(normal).argmax()])
    step = float(across @ normal)
    return normal, step if 1e-5 <= abs(step) < 1e9 else 1.0


def _anatomical(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unit vectors in the plane that the least turn takes to two of the axes R, A and S."""
    across = int(np.abs(normal).argmax())
    target = np.eye(3)[across]
    turn = np.outer(target, normal) - np.outer(normal, target)
    turn = np.eye(3) + turn + turn @ turn / (1 + normal[across])  # Rodrigues: the normal to the axis
    x, y = (turn[i] for i in range(3) if i != across)
    return x, y


def as_stored(array: np.ndarray, affine: np.ndarray, plane: Plane | None) -> tuple[np.ndarray, np.ndarray]:
    """A slice (A, B), or vectors of one (D, A, B), as it stands in its file, and its affine; without a plane as given.

    Args:
        affine: (3, 3), of the array in the plane.
    """
    if plane is None:
        return array, affine
    return np.expand_dims(array, array.ndim - 2 + plane.axis), placed(affine, plane)


def standing(image: Image) -> Image:
    """A slice of 3-D as a volume of one slice; another image itself."""
    array, affine = as_stored(image.array, image.affine, image.plane)
    return image._replace(array=array, affine=affine, plane=None)


def with_axis(shape: Sequence[int], plane: Plane) -> tuple[int, ...]:
    """The shape of a slice in its file."""
    return (*shape[: plane.axis], 1, *shape[plane.axis :])


def placed(affine: np.ndarray, plane: Plane) -> np.ndarray:
    """The affine (4, 4) of a slice in its file, voxel index -> RAS mm, from that in its plane (3, 3)."""
    stored = np.empty((4, 4))
    stored[:, plane.order] = plane.lift @ raised(affine)
    return stored


def raised(matrix: np.ndarray) -> np.ndarray:
    """A matrix of the plane (3, 3) as one of space, (4, 4), that leaves what is off the plane as it is."""
    whole = np.eye(4)
    whole[np.ix_([0, 1, 3], [0, 1, 3])] = matrix
    return whole
