"""The value outside of an image, and voxels without data (NaN).

Outside of an image is not 0 in all of them: air is -1000 HU in a CT, a slide is white, a statistical map is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from regpipe.io.images import Image

FLAT = 0.25  # of the rim's voxels: from this share on one value is the background's
BROAD, BINS = 0.5, 16  # the share of one bin of the range, where the background is noisy
SLIGHT = 1e-6  # share of an interpolated value that may come from voxels without data


def outside(array: np.ndarray) -> float:
    """The value that an image has outside of what it shows, by its rim: NaN where that is no data.

    The value that a quarter of the rim has. Else the middle of the bin, a sixteenth of the range, that half of it
    lies in: the brightest (a slide), or the lowest where that is below 0 (a CT's air with its noise). Else 0; of an
    image with values below 0, where 0 may be anything, the lowest. Values less than such a bin below 0 are noise
    about it.
    """
    rim = _rim(array)
    values, counts = np.unique(rim, return_counts=True)  # NaN are one value
    if counts.max() >= FLAT * rim.size:
        return float(values[counts.argmax()])
    low, high = float(np.nanmin(array)), float(np.nanmax(array))
    rim = rim[~np.isnan(rim)]
    counts, edges = np.histogram(rim, BINS, (low, high))
    if low < 0 <= edges[1]:
        return 0.0
    at = BINS - 1 if low >= 0 else 0
    if counts[at] >= BROAD * rim.size:
        return float(np.median(rim[(rim >= edges[at]) & (rim <= edges[at + 1])]))
    return min(low, 0.0)


def _rim(array: np.ndarray) -> np.ndarray:
    """The voxels of the first and last layer along each axis (N,); of an axis of one voxel none but by the others."""
    inner = np.zeros(array.shape, bool)
    inner[tuple(slice(1, -1) if n > 1 else slice(None) for n in array.shape)] = True
    return array[~inner]


def known(array: np.ndarray) -> np.ndarray | None:
    """(*S) bool: where a voxel holds data; None where all do."""
    missing = np.isnan(array) if array.dtype.kind == "f" else np.zeros(1, bool)
    return ~missing if missing.any() else None


def filled(image: Image) -> Image:
    """The image, each voxel without data given the value of the nearest one that has some; itself where all have.

    Images continue beyond their rim in the same way: no edge appears. ``known`` says which voxels are compared.
    """
    there = known(image.array)
    if there is None:
        return image
    near = ndimage.distance_transform_edt(~there, sampling=image.spacing, return_distances=False, return_indices=True)
    return image._replace(array=image.array[tuple(near)])


def around_gaps(image: Image, pull: Callable[[Image], np.ndarray], weigh: Callable[[Image], np.ndarray]) -> np.ndarray:
    """What ``pull`` samples of an image, NaN where a voxel without data has a part in it, and nowhere else.

    Samplers add 0 times NaN where a point lies on a voxel, up to the last digit of its place: NaN would spread.
    ``weigh`` samples as ``pull`` does, but linearly at most, and gives 0 outside.
    """
    there = known(image.array)
    if there is None:
        return pull(image)
    gaps = weigh(image._replace(array=(~there).astype(np.float32)))
    return np.where(gaps > SLIGHT, np.float32(np.nan), pull(filled(image)))
