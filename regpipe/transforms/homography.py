"""The algebra of homographies, the maps between two views of one flat thing; ``transforms.projective`` finds them.

A homography is a matrix (D+1, D+1) that takes a point ``p`` to ``(P [p, 1])[:D] / w``, ``w`` its last coordinate; only
its ratios count. An affine matrix is one whose last row is 0 ... 0 1. After it the pipeline stays affine: over the
working grid ``P`` is split into an affine frame and a bend ``R`` in working voxels,

    moving_frame R(x) = P(fixed_frame x)

The moving image is sampled at ``R``, and what was found on the grid, ``x -> x + u(x)``, is followed by ``R``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from regpipe.io.geometry import carry, is_affine
from regpipe.transforms.displacement import interpolate

STEEPEST = 5.0  # how much nearer one end of what is seen may be than the other; the horizon is then far off
Map = Callable[[np.ndarray], np.ndarray]
LATTICE = 9  # points along an axis that the affine part is fitted at


def split(matrix: np.ndarray, frame: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A homography (3, 3) RAS mm over a grid -> the moving frame (3, 3) and the bend (3, 3) in working voxels.

    The frame is the affine map nearest to ``P fixed_frame`` over the grid, in the least-squares sense; of an affine
    matrix it is all, and the bend is the identity.

    Args:
        frame: the fixed image's, working voxel -> RAS mm.
        shape: of the working grid.
    """
    through = matrix @ frame
    if is_affine(matrix):
        return through, np.eye(len(matrix))
    at = _points(np.stack(np.meshgrid(*(np.linspace(0, n - 1, LATTICE) for n in shape), indexing="ij")))
    linear = np.linalg.lstsq(np.c_[at, np.ones(len(at))], carry(through, at), rcond=None)[0]
    moving_frame = np.vstack([linear.T, frame[-1]])
    return moving_frame, upright(np.linalg.inv(moving_frame) @ through, (np.array(shape) - 1) / 2)


def upright(matrix: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The same homography, scaled so that its denominator is 1 at ``middle`` (D,)."""
    return matrix / (matrix[-1] @ [*middle, 1.0])


def is_gentle(matrix: np.ndarray, frame: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether a homography has no fold on the working grid, nor its inverse where the grid comes to lie.

    A homography folds where its denominator changes sign, and only there: it may vary by ``STEEPEST``.
    """
    corners = _corners(np.zeros(len(shape)), np.array(shape) - 1.0)
    if not _is_level(matrix @ frame, corners):
        return False
    _, bend = split(matrix, frame, shape)
    reached = np.vstack([corners, carry(bend, corners)])
    reached = _corners(reached.min(axis=0), reached.max(axis=0))
    return _is_level(bend, reached) and _is_level(np.linalg.inv(bend), reached)


def after(u: np.ndarray, bend: np.ndarray) -> np.ndarray:
    """``bend(x + u(x)) - x``: u (D, *S) in voxels, then the bend."""
    x = _places(u.shape[1:])
    return _field(carry(bend, x + _points(u)) - x, u.shape)


def bent(
    u: np.ndarray, inverse: np.ndarray, frames: tuple[np.ndarray, np.ndarray], bend: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """``bent_by`` a homography R (D+1, D+1), in closed form."""
    there, back = bend, np.linalg.inv(bend)
    return bent_by(u, inverse, frames, lambda at: carry(there, at), lambda at: carry(back, at))


def bent_by(
    u: np.ndarray, inverse: np.ndarray, frames: tuple[np.ndarray, np.ndarray], there: Map, back: Map
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both displacements of a pair, followed by a bend R, and the frames that they lie on.

        u'(x) = R(x + u(x)) - x        v'(y) = R^-1(y) + v(R^-1(y)) - y

    The grid is grown by whole voxels until it holds all ``x + u'(x)``, as v' is wanted there.

    Args:
        u: (D, *S), fixed -> moving, voxels.
        inverse: v (D, *S), moving -> fixed; linear between voxels, its rim's value outside.
        frames: fixed and moving, working voxel -> RAS mm.
        there, back: R and its inverse, of points (N, D) in working voxels.
    """
    reached, last = there(_places(u.shape[1:]) + _points(u)), np.array(u.shape[1:]) - 1
    pads = np.ceil([-reached.min(axis=0), reached.max(axis=0) - last]).astype(int).clip(min=0)
    u = np.pad(np.asarray(u, np.float64), [(0, 0), *pads.T], mode="edge")
    y = _places(u.shape[1:], -pads[0])
    before = back(y)
    found = interpolate(inverse, before.T)
    shift = np.eye(len(u) + 1)
    shift[:-1, -1] = -pads[0]
    fields = _field(there(y + _points(u)) - y, u.shape), _field(before + np.transpose(found) - y, u.shape)
    return fields, (frames[0] @ shift, frames[1] @ shift)


def _is_level(matrix: np.ndarray, corners: np.ndarray) -> bool:
    """Whether the denominator has one sign and varies little over a box: it is linear, so its corners (K, D) tell."""
    w = corners @ matrix[-1, :-1] + matrix[-1, -1]
    w = w * np.sign(w[0])
    return bool(w.min() > 0 and w.max() < STEEPEST * w.min())


def _corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(*np.stack([low, high], axis=1), indexing="ij"), -1).reshape(-1, len(low))


def _places(shape: Sequence[int], origin: np.ndarray | None = None) -> np.ndarray:
    """Coordinates (N, D) of all voxels of a grid."""
    at = _points(np.indices(shape, dtype=np.float64))
    return at if origin is None else at + origin


def _points(field: np.ndarray) -> np.ndarray:
    return np.asarray(field, np.float64).reshape(len(field), -1).T


def _field(points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return points.T.reshape(shape)
