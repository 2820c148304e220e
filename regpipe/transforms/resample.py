"""Resamples images through ITK transforms; chooses the interpolation, and the type and format of the result.

``auto`` takes ``linear`` for images and ``nearest`` for label maps. A file is a label map if all its values are whole
numbers and either its name holds a word of ``LABEL_WORDS``, or its folder's name ends with one (``labels``,
``fixed_labels``), or its values are few (``FEW``): 8-bit pictures have more. ``label`` draws smoother borders than
``nearest``: each label's indicator is interpolated linearly and the largest wins. ``bspline`` is cubic and may
overshoot the range of the image a little.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import itk_bridge
from regpipe.io.formats import DICOM, ITK, NIFTI, PICTURE, SUFFIXES, load_nifti, locate
from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image, header, read_image, read_label
from regpipe.transforms import displacement
from regpipe.transforms.read import Space
from regpipe.utils.errors import InputError
from regpipe.utils.files import opened, replace_file

INTERPOLATIONS = ("auto", "linear", "bspline", "nearest", "label")
INTERPOLATORS = {"linear": ("Linear", "D"), "nearest": ("NearestNeighbor", "D"), "bspline": ("BSpline", "DF")}  # ITK's
LABEL_WORDS = ("label", "labelmap", "seg", "segmentation", "parcellation", "mask")
FEW = 32
# The result's suffix for formats of several files, and for lossy ones.
WRITTEN = {".hdr": ".nii.gz", ".img": ".nii.gz", ".mhd": ".mha", ".nhdr": ".nrrd"}
WRITTEN |= {".jpg": ".png", ".jpeg": ".png", ".gif": ".png", ".webp": ".png"} | dict.fromkeys(DICOM, ".nii.gz")
COMPONENTS = {"unsigned_char": "u1", "char": "i1", "unsigned_short": "u2", "short": "i2", "unsigned_int": "u4"}
COMPONENTS |= {"int": "i4", "float": "f4", "double": "f8"}


def read_voxels(path: Path, interpolation: str) -> tuple[Image, np.dtype, str]:
    """An image or label map, the type that its result is written as, and the interpolation that ``auto`` stands for.

    Raises:
        InputError: as ``read_image``; ``label`` of values that are not whole.
    """
    if interpolation in ("linear", "bspline"):
        return read_image(path), np.dtype(np.float32), interpolation
    labels = _whole_numbers(path, required=interpolation == "label")
    if interpolation == "auto":
        if labels is None or not is_label_map(path, labels.array):
            return read_image(path), np.dtype(np.float32), "linear"
        interpolation = "nearest"
    image = read_image(path) if labels is None else labels
    return image, _stored_type(path, image.array), interpolation


def is_label_map(path: Path, values: np.ndarray) -> bool:
    """The rule at the top of this file, for values that are whole numbers."""
    folder = path.absolute().parent.name.lower().removesuffix("s")
    words = {word.removesuffix("s") for word in re.split("[^a-z]+", path.name.lower())}
    named = any(word in words or folder.endswith(word) for word in LABEL_WORDS)
    return named or len(np.unique(values)) <= FEW


def resample(image: Image, transform: Any, grid: Space, method: str) -> np.ndarray:
    """The image pulled through an ``itk.Transform`` (grid's points -> the image's, LPS mm) -> (*grid.shape).

    0 outside the image; a voxel reaches half its size beyond its centre.
    """
    if method != "label":
        return _pull(image, transform, grid, method)
    best = np.zeros(grid.shape, np.float32)
    labels = np.zeros(grid.shape, image.array.dtype)
    for label in np.unique(image.array):  # among equals the lowest wins
        share = _pull(Image((image.array == label).astype(np.float32), image.affine), transform, grid, "linear")
        labels[share > best] = label
        np.maximum(best, share, out=best)
    return labels


def _pull(image: Image, transform: Any, grid: Space, method: str) -> np.ndarray:
    source = itk_bridge.to_itk(image.array, image.affine)
    kind = type(source).__name__.replace("itkImage", "I")
    sampler = itk_bridge.wrapped("ResampleImageFilter", kind * 2).New()
    sampler.SetInput(source)
    sampler.SetTransform(transform)
    name, of = INTERPOLATORS[method]
    sampler.SetInterpolator(itk_bridge.wrapped(f"{name}InterpolateImageFunction", f"{kind}{of}").New())
    sampler.SetReferenceImage(itk_bridge.to_itk(np.zeros(grid.shape, np.uint8), grid.affine))
    sampler.SetUseReferenceImage(True)
    sampler.Update()
    return itk_bridge.from_itk(sampler.GetOutput()).array


def result_suffix(path: Path, grid: Space) -> str:
    """The suffix of an image's result: its own, unless a picture could not say where the grid lies."""
    file, _ = locate(path)
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s) and file.is_file()), ".nii.gz")
    if suffix in PICTURE and (
        len(grid.shape) != 2 or not np.allclose(grid.affine, lps_matrix(np.eye(3), places=False))
    ):
        return ".nii.gz"
    return WRITTEN.get(suffix, suffix)


def write_voxels(path: Path, array: np.ndarray, affine: np.ndarray, dtype: np.dtype) -> None:
    """Write (*S) as ``dtype``, if that holds its values: NIfTI, a picture (cut off below 0), .mha or .nrrd."""
    typed = array.astype(dtype)
    array = typed if dtype.kind == "f" or np.array_equal(typed, array) else array
    if path.suffix.lower() in (".mha", ".nrrd"):
        replace_file(path, _itk_bytes(array, affine, path.suffix.lower()))
    else:
        displacement.write_image(path, array.clip(min=0) if path.suffix.lower() in PICTURE else array, affine)


def _itk_bytes(array: np.ndarray, affine: np.ndarray, suffix: str) -> bytes:
    import itk

    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / f"image{suffix}"
        itk.imwrite(itk_bridge.to_itk(array, affine), str(file), compression=True)
        return file.read_bytes()


def _whole_numbers(path: Path, *, required: bool) -> Image | None:
    header(path)  # refuses several frames, which a label map would take for channels
    try:
        return read_label(path)[0]
    except InputError:
        if required:
            raise
        return None


def _stored_type(path: Path, array: np.ndarray) -> np.dtype:
    """The type of the file's voxels; of formats without one (pictures), or unknown here, that of ``array``."""
    file, _ = locate(path)
    if file.name.lower().endswith(NIFTI):
        with opened(file) as stream:
            stored: np.dtype = load_nifti(file, stream).get_data_dtype()
        return stored
    if not file.name.lower().endswith(ITK):
        return array.dtype
    import itk

    io = itk.ImageIOFactory.CreateImageIO(str(file), itk.CommonEnums.IOFileMode_ReadMode)
    io.SetFileName(str(file))
    io.ReadImageInformation()
    name = io.GetComponentTypeAsString(io.GetComponentType())
    return np.dtype(COMPONENTS.get(name, array.dtype))
