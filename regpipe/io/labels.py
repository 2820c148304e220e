"""Label maps: how they are read, and how a file that may be one is told from an image.

A file is a label map where it says so: NIfTI's intent for labels, DICOM's segmentations, Slicer's ``.seg.nrrd``. Of any
other its name and its voxels are asked. The name counts by its last word, ``aparc+aseg``, ``a_dseg``, ``brainmask``, or
by its folder's, ``fixed_labels``, ``labelsTr``: ``mask_removed_T1`` is an image. The voxels of a label map are whole
numbers that fill regions; those of an image differ from their neighbours, by little. Where the two disagree, that is
said.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io.formats import SUFFIXES, PathLike, locate, warn_once
from regpipe.io.images import Image, opened_image, resample, straightened, voxels_of
from regpipe.utils.errors import InputError

LARGEST = 2**63 - 1  # of label ids
WHOLE = 1e-3  # how far from a whole number a label may lie: a scale factor or float32 makes 2.9999995 of 3
# what the last word of a name ends with; ``probseg``, of BIDS, are probabilities
WORDS = ("seg", "label", "labelmap", "mask", "parc", "parcellation", "segmentation", "annotation", "annot", "roi")
ATLAS = ("atlas",)  # of a folder that may hold the atlas's image, too
NO_WORDS = ("probseg", "unmask")
LATTICE = 0.05  # voxels that a label map may lie off its image's
FEW = 32  # values; 8-bit pictures have more
NEXT = 2  # values that neighbours of different ones are apart, in the list of all that occur
LAYERS = 8  # values; images have more
SPARSE = 0.9  # share of the background, from which on what is not are points
GLANCE = 4096  # voxels that tell most images from labels
LOOKED_AT = 4_000_000  # voxels, at most about so many
FLAT, UNEVEN = 0.5, 0.3  # share of equal neighbours: measured 0.69 and more of label maps, 0.08 and less of images
# how unlike neighbours are, to voxels anywhere: measured 1.4 and more of label maps, 0.4 and less of images
ALIKE = 0.75
# of numbered cells: the least share of numbers that occur, and how far a number's voxels spread, of the squares of all
# and by that share: measured 0.1 and less of 100 cells and more, 0.6 and more of images of repeated voxels
COUNTED, TOGETHER = 0.2, 0.4
SUGGEST = "--interpolation"


class Look(NamedTuple):
    """What the voxels of a file look like; neither where both are False."""

    values: int  # how many there are
    label: bool
    image: bool
    graded: bool  # where neighbours differ, they differ by little: an image of few grey values, or layers
    noise: bool  # neighbours differ nearly everywhere, and not around single points
    flat: bool  # most neighbours are equal; an image with graded, its voxels repeated


def read_label(
    path: PathLike, file: BinaryIO | None = None, *, landmark_channels: int | None = None
) -> tuple[Image, np.ndarray | None]:
    """Read a label map -> int32 ``(*S)`` at its place, int64 where its ids need that; and landmarks in its channels.

    In a 4-D file (channels last) channel i becomes label i+1, the later one winning; with
    ``landmark_channels=n`` only those before n do, and each from n on is one landmark. ``file``: as of ``read_image``.

    Returns:
        The map, and the landmarks' centroids ``(K, D)`` in voxels of the map (empty channel:
        NaN), or None where ``landmark_channels`` is None.

    Raises:
        InputError: missing, unreadable, not integral, more than 4-D.
    """
    with opened_image(path, file, label=True) as source:
        array = voxels_of(source, path)
    whole = ids_of(array, path)
    channels = []
    if whole.ndim == 4:
        channels = [c[..., 0] if c.shape[-1] == 1 else c for c in np.moveaxis(whole, -1, 0)]
        whole = np.zeros(channels[0].shape, np.int32)
        for i, channel in enumerate(channels[:landmark_channels]):
            whole[channel != 0] = i + 1
    labels = straightened(Image(whole, source.affine, source.plane), path, order=0)
    if landmark_channels is None:
        return labels, None
    centroids = _centroids(channels[landmark_channels:], whole.ndim)
    return labels, apply_affine(np.linalg.inv(labels.affine) @ source.affine, centroids)


def ids_of(array: np.ndarray, path: PathLike) -> np.ndarray:
    """``whole_numbers`` as int32, or int64 where ids need that.

    Raises:
        InputError: they are none, or not below 2^63; it names ``path``.
    """
    if array.dtype.kind != "b":
        least, largest = np.fmin.reduce(array, axis=None), np.fmax.reduce(array, axis=None)  # nanmin warns of NaN alone
        if not (-LARGEST <= least <= largest <= LARGEST or np.isnan(least)):
            raise InputError(f"{path}: label ids reach from {least} to {largest}; number them below 2^63")
    whole = whole_numbers(array)
    if whole is None:
        raise InputError(f"{path}: labels are whole numbers, these are not; is it an image?")
    fits = whole.min() > -(2**31) and whole.max() < 2**31
    return whole.astype(np.int32 if fits else np.int64)


def _centroids(channels: Sequence[np.ndarray], dim: int) -> np.ndarray:
    found = (np.argwhere(c) for c in channels)
    rows = [at.mean(axis=0) if len(at) else np.full(dim, np.nan) for at in found]
    return np.array(rows).reshape(-1, dim)


def laid_on(label: Image, shape: Sequence[int], affine: np.ndarray) -> Image | None:
    """A label map on its image's grid, where its voxels are voxels of that: it may be a part of it, or turned.

    None where they lie elsewhere, or where something of them is beyond the image. What is beyond the label map is 0.
    """
    move = np.linalg.inv(affine) @ label.affine
    turn, corners = np.rint(move[:-1, :-1]), np.array(list(itertools.product(*((0, n - 1) for n in label.array.shape))))
    at = apply_affine(move, corners)
    if not (np.abs(turn) @ np.ones(len(turn)) == 1).all() or np.abs(np.linalg.det(turn)) != 1:
        return None
    if np.abs(at - np.rint(at)).max() > LATTICE or np.abs(at - at[0] - (corners - corners[0]) @ turn.T).max() > LATTICE:
        return None
    exact = np.eye(len(move))
    exact[:-1, :-1], exact[:-1, -1] = turn, np.rint(at[0] - turn @ corners[0])
    laid = resample(Image(label.array, affine @ exact), affine, shape, order=0)
    kept = np.count_nonzero(laid) == np.count_nonzero(label.array)
    return label._replace(array=laid, affine=affine) if kept else None


def whole_numbers(array: np.ndarray) -> np.ndarray | None:
    """The labels that an array holds: itself where its type is a whole one, else rounded; None where they are none.

    What is within ``WHOLE`` of a whole number is one, and NaN is 0. An image of values so small is none: rounding would
    leave few of them.
    """
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        return array
    if array.size > GLANCE and _rounded(array.ravel("K")[:: array.size // GLANCE | 1]) is None:  # as of most images
        return None
    rounded = None if np.isnan(array).all() else _rounded(array)
    if rounded is None:
        return None
    known, near, off = rounded
    if off.any() and len(np.unique(near)) <= 2 and len(np.unique(known)) > FEW:
        return None
    if off.any() and near.min() == near.max() and known.min() != known.max():
        return None
    return near.astype(np.int64)


def _rounded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Real values with NaN as 0, rounded, and how far off; None where one is no whole number."""
    known = np.nan_to_num(array, nan=0.0, posinf=np.inf, neginf=-np.inf)
    near = np.rint(known)
    with np.errstate(invalid="ignore"):  # infinite ones
        off = np.abs(known - near)
    # float32 has steps of its own
    near_enough = (off <= WHOLE + np.finfo(np.float32).eps * np.abs(near)).all() and np.abs(near).max() <= LARGEST
    return (known, near, off) if near_enough else None


