"""A registered pair and its closed formula, for every format of transform files."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from regpipe.fields import algebra
from regpipe.io.images import Grid, Image, to_grid
from regpipe.transforms import export
from regpipe.transforms.export import ImageFile, PairTransform

WAY = pytest.mark.parametrize("way", export.WAYS)


class Setup(NamedTuple):
    u: np.ndarray  # working voxels
    inverse_u: np.ndarray
    fixed_frame: np.ndarray
    moving_frame: np.ndarray
    fixed: Image
    moving: Image
    pair: PairTransform


def placed(shape: tuple[int, ...], spacing: tuple[float, ...], angles: list[float], flip: int) -> Image:
    """A smooth image on an oblique grid whose axis ``flip`` runs backwards: in 3-D the affine is left-handed."""
    dim = len(shape)
    affine = np.eye(dim + 1)
    turn = Rotation.from_euler("zyx", angles, degrees=True).as_matrix()[:dim, :dim]
    affine[:dim, :dim] = turn * np.where(np.arange(dim) == flip, -1, 1) * spacing
    affine[:dim, dim] = [12.5, -40.0, 33.0][:dim]
    smooth = ndimage.gaussian_filter(np.random.default_rng(sum(shape)).random(shape), 1.5)
    return Image(((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32), affine)


@functools.cache
def setup(dim: int) -> Setup:
    """Two images far apart, laid onto each other by a turn, scale and shear; exp(v) and exp(-v) of a smooth v."""
    shapes = ((30, 26, 12)[:dim], (27, 24, 25)[:dim])
    if dim == 3:
        fixed = placed(shapes[0], (0.9, 1.1, 3.0), [20, -10, 15], flip=0)
        moving = placed(shapes[1], (1.3, 1.2, 1.4), [-15, 25, 5], flip=1)
        grid = Grid((24, 20, 20), (1.2, 1.5, 1.8))
    else:
        fixed = placed(shapes[0], (0.9, 1.1), [20, 0, 0], flip=0)
        moving = placed(shapes[1], (1.3, 1.2), [-15, 0, 0], flip=1)
        grid = Grid((24, 20), (1.2, 1.5))
    linear = np.eye(dim) + 0.06 * np.random.default_rng(7).standard_normal((dim, dim))
    middles = [apply_affine(image.affine, (np.array(image.array.shape) - 1) / 2) for image in (fixed, moving)]
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim], matrix[:dim, dim] = linear, middles[1] - linear @ middles[0] + 1.5
    noise = np.random.default_rng(2).standard_normal((dim, *grid.shape))
    smooth = np.stack([ndimage.gaussian_filter(n, 4) for n in noise])
    v = torch.from_numpy(1.5 * smooth / np.abs(smooth).max()).float()
    u, inverse_u = (field[0].numpy() for field in algebra.integrate_both(v[None]))
    frame = to_grid(fixed, grid)
    spaces = [(image.array.shape, image.affine) for image in (fixed, moving)]
    pair = export.pair_transform(u, inverse_u, frame, matrix @ frame, *spaces)
    return Setup(u, inverse_u, frame, matrix @ frame, fixed, moving, pair)


def image_files(case: Setup) -> tuple[ImageFile, ImageFile]:
    return (
        ImageFile("fixed.nii.gz", case.fixed.array.shape, case.fixed.affine, "0" * 64),
        ImageFile("moving.nii.gz", case.moving.array.shape, case.moving.affine, "1" * 64),
    )


def lps(points: np.ndarray) -> np.ndarray:
    return points * [-1, -1, 1][: points.shape[-1]]


def pulled_and_pulling(case: Setup, way: str) -> tuple[Image, Image, Any]:
    """The image that is resampled, the one whose grid it gets, and the closed formula of its points."""
    if way == "moving_to_fixed":
        return case.moving, case.fixed, export.moving_points
    return case.fixed, case.moving, export.fixed_points


def dense(case: Setup, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Displacement (D, *S) LPS mm on the pulling image's grid, and where it stays well inside the pulled one."""
    pulled, pulling, move = pulled_and_pulling(case, way)
    shape = pulling.array.shape
    points = lps(apply_affine(pulling.affine, np.indices(shape).reshape(len(shape), -1).T))
    moved = move(case.pair, points)
    at = apply_affine(np.linalg.inv(pulled.affine), lps(moved))
    inside = ((at > 0.5) & (at < np.array(pulled.array.shape) - 1.5)).all(axis=1)
    return (moved - points).T.reshape(-1, *shape), inside.reshape(shape)
