"""Displacements in native space: from the network's, to and from files, and applied to images and points.

Inside regpipe a displacement is in voxels of the working grid (see ``fields.algebra``). Here it
becomes ITK's: at each voxel of the fixed image's own grid the vector ``d`` (D, *S) in **LPS mm**
from the fixed point to the moving one, ``p_m = p_f + d(p_f)``. Affines stay voxel index -> RAS mm;
RAS and LPS differ by ``L = diag(-1, -1, 1)``. The other direction is the same with the two images
exchanged and the inverse displacement. No function here changes its arguments.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from scipy import ndimage

from regpipe.io import background, pictures
from regpipe.io.formats import load_nifti, nifti_affine, nifti_array
from regpipe.io.geometry import LPS, voxel_size
from regpipe.io.images import PICTURE, Image, PathLike, exactly
from regpipe.io.nifti_place import placed_image
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import opened, replace_hashed

WRITABLE = (".nii.gz", ".nii")
VECTOR = 1007  # the NIfTI intent whose values ITK takes as they are, that is as LPS; 1006 is RAS


def native_displacement(u: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray, image: Image) -> np.ndarray:
    """The network's displacement on the fixed image's own grid, in LPS mm.

    ``d = L (moving_affine (i + u(i)) - p)`` at each native voxel's place ``p = fixed_affine i``.

    Args:
        u: (D, *grid), voxels of the working grid; linear between them, its rim's value outside.
        fixed_affine: (D+1, D+1), working voxel -> RAS mm of the fixed image.
        moving_affine: the same of the moving image.
        image: the fixed image (of its array only the shape counts).

    Returns:
        (D, *S) float32, S the shape of ``image``.
    """
    places = _move(image.affine, _indices(image.array.shape))
    at = _move(np.linalg.inv(fixed_affine), places)
    moved = _move(moving_affine, at + interpolate(u, at))
    return _flip(moved - places).astype(np.float32)


def native_lengths(error: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray, image: Image) -> np.ndarray:
    """Of an error along each axis, (D, *grid) working voxels, the length in mm of the moving image -> (*S) float32.

    Arguments as ``native_displacement``'s. A homography or a field before it is not looked at.
    """
    at = _move(np.linalg.inv(fixed_affine), _move(image.affine, _indices(image.array.shape)))
    sides = _column(voxel_size(moving_affine), at.ndim)
    return np.linalg.norm(sides * interpolate(error, at), axis=0).astype(np.float32)


def native_jacobian(d: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """det of the map ``p -> p + d(p)`` at each voxel of d's grid -> (*S) float32; 1 keeps the volume."""
    import torch  # takes a second or two to import, and resampling needs none of it

    from regpipe.fields.algebra import jacobian_determinant

    u = np.tensordot(np.linalg.inv(affine[:-1, :-1]), _flip(np.asarray(d, np.float64)), axes=1)  # in voxels
    return jacobian_determinant(torch.from_numpy(u)[None])[0].numpy()


