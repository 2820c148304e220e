"""Volumes: maps with determinants in closed form, and sums that stay where intensities are modulated."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from helpers.folders import save
from regpipe.io.series import read_series
from regpipe.transforms import volume
from regpipe.transforms.apply import apply
from regpipe.transforms.displacement import write_displacement
from regpipe.transforms.volume import jacobian
from regpipe.utils.errors import InputError

SHAPE, SPACING = (40, 36, 32), (1.5, 1.2, 2.0)
AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = -np.array(SPACING) * (np.array(SHAPE) - 1) / 2  # about 0
IDS = (312782574, 312782575)  # as of the Allen atlas
MATRIX = np.array([[1.2, 0.1, 0.0], [-0.05, 0.9, 0.0], [0.0, 0.1, 1.1]])


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def linear(path: Path, matrix: np.ndarray = MATRIX) -> Path:
    sitk.WriteTransform(sitk.AffineTransform(matrix.ravel().tolist(), (1.0, 2.0, 3.0)), str(path))
    return path


def places() -> np.ndarray:
    return apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))


def frame(image: sitk.Image) -> tuple:
    return image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()


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


@pytest.mark.parametrize("kind", ["linear", "mirror", "swelling"])
@pytest.mark.parametrize("coarser", [1, 2])
def test_modulated_intensities_keep_their_sum_times_the_voxels_size(tmp_path: Path, kind: str, coarser: int) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    wide = AFFINE @ np.diag([coarser] * 3 + [1])
    reference = save(tmp_path / "grid.nii.gz", np.zeros([n // coarser for n in SHAPE], np.float32), wide)
    kinds = {"linear": MATRIX, "mirror": MATRIX * [-1, 1, 1]}
    transform = linear(tmp_path / "t.tfm", kinds[kind]) if kind in kinds else swelling(tmp_path / "d.nii.gz")
    for modulate in (False, True):
        apply(transform, [image], tmp_path / f"{modulate}.nii.gz", reference=reference, modulate=modulate)
    sums = [read(tmp_path / f"{m}.nii.gz").sum() * coarser**3 / blob().sum() for m in (False, True)]
    exact = 0.02 if (kind, coarser) == ("swelling", 2) else 0.005  # differences over 8 mm of a bump of 12 mm
    assert abs(sums[0] - 1) > 0.1 and sums[1] == pytest.approx(1, abs=exact)


def test_a_regions_ratio_is_its_volume_in_the_other_image(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    regions = np.zeros(SHAPE, np.uint32)
    regions[12:20, 10:20, 8:20], regions[24:30, 20:30, 10:20] = IDS
    labels = save(tmp_path / "regions_seg.nii.gz", regions, AFFINE)
    rows = jacobian(linear(tmp_path / "t.tfm"), tmp_path / "map.v2.nii.gz", reference=image, labels=labels)
    assert [row["label"] for row in rows] == [*IDS]
    assert rows[0]["size"] == pytest.approx(8 * 10 * 12 * np.prod(SPACING) / 1000)
    assert all(row["ratio"] == pytest.approx(np.linalg.det(MATRIX), rel=1e-4) for row in rows)
    with (tmp_path / "map.v2_labels.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["label"]) for row in table] == [*IDS]
    assert [float(row["volume_ml"]) for row in table] == pytest.approx([r["size"] for r in rows], rel=1e-5)


def test_the_map_of_a_swelling_is_the_same_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    jacobian(swelling(tmp_path / "d.nii.gz"), tmp_path / "whole.nii.gz", reference=image)
    monkeypatch.setattr(volume, "SLAB", 7 * 36 * 32)
    jacobian(tmp_path / "d.nii.gz", tmp_path / "slabs.nii.gz", reference=image)
    np.testing.assert_array_equal(read(tmp_path / "slabs.nii.gz"), read(tmp_path / "whole.nii.gz"))


@pytest.mark.parametrize("dense", [False, True])
def test_of_one_slice_of_space_it_is_that_of_areas(tmp_path: Path, dense: bool) -> None:
    """A tilt by 30 degrees, and twice the width: as an affine map and as the displacement of that one slice."""
    image = save(tmp_path / "slice.nii.gz", blob()[:, :, 16:17], AFFINE)
    turn = Rotation.from_euler("x", 30, degrees=True).as_matrix() @ np.diag([2.0, 1, 1])
    transform = linear(tmp_path / "t.tfm", turn)
    if dense:
        grid = sitk.ReadImage(str(image))
        field = sitk.TransformToDisplacementField(
            sitk.ReadTransform(str(transform)), sitk.sitkVectorFloat32, *frame(grid)
        )
        sitk.WriteImage(field, str(transform := tmp_path / "d.nii.gz"))
    jacobian(transform, tmp_path / "map.nii.gz", reference=image)
    found = read(tmp_path / "map.nii.gz")
    assert found.shape == (40, 36, 1)
    np.testing.assert_allclose(found[1:-1, 1:-1], 2, rtol=1e-3)


def test_a_pictures_map_is_of_areas(tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.AffineTransform([1.2, 0.0, 0.1, 1.5], (1.0, 2.0)), str(tmp_path / "t.tfm"))
    image = save(tmp_path / "flat.nii.gz", blob()[:, :, 16], np.diag([1.0, 1.0, 1.0, 1.0]))
    labels = save(tmp_path / "flat_seg.nii.gz", np.ones(SHAPE[:2], np.uint8), np.eye(4))
    rows = jacobian(tmp_path / "t.tfm", tmp_path / "map.nii.gz", reference=image, labels=labels)
    assert rows[0]["ratio"] == pytest.approx(1.8, rel=1e-4) and rows[0]["size"] == pytest.approx(40 * 36 / 100)
    assert (tmp_path / "map_labels.csv").read_text().startswith("label,area_cm2,ratio")


def test_labels_keep_no_sum_and_regions_need_the_maps_grid(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    labels = save(tmp_path / "small_seg.nii.gz", np.ones((5, 5, 5), np.uint8), AFFINE)
    with pytest.raises(InputError, match="small_seg.*--modulate is for intensities"):
        apply(linear(tmp_path / "t.tfm"), [labels], tmp_path / "out", reference=image, modulate=True)
    with pytest.raises(InputError, match="--fill 3"):
        apply(tmp_path / "t.tfm", [image], tmp_path / "out", reference=image, modulate=True, fill=3)
    with pytest.raises(InputError, match="is an input"):
        jacobian(tmp_path / "t.tfm", labels, reference=image, labels=labels)
    with pytest.raises(InputError, match="a picture cannot hold"):
        jacobian(tmp_path / "t.tfm", tmp_path / "map.png", reference=image)
    with pytest.raises(InputError, match="labels are whole numbers"):
        jacobian(tmp_path / "t.tfm", tmp_path / "map.nii.gz", reference=image, labels=image)
    with pytest.raises(InputError, match="small_seg.*another grid"):
        jacobian(tmp_path / "t.tfm", tmp_path / "map.nii.gz", reference=image, labels=labels)
    assert not (tmp_path / "map.nii.gz").exists()


def test_strain_is_green_lagranges(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    labels = save(tmp_path / "all_seg.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    (row,) = jacobian(linear(tmp_path / "t.tfm"), tmp_path / "e.nrrd", reference=image, strained=True, labels=labels)
    expected = (MATRIX.T @ MATRIX - np.eye(3)) / 2  # of a linear map, in the axes of its matrix: LPS
    series = read_series(tmp_path / "e.nrrd")  # by ITK
    assert series is not None and series.kind == "tensor"
    found = series.array
    np.testing.assert_allclose(found, np.broadcast_to(expected[np.triu_indices(3)], found.shape), atol=1e-4)
    jacobian(tmp_path / "t.tfm", tmp_path / "e.nii.gz", reference=image, strained=True)
    lower = read(tmp_path / "e.nii.gz")[:, :, :, 0]
    np.testing.assert_allclose(lower, np.broadcast_to(expected[np.tril_indices(3)], lower.shape), atol=1e-4)
    assert nib.Nifti1Image.from_filename(tmp_path / "e.nii.gz").header.get_intent()[0] == "symmetric matrix"
    ends = np.linalg.eigvalsh(expected)[[-1, 0]]
    assert [row["strain_max"], row["strain_min"]] == pytest.approx([*ends], abs=1e-4)
    head = (tmp_path / "e_labels.csv").read_text().splitlines()[0]
    assert head == "label,volume_ml,strain_max,strain_max_p5,strain_max_p95,strain_min,strain_min_p5,strain_min_p95"


def test_a_rotation_strains_nothing_and_a_swelling_as_its_closed_form(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    turn = Rotation.from_euler("zyx", [20, -10, 5], degrees=True).as_matrix()
    jacobian(linear(tmp_path / "r.tfm", turn), tmp_path / "r.nii.gz", reference=image, strained=True)
    assert np.abs(read(tmp_path / "r.nii.gz")).max() < 1e-4
    jacobian(swelling(tmp_path / "d.nii.gz"), tmp_path / "s.nii.gz", reference=image, strained=True)
    r2 = (places() ** 2).sum(-1)
    bump = 0.3 * np.exp(-r2 / 12**2)
    stretches = 1 + bump - 2 * r2 / 12**2 * bump, 1 + bump  # of p f(r): along the radius, and twice across it
    trace = (stretches[0] ** 2 + 2 * stretches[1] ** 2 - 3) / 2
    lower, inner = read(tmp_path / "s.nii.gz")[:, :, :, 0], (slice(2, -2),) * 3
    np.testing.assert_allclose((lower[..., [0, 2, 5]].sum(-1))[inner], trace[inner], atol=0.03)


def test_strain_of_a_picture_and_of_one_slice_in_space_is_that_of_the_plane(tmp_path: Path) -> None:
    flat, slices = np.diag([1.0, 1.0, 1.0, 1.0]), blob()[:, :, 16:17]
    sitk.WriteTransform(sitk.AffineTransform([1.2, 0.0, 0.1, 1.5], (1.0, 2.0)), str(tmp_path / "t.tfm"))
    image = save(tmp_path / "flat.nii.gz", slices[..., 0], flat)
    jacobian(tmp_path / "t.tfm", tmp_path / "e.nii.gz", reference=image, strained=True)
    expected = (np.array([[1.2, 0.1], [0.0, 1.5]]) @ np.array([[1.2, 0.0], [0.1, 1.5]]) - np.eye(2)) / 2
    found = read(tmp_path / "e.nii.gz").reshape(-1, 3)
    np.testing.assert_allclose(found, np.broadcast_to(expected[np.triu_indices(2)], found.shape), atol=1e-4)
    turn = Rotation.from_euler("x", 30, degrees=True).as_matrix() @ np.diag([2.0, 1, 1])
    tilted = save(tmp_path / "slice.nii.gz", slices, AFFINE)
    labels = save(tmp_path / "slice_seg.nii.gz", np.ones(slices.shape, np.uint8), AFFINE)
    told: dict[str, Any] = {"reference": tilted, "strained": True, "labels": labels}
    (row,) = jacobian(linear(tmp_path / "x.tfm", turn), tmp_path / "x.nii.gz", **told)
    assert [row["strain_max"], row["strain_min"]] == pytest.approx([1.5, 0], abs=1e-3)


def test_strain_has_no_logarithm(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", blob(), AFFINE)
    with pytest.raises(InputError, match="--log is of volumes"):
        jacobian(linear(tmp_path / "t.tfm"), tmp_path / "e.nii.gz", reference=image, strained=True, log=True)
