"""One file in, one array and one affine out; and the working grid that every image is put onto.

A path is a file, a folder with one DICOM series, or one frame of a film: ``film.nii.gz#4``, counted from 0;
``scan.png#mm`` is a picture whose resolution is used.
Arrays are indexed ``[x, y(, z)]``; affines are ``(D+1, D+1)`` float64, voxel index -> RAS mm, columns at right angles,
whatever the format. A picture (PNG, ...) is ``(W, H)`` with the affine ``diag(-1, -1, 1)``: its LPS mm are its
pixel indices.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import inv_ornt_aff
from scipy import ndimage

from regpipe.io import background, dicom, formats, pictures, planes
from regpipe.io.dicom import is_series
from regpipe.io.formats import PICTURE, SUFFIXES, PathLike, Source, locate, one_line, squeezed, unreadable, warn_once
from regpipe.io.geometry import carry, extent, is_affine, orientation, voxel_size
from regpipe.io.planes import Plane
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import opened, parse_json, replace_file

__all__ = ["PICTURE", "SUFFIXES", "PathLike", "is_series"]  # the readers' own, offered here too

FLAT = 0.01  # of a box's volume: what axes at an angle of less than half a degree to each other leave
GREATEST = 1e30  # value of a voxel; sums of them are float32, too


class Image(NamedTuple):
    """An image or label map and where it lies."""

    array: np.ndarray  # (*S)
    affine: np.ndarray  # (D+1, D+1) float64, voxel index -> RAS mm
    plane: Plane | None = None  # of one slice stored in 3-D, see ``io.planes``
    stored: np.ndarray | None = None  # the file's own affine, where its axes are sheared and the array's are not

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size (D,) in mm along the array axes."""
        return voxel_size(self.affine)


class Grid(NamedTuple):
    """The working grid of a cohort. Its place in space is each image's own: see ``to_grid``."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]  # mm


def stem(path: PathLike) -> str:
    """The file's name without its suffix (``a.nii.gz`` -> ``a``), with its frame's number; a folder's name."""
    file, frame = locate(path)
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), file.suffix)
    name = file.name if file.is_dir() else file.name[: len(file.name) - len(suffix)]
    return name if frame is None else f"{name}_{frame}"


def files(path: PathLike) -> list[Path]:
    """The files that an image's path stands for: of a series its DICOM files, of a frame its film."""
    file, _ = locate(path)
    return [*dicom.parts(file)] if file.is_dir() else [file]


def read_image(path: PathLike, file: BinaryIO | None = None) -> Image:
    """Read a 2-D or 3-D image -> float32 ``(*S)`` and RAS affine.

    NaN is no data, see ``io.background``. Warns where it takes a liberty: colour becomes grey; a sheared grid is
    resampled (linearly) onto the nearest one with axes at right angles, as no other tool's transform could name it;
    sform and qform differ.
    ``file``: the same, open already; see ``io.source``.

    Raises:
        InputError: missing, unreadable, truncated; a film without a frame; complex, constant, NaN everywhere, infinite,
            or too large or alike for single precision.
    """
    with opened_image(path, file) as source:
        return image_of(path, source, voxels_of(source, path))


def image_of(path: PathLike, source: Source, array: np.ndarray) -> Image:
    """What ``read_image`` gives of a file's voxels (*S), and raises."""
    low, high = float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))  # NaN is no data
    if not math.isfinite(low + high):
        raise InputError(f"{path}: holds infinite values, or NaN alone; make NaN of what is no data, or leave it out")
    if low == high:
        raise InputError(f"{path}: is constant ({low:g}); leave it out")
    if max(-low, high) > GREATEST or high - low < 1 / GREATEST:
        raise InputError(f"{path}: its values reach from {low:g} to {high:g}, beyond single precision; rescale them")
    return straightened(Image(array.astype(np.float32), source.affine, source.plane), path, order=1)


