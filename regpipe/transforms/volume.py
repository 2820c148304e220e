"""How much a transform changes volumes, and strains: of its derivative, voxel by voxel and region by region.

A transform takes places of the grid to places of the image. Where its determinant is 2, a voxel of the grid covers
twice its volume in the image: what lies there was halved on its way to the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import itk_bridge
from regpipe.io.formats import PICTURE
from regpipe.io.geometry import lps_matrix
from regpipe.io.images import stem
from regpipe.io.planes import standing
from regpipe.io.series import TENSOR, VALUES, Series, write_series
from regpipe.transforms.read import Space, find, grid_of, read_transform
from regpipe.transforms.resample import read_voxels, write_voxels
from regpipe.utils.errors import InputError
from regpipe.utils.files import absolute, csv_bytes, replace_file

SLAB = 2**22  # voxels whose derivatives are in memory at a time
LARGEST, SMALLEST = ([f"{name}{end}" for end in ("", "_p5", "_p95")] for name in ("strain_max", "strain_min"))


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
    return _in_slabs(transform, grid, lambda derivative: _of_volumes(derivative, grid))


def strain(transform: Any, grid: Space) -> np.ndarray:
    """Green-Lagrange's strain ``E = (F^T F - I) / 2`` with F of ``derivatives``: (*S, C) float32.

    The upper triangle by rows, in LPS, of the grid as it is at rest: C is 6 (xx, xy, xz, yy, yz, zz), in 2-D 3. 0
    wherever the motion is rigid. Of one slice in space only what lies in its plane is not 0.
    """
    dim, plane = len(grid.shape), _plane(grid)
    rows, columns = np.triu_indices(dim)

    def of(derivative: np.ndarray) -> np.ndarray:
        tensor = (np.swapaxes(derivative, -1, -2) @ derivative - np.eye(dim)) / 2
        across = plane @ plane.T
        return (across @ tensor @ across)[..., rows, columns]

    return _in_slabs(transform, grid, of)


def principal(tensors: np.ndarray, grid: Space) -> np.ndarray:
    """Of ``strain`` (..., C): the principal ones (..., D), ascending; of one slice in space the two in its plane."""
    dim, plane = len(grid.shape), _plane(grid)
    rows, columns = np.triu_indices(dim)
    full = np.zeros((*tensors.shape[:-1], dim, dim))
    full[..., rows, columns] = full[..., columns, rows] = tensors
    found: np.ndarray = np.linalg.eigvalsh(plane.T @ full @ plane)
    return found


def _plane(grid: Space) -> np.ndarray:
    """Directions (D, D), or (D, 2) of one slice in space, that a grid spans: LPS, orthonormal."""
    spans = [i for i, n in enumerate(grid.shape) if n > 1]
    axes = lps_matrix(grid.affine, places=False)[:-1, :-1]
    return np.linalg.qr(axes[:, spans])[0] if len(spans) < len(axes) else np.eye(len(axes))


def _in_slabs(transform: Any, grid: Space, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What a function makes of ``derivatives``, float32, a part of the grid at a time."""
    d, affine, inside = _sampled(transform, grid)
    step = max(1, SLAB // d[0, 0].size)
    parts = []
    for start in range(0, d.shape[1], step):
        low = max(start - 1, 0)  # a neighbour on either side
        part = of(_derivatives(d[:, low : start + step + 1], affine))
        parts.append(part[start - low :][:step].astype(np.float32))
    return np.concatenate(parts)[inside]


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
    strained: bool = False,
    labels: str | Path | None = None,
) -> list[dict[str, float]]:
    """Write the map of ``ratio``, or of ``strain``, on the grid of the ``fixed`` or the ``moving`` image.

    Args:
        transform: a case, or any, as ``transforms.apply.apply`` takes it.
        out: the map's file: .nii, .nii.gz, .mha or .nrrd.
        to: whose grid; the values say how much larger its places are in the other image.
        reference: the image whose grid it is instead; a transform file needs it.
        log: the natural logarithm, 0 where the volume stays; NaN where the transform folds.
        strained: the strain, a symmetric tensor at each voxel (2-D: three values), in place of the ratio.
        labels: a label map on that grid, of whose regions ``<out>_labels.csv`` tells the volume, mL (2-D: the area,
            cm^2), and how much larger each is in the other image: ``ratio`` of the region as a whole, p5 and p95 of
            its voxels; or of its largest and smallest principal strain the mean, p5 and p95.

    Returns:
        The table: a row for each label but 0.

    Raises:
        InputError: as ``find``; no reference; a picture, or one of the inputs, as ``out``; labels that are none, or lie
            on another grid.
    """
    out = Path(out)
    if out.name.lower().endswith(PICTURE):
        raise InputError(f"{out}: a picture cannot hold such values; name it .nii.gz")
    if log and strained:
        raise InputError("--log is of volumes; leave it out with --strain")
    if absolute(out) in {absolute(path) for path in (transform, reference, labels) if path is not None}:
        raise InputError(f"{out}: is an input; give the map a file of its own")
    move = find(transform, to)
    pull = read_transform(move.images)
    grid = grid_of(reference, move.target, pull)
    found = strain(pull, grid) if strained else ratio(pull, grid)
    rows = [] if labels is None else _regions(Path(labels), found, grid)
    if strained:
        kind = TENSOR if len(grid.shape) == 3 else VALUES
        write_series(out, found, grid.affine, Series(found, grid.affine, found.dtype, kind))
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(found > 0, np.log(found), np.nan)
    if not strained:
        write_voxels(out, found, grid.affine, np.dtype(np.float32))
    if labels is not None:
        names = [*LARGEST, *SMALLEST] if strained else ["ratio", "ratio_p5", "ratio_p95"]
        head = ["label", "volume_ml" if len(grid.shape) == 3 else "area_cm2", *names]
        numbers = ([row["label"], *(f"{value:.6g}" for value in [*row.values()][1:])] for row in rows)
        table: list[list[Any]] = [head, *numbers]
        replace_file(out.with_name(f"{stem(out)}_labels.csv"), csv_bytes(table))
    return rows


def _regions(path: Path, found: np.ndarray, grid: Space) -> list[dict[str, float]]:
    image, _, _ = read_voxels(path, "label")
    image = standing(image) if len(grid.shape) == 3 else image
    if image.array.shape != tuple(grid.shape) or not np.allclose(image.affine, grid.affine, atol=1e-3):
        raise InputError(f"{path}: lies on another grid than the map; give labels of the image whose grid it has")
    size = abs(np.linalg.det(grid.affine[:-1, :-1])) / (1000 if len(grid.shape) == 3 else 100)
    of = ratios if found.ndim == len(grid.shape) else (lambda inside: _strains(principal(inside, grid)))
    return [{"label": label, "size": len(inside) * size, **of(inside)} for label, inside in regions(image.array, found)]


def _strains(inside: np.ndarray) -> dict[str, float]:
    """Of principal strains (K, D) of a region, ascending."""
    told: dict[str, float] = {}
    for names, values in ((LARGEST, inside[:, -1]), (SMALLEST, inside[:, 0])):
        told |= dict(zip(names, (float(values.mean()), *map(float, np.percentile(values, [5, 95]))), strict=True))
    return told


def regions(labels: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label but 0, ascending, and the values (*S, ...) at its voxels, float64."""
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