def is_label_map(path: PathLike, array: np.ndarray, said: bool) -> bool:
    """Whether the voxels of a file are labels, by the rule at the top of this file; logs a warning where in doubt.

    Args:
        path: for its name.
        array: (*S), its voxels.
        said: whether the file itself says that it is a label map.
    """
    whole, named = whole_numbers(array), is_named_label(path)
    if whole is None and said:
        warn_once(f"{path}: says that it is a label map and holds fractions, which are kept, by nearest neighbour")
    if said or (not named and (whole is None or (array.dtype.kind == "f" and np.isnan(array).any()))):
        return said  # NaN is no data of an image, and 0 of labels
    look = look_of(array if whole is None else whole)
    if whole is None:
        return _of_fractions(path, look)
    if named and look.image:
        warn_once(f"{path}: is named like a label map and looks like an image: taken for one; else {SUGGEST} nearest")
    return not look.image if named else _of_whole(path, look)


def _of_fractions(path: PathLike, look: Look) -> bool:
    told = "in flat regions: by nearest neighbour" if look.label else f"taken for an image; else {SUGGEST} nearest"
    warn_once(f"{path}: is named like a label map and holds fractions, {told}")
    return look.label


def _of_whole(path: PathLike, look: Look) -> bool:
    """Of a file that says nothing; few values are labels unless they are graded."""
    if look.values <= 2 or look.image:
        return not look.image
    few = look.values <= FEW
    label = (look.label or few) and not ((look.graded or look.noise) and look.values > LAYERS)
    sure = look.label and few if label else not (few or look.flat)
    if not sure:
        kinds = ("a label map", "linear") if label else ("an image", "nearest")
        warn_once(f"{path}: is taken for {kinds[0]}, by its {look.values} values; else give {SUGGEST} {kinds[1]}")
    return label


