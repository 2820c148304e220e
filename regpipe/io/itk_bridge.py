"""Between regpipe's arrays and ITK: its objects (images, affines, fields, composites) and its transform files.

Arrays are indexed ``[x, y(, z)]`` and affines are voxel index -> RAS mm (see ``io.images``); ITK's
arrays are ``[(z, )y, x]`` and its mm are LPS: both are turned here. Everything given out owns its memory.
ITK is imported by the functions, and of it the classes that they need: see ``wrapped``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from scipy.io import savemat

from regpipe.io.geometry import lps_matrix, voxel_size
from regpipe.io.images import Image

# The pixel types that ITK's filters are built for in Python; anything else becomes one of them.
PIXELS = {"uint8": "UC", "int16": "SS", "uint16": "US", "float32": "F", "float64": "D"}

CHUNK = 2**18  # values of an .h5 file that are packed together


def wrapped(name: str, of: str, *, module: str | None = None) -> Any:
    """The class of ITK that Python calls ``itk<name><of>``: ``wrapped("Image", "F3")`` is ``itk.Image[itk.F, 3]``.

    From the module that wraps it. The name in ``itk`` loads its whole part of ITK, and all parts below that: 8 seconds
    for elastix, and a half by this way. ``module``: whose name is not the class's.
    """
    with _torch_later():
        return getattr(importlib.import_module(f"itk.itk{module or name}Python"), f"itk{name}{of}")


class _Torch(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _leave(self)
        return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def _torch_later() -> Iterator[None]:
    """What is imported here and imports torch gets a stand-in, which loads torch when it is used.

    ITK's modules import it for functions that take tensors, and regpipe calls none of them.
    """
    if "torch" in sys.modules:
        yield
        return
    stand_in = _Torch("torch")
    stand_in.__spec__ = importlib.util.find_spec("torch")  # for those who only ask whether it is there
    sys.modules["torch"] = stand_in
    try:
        yield
    finally:
        _leave(stand_in)


def _leave(stand_in: _Torch) -> None:
    """Make room for torch itself, unless it is there already."""
    if sys.modules.get("torch") is stand_in:
        del sys.modules["torch"]


def to_itk(array: np.ndarray, affine: np.ndarray) -> Any:
    """An image or label map (*S) as ``itk.Image`` at its place, its values kept.

    Booleans become uint8; other whole numbers int16 where they fit, else float64; float16 becomes float32.
    """
    return _filled(f"{PIXELS[_pixel(array)]}{array.ndim}", array.T, affine)


def from_itk(image: Any) -> Image:
    """An ``itk.Image`` of one value per voxel -> array (*S) of its pixel type and RAS affine."""
    dim = image.GetImageDimension()
    affine, direction = np.eye(dim + 1), image.GetDirection()
    axes = [[direction(i, j) for j in range(dim)] for i in range(dim)]
    affine[:-1, :-1] = np.array(axes) * np.array(image.GetSpacing())
    affine[:-1, -1] = np.array(image.GetOrigin())
    return Image(values(image).T.copy(order="C"), lps_matrix(affine, places=False))


def values(image: Any) -> np.ndarray:
    """The voxels of an ``itk.Image``, ([z, ]y, x[, D]), in its own memory: it must be kept while they are used."""
    buffer = wrapped("PyBuffer", type(image).__name__.replace("itkImage", "I"))
    with _torch_later():  # it asks for ``itk.VectorImage``, and so for all of ITKCommon
        view: np.ndarray = buffer.GetArrayViewFromImage(image)
    return view


def itk_affine(matrix: np.ndarray) -> Any:
    """A map of points (D+1, D+1) in RAS mm as ``itk.AffineTransform[itk.D, D]``, centred on the origin."""
    lps = lps_matrix(matrix)
    transform = wrapped("AffineTransform", f"D{len(matrix) - 1}").New()
    transform.SetMatrix(_matrix(lps[:-1, :-1]))
    transform.SetTranslation([float(mm) for mm in lps[:-1, -1]])
    return transform


def itk_field(d: np.ndarray, affine: np.ndarray) -> Any:
    """A displacement (D, *S) in LPS mm on the grid of ``affine`` as ``itk.DisplacementFieldTransform[itk.D, D]``.

    Linear between voxels; outside its grid ITK displaces nothing.
    """
    field = _filled(f"VD{len(d)}{len(d)}", d.T, affine)
    transform = wrapped("DisplacementFieldTransform", f"D{len(d)}").New()
    transform.SetDisplacementField(field)
    return transform


def composite(*transforms: Any) -> Any:
    """``itk.CompositeTransform[itk.D, D]`` of transforms given in the order in which a point meets them."""
    chain = wrapped("CompositeTransform", f"D{transforms[0].GetInputSpaceDimension()}").New()
    for transform in reversed(transforms):  # ITK applies the one added last first
        chain.AddTransform(transform)
    return chain


def sampled(transform: Any, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """``transform(p) - p`` at each voxel of a grid -> (D, *shape) float32 LPS mm."""
    dim = len(shape)
    sampler = wrapped("TransformToDisplacementFieldFilter", f"IVF{dim}{dim}D").New()
    sampler.SetTransform(transform)
    sampler.SetReferenceImage(to_itk(np.zeros(tuple(shape), np.uint8), affine))
    sampler.SetUseReferenceImage(True)
    sampler.Update()
    return values(sampler.GetOutput()).T.copy(order="K")


class Part(NamedTuple):
    """A transform as ITK's files hold it."""

    kind: str
    fixed_parameters: np.ndarray
    parameters: np.ndarray


