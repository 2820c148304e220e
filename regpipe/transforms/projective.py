"""Beyond the affine stage, in 2-D: the homography between two views of one flat thing, e.g. two photographs of a slide.

    affine -> OpenCV's ECC (Evangelidis & Psarakis, PAMI 2008), coarse to fine -> kept where it is more similar

ECC maximises the correlation of the images, so they should be of one contrast and evenly lit; landmarks work for any.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from regpipe.io.geometry import carry, lps_matrix
from regpipe.io.images import Image
from regpipe.transforms.affine import FINE, Alignment
from regpipe.transforms.homography import upright
from regpipe.transforms.likeness import Side, Sides, make_sides, overlap, reduced, similarity
from regpipe.utils.errors import InputError

log = logging.getLogger(__name__)

SIZES = (64, 128, FINE[2])  # pixels a side, coarse to fine
ITERATIONS, ENOUGH = 200, 1e-7  # of ECC, at each size; the gain in correlation that ends them before
NEEDED = 4  # landmarks
FLAT = 1e-6  # of the largest singular value: below it landmarks leave something open


def align_projective(
    fixed: Image,
    moving: Image,
    start: np.ndarray,
    *,
    metric: str = "mi",
    fixed_mask: np.ndarray | None = None,
    moving_mask: np.ndarray | None = None,
) -> Alignment:
    """The homography of two 2-D images, from a matrix that is near; the start itself where nothing is more similar.

    Args:
        start: (3, 3) RAS mm, fixed point -> moving point: the affine stage's, or a homography.
        metric: what says which is more similar: ``mi`` or ``ncc``, see ``transforms.affine.align``.
        fixed_mask: (*S) of the fixed image, nonzero where it counts; without, everywhere.
        moving_mask: the same of the moving image.

    Raises:
        InputError: another dimension, a mask that is empty or on another grid; OpenCV is not installed.
    """
    if (fixed.array.ndim, moving.array.ndim) != (2, 2):
        raise InputError("projective is for 2D images; use affine")
    cv2 = opencv()
    pair, judged = make_sides(fixed, moving, fixed_mask, moving_mask, size=SIZES[-1])
    matrix = np.asarray(start, np.float64)
    for size in SIZES:
        matrix = _improved(cv2, Sides(*(reduced(side, size) for side in pair)), matrix)
    before, found = (similarity(*judged, m, metric) for m in (start, matrix))
    if found <= before:
        log.info("no homography is an improvement (%.4f to %.4f); the one before is kept", before, found)
        matrix = np.asarray(start, np.float64)
    return Alignment(matrix, overlap(*pair, matrix), before, max(before, found))


def from_landmarks(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """The homography that takes fixed to moving landmarks with the least squared distance.

    The direct linear transform (Hartley & Zisserman 2004, algorithm 4.2), then Levenberg-Marquardt's kind of steps; as
    OpenCV's ``findHomography``, but that rounds to single precision. A row with NaN in either is left out.

    Args:
        fixed: (K, 2) LPS mm.
        moving: (K, 2) LPS mm, row by row the same places.

    Returns:
        (3, 3) RAS mm.

    Raises:
        InputError: unlike shapes, not 2-D, fewer than four, or no four of which no three lie on a line.
    """
    x, y = np.asarray(fixed, np.float64), np.asarray(moving, np.float64)
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != 2:
        raise InputError(f"landmarks: {x.shape} fixed and {y.shape} moving ones; give the same places in both, x and y")
    known = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    x, y = x[known], y[known]
    if len(x) < NEEDED:
        raise InputError(f"landmarks: {len(x)} are known in both images; projective needs {NEEDED}")
    middle, to_x, to_y = x.mean(axis=0), _unit(x), _unit(y)
    x, y = carry(to_x, x), carry(to_y, y)
    found = _direct(x, y)
    from scipy.optimize import least_squares  # of this stage alone

    fitted = least_squares(lambda h: (carry(h.reshape(3, 3), x) - y).ravel(), found.ravel(), xtol=1e-15, ftol=1e-15)
    matrix = np.linalg.inv(to_y) @ fitted.x.reshape(3, 3) @ to_x
    return upright(lps_matrix(matrix), -middle)


def _unit(points: np.ndarray) -> np.ndarray:
    """(3, 3) that brings points (K, 2) around 0 at a distance of about 1."""
    middle, size = points.mean(axis=0), max(points.std(), 1e-30)
    return np.array([[1, 0, -middle[0]], [0, 1, -middle[1]], [0, 0, size]]) / size


def _direct(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(3, 3) with ``y = carry(it, x)`` in the algebraic sense. Raises InputError where that is not one map."""
    ones, zeros = np.c_[x, np.ones(len(x))], np.zeros((len(x), 3))
    rows = np.vstack([np.c_[ones, zeros, -y[:, :1] * ones], np.c_[zeros, ones, -y[:, 1:] * ones]])
    _, weight, basis = np.linalg.svd(rows)
    matrix = basis[-1].reshape(3, 3)
    if weight[7] <= FLAT * weight[0] or abs(np.linalg.det(matrix)) <= FLAT:
        raise InputError("landmarks: too many lie on one line; place four of which no three do")
    return matrix


def _improved(cv2: Any, pair: Sides, matrix: np.ndarray) -> np.ndarray:
    """``matrix`` moved on by ECC; as it was where ECC gives up."""
    try:
        found = _ecc(cv2, *pair, matrix)
    except cv2.error as problem:  # it does not converge, or the images share nothing
        log.info("ECC gave up at %s pixels (%s); the one before is kept", pair.fixed.array.shape, problem.err)
        return matrix
    return found if np.isfinite(found).all() else matrix


def _ecc(cv2: Any, fixed: Side, moving: Side, matrix: np.ndarray) -> np.ndarray:
    """One run of ECC from ``matrix`` (3, 3) RAS mm. Raises cv2.error where it gives up.

    OpenCV's point (x, y) is column and row: of the transposed array [x, y] its index as it is, whole at the middle of a
    pixel. ECC's warp takes the template's points to the input's, which is fixed to moving.
    """
    warp = np.linalg.inv(moving.affine) @ matrix @ fixed.affine
    warp = (warp / warp[2, 2]).astype(np.float32)
    template, image = (np.ascontiguousarray(side.array.T, np.float32) for side in (fixed, moving))
    counts = np.ascontiguousarray(moving.mask.T, np.uint8)
    if not fixed.mask.all():  # ECC takes one mask, the input's: the template's is laid over it as the start has it
        seen = np.ascontiguousarray(fixed.mask.T, np.uint8)
        counts &= cv2.warpPerspective(seen, warp, counts.shape[::-1], flags=cv2.INTER_NEAREST)
    enough = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, ITERATIONS, ENOUGH)
    _, warp = cv2.findTransformECC(template, image, warp, cv2.MOTION_HOMOGRAPHY, enough, counts, 5)
    found = moving.affine @ warp @ np.linalg.inv(fixed.affine)
    return upright(found, fixed.affine[:-1] @ [*(np.array(fixed.array.shape) - 1) / 2, 1.0])


def opencv() -> Any:
    """The module cv2. Raises InputError where it is not installed."""
    try:
        import cv2
    except ImportError as cause:
        raise InputError("--affine projective: needs OpenCV; pip install regpipe[projective]") from cause
    return cv2
