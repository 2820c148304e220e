"""One file in, one array and one affine out; and the working grid that every image is put onto.

Arrays are indexed ``[x, y(, z)]``; affines are ``(D+1, D+1)`` float64, voxel index -> RAS mm,
whatever the format (ITK's LPS is turned here). A picture (PNG, ...) is ``(W, H)`` with the affine
``diag(-1, -1, 1)``: its LPS mm are its pixel indices.
"""

from __future__ import annotations

import csv
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from PIL import Image as Picture
from scipy import ndimage

from regpipe.errors import InputError
from regpipe.files import replace_file

log = logging.getLogger(__name__)

PathLike = str | Path

NIFTI = (".nii.gz", ".nii", ".hdr", ".img")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
PICTURE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES = NIFTI + ITK + PICTURE


class Image(NamedTuple):
    """An image or label map and where it lies."""

    array: np.ndarray  # (*S)
    affine: np.ndarray  # (D+1, D+1) float64, voxel index -> RAS mm

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size (D,) in mm along the array axes."""
        return voxel_size(self.affine)


class Grid(NamedTuple):
    """The working grid of a cohort. Its place in space is each image's own: see ``to_grid``."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]  # mm


class _Source(NamedTuple):
    """A file whose header has been read and whose voxels have not."""

    shape: tuple[int, ...]  # as stored, without singleton axes at the end
    affine: np.ndarray
    dtype: np.dtype
    voxels: Callable[[], np.ndarray]


def stem(path: PathLike) -> str:
    """The file's name without its suffix (``a.nii.gz`` -> ``a``)."""
    name = Path(path).name
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), Path(name).suffix)
    return name[: len(name) - len(suffix)]


def read_image(path: PathLike) -> Image:
    """Read a 2-D or 3-D image -> float32 ``(*S)`` and RAS affine. Colour becomes grey and warns.

    Raises:
        InputError: missing, unreadable, truncated; complex, 4-D, constant, NaN or infinite.
    """
    source = _open(path)
    array = _voxels(source, path).astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinite values; replace them by the background's")
    if array.min() == array.max():
        raise InputError(f"{path}: is constant ({array.flat[0]:g}); leave it out")
    return Image(array, source.affine)


def read_label(path: PathLike, *, landmark_channels: int | None = None) -> tuple[Image, np.ndarray | None]:
    """Read a label map -> int32 ``(*S)``, and the landmarks held as channels.

    In a 4-D file (channels last) channel i becomes label i+1, the later one winning; with
    ``landmark_channels=n`` only those before n do, and each from n on is one landmark.

    Returns:
        The map, and the landmarks' centroids ``(K, D)`` in voxels of this file (empty channel:
        NaN), or None where ``landmark_channels`` is None.

    Raises:
        InputError: missing, unreadable, not integral, more than 4-D.
    """
    source = _open(path, label=True)
    array = _voxels(source, path)
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise InputError(f"{path}: labels are whole numbers, these are not; is it an image?")
    channels = []
    if array.ndim == 4:
        channels = [_squeeze_plane(array[..., i]) for i in range(array.shape[3])]
        array = np.zeros(channels[0].shape)
        for i, channel in enumerate(channels[:landmark_channels]):
            array[channel != 0] = i + 1
    labels = Image(array.astype(np.int32), source.affine)
    if landmark_channels is None:
        return labels, None
    return labels, _centroids(channels[landmark_channels:], array.ndim)


