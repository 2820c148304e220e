"""How much a transform changes volumes: the determinant of its derivative, voxel by voxel and region by region.

A transform takes places of the grid to places of the image. Where its determinant is 2, a voxel of the grid covers
twice its volume in the image: what lies there was halved on its way to the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import itk_bridge
from regpipe.io.formats import PICTURE
from regpipe.io.geometry import lps_matrix
from regpipe.io.images import stem
from regpipe.io.planes import standing
from regpipe.transforms.read import Space, find, grid_of, read_transform
from regpipe.transforms.resample import read_voxels, write_voxels
from regpipe.utils.errors import InputError
from regpipe.utils.files import absolute, csv_bytes, replace_file

SLAB = 2**22  # voxels whose derivatives are in memory at a time


def derivatives(transform: Any, grid: Space) -> np.ndarray:
    """(*S, D, D) float64: the transform's derivative at each voxel of a grid, in LPS, by central differences."""
    d, affine, inside = _sampled(transform, grid)
    return _derivatives(d, affine)[inside]


def _sampled(transform: Any, grid: Space) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """``transform(p) - p`` (D, *S) LPS mm on a grid, its affine, and where in it the grid is.

    One slice has no neighbours of its own: it gets one on either side.
    """
    thin = np.array(grid.shape) == 1
    affine, layers = grid.affine.copy(), [3 if one else int(n) for n, one in zip(grid.shape, thin, strict=True)]
    affine[:-1, -1] -= affine[:-1, :-1] @ thin
    inside = tuple(slice(1, 2) if one else slice(None) for one in thin)
    return itk_bridge.sampled(transform, layers, affine), affine, inside


def _derivatives(d: np.ndarray, affine: np.ndarray) -> np.ndarray:
    dim = len(d)
    by_voxel = np.stack([np.stack(np.gradient(part.astype(np.float64)), -1) for part in d], -2)
    axes = lps_matrix(affine, places=False)[:dim, :dim]
    found: np.ndarray = np.eye(dim) + by_voxel @ np.linalg.inv(axes)
    return found


def ratio(transform: Any, grid: Space) -> np.ndarray:
    """The volume in the image of what fills each voxel of the grid, relative to it: (*S) float32, 1 where it stays.

    The determinant of ``derivatives``; negative where the transform folds, or mirrors. Of one slice in space it is that
    of areas: a transform may know nothing of what lies beside it.
    """
    d, affine, inside = _sampled(transform, grid)
    found = np.empty(d.shape[1:], np.float32)
    step = max(1, SLAB // found[0].size)
    for start in range(0, len(found), step):
        low = max(start - 1, 0)  # a neighbour on either side
        part = _of_volumes(_derivatives(d[:, low : start + step + 1], affine), grid)
        found[start : start + step] = part[start - low :][:step]
    return found[inside]


def _of_volumes(derivative: np.ndarray, grid: Space) -> np.ndarray:
    determinant = np.linalg.det(derivative)
    if 1 not in grid.shape or len(grid.shape) == 2:
        return determinant
    axes = lps_matrix(grid.affine, places=False)[:3, :3]
    one, other = (axes[:, i] for i in range(3) if i != grid.shape.index(1))
    area = np.linalg.norm(np.cross(derivative @ one, derivative @ other), axis=-1)
    return np.copysign(area / np.linalg.norm(np.cross(one, other)), determinant)


def jacobian(
    transform: str | Path,
    out: str | Path,
    *,
    to: str = "fixed",
    reference: str | Path | None = None,
    log: bool = False,
    labels: str | Path | None = None,
) -> list[dict[str, float]]:
    """Write the map of ``ratio`` on the grid of the ``fixed`` or the ``moving`` image: of a case, or any transform.

    Args:
        transform: as ``transforms.apply.apply`` takes it.
        out: the map's file: .nii, .nii.gz, .mha or .nrrd.
        to: whose grid; the values say how much larger its places are in the other image.
        reference: the image whose grid it is instead; a transform file needs it.
        log: the natural logarithm, 0 where the volume stays; NaN where the transform folds.
        labels: a label map on that grid, of whose regions ``<out>_labels.csv`` tells the volume, mL (2-D: the area,
            cm^2), and how much larger each is in the other image: ``ratio`` of the region as a whole, p5 and p95 of
            its voxels.

    Returns:
        The table: a row for each label but 0.

    Raises:
        InputError: as ``find``; no reference; a picture, or one of the inputs, as ``out``; labels that are none, or lie
            on another grid.
    """
    out = Path(out)
    if out.name.lower().endswith(PICTURE):
        raise InputError(f"{out}: a picture cannot hold such values; name it .nii.gz")
    if absolute(out) in {absolute(path) for path in (transform, reference, labels) if path is not None}:
        raise InputError(f"{out}: is an input; give the map a file of its own")
    move = find(transform, to)
    pull = read_transform(move.images)
    grid = grid_of(reference, move.target, pull)
    found = ratio(pull, grid)
    rows = [] if labels is None else _regions(Path(labels), found, grid)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(found > 0, np.log(found), np.nan)
    write_voxels(out, found, grid.affine, np.dtype(np.float32))
    if labels is not None:
        head = ["label", "volume_ml" if found.ndim == 3 else "area_cm2", "ratio", "ratio_p5", "ratio_p95"]
        numbers = ([row["label"], *(f"{value:.6g}" for value in [*row.values()][1:])] for row in rows)
        table: list[list[Any]] = [head, *numbers]
        replace_file(out.with_name(f"{stem(out)}_labels.csv"), csv_bytes(table))
    return rows


def _regions(path: Path, found: np.ndarray, grid: Space) -> list[dict[str, float]]:
    image, _, _ = read_voxels(path, "label")
    image = standing(image) if len(grid.shape) == 3 else image
    if image.array.shape != tuple(grid.shape) or not np.allclose(image.affine, grid.affine, atol=1e-3):
        raise InputError(f"{path}: lies on another grid than the map; give labels of the image whose grid it has")
    size = abs(np.linalg.det(grid.affine[:-1, :-1])) / (1000 if found.ndim == 3 else 100)
    return [
        {"label": label, "size": inside.size * size, **ratios(inside)} for label, inside in regions(image.array, found)
    ]


def regions(labels: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label but 0, ascending, and the values at its voxels, float64."""
    shown = labels != 0  # most of an image is not
    ids, which = np.unique(labels[shown], return_inverse=True)
    order = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[order], range(1, len(ids)))
    parts = np.split(values[shown][order].astype(np.float64), ends)
    return ((int(i), part) for i, part in zip(ids, parts, strict=False))  # without labels: no id, one empty part


def ratios(inside: np.ndarray) -> dict[str, float]:
    """Of a region: ``ratio`` of its volume, ``p5`` and ``p95`` of its voxels."""
    low, high = np.percentile(inside, [5, 95])
    return {"ratio": float(inside.mean()), "p5": float(low), "p95": float(high)}