def affine_part(matrix: np.ndarray) -> Part:
    """A map of points (D+1, D+1) in RAS mm, as ``itk_affine`` has it."""
    lps = lps_matrix(matrix)
    return Part("AffineTransform", np.zeros(len(lps) - 1), np.r_[lps[:-1, :-1].ravel(), lps[:-1, -1]])


def field_part(d: np.ndarray, affine: np.ndarray) -> Part:
    """A displacement (D, *S) in LPS mm on the grid of ``affine``, as ``itk_field`` has it."""
    lps, spacing = lps_matrix(affine, places=False), voxel_size(affine)
    place = np.r_[d.shape[1:], lps[:-1, -1], spacing, (lps[:-1, :-1] / spacing).ravel()]
    return Part("DisplacementFieldTransform", place, d.T.ravel())  # the vector runs fastest, then x


def affine_mat(matrix: np.ndarray) -> bytes:
    """A map of points (D+1, D+1) in RAS mm as ITK's .mat, which is MATLAB's version 4."""
    part, dim, data = affine_part(matrix), len(matrix) - 1, io.BytesIO()
    columns = {f"{part.kind}_double_{dim}_{dim}": part.parameters, "fixed": part.fixed_parameters}
    savemat(data, {name: column[:, None] for name, column in columns.items()}, format="4")
    return data.getvalue()


def composite_h5(*parts: Part) -> bytes:
    """ITK's composite .h5, single precision, of parts in the order in which a point meets them; at least one affine.

    Not by ITK's own writer: that stamps the time and the machine, and no two files are alike.
    """
    import h5py

    data = io.BytesIO()
    dim = next(len(part.fixed_parameters) for part in parts if part.kind == "AffineTransform")
    with h5py.File(data, "w") as file:
        _h5_group(file, 0, Part("CompositeTransform", np.empty(0), np.empty(0)), dim)
        for i, part in enumerate(reversed(parts), start=1):  # ITK applies the last one first
            _h5_group(file, i, part, dim)
    return data.getvalue()


def _h5_group(file: Any, i: int, part: Part, dim: int) -> None:
    import h5py

    group = file.create_group(f"TransformGroup/{i}")
    kind = np.array([f"{part.kind}_float_{dim}_{dim}"], object)
    group.create_dataset("TransformType", data=kind, dtype=h5py.string_dtype("ascii"), track_times=False)
    if part.parameters.size:
        numbers = part.parameters.astype(np.float32)
        packed = {"compression": "gzip", "shuffle": True, "chunks": (min(numbers.size, CHUNK),)}
        group.create_dataset("TransformFixedParameters", data=part.fixed_parameters, track_times=False)
        group.create_dataset("TransformParameters", data=numbers, track_times=False, **packed)


def _pixel(array: np.ndarray) -> str:
    if array.dtype.name in PIXELS:
        return array.dtype.name
    if array.dtype.kind == "b":
        return "uint8"
    if array.dtype.kind == "f":
        return "float32" if array.dtype.itemsize < 4 else "float64"
    fits = array.size == 0 or (array.min() >= -(2**15) and array.max() < 2**15)
    return "int16" if fits else "float64"


def _filled(kind: str, voxels: np.ndarray, affine: np.ndarray) -> Any:
    """An image of ``kind``, as ITK shortens it, with ``voxels`` ([z, ]y, x[, D]) at its place.

    Not by ``image_from_array``: it has no vectors of doubles, and takes a single row of voxels for a column.
    """
    dim = len(affine) - 1
    image, region = wrapped("Image", kind).New(), wrapped("ImageRegion", f"{dim}")()
    region.SetSize([int(n) for n in voxels.shape[:dim][::-1]])
    image.SetRegions(region)
    image.Allocate()
    values(image)[...] = voxels
    lps, spacing = lps_matrix(affine, places=False), voxel_size(affine)
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetOrigin([float(mm) for mm in lps[:-1, -1]])
    image.SetDirection(_matrix(lps[:-1, :-1] / spacing))
    return image


def _matrix(linear: np.ndarray) -> Any:
    """(D, D) as ``itk.Matrix``."""
    numbers = importlib.import_module("itk.vnl_matrixPython").vnl_matrixD(*linear.shape)
    for at, value in np.ndenumerate(linear):
        numbers.put(*at, float(value))
    return wrapped("Matrix", f"D{len(linear)}{len(linear)}")(numbers)