def _squeeze_plane(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.shape[-1] == 1 else array


def _centroids(channels: Sequence[np.ndarray], dim: int) -> np.ndarray:
    found = (np.argwhere(c) for c in channels)
    rows = [at.mean(axis=0) if len(at) else np.full(dim, np.nan) for at in found]
    return np.array(rows).reshape(-1, dim)


def read_landmarks(path: PathLike) -> np.ndarray:
    """Read a CSV with header ``x,y`` or ``x,y,z`` -> (K, D) LPS mm; an empty cell is NaN."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = [{(k or "").strip().lower(): v for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise InputError(f"{path}: cannot be read ({_one_line(cause)})") from cause
    if not rows or not {"x", "y"} <= rows[0].keys():
        raise InputError(f"{path}: needs the header x,y or x,y,z and a row per landmark (LPS mm)")
    axes = [a for a in "xyz" if a in rows[0]]
    try:
        return np.array([[float((row[a] or "").strip() or "nan") for a in axes] for row in rows])
    except ValueError as cause:
        raise InputError(f"{path}: {_one_line(cause)}; coordinates are numbers in LPS mm") from cause


def geometry(path: PathLike) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and spacing (mm) of an image on its working grid's axes, from the header alone."""
    source = _open(path)
    shape, affine = _canonical(source.shape, source.affine)
    return shape, voxel_size(affine)


def voxel_size(affine: np.ndarray) -> np.ndarray:
    """Voxel size (D,) in mm: the lengths of the affine's columns."""
    return np.linalg.norm(affine[:-1, :-1], axis=0)


def _open(path: PathLike, *, label: bool = False) -> _Source:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown format; use one of {' '.join(SUFFIXES)}")
    try:
        if name.endswith(PICTURE):
            source = _open_picture(path, label)
        else:
            source = _open_nifti(path) if name.endswith(NIFTI) else _open_itk(path)
    except InputError:
        raise
    except Exception as cause:  # three libraries, each with its own errors for a broken file
        raise _unreadable(path, cause) from cause
    if source.dtype.kind not in "biuf":
        raise InputError(f"{path}: {source.dtype} voxels; save one real value per voxel")
    if not 2 <= len(source.shape) <= 3 + label:
        raise InputError(f"{path}: its shape is {source.shape}; save one frame per file, 2-D or 3-D")
    if not abs(np.linalg.det(source.affine)) > 0:
        raise InputError(f"{path}: its affine is singular; mend its header")
    return source


def _voxels(source: _Source, path: PathLike) -> np.ndarray:
    try:
        return source.voxels()
    except Exception as cause:  # as above: a truncated file shows only here
        raise _unreadable(path, cause) from cause


def _unreadable(path: PathLike, cause: Exception) -> InputError:
    return InputError(f"{path}: broken or truncated ({_one_line(cause)}); export it again")


def _one_line(cause: Exception) -> str:
    return (" ".join(str(cause).split()) or type(cause).__name__)[-160:]


def _open_nifti(path: Path) -> _Source:
    image: Any = nib.load(path)
    shape = _squeezed(image.shape)
    affine, spacing = np.asarray(image.affine, np.float64), image.header.get_zooms()
    # (X, Y) and (X, Y, 1, C) are 2-D: the plane's block of the affine, unless it is not axial.
    if len(shape) == 2 or (len(shape) == 4 and shape[2] == 1):
        affine = affine[np.ix_([0, 1, 3], [0, 1, 3])]
        if abs(np.linalg.det(affine)) < 1e-3 * spacing[0] * spacing[1]:
            affine = np.diag([float(spacing[0]), float(spacing[1]), 1.0])
    return _Source(shape, affine, image.get_data_dtype(), lambda: np.asanyarray(image.dataobj).reshape(shape))


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _open_itk(path: Path) -> _Source:
    import itk  # takes a second, and most cohorts are NIfTI

    io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise InputError(f"{path}: ITK does not recognise its header; export it again")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    if io.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: {io.GetNumberOfComponents()} values per voxel; save one")
    shape = _squeezed(int(io.GetDimensions(i)) for i in range(io.GetNumberOfDimensions()))
    dim = min(len(shape), 3)
    affine = np.eye(dim + 1)
    for i in range(dim):
        affine[:dim, i] = np.array(io.GetDirection(i)[:dim]) * io.GetSpacing(i)
        affine[i, dim] = io.GetOrigin(i)
    affine[:2] *= -1  # LPS -> RAS

    def voxels() -> np.ndarray:
        # ITK's Python has no int8 or int64 images: read as double, exact for every label.
        return itk.array_from_image(itk.imread(str(path), itk.D)).T.reshape(shape)

    return _Source(shape, affine, np.dtype("f8"), voxels)


def _open_picture(path: Path, label: bool) -> _Source:
    with Picture.open(path) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{path}: holds {frames} frames; save one frame per file")
        size, mode = picture.size, picture.mode
    indexed = mode in ("L", "F", "1") or mode.startswith("I") or (label and mode == "P")
    if label and not indexed:
        raise InputError(f"{path}: a label map in colour ({mode}); save one number per pixel")
    read = functools.partial(_pixels, path, indexed)
    return _Source(size, np.diag([-1.0, -1.0, 1.0]), np.dtype("f4"), read)


def _pixels(path: Path, indexed: bool) -> np.ndarray:
    with Picture.open(path) as picture:
        if indexed:
            return np.array(picture).T
        rgb = np.array(picture.convert("RGB"))
        if (rgb != rgb[..., :1]).any():
            log.warning("%s: is in colour; its luminance is used", path)
        return np.array(picture.convert("RGB").convert("L")).T


def _canonical(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine with the axes permuted and flipped to the closest RAS (2-D: as they are)."""
    if len(shape) == 2:
        return shape, affine
    orientation = io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    return tuple(shape[i] for i in order), affine @ inv_ornt_aff(orientation, shape)


def to_grid(image: Image, grid: Grid) -> np.ndarray:
    """Affine (D+1, D+1), working voxel -> RAS mm, that lays the working grid over this image.

    3-D: along the image's own axes, permuted and flipped to the closest RAS; 2-D: as stored. The
    centres coincide; where the grid is not the finer one, to within half an image voxel, so that
    the first working voxel lies on an image voxel: equal spacing then means copying, without
    blur and without labels rounded half a voxel to one side.

    Raises:
        InputError: the grid has another dimension.
    """
    shape, affine = _canonical(image.array.shape, image.affine)
    if len(shape) != len(grid.shape):
        raise InputError(f"a {len(shape)}-D image does not fit the working grid {grid.shape}")
    ratio = np.array(grid.spacing) / voxel_size(affine)
    offset = (np.array(shape) - 1) / 2 - ratio * (np.array(grid.shape) - 1) / 2
    # 0.4999, not 0.5: a tie must fall to the same side whatever the last digit of the spacing.
    offset = np.where(ratio > 0.999, np.floor(offset + 0.4999), offset)
    placed = np.diag([*ratio, 1.0])
    placed[:-1, -1] = offset
    return affine @ placed


def resample(image: Image, affine: np.ndarray, shape: Sequence[int], *, order: int) -> np.ndarray:
    """Sample ``image`` on the grid ``shape`` with ``affine`` (voxel -> RAS mm).

    Order 1 for images (the rim continues outside), 0 for labels (0 outside). Nothing is smoothed
    before a coarser grid.
    """
    pull = np.linalg.inv(image.affine) @ affine
    pull = np.where(np.abs(pull - np.rint(pull)) < 1e-6, np.rint(pull), pull)  # a copy stays a copy
    if order == 0:  # a tie between two labels falls to the same side however the file is stored
        pull[:-1, -1] -= 1e-4 * pull[:-1, :-1].sum(axis=1)
    mode = "nearest" if order else "grid-constant"
    return ndimage.affine_transform(image.array, pull, output_shape=tuple(shape), order=order, mode=mode)


def normalise(array: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]: percentiles 0.5 and 99.5 become 0 and 1 (or the extremes)."""
    low, high = np.percentile(array, [0.5, 99.5])
    if high <= low:
        low, high = float(array.min()), float(array.max())
    scaled = (array.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-30))
    return np.clip(scaled, 0, 1)


def make_grid(shape: Sequence[int], spacing: Sequence[float]) -> Grid:
    """A checked Grid. Raises InputError where shape and spacing do not go together."""
    if len(shape) not in (2, 3) or len(shape) != len(spacing) or min(*shape, *spacing) <= 0:
        raise InputError(f"no working grid has shape {[*shape]} and spacing {[*spacing]}")
    return Grid(tuple(int(n) for n in shape), tuple(float(mm) for mm in spacing))


def save_grid(path: PathLike, grid: Grid) -> None:
    """Write a grid as JSON: ``{"shape": [...], "spacing": [...]}``."""
    text = json.dumps({"shape": list(grid.shape), "spacing": list(grid.spacing)}) + "\n"
    replace_file(path, text.encode())


def load_grid(path: PathLike) -> Grid:
    """Read what ``save_grid`` wrote. Raises InputError for anything else."""
    try:
        data = json.loads(Path(path).read_text())
        return make_grid(data["shape"], data["spacing"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise InputError(f"{path}: no working grid ({_one_line(cause)}); make it anew") from cause
