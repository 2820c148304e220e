"""Files of several values: what one convention holds is the same in the other, as ITK reads both."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from regpipe.io.series import TENSOR, VALUES, VECTOR, Series, read_series, write_series

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def values(many: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 5, 6, many)).astype(np.float32)


def by_itk(path: Path) -> np.ndarray:
    reader = itk.ImageFileReader[itk.VectorImage[itk.F, 3]].New(FileName=str(path))
    reader.Update()
    return itk.array_from_image(reader.GetOutput())


def written(folder: Path, suffix: str, series: Series) -> np.ndarray:
    path = folder / f"written{suffix}"
    write_series(path, series.array, series.affine, series)
    return by_itk(path)


@pytest.mark.parametrize(("intent", "many"), [(1005, 6), (1006, 3), (1007, 3)])
def test_tensors_and_vectors_are_the_same_in_nifti_and_nrrd(tmp_path: Path, intent: int, many: int) -> None:
    image = nib.Nifti1Image(values(many)[..., None, :], AFFINE)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "a.nii.gz")
    expected = by_itk(tmp_path / "a.nii.gz")
    series = read_series(tmp_path / "a.nii.gz")
    assert series is not None and series.kind == (TENSOR if many == 6 else VECTOR)
    np.testing.assert_array_equal(written(tmp_path, ".nrrd", series), expected)
    back = read_series(tmp_path / "written.nrrd")
    assert back is not None and back.kind == series.kind
    np.testing.assert_array_equal(written(tmp_path, ".nii.gz", back), expected)


def test_a_list_of_values_in_a_nrrd_file_is_no_vector(tmp_path: Path) -> None:
    for kind in (VALUES, VECTOR):
        path = tmp_path / f"{kind}.nrrd"
        write_series(path, values(3), AFFINE, Series(values(3), AFFINE, np.dtype(np.float32), kind))
        found = read_series(path)
        assert found is not None and found.kind == kind
