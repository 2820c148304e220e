"""Resamples images through ITK transforms; chooses the interpolation, and the type and format of the result.

``auto`` takes ``linear`` for images and ``nearest`` for label maps: see ``io.labels``, how they are told. ``label``
draws smoother borders than ``nearest``: each label's indicator is interpolated linearly and the largest wins.
``bspline`` is cubic and may overshoot the range of the image a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from regpipe.io import background, itk_bridge, pictures
from regpipe.io.formats import DICOM, ITK, NIFTI, PICTURE, SUFFIXES, Source, locate
from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image, exactly, header, image_of, opened_image, read_image, straightened, voxels_of
from regpipe.io.itk_files import image_bytes
from regpipe.io.labels import ids_of, is_label_map, whole_numbers
from regpipe.transforms import displacement
from regpipe.transforms.read import Space
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

INTERPOLATIONS = ("auto", "linear", "bspline", "nearest", "label")
INTERPOLATORS = {"linear": ("Linear", "D"), "nearest": ("NearestNeighbor", "D"), "bspline": ("BSpline", "DF")}  # ITK's
# The result's suffix for formats of several files, and for lossy ones.
WRITTEN = {".hdr": ".nii.gz", ".img": ".nii.gz", ".mhd": ".mha", ".nhdr": ".nrrd"}
WRITTEN |= {".jpg": ".png", ".jpeg": ".png", ".gif": ".png", ".webp": ".png"} | dict.fromkeys(DICOM, ".nii.gz")
WRITTEN |= dict.fromkeys((".jfif", ".jp2", ".avif", ".heic", ".heif"), ".png")


def read_voxels(path: Path, interpolation: str, file: BinaryIO | None = None) -> tuple[Image, np.dtype, str]:
    """An image or label map, the type that its result is written as, and the interpolation that ``auto`` stands for.

    ``file``: the same, open already.

    Raises:
        InputError: as ``read_image``; ``label`` of values that are not whole.
    """
    if interpolation in ("linear", "bspline"):
        return read_image(path, file), np.dtype(np.float32), interpolation
    header(path, file)  # refuses several frames, which a label map would take for channels
    stored = _stored(path, file, required=interpolation == "label")
    if stored is None:
        return read_image(path, file), np.dtype(np.float32), interpolation.replace("auto", "linear")
    array, source, dtype = stored
    label = interpolation != "auto" or is_label_map(path, array, source.label)
    whole = whole_numbers(array) if label else None
    if whole is None and interpolation == "label":
        raise InputError(f"{path}: labels are whole numbers, these are not; is it an image?")
    if whole is not None:
        image = straightened(Image(whole, source.affine, source.plane), path, order=0)
    else:  # of a picture other voxels: its grey, and not its numbers of colours
        picture = locate(path)[0].name.lower().endswith(PICTURE)
        image = read_image(path, file) if picture else image_of(path, source, array)
    return (
        image,
        dtype if label else np.dtype(np.float32),
        interpolation.replace("auto", "nearest" if label else "linear"),
    )


def _stored(path: Path, file: BinaryIO | None, *, required: bool) -> tuple[np.ndarray, Source, np.dtype] | None:
    """A file's voxels, what it says, and their type there; None of what a label map cannot be: colours.

    Formats that do not keep a type get that of ``io.labels.ids_of``.
    """
    try:
        with opened_image(path, file, label=True) as source:
            array = voxels_of(source, path)
    except InputError:
        if required:
            raise
        return None
    if locate(path)[0].name.lower().endswith(NIFTI + ITK):
        return array, source, source.dtype
    whole = whole_numbers(array)
    return array, source, np.dtype(np.float32) if whole is None else ids_of(whole, path).dtype


def fill_value(path: Path, image: Image, asked: float | None) -> float:
    """What lies outside of a file's image: what was asked for, or the image's own; of a label map 0."""
    if image.array.dtype.kind != "f" and image.array.min() >= 0 and is_label_map(path, image.array, False):
        return 0.0
    return background.outside(image.array) if asked is None else asked


def resample(image: Image, transform: Any, grid: Space, method: str, fill: float = 0.0) -> np.ndarray:
    """The image pulled through an ``itk.Transform`` (grid's points -> the image's, LPS mm) -> (*grid.shape).

    ``fill`` outside the image, of ``label`` 0; a voxel reaches half its size beyond its centre. NaN stays NaN.
    """
    if method != "label":

        def pull(whole: Image) -> np.ndarray:
            if method != "nearest":
                return _pull(whole, transform, grid, method, fill)
            known = whole.array  # of ids beyond doubles their places in a list are asked for
            return exactly(
                lambda ids: _pull(whole._replace(array=ids), transform, grid, method, fill if ids is known else 0.0),
                known,
            )

        weighing = "nearest" if method == "nearest" else "linear"
        return background.around_gaps(image, pull, lambda gaps: _pull(gaps, transform, grid, weighing))
    best = np.zeros(grid.shape, np.float32)
    labels = np.zeros(grid.shape, image.array.dtype)
    for label in np.unique(image.array):  # among equals the lowest wins
        share = _pull(Image((image.array == label).astype(np.float32), image.affine), transform, grid, "linear")
        labels[share > best] = label
        np.maximum(best, share, out=best)
    return labels


def _pull(image: Image, transform: Any, grid: Space, method: str, fill: float = 0.0) -> np.ndarray:
    holds = image.array.dtype.kind == "f" or np.array_equal(np.array(fill).astype(image.array.dtype), fill)
    source = itk_bridge.to_itk(image.array if holds else image.array.astype(np.float64), image.affine)
    kind = type(source).__name__.replace("itkImage", "I")
    sampler = itk_bridge.wrapped("ResampleImageFilter", kind * 2).New()
    sampler.SetInput(source)
    sampler.SetTransform(transform)
    name, of = INTERPOLATORS[method]
    sampler.SetInterpolator(itk_bridge.wrapped(f"{name}InterpolateImageFunction", f"{kind}{of}").New())
    sampler.SetReferenceImage(itk_bridge.to_itk(np.zeros(grid.shape, np.uint8), grid.affine))
    sampler.SetUseReferenceImage(True)
    if fill:  # NaN too
        sampler.SetDefaultPixelValue(fill if kind[1] in "FD" else int(fill))
    sampler.Update()
    return itk_bridge.from_itk(sampler.GetOutput()).array


def result_suffix(path: Path, grid: Space) -> str:
    """The suffix of an image's result: its own, unless a picture could not say where the grid lies, or is a film."""
    file, _ = locate(path)
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s) and file.is_file()), ".nii.gz")
    flat = len(grid.shape) == 2 and np.allclose(grid.affine, lps_matrix(np.eye(3), places=False))
    if suffix in PICTURE and not (flat and pictures.frames_of(file) == 1):
        return ".nii.gz"
    return WRITTEN.get(suffix, suffix)


def write_voxels(
    path: Path, array: np.ndarray, affine: np.ndarray, dtype: np.dtype, notes: Mapping[str, str] | None = None
) -> None:
    """Write (*S) as ``dtype``, if that holds its values: NIfTI, a picture (cut off below 0), .mha or .nrrd."""
    typed = array.astype(dtype)
    array = typed if dtype.kind == "f" or np.array_equal(typed, array) else array
    if path.suffix.lower() in (".mha", ".nrrd"):
        replace_file(path, image_bytes(path.suffix.lower(), array, affine, notes=notes))
    else:
        displacement.write_image(path, array.clip(min=0) if path.suffix.lower() in PICTURE else array, affine)
