"""How much a transform changes volumes: the determinant of its derivative, voxel by voxel and region by region.

A transform takes places of the grid to places of the image. Where its determinant is 2, what fills a voxel of the grid
fills twice as much in the image: from the grid's side it was halved.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import itk_bridge
from regpipe.io.planes import standing
from regpipe.transforms import displacement
from regpipe.transforms.read import Space, find, grid_of, read_transform
from regpipe.transforms.resample import read_voxels, write_voxels
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

TABLE = ("label", "volume_ml", "ratio", "ratio_p5", "ratio_p95")


def sampled(transform: Any, grid: Space) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """``transform(p) - p`` (D, *S) LPS mm on a grid, its affine, and where in it the grid is.

    One slice has no neighbours of its own: it gets one on either side.
    """
    thin = np.array(grid.shape) == 1
    affine, layers = grid.affine.copy(), [3 if one else int(n) for n, one in zip(grid.shape, thin, strict=True)]
    affine[:-1, -1] -= affine[:-1, :-1] @ thin
    inside = tuple(slice(1, 2) if one else slice(None) for one in thin)
    return itk_bridge.sampled(transform, layers, affine), affine, inside


def ratio(transform: Any, grid: Space) -> np.ndarray:
    """The volume in the image of what fills each voxel of the grid, relative to it: (*S) float32, 1 where it stays.

    Determinant of the derivative by central differences; negative where the transform folds.
    """
    d, affine, inside = sampled(transform, grid)
    return displacement.native_jacobian(d, affine)[inside]


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
        out: the map's file.
        to: whose grid; the values say how much larger its places are in the other image.
        reference: the image whose grid it is instead; a transform file needs it.
        log: the natural logarithm, 0 where the volume stays; NaN where the transform folds.
        labels: a label map on that grid, of whose regions ``<out>_labels.csv`` tells the volume, mL (2-D: cm^2), and
            how much larger each is in the other image: the mean is that of the whole region, p5 and p95 of its voxels.

    Returns:
        The table: a row for each label but 0.

    Raises:
        InputError: as ``find``; no reference; labels on another grid.
    """
    move = find(transform, to)
    pull = read_transform(move.images)
    grid = grid_of(reference, move.target, pull)
    found, out = ratio(pull, grid), Path(out)
    rows = [] if labels is None else _regions(Path(labels), found, grid)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(found > 0, np.log(found), np.nan)
    write_voxels(out, found, grid.affine, np.dtype(np.float32))
    if rows:
        text = io.StringIO()
        table = csv.DictWriter(text, TABLE, lineterminator="\n")
        table.writeheader()
        table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
        replace_file(out.with_name(f"{out.name.partition('.')[0]}_labels.csv"), text.getvalue().encode())
    return rows


def _regions(path: Path, found: np.ndarray, grid: Space) -> list[dict[str, float]]:
    image, _, _ = read_voxels(path, "nearest")
    image = standing(image) if len(grid.shape) == 3 else image
    if image.array.shape != tuple(grid.shape) or not np.allclose(image.affine, grid.affine, atol=1e-3):
        raise InputError(f"{path}: lies on another grid than the map; give labels of the image whose grid it has")
    size = abs(np.linalg.det(grid.affine[:-1, :-1]))  # mm^D
    rows = []
    for label in np.unique(image.array[image.array != 0]):
        inside = found[image.array == label].astype(np.float64)
        low, high = np.percentile(inside, [5, 95])
        volume = inside.size * size / (1000 if found.ndim == 3 else 100)
        rows.append(dict(zip(TABLE, (float(label), volume, inside.mean(), low, high), strict=True)))
    return rows