def is_named_label(path: PathLike) -> bool:
    """Whether the last word of a file's name, or of its folder's, is one for label maps."""
    file, _ = locate(path)
    name = file.name.lower()
    name = name.removesuffix(next((s for s in SUFFIXES if name.endswith(s)), file.suffix.lower()))
    folder = re.sub("(tr|ts|val|train|test)$", "", file.absolute().parent.name.lower())
    return _last_word(name).endswith(WORDS + ATLAS) or _last_word(folder).endswith(WORDS)


def _last_word(name: str) -> str:
    """Of letters, in the singular; empty where it is one of ``NO_WORDS``."""
    words = [word for word in re.split("[^a-z]+", name) if word]
    last = words[-1] if words else ""
    last = last if last.endswith(ATLAS) else last.removesuffix("s")
    return "" if last.endswith(NO_WORDS) else last


def look_of(array: np.ndarray) -> Look:
    """What neighbours say: equal in a label map, except at borders; nearly equal in an image.

    The commonest value, which is the background, is not asked; nor are neighbours along the last axis of a volume, so
    that some of its slices are enough.
    """
    slices = array.reshape(*array.shape[:2], -1)
    slices = slices[..., :: max(1, round(array.size / LOOKED_AT))]
    ids, counts = np.unique(slices, return_counts=True)
    background = ids[counts.argmax()]
    pairs = [_pairs(slices, background), _pairs(slices.swapaxes(0, 1), background)]
    one, other = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    differ = one != other
    flat = 1 - differ.mean() if len(differ) else 1.0
    one, other = one[differ], other[differ]
    anywhere = np.abs(one - np.random.default_rng(0).permutation(other)).mean() if len(one) else 0.0
    alike = np.abs(one - other).mean() / anywhere if anywhere else 1.0
    levels = np.abs(np.searchsorted(ids, one) - np.searchsorted(ids, other)).mean() if len(one) else 0.0
    # where regions are flat, a shade of grey borders on the next one, a label on any: also cells numbered row by row
    blocks = flat >= FLAT and len(ids) > FEW and alike < ALIKE and not _is_numbered(slices, ids, background)
    graded = len(ids) > 2 and alike < ALIKE and (flat < FLAT or levels < NEXT or blocks)
    label = flat >= FLAT and (len(ids) <= FEW or not graded)
    noise = flat < UNEVEN and counts.max() < SPARSE * slices.size
    return Look(len(ids), bool(label), bool(graded and flat < UNEVEN), bool(graded), bool(noise), bool(flat >= FLAT))


def _is_numbered(slices: np.ndarray, ids: np.ndarray, background: np.generic) -> bool:
    """Whether ids number cells, in steps of any size: not too many are left out, and each lies together.

    A shade of an image whose voxels were doubled lies anywhere, unless few of all shades occur.
    """
    gaps = np.diff(ids.astype(np.float64))
    step = gaps[gaps > 0].min()  # 0: of ids beyond 2^53
    share = len(ids) * step / (gaps.sum() + step)
    if share < COUNTED:
        return False
    kept = slices != background
    at, value = np.argwhere(kept), np.searchsorted(ids, slices[kept])
    counts = np.bincount(value, minlength=len(ids)).clip(min=1)
    means = np.stack([np.bincount(value, weights=axis, minlength=len(ids)) / counts for axis in at.T], 1)
    return bool(np.square(at - means[value]).sum() < share * TOGETHER * np.square(at - at.mean(axis=0)).sum())


def _pairs(slices: np.ndarray, background: np.generic) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours along the first axis (N,), (N,) of which one is not background."""
    one, other = slices[1:], slices[:-1]
    kept = (one != background) | (other != background)
    return one[kept], other[kept]
