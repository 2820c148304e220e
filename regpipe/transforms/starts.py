"""Where the affine stage may begin: the usual places, and, where the end reached from them looks poor, any rotation.

Matrices (D+1, D+1) are in RAS mm and take a fixed point to its moving point.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from regpipe.io.images import Image
from regpipe.transforms.likeness import Side, Sides, overlap, reduced, similarity

log = logging.getLogger(__name__)

SWEPT = {2: 40, 3: 14}  # voxels a side at which all starts of the sweep are compared
ANGLE, ROTATIONS = 15.0, 300  # degrees between rotations in 2-D, how many in 3-D beside the cube's 24
SHIFTS, WIDEST = {2: 17, 3: 7}, 0.65  # along each axis, up to this share of the fixed field of view both ways
POOR = 0.85  # a start elsewhere with this share of the similarity that was reached makes it doubtful
STARTS = 4  # of the sweep, looked at closer
APART, SAME = 0.2, 0.1  # of the field of view: so far apart starts are, and so near two ends are one
STANDS_OUT = 1.2  # times as alike as all else: a slice's true turn reaches 1.23, docs/results/large_motion.md


def middle(side: Side) -> np.ndarray:
    """The centre of the grid (D,) in RAS mm."""
    return side.affine[:-1] @ [*(np.array(side.array.shape) - 1) / 2, 1.0]


def mass(side: Side) -> np.ndarray:
    """The centre of mass (D,) of the intensities within the mask, RAS mm."""
    return side.affine[:-1] @ [*ndimage.center_of_mass((side.array + 1e-6) * side.mask), 1.0]


def onto(fixed: np.ndarray, moving: np.ndarray, turn: np.ndarray | None = None) -> np.ndarray:
    """The matrix that turns about the point ``fixed`` by ``turn`` (D, D) and takes it to ``moving``."""
    matrix = np.eye(len(fixed) + 1)
    if turn is not None:
        matrix[:-1, :-1] = turn
    matrix[:-1, -1] = moving - matrix[:-1, :-1] @ fixed
    return matrix


def usual(fixed: Side, moving: Side) -> list[np.ndarray]:
    """Matrices to start from: places in space if they overlap, middles, centres of mass; none twice (to a voxel)."""
    own = np.eye(fixed.array.ndim + 1)
    kept = [own] if overlap(fixed, moving, own) > 0 else []
    apart = Image(fixed.array, fixed.affine).spacing.max()
    for matrix in (onto(of(fixed), of(moving)) for of in (middle, mass)):
        if all(np.linalg.norm((matrix - other)[:-1, -1]) > apart for other in kept):
            kept.append(matrix)
    return kept


def elsewhere(pair: Sides, fine: Sides, reached: np.ndarray, search: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``reached``; or, where it looks poor, an end far from it that is clearly more similar than all others.

    Rotations and shifts over the whole field of view are compared at a low resolution, by mutual information. Where one
    far from ``reached`` comes close to it, the best few are searched from. What is found counts only if it stands out:
    between images that hardly resemble each other many a turn looks a little better than none.

    Args:
        pair: both images, small, for the sweep.
        fine: the same at the size at which ends are judged: a slice of a head and its turned self differ by detail.
        search: a start -> where a local search from it ends.
    """
    small = Sides(*(reduced(side, SWEPT[side.array.ndim]) for side in pair))
    corners = apply_affine(small.fixed.affine, np.array(list(itertools.product(*((0, n - 1) for n in _shape(small))))))

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        far = np.square(apply_affine(one, corners) - apply_affine(other, corners)).sum(axis=1)
        return float(np.sqrt(far.mean()) / np.linalg.norm(corners[0] - corners[-1]))

    swept = sorted(((similarity(*small, m, "mi"), i, m) for i, m in enumerate(_sweep(small))), reverse=True)
    enough, starts = POOR * similarity(*small, reached, "mi"), list[np.ndarray]()
    for score, _, matrix in swept:
        if score < enough or len(starts) == STARTS:
            break
        if all(apart(matrix, other) > APART for other in (reached, *starts)):
            starts.append(matrix)
    ends = [(similarity(*fine, m, "mi"), m) for m in (reached, *map(search, starts))]
    best, found = max(ends, key=lambda end: end[0])
    rest = max((score for score, m in ends if apart(m, found) > SAME), default=0.0)
    if apart(found, reached) <= SAME:
        return reached
    where = (
        f"{_angle(found, reached):.0f} degrees and {apart(found, reached):.0%} of the field of view from the usual end"
    )
    if best < STANDS_OUT * rest:
        log.warning(
            "the affine stage is in doubt: %s the images are no less alike (%.3f, here %.3f); look at the result, or "
            "give --initial, masks or landmarks",
            where,
            best,
            ends[0][0],
        )
        return reached
    log.warning(
        "the images lie far from each other: aligned %s, far more alike there (%.3f, not %.3f)", where, best, rest
    )
    return found


def _shape(pair: Sides) -> tuple[int, ...]:
    return pair.fixed.array.shape


def _sweep(pair: Sides) -> list[np.ndarray]:
    """Rotations about the centres of mass and of the grids; shifts by parts of the field of view."""
    dim, (fixed, moving) = len(_shape(pair)), pair
    centres = [(of(fixed), of(moving)) for of in (mass, middle)]
    size = np.abs(fixed.affine[:-1, :-1]) @ _shape(pair)
    shifted = [
        centres[1][1] + size * share
        for share in itertools.product(np.linspace(-WIDEST, WIDEST, SHIFTS[dim]), repeat=dim)
    ]
    return [onto(*ends, turn) for turn in _rotations(dim) for ends in centres] + [
        onto(centres[1][0], end) for end in shifted
    ]


def _rotations(dim: int) -> np.ndarray:
    """(N, D, D): evenly over the circle; in 3-D the cube's and super-Fibonacci spirals (Alexa, CVPR 2022, eq. 11)."""
    if dim == 2:
        return Rotation.from_rotvec(np.deg2rad(np.arange(0, 360, ANGLE))[:, None] * [0, 0, 1]).as_matrix()[:, :2, :2]
    s = np.arange(ROTATIONS) + 0.5
    alpha, beta = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    r, rest = np.sqrt(s / ROTATIONS), np.sqrt(1 - s / ROTATIONS)
    spirals = np.stack([r * np.sin(alpha), r * np.cos(alpha), rest * np.sin(beta), rest * np.cos(beta)], axis=1)
    return np.concatenate([Rotation.create_group("O").as_matrix(), Rotation.from_quat(spirals).as_matrix()])


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between the rotations of two rigid matrices."""
    between = np.eye(3)
    dim = len(one) - 1
    between[:dim, :dim] = one[:-1, :-1] @ other[:-1, :-1].T
    return float(np.degrees(Rotation.from_matrix(between).magnitude()))
