"""Resamples files of several values at each place: each value like an image; vectors and tensors turn with their place.

A transform takes places of the grid to places of the image, and by its derivative J directions there;
directions come back by the inverse of J, of which the rotation is taken, so that lengths and diffusivities stay (finite
strain: Alexander et al., IEEE TMI 2001).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import background
from regpipe.io import series as kinds
from regpipe.io.geometry import LPS
from regpipe.io.images import Image, straightened
from regpipe.io.labels import ids_of, is_label_map, is_named_label, look_of, whole_numbers
from regpipe.io.planes import standing
from regpipe.io.series import Series, of_dimension, write_series
from regpipe.transforms import volume
from regpipe.transforms.read import Space
from regpipe.transforms.resample import resample
from regpipe.utils.errors import InputError

# of a symmetric matrix: the values' places in NIfTI (its lower triangle, row by row) and in ITK (its upper one)
LOWER = ([0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2])
UPPER = ([0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2])


def carry_series(
    path: Path, target: Path, series: Series, transform: Any, grid: Space, interpolation: str, fill: float | None
) -> str:
    """Resample all values of a file; returns how many, how, and what lies outside where it is not 0.

    ``fill``: value outside; None: 0 of labels, vectors and tensors, of frames what the first has there, of colours and
    other values what each has, see ``io.background``.

    Raises:
        InputError: of another dimension than the transform; ``label`` of values that are not whole.
    """
    dim = transform.GetInputSpaceDimension()
    series = of_dimension(series, dim)
    if series.array.ndim - 1 != dim and not (dim == 3 and series.plane):
        raise InputError(f"{path}: is {series.array.ndim - 1}-D, the transform is {dim}-D; give an image of its kind")
    method = interpolation if interpolation != "auto" else "nearest" if _is_label(path, series) else "linear"
    values, dtype = _values(path, series, method)
    rims = _outside(series, values, interpolation, method, fill)
    channels = (_carried(path, values[..., i], series, transform, grid, method, rim) for i, rim in enumerate(rims))
    moved = np.stack(list(channels), -1)
    turned = series.kind in (kinds.VECTOR, kinds.TENSOR)
    if turned:
        moved = _turned(moved, rotations(transform, grid), series)
    if series.kind == kinds.COLOURS and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        moved = np.rint(moved).clip(limits.min, limits.max)
    typed = moved.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(typed, moved):  # its slope and intercept made other values of them
        typed = moved.astype(np.float32) if moved.dtype.kind == "f" else moved
    write_series(target, typed, grid.affine, series)
    what = f"{series.kind} turned" if turned else f"{values.shape[-1]} {series.kind}"
    return f"{what}, {method}{f', {rims[0]:g} outside' if rims[0] else ''}"


def _outside(series: Series, values: np.ndarray, interpolation: str, method: str, fill: float | None) -> list[float]:
    """For each of the values (*S, C)."""
    many = values.shape[-1]
    labels = method == "label" or (method == "nearest" and interpolation == "auto")
    if labels or (fill is None and series.kind in (kinds.VECTOR, kinds.TENSOR)):
        return [0.0] * many
    if fill is not None:
        return [fill] * many
    if series.kind == kinds.FRAMES:
        return [background.outside(values[..., 0])] * many
    return [background.outside(values[..., i]) for i in range(many)]


def _is_label(path: Path, series: Series) -> bool:
    if series.kind in (kinds.VECTOR, kinds.TENSOR):
        return series.label
    if series.kind == kinds.COLOURS:  # a colour for each label
        packed = series.array.astype(np.int64) @ 256 ** np.arange(series.array.shape[-1])
        return series.label or (is_named_label(path) and look_of(packed).label)
    return is_label_map(path, series.array, series.label)


def _values(path: Path, series: Series, method: str) -> tuple[np.ndarray, np.dtype]:
    """The values as they are resampled, and the type of the result."""
    if method in ("linear", "bspline"):
        return series.array, series.dtype if series.kind == kinds.COLOURS else np.dtype(np.float32)
    whole = whole_numbers(series.array)
    if whole is None and method == "label":
        raise InputError(f"{path}: labels are whole numbers, these are not; is it an image?")
    if series.dtype.kind == "f" and whole is not None:
        whole = ids_of(whole, path)
    return series.array if whole is None else whole, series.dtype


def _carried(
    path: Path, value: np.ndarray, series: Series, transform: Any, grid: Space, method: str, fill: float
) -> np.ndarray:
    smooth = method in ("linear", "bspline")
    kept = value.astype(np.float32) if smooth or value.dtype.kind == "f" else value
    image = straightened(Image(kept, series.affine, series.plane), path, order=1 if smooth else 0)
    image = standing(image) if transform.GetInputSpaceDimension() == 3 else image
    return resample(image, transform, grid, method, fill)


def rotations(transform: Any, grid: Space) -> np.ndarray:
    """(*S, D, D) in LPS: what turns directions of the image into those of the grid, at each of its voxels."""
    u, _, v = np.linalg.svd(volume.derivatives(transform, grid))
    turns: np.ndarray = np.swapaxes(u @ v, -1, -2)
    return turns


def _turned(values: np.ndarray, turns: np.ndarray, series: Series) -> np.ndarray:
    """Vectors (*S, D) or tensors (*S, 6) with their directions on the grid."""
    if series.kind == kinds.VECTOR:
        flip = LPS[: values.shape[-1]] if series.ras else 1.0
        return flip * (turns @ (flip * values)[..., None])[..., 0]
    rows, columns = LOWER if series.about is not None else UPPER
    matrices = np.zeros((*values.shape[:-1], 3, 3))
    matrices[..., rows, columns] = values
    matrices[..., columns, rows] = values
    matrices = turns @ matrices @ np.swapaxes(turns, -1, -2)
    return matrices[..., rows, columns]
