"""Volumes: maps with determinants in closed form, and sums that stay where intensities are modulated."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine

from helpers.folders import save
from regpipe.transforms.apply import apply
from regpipe.transforms.displacement import write_displacement
from regpipe.transforms.volume import jacobian
from regpipe.utils.errors import InputError

SHAPE, SPACING = (40, 36, 32), (1.5, 1.2, 2.0)
AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = -np.array(SPACING) * (np.array(SHAPE) - 1) / 2  # about 0
MATRIX = np.array([[1.2, 0.1, 0.0], [-0.05, 0.9, 0.0], [0.0, 0.1, 1.1]])


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def linear(path: Path) -> Path:
    sitk.WriteTransform(sitk.AffineTransform(MATRIX.ravel().tolist(), (1.0, 2.0, 3.0)), str(path))
    return path


def places() -> np.ndarray:
    return apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))


def swelling(path: Path) -> Path:
    """p -> p (1 + a exp(-r^2 / s^2)): larger in the middle, nothing at the rim."""
    p = places() * [-1, -1, 1]
    d = 0.3 * np.exp(-(p**2).sum(-1, keepdims=True) / 12**2) * p
    write_displacement(path, np.moveaxis(d, -1, 0), AFFINE)
    return path


def blob() -> np.ndarray:
    return np.exp(-((places() - [2, -1, 1]) ** 2).sum(-1) / (2 * 5.0**2)).astype(np.float32)


def test_a_linear_map_has_its_determinant_everywhere(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    rows = jacobian(linear(tmp_path / "t.tfm"), tmp_path / "map.nii.gz", reference=image)
    np.testing.assert_allclose(read(tmp_path / "map.nii.gz"), np.linalg.det(MATRIX), rtol=1e-4)
    jacobian(linear(tmp_path / "t.tfm"), tmp_path / "log.nii.gz", reference=image, log=True)
    np.testing.assert_allclose(read(tmp_path / "log.nii.gz"), np.log(np.linalg.det(MATRIX)), rtol=1e-3)
    assert rows == []


def test_a_swelling_has_the_closed_forms_determinant(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    jacobian(swelling(tmp_path / "d.nii.gz"), tmp_path / "map.nii.gz", reference=image)
    r2 = (places() ** 2).sum(-1)
    f = 1 + 0.3 * np.exp(-r2 / 12**2)
    expected = f**2 * (f - 2 * 0.3 * r2 / 12**2 * np.exp(-r2 / 12**2))  # of p f(r): f^(D-1) (f + r f')
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(read(tmp_path / "map.nii.gz")[inner], expected[inner], atol=0.03)  # differences of 2 mm


@pytest.mark.parametrize("kind", ["linear", "swelling"])
def test_modulated_intensities_keep_their_sum(tmp_path: Path, kind: str) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    transform = linear(tmp_path / "t.tfm") if kind == "linear" else swelling(tmp_path / "d.nii.gz")
    for modulate in (False, True):
        apply(transform, [image], tmp_path / f"{modulate}.nii.gz", reference=image, modulate=modulate)
    sums = [read(tmp_path / f"{m}.nii.gz").sum() / blob().sum() for m in (False, True)]
    assert abs(sums[0] - 1) > 0.1 and sums[1] == pytest.approx(1, abs=0.005)


def test_a_regions_ratio_is_its_volume_in_the_other_image(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    regions = np.zeros(SHAPE, np.uint8)
    regions[12:20, 10:20, 8:20], regions[24:30, 20:30, 10:20] = 3, 7
    labels = save(tmp_path / "regions_seg.nii.gz", regions, AFFINE)
    rows = jacobian(linear(tmp_path / "t.tfm"), tmp_path / "map.nii.gz", reference=image, labels=labels)
    assert [row["label"] for row in rows] == [3, 7]
    assert rows[0]["volume_ml"] == pytest.approx(8 * 10 * 12 * np.prod(SPACING) / 1000)
    assert all(row["ratio"] == pytest.approx(np.linalg.det(MATRIX), rel=1e-4) for row in rows)
    with (tmp_path / "map_labels.csv").open() as file:
        assert [float(row["ratio"]) for row in csv.DictReader(file)] == pytest.approx([r["ratio"] for r in rows])


def test_one_slice_of_space_has_a_determinant(tmp_path: Path) -> None:
    image = save(tmp_path / "slice.nii.gz", blob()[:, :, 16:17], AFFINE)
    jacobian(linear(tmp_path / "t.tfm"), tmp_path / "map.nii.gz", reference=image)
    found = read(tmp_path / "map.nii.gz")
    assert found.shape == (40, 36, 1)
    np.testing.assert_allclose(found, np.linalg.det(MATRIX), rtol=1e-4)


def test_labels_keep_no_sum_and_regions_need_the_maps_grid(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    labels = save(tmp_path / "small_seg.nii.gz", np.ones((5, 5, 5), np.uint8), AFFINE)
    with pytest.raises(InputError, match="small_seg.*no density"):
        apply(linear(tmp_path / "t.tfm"), [labels], tmp_path / "out", reference=image, modulate=True)
    with pytest.raises(InputError, match="small_seg.*another grid"):
        jacobian(tmp_path / "t.tfm", tmp_path / "map.nii.gz", reference=image, labels=labels)
    assert not (tmp_path / "map.nii.gz").exists()