def stamps(path: PathLike) -> list[tuple[Path, int, int]]:
    """File, size and time of each file that an image's path stands for and that is there."""
    found = [(file, file.stat()) for file in files(path) if file.exists()]
    return [(file, about.st_size, about.st_mtime_ns) for file, about in found]


def header(path: PathLike, file: BinaryIO | None = None, *, film: bool = False) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and RAS affine that ``read_image`` gives, from the header alone; ``film``: of any frame."""
    with opened_image(path, file, film=film, values=film) as source:
        return _straight_grid(source.shape[: len(source.affine) - 1], source.affine)


def count_of(path: PathLike) -> int:
    """How many images of one grid a file holds: frames, a picture's colours, values at each place."""
    with opened_image(path, film=True, values=True) as source:
        return source.shape[3] if len(source.shape) == 4 else 1


def plane_of(path: PathLike, file: BinaryIO | None = None) -> Plane | None:
    """Where one slice stored in 3-D lies, from the header alone; None of all else."""
    with opened_image(path, file) as source:
        return source.plane


def place(path: PathLike, *, film: bool = False) -> tuple[tuple[int, ...], np.ndarray]:
    """The same; of one slice stored in 3-D as it stands there: shape (X, Y, 1), affine (4, 4)."""
    with opened_image(path, film=film) as source:
        shape, affine = _straight_grid(source.shape[: len(source.affine) - 1], source.affine)
    if source.plane is None:
        return shape, affine
    return planes.with_axis(shape, source.plane), planes.placed(affine, source.plane)


def geometry(path: PathLike) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and spacing (mm) of an image on its working grid's axes, from the header alone."""
    return on_own_axes(*header(path))