def grid_displacement(
    d: np.ndarray, affine: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """The reverse: ``d`` (D, *S) LPS mm on the grid of ``affine`` -> u (D, *shape) in working voxels.

    ``u = moving_affine^-1 (p + L d(p)) - i`` at each working voxel's place ``p = fixed_affine i``.
    """
    at = _indices(shape)
    places = _flip(_move(fixed_affine, at)).reshape(len(at), -1).T  # (K, D) LPS mm
    moved = map_points(places, d, affine).T.reshape(at.shape)
    return _move(np.linalg.inv(moving_affine), _flip(moved)) - at


def resample_through(moving: Image, d: np.ndarray, affine: np.ndarray, *, order: int, fill: float = 0.0) -> np.ndarray:
    """The moving image pulled once through ``d`` (D, *S) LPS mm onto its grid -> (*S).

    Order 1 for images, 0 for labels; ``fill`` outside the moving image, as ITK's resampling has it: a
    voxel reaches half its size beyond its centre. NaN stays NaN. ``affine`` is that of d's grid.

    Raises:
        InputError: the image's dimension is not the displacement's.
    """
    shape = moving.array.shape
    if len(shape) != len(d):
        raise InputError(f"a {len(d)}-D transform does not apply to a {len(shape)}-D image")
    places = _move(affine, _indices(d.shape[1:])) + _flip(d)
    at = _move(np.linalg.inv(moving.affine), places)
    last = _column(np.array(shape) - 0.5, at.ndim)
    inside = ((at >= -0.5) & (at <= last)).all(axis=0)

    def sample(array: np.ndarray) -> np.ndarray:
        # Not mode="constant": that loses the rim of an untouched image to the last digit of `at`.
        return ndimage.map_coordinates(array, at, order=order, mode="nearest")

    def pull(image: Image) -> np.ndarray:
        return sample(image.array) if order else exactly(sample, image.array)

    values = background.around_gaps(moving, pull, pull)
    return np.where(inside, values, values.dtype.type(fill))


def map_points(points: np.ndarray, d: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Fixed points (K, D) LPS mm -> their moving points, with ``d`` (D, *S) LPS mm on ``affine``.

    Linear between voxels; beyond the grid its rim's value (ITK: none at all). NaN stays NaN.
    """
    lps = np.asarray(points, np.float64).T  # (D, K)
    at = _move(np.linalg.inv(affine), _flip(lps))
    return (lps + interpolate(d, np.nan_to_num(at))).T


def write_displacement(path: PathLike, d: np.ndarray, affine: np.ndarray) -> str:
    """Write ``d`` (D, *S) LPS mm as the NIfTI vector field that ITK, ANTs and 3D Slicer read; returns its SHA-256.

    Shape (X, Y, Z, 1, 3), or (X, Y, 1, 1, 2) for 2-D; float32; intent 1007. Same input, same bytes.

    Raises:
        InputError: the suffix is not .nii or .nii.gz.
    """
    if not str(path).lower().endswith(WRITABLE):
        raise InputError(f"{path}: displacements are NIfTI; name it .nii.gz")
    return replace_hashed(path, displacement_bytes(d, affine, compressed=str(path).lower().endswith(".gz")))


def displacement_bytes(d: np.ndarray, affine: np.ndarray, *, compressed: bool = True) -> bytes:
    """The file that ``write_displacement`` writes."""
    shape = (*d.shape[1:], 1, 1)[:4]
    vectors = np.moveaxis(np.asarray(d, np.float32), 0, -1).reshape(*shape, len(d))
    return _nifti(vectors, affine, compressed=compressed, intent="vector")


def read_displacement(path: PathLike, file: BinaryIO | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read what ``write_displacement`` (or ITK) wrote -> d (D, *S) float32 LPS mm, RAS affine.

    ``file``: the same, open already.

    Raises:
        InputError: missing or broken, or another kind of NIfTI.
    """
    try:
        with contextlib.nullcontext(file) if file else opened(path) as stream:
            image = load_nifti(path, stream)
            limits.require_room(path, image.shape, 4)
            vectors = nifti_array(image).astype(np.float32)
            affine = nifti_affine(path, image)
    except InputError:
        raise
    except Exception as cause:  # nibabel's, gzip's and the system's errors for a broken file
        reason = " ".join(str(cause).split())
        raise InputError(f"{path}: not a readable NIfTI ({reason}); register again") from cause
    dim = vectors.shape[-1]
    intent = int(image.header["intent_code"])
    if vectors.ndim != 5 or dim not in (2, 3) or vectors.shape[dim:4] != (1,) * (4 - dim):
        raise InputError(f"{path}: shape {vectors.shape} is no displacement field's (X, Y, Z, 1, 3)")
    if intent != VECTOR:
        raise InputError(f"{path}: NIfTI intent {intent}; give a vector field in LPS mm ({VECTOR})")
    keep = [*range(dim), 3]
    d = np.moveaxis(vectors.reshape(*vectors.shape[:dim], dim), -1, 0)
    return np.ascontiguousarray(d), affine[np.ix_(keep, keep)]


def write_image(path: PathLike, array: np.ndarray, affine: np.ndarray) -> str:
    """Write an image or label map (*S) as NIfTI, its dtype kept, or as a grey picture by suffix; returns its SHA-256.

    A picture (2-D only) has no affine, and is 8-bit, or 16-bit where a value exceeds 255; real
    values are rounded. Same input, same bytes.

    Raises:
        InputError: an unknown suffix, or an array that the picture format cannot hold.
    """
    name = str(path).lower()
    if name.endswith(WRITABLE):
        kept = array.astype(np.uint8) if array.dtype == bool else array
        return replace_hashed(path, _nifti(kept, affine, compressed=name.endswith(".gz")))
    if name.endswith(PICTURE):
        return replace_hashed(path, _picture(path, array))
    raise InputError(f"{path}: unknown format; use one of {' '.join(WRITABLE + PICTURE)}")


def _indices(shape: Sequence[int]) -> np.ndarray:
    return np.indices(shape, dtype=np.float64)


def _column(values: np.ndarray, ndim: int) -> np.ndarray:
    return values.reshape(-1, *[1] * (ndim - 1))


def _move(affine: np.ndarray, at: np.ndarray) -> np.ndarray:
    """``affine`` (D+1, D+1) applied to coordinates (D, ...)."""
    matrix = np.asarray(affine, np.float64)
    return np.tensordot(matrix[:-1, :-1], at, axes=1) + _column(matrix[:-1, -1], at.ndim)


def _flip(vectors: np.ndarray) -> np.ndarray:
    """RAS <-> LPS of vectors or points (D, ...): ``L = diag(-1, -1, 1)``, or its 2-D block."""
    return _column(LPS[: len(vectors)], vectors.ndim) * vectors


def interpolate(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A field (D, *S) at voxel coordinates (D, ...), linear, the rim's value outside."""
    channels = [np.asarray(channel, np.float64) for channel in field]
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in channels])


def _nifti(array: np.ndarray, affine: np.ndarray, *, compressed: bool, intent: str = "none") -> bytes:
    image = placed_image(array, affine)
    image.header.set_intent(intent)
    data: bytes = image.to_bytes()
    return gzip.compress(data, compresslevel=1, mtime=0) if compressed else data  # no time stamp: same bytes


def _picture(path: PathLike, array: np.ndarray) -> bytes:
    values = np.rint(array)
    if array.ndim != 2 or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: a picture holds 2-D values from 0 to 65535; name it .nii.gz")
    pixels = values.astype(np.uint8 if values.max() <= 255 else np.uint16).T  # rows are y
    return pictures.encoded(path, pixels)
