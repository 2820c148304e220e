"""A flat thing and two views of it, a homography apart."""

from __future__ import annotations

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io.geometry import carry
from regpipe.io.images import Image

RNG = np.random.default_rng(11)
CENTRES, WIDTHS = RNG.uniform(-75, 75, (90, 2)), RNG.uniform(4, 9, 90)  # mm
HEIGHTS = RNG.uniform(0.3, 1.0, 90)
FIXED_SHAPE, MOVING_SHAPE = (120, 104), (116, 112)
LPS = [-1.0, -1.0]


def scene(points: np.ndarray) -> np.ndarray:
    """Brightness of the flat thing at points (..., 2) RAS mm of the fixed image: a closed form."""
    squared = sum((points[..., i, None] - CENTRES[:, i]) ** 2 for i in range(2))
    return (np.exp(-squared / (2 * WIDTHS**2)) @ HEIGHTS).astype(np.float32)


def grid(shape: tuple[int, int], spacing: tuple[float, float], middle: tuple[float, float]) -> np.ndarray:
    """Affine with this middle, the second axis backwards where its spacing is negative."""
    matrix = np.diag([*spacing, 1.0])
    matrix[:2, 2] = np.array(middle) - matrix[:2, :2] @ (np.array(shape) - 1) / 2
    return matrix


def view(affine_: np.ndarray, shape: tuple[int, int], truth: np.ndarray | None = None) -> Image:
    """The flat thing on this grid, as the view ``truth`` (fixed -> moving, RAS mm) shows it."""
    places = apply_affine(affine_, np.moveaxis(np.indices(shape), 0, -1))
    return Image(scene(places if truth is None else carry(np.linalg.inv(truth), places)), affine_)


# Turned by 10 degrees, 15 mm aside; from one corner to the opposite one what is seen lies 1.9 times as far off.
ANGLE = np.deg2rad(10)
TRUTH = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 12], [np.sin(ANGLE), np.cos(ANGLE), -9], [3.5e-3, -2e-3, 1.0]])
FIXED = view(grid(FIXED_SHAPE, (-1, -1), (0, 0)), FIXED_SHAPE)
MOVING = view(grid(MOVING_SHAPE, (-1.3, 1.2), (-9, -14)), MOVING_SHAPE, TRUTH)
PLACES = apply_affine(FIXED.affine, np.moveaxis(np.indices(FIXED_SHAPE), 0, -1).reshape(-1, 2))


def errors(matrix: np.ndarray, truth: np.ndarray = TRUTH) -> np.ndarray:
    """Distances (N,) in moving pixels between where two matrices put the fixed image's pixels."""
    return np.linalg.norm((carry(matrix, PLACES) - carry(truth, PLACES)) / MOVING.spacing, axis=1)


def best_affine(truth: np.ndarray = TRUTH) -> np.ndarray:
    """No affine map is nearer to the truth over the fixed image, in the least-squares sense."""
    linear = np.linalg.lstsq(np.c_[PLACES, np.ones(len(PLACES))], carry(truth, PLACES), rcond=None)[0]
    return np.vstack([linear.T, [0, 0, 1]])
