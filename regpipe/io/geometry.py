"""Affine matrices on points and on the corners of a grid; between RAS and LPS; upright axes.

Affines are voxel index -> RAS mm. Files and ITK count in LPS mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

LPS = np.array([-1.0, -1.0, 1.0])  # times RAS mm is LPS mm, and back


def carry(matrix: Any, points: Any) -> Any:
    """Points (..., D) through a matrix (D+1, D+1); both numpy's or both torch's. NaN stays NaN."""
    ahead = points @ matrix[:, :-1].T + matrix[:, -1]
    return ahead[..., :-1] / ahead[..., -1:]


def is_affine(matrix: np.ndarray) -> bool:
    """Whether a matrix has no projective part."""
    return not matrix[-1, :-1].any()


def voxel_size(affine: np.ndarray) -> np.ndarray:
    """Voxel size (D,) in mm: the lengths of the affine's columns."""
    return np.linalg.norm(affine[:-1, :-1], axis=0)


def voxel_corners(shape: Sequence[int]) -> np.ndarray:
    """Indices (2^D, D) of the voxels at an array's corners."""
    return np.array([*np.ndindex(*[2] * len(shape))]) * (np.array(shape) - 1)


def extent(shape: Sequence[int], affine: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates (D,) of an image's corners, voxels' edges included, in voxels of a frame."""
    sides = [(-0.5, n - 0.5) for n in shape]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(shape))
    at = apply_affine(np.linalg.inv(frame) @ affine, corners)
    return at.min(0), at.max(0)


def flipped(points: Any) -> Any:
    """RAS <-> LPS of points or vectors (..., D)."""
    return points * LPS[: points.shape[-1]]


def lps_matrix(matrix: np.ndarray, *, places: bool = True) -> np.ndarray:
    """RAS <-> LPS of (D+1, D+1): a map of points ``L M L``, or with ``places=False`` voxel -> mm, ``L M``."""
    flip = np.diag([*LPS[: len(matrix) - 1], 1.0])
    return flip @ matrix @ flip if places else flip @ matrix


def orientation(affine: np.ndarray, *, pictures: bool = True) -> np.ndarray:
    """What turns an image's axes to the closest RAS, in 2-D to LPS, as ``pictures`` are stored; see nibabel's."""
    return io_orientation(lps_matrix(affine, places=False) if pictures and len(affine) == 3 else affine)


def upright(array: np.ndarray, affine: np.ndarray, *, pictures: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An array (*S) with its axes permuted and flipped by ``orientation``, and its affine."""
    turn = orientation(affine, pictures=pictures)
    return apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)
