"""How similar two images are under an alignment matrix, and how much they overlap.

A matrix (D+1, D+1) is in RAS mm and takes a fixed point to its moving point; a homography is one too. Both images are
first turned to the closest RAS and reduced to about one size, so that nothing depends on how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from regpipe.io.geometry import lps_matrix, upright, voxel_size
from regpipe.io.images import Image, normalise
from regpipe.utils.errors import InputError

BINS = 32
DARK = 0.08  # of an image's range: below it lies background


class Side(NamedTuple):  # one image of the pair at a common size, and its mask
    array: np.ndarray  # (*S) float32 in [0, 1]
    mask: np.ndarray  # (*S) bool
    affine: np.ndarray


class Sides(NamedTuple):  # both images at a common size
    fixed: Side
    moving: Side


def make_sides(
    fixed: Image, moving: Image, fixed_mask: np.ndarray | None, moving_mask: np.ndarray | None, *, size: int
) -> tuple[Sides, Sides]:
    """Both images at about ``size`` voxels a side; and the same with the mask in which they are compared.

    Without a mask they are compared where the fixed image is not dark.

    Args:
        fixed_mask: (*S), nonzero where the fixed image counts; None: everywhere.
        moving_mask: the same of the moving image.

    Raises:
        InputError: a mask that is empty or on another grid.
    """
    pair = Sides(_side(fixed, fixed_mask, "fixed", size), _side(moving, moving_mask, "moving", size))
    if fixed_mask is not None:
        return pair, pair
    seen = ndimage.binary_dilation(pair.fixed.array > DARK, iterations=2)  # a wide dark background would dominate
    return pair, pair._replace(fixed=pair.fixed._replace(mask=seen))


def _side(image: Image, mask: np.ndarray | None, name: str, size: int) -> Side:
    """Upright, reduced and scaled to [0, 1]. Raises InputError for a mask that is empty or on another grid."""
    mask = np.ones(image.array.shape, bool) if mask is None else np.asarray(mask) != 0
    if mask.shape != image.array.shape:
        raise InputError(f"{name} mask: shape {mask.shape}, its image's is {image.array.shape}; give it on that grid")
    if not mask.any():
        raise InputError(f"{name} mask: is empty; mark where the image counts, or give none")
    (array, affine), (mask, _) = (upright(a, image.affine, pictures=False) for a in (image.array, mask))
    side = reduced(Side(array.astype(np.float32), mask, affine), size)
    return side._replace(array=normalise(side.array))


def reduced(side: Side, size: int) -> Side:
    """Averages blocks to about ``size`` voxels an axis, of about cubic shape; at least 8 voxels remain."""
    image, shape = Image(side.array, side.affine), np.array(side.array.shape)
    target = np.prod(shape * image.spacing) ** (1 / len(shape)) / size
    factors = np.clip(np.rint(target / image.spacing), 1, np.maximum(shape // 8, 1)).astype(int).tolist()
    small, share = (_averaged(a.astype(np.float32), factors) for a in (side.array, side.mask))
    mask = share >= min(0.5, share.max())  # a mask thinner than a block remains
    return Side(small, mask, _of_blocks(side.affine, np.array(factors)))


def _averaged(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Mean of each block of ``factors`` voxels; voxels that fill no block are left out: ITK's ``BinShrink``."""
    counts = [n // k for n, k in zip(array.shape, factors, strict=True)]
    whole = array[tuple(slice(n * k) for n, k in zip(counts, factors, strict=True))]
    blocks = whole.reshape([side for pair in zip(counts, factors, strict=True) for side in pair])
    return blocks.mean(axis=tuple(range(1, 2 * array.ndim, 2)), dtype=np.float64).astype(np.float32)


def _of_blocks(affine: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The affine of the blocks' grid, rounded as ITK rounds it."""
    lps, spacing = lps_matrix(affine, places=False), voxel_size(affine)
    direction, blocks = lps[:-1, :-1] / spacing, np.eye(len(affine))
    middle = sum(column * at for column, at in zip((direction * spacing).T, (factors - 1) / 2, strict=True))
    blocks[:-1, :-1], blocks[:-1, -1] = direction * (spacing * factors), middle + lps[:-1, -1]
    return lps_matrix(blocks, places=False)


def _meet(fixed: Side, moving: Side, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the N voxels of the fixed mask lie in the moving image.

    Returns:
        (D, N) voxels; (N,) whether in the moving mask; (N,) volume in mm^D of the moving space.
    """
    pull = np.linalg.inv(moving.affine) @ matrix @ fixed.affine
    ahead = pull[:, :-1] @ np.array(np.nonzero(fixed.mask)) + pull[:, -1:]
    w = np.where(ahead[-1] > 0, ahead[-1], np.inf)  # beyond the horizon of a homography there is nothing
    at = ahead[:-1] / w
    inside = ndimage.map_coordinates(moving.mask.astype(np.uint8), at, order=0, mode="grid-constant") > 0
    return at, inside & np.isfinite(w), abs(np.linalg.det(matrix @ fixed.affine)) / w ** len(matrix)


def similarity(fixed: Side, moving: Side, matrix: np.ndarray, metric: str) -> float:
    """Mutual information (nats) or correlation in the overlap, times the share of the fixed mask that overlaps.

    Without the share, two images that only touch at their rims would match best.
    """
    at, inside, _ = _meet(fixed, moving, matrix)
    if inside.sum() < 2:
        return 0.0
    x = fixed.array[fixed.mask][inside]
    y = ndimage.map_coordinates(moving.array, at[:, inside], order=1, mode="nearest")
    value = information(x, y) if metric == "mi" else correlation(x, y)
    return float(value * inside.mean())


def information(x: np.ndarray, y: np.ndarray) -> float:
    """Mutual information in nats of values (N,) in [0, 1], from a joint histogram."""
    bins = [np.minimum((v * BINS).astype(int), BINS - 1) for v in (x, y)]
    joint = np.bincount(bins[0] * BINS + bins[1], minlength=BINS**2).reshape(BINS, BINS) / len(x)
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Of values of one shape, in [-1, 1]; 0 where one side is constant."""
    x, y = (v.ravel().astype(np.float64) for v in (x, y))
    return float(np.corrcoef(x, y)[0, 1]) if min(x.std(), y.std()) > 0 else 0.0


def overlap(fixed: Side, moving: Side, matrix: np.ndarray) -> float:
    """Dice of the fixed mask, brought to the moving image, and the moving one, by volume."""
    _, inside, volume = _meet(fixed, moving, matrix)
    of_moving = moving.mask.sum() * abs(np.linalg.det(moving.affine))
    return float(min(2 * volume[inside].sum() / (volume.sum() + of_moving), 1.0))