def on_own_axes(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The same of an image whose header is known."""
    shape, affine = _canonical(shape, affine)
    return shape, voxel_size(affine)


@contextlib.contextmanager
def opened_image(
    path: PathLike, file: BinaryIO | None = None, *, label: bool = False, film: bool = False, values: bool = False
) -> Iterator[Source]:
    """The header, checked, while the file is open (``file``). Frames: ``film``, and ``values`` at each place."""
    with opened_file(path, file) as stream:
        yield _open(path, stream, label, film, values)


def opened_file(path: PathLike, file: BinaryIO | None = None) -> contextlib.AbstractContextManager[BinaryIO | None]:
    """The file of an image, open, or ``file``, which stays open; None of a folder with a DICOM series."""
    where, _ = locate(path)
    return contextlib.nullcontext(file) if file or where.is_dir() else opened(where)


def _open(path: PathLike, stream: BinaryIO | None, label: bool, film: bool, values: bool) -> Source:
    """The header, checked; of a film, or of several values, the one that ``path`` asks for."""
    file, frame = locate(path)
    try:
        source = _reader(path, file, stream, label, values or frame is not None)
    except InputError:
        raise
    except Exception as cause:  # four libraries, each with its own errors for a broken file
        raise unreadable(path, cause) from cause
    if source.dtype.kind not in "biuf":
        raise InputError(f"{path}: {source.dtype} voxels; save one real value per voxel")
    if frame is not None:
        source = _one_frame(source, file, frame)
    if min(source.shape) < 1:
        raise InputError(f"{path}: its shape is {source.shape}; mend its header")
    if len(source.shape) == 4 and not film and not (label and not file.name.lower().endswith(PICTURE)):
        last = source.shape[3] - 1
        raise InputError(f"{path}: holds {last + 1} frames; ask for one frame: write #0 to #{last} after its name")
    if not 2 <= len(source.shape) <= 3 + (label or film):
        raise InputError(f"{path}: its shape is {source.shape}; an image is 2-D or 3-D, or a film of such")
    if min(squeezed(source.shape[:3])) < 2:
        raise InputError(f"{path}: is one voxel thick (its shape is {source.shape}); leave it out")
    _check_affine(source.affine, path)
    limits.require_room(path, source.shape)
    limits.require_room(path, _straight_grid(source.shape[: len(source.affine) - 1], source.affine)[0])
    return source


def _reader(path: PathLike, file: Path, stream: BinaryIO | None, label: bool, values: bool) -> Source:
    name = file.name.lower()
    if stream is None:
        if not is_series(file):
            raise InputError(f"{file}: a folder without DICOM files is no image; give a file")
        return dicom.open_series(file)
    if name.endswith(PICTURE):
        return pictures.open_picture(file, stream, label=label, values=values, mm=formats.in_mm(path))
    if formats.in_mm(path):
        raise InputError(f"{path}: {formats.IN_MM} is for pictures, leave it out")
    if name.endswith(formats.NIFTI):
        return formats.open_nifti(file, stream, values=values)
    if name.endswith(formats.ITK):
        return formats.open_itk(file, stream, values=values)
    if name.endswith(formats.DICOM) or dicom.is_dicom(file):
        return dicom.open_dicom(file)
    raise InputError(f"{file}: unknown format; use one of {' '.join(SUFFIXES)}")


def _one_frame(source: Source, file: Path, frame: int) -> Source:
    if len(source.shape) != 4:
        raise InputError(f"{file}: has no frames (its shape is {source.shape}); leave out #{frame}")
    if frame >= source.shape[3]:
        raise InputError(f"{file}: has no frame {frame}; its {source.shape[3]} frames are counted from 0")
    return source._replace(shape=squeezed(source.shape[:3]), voxels=lambda _: source.voxels(frame))


def _check_affine(affine: np.ndarray, path: PathLike) -> None:
    size = voxel_size(affine)
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine)) > FLAT * np.prod(size):
        raise InputError(f"{path}: its affine is singular or not finite; mend its header")
    formats.require_voxel_size(path, size)


def voxels_of(source: Source, path: PathLike) -> np.ndarray:
    """All voxels of an open image (*S). Raises InputError where the file breaks off."""
    try:
        return source.voxels(None)
    except InputError:
        raise
    except Exception as cause:  # as in `_open`: a truncated file shows only here
        raise unreadable(path, cause) from cause


def straightened(image: Image, path: PathLike, *, order: int) -> Image:
    """The image, resampled if its axes are sheared."""
    shape, affine = _straight_grid(image.array.shape, image.affine)
    if affine is image.affine:
        return image
    warn_once(f"{path}: its axes are not at right angles; resampled onto the nearest grid that has them, {shape}")
    turned = functools.partial(resample, affine=affine, shape=shape, order=order)
    return image._replace(array=background.around_gaps(image, turned, turned), affine=affine, stored=image.affine)


def _straight_grid(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The grid itself, or for a sheared one (cosines above 1e-3) the nearest at right angles that covers it.

    Its directions are the orthogonal polar factor of the sheared ones, its spacing is the same.
    """
    size = voxel_size(affine)
    axes = affine[:-1, :-1] / size
    if np.abs(axes.T @ axes - np.eye(len(size))).max() <= 1e-3:
        return shape, affine
    u, _, v = np.linalg.svd(axes)
    straight = affine.copy()
    straight[:-1, :-1] = u @ v * size
    low, high = extent(shape, affine, straight)
    n = np.ceil(high - low - 1e-3)  # not a voxel more for the last digit of a label's affine
    straight[:-1, -1] = apply_affine(straight, (low + high - n + 1) / 2)
    return tuple(int(k) for k in n), straight


def _canonical(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine with the axes permuted and flipped to the closest RAS; 2-D to LPS, as pictures are stored."""
    turn = orientation(affine)
    return tuple(shape[i] for i in np.argsort(turn[:, 0])), affine @ inv_ornt_aff(turn, shape)


def to_grid(image: Image, grid: Grid) -> np.ndarray:
    """Affine (D+1, D+1), working voxel -> RAS mm, that lays the working grid over this image.

    Along the image's own axes, permuted and flipped to the closest RAS, in 2-D to LPS (a picture's own). The
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


def resample(
    image: Image, affine: np.ndarray, shape: Sequence[int], *, order: int, field: np.ndarray | None = None
) -> np.ndarray:
    """Sample ``image`` on the grid ``shape`` with ``affine`` (voxel -> RAS mm), which may be a homography.

    ``field`` (D, *shape): in voxels of the grid, for a look at ``x + field(x)``. Order 1 for images (the rim continues
    outside), 0 for labels (0 outside). Nothing is smoothed before a coarser grid.
    """
    pull, mode = np.linalg.inv(image.affine) @ affine, "nearest" if order else "grid-constant"
    if field is not None or not is_affine(affine):
        at = carry(pull, np.moveaxis(np.indices(shape) + (0 if field is None else field), 0, -1))
        return ndimage.map_coordinates(image.array, np.moveaxis(at, -1, 0), order=order, mode=mode)
    pull = np.where(np.abs(pull - np.rint(pull)) < 1e-6, np.rint(pull), pull)  # a copy stays a copy
    if order == 0:  # a tie between two labels falls to the same side however the file is stored
        pull[:-1, -1] -= 1e-4 * pull[:-1, :-1].sum(axis=1)

    def sample(array: np.ndarray) -> np.ndarray:
        return ndimage.affine_transform(array, pull, output_shape=tuple(shape), order=order, mode=mode)

    return sample(image.array) if order else exactly(sample, image.array)


def exactly(sample: Callable[[np.ndarray], np.ndarray], labels: np.ndarray) -> np.ndarray:
    """``sample`` of labels (any shape), whatever their ids: it counts in doubles, which hold whole numbers up to 2^53.

    Of larger ones it gets their places in the list of ids, 0 for 0.
    """
    if labels.dtype.kind not in "iu" or not labels.size or max(-int(labels.min()), int(labels.max())) < 2**53:
        return sample(labels)
    ids = np.r_[labels.dtype.type(0), np.unique(labels[labels != 0])]
    places = np.searchsorted(ids[1:], labels) + 1
    places[labels == 0] = 0
    return ids[sample(places.astype(np.int32))]


def normalise(array: np.ndarray, *, like: np.ndarray | None = None) -> np.ndarray:
    """float32 in [0, 1]: percentiles 0.5 and 99.5 (of ``like`` where given) become 0 and 1, or the extremes."""
    like = array if like is None else like
    low, high = np.percentile(like, [0.5, 99.5])
    if high <= low:
        low, high = float(like.min()), float(like.max())
    scaled = (array.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-30))
    return np.clip(scaled, 0, 1)


def make_grid(shape: Sequence[int], spacing: Sequence[float]) -> Grid:
    """A checked Grid. Raises InputError where shape and spacing do not go together."""
    sound = all(0 < n < math.inf for n in (*shape, *spacing))
    if len(shape) not in (2, 3) or len(shape) != len(spacing) or not sound:
        raise InputError(f"no working grid has shape {[*shape]} and spacing {[*spacing]}")
    return Grid(tuple(int(n) for n in shape), tuple(float(mm) for mm in spacing))


def save_grid(path: PathLike, grid: Grid) -> None:
    """Write a grid as JSON: ``{"shape": [...], "spacing": [...]}``."""
    text = json.dumps({"shape": list(grid.shape), "spacing": list(grid.spacing)}) + "\n"
    replace_file(path, text.encode())


def load_grid(path: PathLike) -> Grid:
    """Read what ``save_grid`` wrote. Raises InputError for anything else."""
    try:
        data = parse_json(Path(path).read_bytes())
        grid = make_grid(data["shape"], data["spacing"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise InputError(f"{path}: no working grid ({one_line(cause)}); make it anew") from cause
    limits.require_room(path, grid.shape)
    return grid
