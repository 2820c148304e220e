"""Matrices that take voxels to places: what they do to a grid's corners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nibabel.affines import apply_affine


def voxel_corners(shape: Sequence[int]) -> np.ndarray:
    """Indices (2^D, D) of the voxels at an array's corners."""
    return np.array([*np.ndindex(*[2] * len(shape))]) * (np.array(shape) - 1)


def extent(shape: Sequence[int], affine: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates (D,) of an image's corners, voxels' edges included, in voxels of a frame."""
    sides = [(-0.5, n - 0.5) for n in shape]
    corners = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(shape))
    at = apply_affine(np.linalg.inv(frame) @ affine, corners)
    return at.min(0), at.max(0)
