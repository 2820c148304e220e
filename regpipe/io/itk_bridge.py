"""Between regpipe's arrays and ITK: its objects (images, affines, fields, composites) and its transform files.

Arrays are indexed ``[x, y(, z)]`` and affines are voxel index -> RAS mm (see ``io.images``); ITK's
arrays are ``[(z, )y, x]`` and its mm are LPS: both are turned here. Everything given out owns its memory.
ITK is imported by the functions: that takes seconds, and most commands need none of it.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from scipy.io import savemat

from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image, voxel_size

# The pixel types that ITK's filters are built for in Python; anything else becomes one of them.
PIXELS = {"uint8": "UC", "int16": "SS", "uint16": "US", "float32": "F", "float64": "D"}

CHUNK = 2**18  # values of an .h5 file that are packed together


def to_itk(array: np.ndarray, affine: np.ndarray) -> Any:
    """An image or label map (*S) as ``itk.Image`` at its place, its values kept.

    Booleans become uint8; other whole numbers int16 where they fit, else float64; float16 becomes float32.
    """
    import itk

    kind = itk.Image[getattr(itk, PIXELS[_pixel(array)]), array.ndim]
    return _filled(kind, array.T, affine)


def from_itk(image: Any) -> Image:
    """An ``itk.Image`` of one value per voxel -> array (*S) of its pixel type and RAS affine."""
    import itk

    dim = image.GetImageDimension()
    affine = np.eye(dim + 1)
    affine[:-1, :-1] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:-1, -1] = np.array(image.GetOrigin())
    return Image(np.ascontiguousarray(itk.array_from_image(image).T), lps_matrix(affine, places=False))


def itk_affine(matrix: np.ndarray) -> Any:
    """A map of points (D+1, D+1) in RAS mm as ``itk.AffineTransform[itk.D, D]``, centred on the origin."""
    import itk

    dim = len(matrix) - 1
    lps = lps_matrix(matrix)
    transform = itk.AffineTransform[itk.D, dim].New()
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetTranslation([float(mm) for mm in lps[:-1, -1]])
    return transform


def itk_field(d: np.ndarray, affine: np.ndarray) -> Any:
    """A displacement (D, *S) in LPS mm on the grid of ``affine`` as ``itk.DisplacementFieldTransform[itk.D, D]``.

    Linear between voxels; outside its grid ITK displaces nothing.
    """
    import itk

    dim = len(d)
    field = _filled(itk.Image[itk.Vector[itk.D, dim], dim], d.T, affine)
    transform = itk.DisplacementFieldTransform[itk.D, dim].New()
    transform.SetDisplacementField(field)
    return transform


def composite(*transforms: Any) -> Any:
    """``itk.CompositeTransform[itk.D, D]`` of transforms given in the order in which a point meets them."""
    import itk

    chain = itk.CompositeTransform[itk.D, transforms[0].GetInputSpaceDimension()].New()
    for transform in reversed(transforms):  # ITK applies the one added last first
        chain.AddTransform(transform)
    return chain


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
    savemat(data, {name: values[:, None] for name, values in columns.items()}, format="4")
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
        values = part.parameters.astype(np.float32)
        packed = {"compression": "gzip", "shuffle": True, "chunks": (min(values.size, CHUNK),)}
        group.create_dataset("TransformFixedParameters", data=part.fixed_parameters, track_times=False)
        group.create_dataset("TransformParameters", data=values, track_times=False, **packed)


def _pixel(array: np.ndarray) -> str:
    if array.dtype.name in PIXELS:
        return array.dtype.name
    if array.dtype.kind == "b":
        return "uint8"
    if array.dtype.kind == "f":
        return "float32" if array.dtype.itemsize < 4 else "float64"
    fits = array.size == 0 or (array.min() >= -(2**15) and array.max() < 2**15)
    return "int16" if fits else "float64"


def _filled(kind: Any, values: np.ndarray, affine: np.ndarray) -> Any:
    """An image of ``kind`` with ``values`` ([z, ]y, x[, D]) at its place.

    Not by ``image_from_array``: it has no vectors of doubles, and takes a single row of voxels for a column.
    """
    import itk

    dim = kind.GetImageDimension()
    image, region = kind.New(), itk.ImageRegion[dim]()
    region.SetSize([int(n) for n in values.shape[:dim][::-1]])
    image.SetRegions(region)
    image.Allocate()
    itk.PyBuffer[kind].GetArrayViewFromImage(image)[...] = values
    lps, spacing = lps_matrix(affine, places=False), voxel_size(affine)
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetOrigin([float(mm) for mm in lps[:-1, -1]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1] / spacing)))
    return image
