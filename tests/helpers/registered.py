"""A registered pair on disk with a known map of points, for several test files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from regpipe.io.images import read_image
from regpipe.transforms.displacement import map_points

CSV = {2: "x,y\n", 3: "x,y,z\n"}


class Pair(NamedTuple):
    """A registered pair on disk: the case folder, the two images, and the closed form of its map of points."""

    case: Path
    fixed: Path
    moving: Path
    d: np.ndarray  # (D, *grid) LPS mm on `frame`
    frame: np.ndarray
    matrix: np.ndarray  # fixed point -> moving point, RAS mm

    def to_moving(self, points: np.ndarray) -> np.ndarray:
        """Fixed points (K, D) LPS mm -> T(p + d(p)), by scipy."""
        return at(lps_map(self.matrix), map_points(points, self.d, self.frame))


def at(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def lps_map(matrix: np.ndarray) -> np.ndarray:
    flip = np.diag([-1.0, -1.0, *np.ones(len(matrix) - 2)])
    return flip @ matrix @ flip


def lps_place(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    return at(affine, index) * [-1, -1, 1][: len(affine) - 1]


Triple = tuple[float, float, float]


def turned(dim: int, degrees: Triple) -> np.ndarray:
    """About z (in 2-D only), y and x."""
    about = np.array(degrees) * ([1, 1, 1] if dim == 3 else [1, 0, 0])
    return Rotation.from_euler("zyx", about, degrees=True).as_matrix()[:dim, :dim]


def affine_of(dim: int, spacing: Triple, degrees: Triple, shape: tuple[int, ...], flip: int) -> np.ndarray:
    """Oblique, axis ``flip`` backwards, the centre at (4, -3, 6) mm."""
    affine = np.eye(dim + 1)
    affine[:dim, :dim] = turned(dim, degrees) * np.where(np.arange(dim) == flip, -1, 1) * spacing[:dim]
    affine[:dim, dim] = np.array([4.0, -3.0, 6.0])[:dim] - affine[:dim, :dim] @ (np.array(shape) - 1) / 2
    return affine


def inverted(d: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """e with ``p + d(p) = q  <=>  q + e(q) = p`` on the same grid: 60 fixed-point steps, scipy's interpolation."""
    places = lps_place(frame, np.indices(d.shape[1:]).reshape(len(d), -1).T)
    e = np.zeros_like(places)
    for _ in range(60):
        e = -(map_points(places + e, d, frame) - places - e)
    return e.T.reshape(d.shape)


def sitk_affine(matrix: np.ndarray) -> sitk.Transform:
    """RAS mm -> as a transform of LPS mm."""
    made, placed = sitk.AffineTransform(len(matrix) - 1), lps_map(matrix)
    made.SetMatrix(placed[:-1, :-1].ravel().tolist())
    made.SetTranslation(placed[:-1, -1].tolist())
    return made


def write_affine(path: Path, matrix: np.ndarray) -> Path:
    sitk.WriteTransform(sitk_affine(matrix), str(path))
    return path


def sitk_field(d: np.ndarray, frame: np.ndarray) -> sitk.Transform:
    """``d`` (D, *grid) LPS mm on ``frame``, grid voxel -> RAS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(d.T.astype(np.float64)), isVector=True)
    spacing = np.linalg.norm(frame[:-1, :-1], axis=0)
    flip = np.array([-1, -1, 1][: len(d)])
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flip[:, None] * frame[:-1, :-1] / spacing).ravel().tolist())
    image.SetOrigin((flip * frame[:-1, -1]).tolist())
    return sitk.DisplacementFieldTransform(image)


def chain(first: sitk.Transform, then: sitk.Transform) -> sitk.Transform:
    """What takes points through ``first``, then through ``then``."""
    both = sitk.CompositeTransform(first.GetDimension())
    both.AddTransform(then)  # the last one added is applied first
    both.AddTransform(first)
    return both


def write_case(folder: Path, ways: dict[str, sitk.Transform], spaces: dict[str, nib.Nifti1Image]) -> Path:
    folder.mkdir()
    about: dict[str, object] = {"format": "regpipe transform 1"}
    for name, transform in ways.items():
        file = folder / f"{name}.h5"
        sitk.WriteTransform(transform, str(file))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        about[name] = {"itk": file.name, "sha256": {file.name: digest}}
    for side, image in spaces.items():
        dim = 3 if image.shape[2:] else 2
        affine = image.affine[np.ix_([*range(dim), 3], [*range(dim), 3])]
        about[side] = {"file": f"{side}.nii.gz", "shape": [*image.shape], "affine": affine.tolist()}
    (folder / "transform.json").write_text(json.dumps(about))
    return folder


def make_pair(folder: Path, dim: int) -> Pair:
    rng = np.random.default_rng(dim)
    shapes = {"fixed": (36, 40, 16)[:dim], "moving": (40, 34, 30)[:dim]}
    grids = {
        "fixed": affine_of(dim, (1.1, 0.9, 2.5), (20, -10, 15), shapes["fixed"], 0),
        "moving": affine_of(dim, (1.0, 1.2, 1.4), (-12, 8, 5), shapes["moving"], 1),
    }
    frame = affine_of(dim, (3.0, 3.0, 3.0), (20, -10, 15), (40,) * dim, 0)
    noise = rng.standard_normal((dim, *(40,) * dim))
    d = np.stack([ndimage.gaussian_filter(n, 4) for n in noise])
    d *= 4 / np.abs(d).max()
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = turned(dim, (8, -5, 4)) @ np.diag([1.05, 0.96, 1.02][:dim])
    matrix[:dim, dim] = [1.5, -2.0, 1.0][:dim]
    images = {}
    for side, affine in grids.items():
        placed = np.eye(4)
        placed[np.ix_([*range(dim), 3], [*range(dim), 3])] = affine
        values = 100 * ndimage.gaussian_filter(rng.random(shapes[side]), 1.5).astype(np.float32)
        images[side] = nib.Nifti1Image(values, placed)
        nib.save(images[side], folder / f"{side}.nii.gz")
    ways = {
        "moving_to_fixed": chain(sitk_field(d, frame), sitk_affine(matrix)),
        "fixed_to_moving": chain(sitk_affine(np.linalg.inv(matrix)), sitk_field(inverted(d, frame), frame)),
    }
    case = write_case(folder / "case", ways, images)
    return Pair(case, folder / "fixed.nii.gz", folder / "moving.nii.gz", d, frame, matrix)


def nifti(path: Path) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_filename(path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nifti(path).dataobj)


def inner_points(image: Path, k: int = 300) -> np.ndarray:
    """Points (K, D) LPS mm in the inner part of an image."""
    array, affine, *_ = read_image(image)
    shape = np.array(array.shape)
    return lps_place(affine, np.random.default_rng(5).uniform(0.2, 0.8, (k, len(shape))) * (shape - 1))


def write_csv(path: Path, points: np.ndarray) -> Path:
    rows = [",".join(map(repr, point)) for point in points.tolist()]
    path.write_text(CSV[points.shape[1]] + "\n".join(rows) + "\n")
    return path


def simpleitk(image: Path, reference: Path, transform: Path, interpolator: int) -> np.ndarray:
    pulled = sitk.Resample(
        sitk.ReadImage(str(image)),
        sitk.ReadImage(str(reference)),
        sitk.ReadTransform(str(transform)),
        interpolator,
        0.0,
    )
    return sitk.GetArrayFromImage(pulled).T
