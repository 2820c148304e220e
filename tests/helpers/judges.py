"""ITK as the judge of displacement files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import itk
import numpy as np


def itk_transform(path, dim: int) -> Any:
    """The file as ITK's own transform (its Python computes with double fields only)."""
    field = itk.imread(str(path), itk.Vector[itk.F, dim])
    assert field.GetImageDimension() == dim
    kind = itk.Vector[itk.D, dim]
    image = itk.Image[kind, dim].New()
    image.CopyInformation(field)
    image.SetRegions(field.GetLargestPossibleRegion())
    image.Allocate(True)
    view = itk.PyBuffer[itk.Image[kind, dim]].GetArrayViewFromImage(image)
    view[...] = itk.array_from_image(field)
    transform = itk.DisplacementFieldTransform[itk.D, dim].New()
    transform.SetDisplacementField(image)
    return transform


def itk_resampled(
    moving: str | Path, fixed: str | Path, field: str | Path, dim: int, *, nearest: bool = False
) -> np.ndarray:
    """What ITK makes of the moving file and the displacement file."""
    source = itk.imread(str(moving), itk.F)
    kind = itk.NearestNeighborInterpolateImageFunction if nearest else itk.LinearInterpolateImageFunction
    resampled = itk.resample_image_filter(
        source,
        transform=itk_transform(field, dim),
        interpolator=kind[type(source), itk.D].New(),
        use_reference_image=True,
        reference_image=itk.imread(str(fixed), itk.F),
    )
    return itk.array_from_image(resampled).T
