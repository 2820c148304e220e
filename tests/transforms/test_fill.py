"""Truth: SimpleITK resampling the same file through the same transform, the value outside given."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from helpers.commandline import regpipe
from helpers.folders import save
from regpipe.io import background
from regpipe.transforms.apply import apply

RNG = np.random.default_rng(3)
SHAPE = (26, 24, 22)
BODY = (((np.indices(SHAPE).T - (np.array(SHAPE) - 1) / 2) / [8, 9, 10]) ** 2).sum(-1).T < 1
AFFINE = np.array([[1.9, 0.3, 0, -20], [-0.3, 1.9, 0, 5], [0, 0, 2.5, 7], [0, 0, 0, 1]])
ARRAYS = {
    "ct": np.where(BODY, 40 + 20 * RNG.standard_normal(SHAPE), -1000).astype(np.int16),
    "mr": np.where(BODY, 300 + 40 * RNG.random(SHAPE), 0).astype(np.float32),
    "con": np.where(BODY, RNG.standard_normal(SHAPE), np.nan).astype(np.float32),
    "seg_labels": BODY.astype(np.uint8),
}
OUTSIDE = {"ct": -1000.0, "mr": 0.0, "con": math.nan, "seg_labels": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, and an affine transform that leaves a part of the grid uncovered."""
    folder = tmp_path_factory.mktemp("fill")
    for name, array in ARRAYS.items():
        save(folder / f"{name}.nii.gz", array, AFFINE)
    move = sitk.Euler3DTransform((0, 0, 0), 0.1, 0.05, -0.2, (9.3, -4.1, 14.7))
    sitk.WriteTransform(move, str(folder / "move.tfm"))
    return folder


def by_simpleitk(folder: Path, name: str, method: int, fill: float) -> np.ndarray:
    image = sitk.GetImageFromArray(ARRAYS[name].T)  # ITK's reader makes 0 of NaN
    image.CopyInformation(sitk.ReadImage(str(folder / f"{name}.nii.gz")))
    image = image if name == "seg_labels" else sitk.Cast(image, sitk.sitkFloat32)
    moved = sitk.Resample(image, image, sitk.ReadTransform(str(folder / "move.tfm")), method, fill)
    return sitk.GetArrayFromImage(moved).T


@pytest.mark.parametrize("name", ARRAYS)
def test_what_an_image_has_outside_is_outside_of_what_becomes_of_it(folder: Path, tmp_path: Path, name: str) -> None:
    (out,) = apply(folder / "move.tfm", [folder / f"{name}.nii.gz"], tmp_path, reference=folder / "mr.nii.gz")
    found = np.asanyarray(nib.load(out).dataobj)  # type: ignore[attr-defined]
    method = sitk.sitkNearestNeighbor if name == "seg_labels" else sitk.sitkLinear
    expected = by_simpleitk(folder, name, method, OUTSIDE[name])
    np.testing.assert_allclose(found, expected, atol=2e-3, equal_nan=True)
    uncovered = by_simpleitk(folder, name, method, 77) == 77
    assert uncovered.mean() > 0.2
    np.testing.assert_array_equal(found[uncovered], OUTSIDE[name])


@pytest.mark.parametrize(("fill", "method"), [(-55.5, "linear"), (math.nan, "linear"), (31, "nearest"), (7, "bspline")])
def test_fill_is_the_value_outside_of_images_and_not_of_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: float, method: str
) -> None:
    files = [folder / "ct.nii.gz", folder / "seg_labels.nii.gz"]
    told = ["--reference", files[0], "-o", tmp_path, "--fill", fill, "--interpolation"]
    assert regpipe(monkeypatch, "apply", folder / "move.tfm", files[0], *told, method) == 0
    assert regpipe(monkeypatch, "apply", folder / "move.tfm", files[1], *told, "auto") == 0
    kinds = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline}
    found = np.asanyarray(nib.load(tmp_path / "ct.nii.gz").dataobj)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, by_simpleitk(folder, "ct", kinds[method], fill), atol=2e-2, equal_nan=True)
    labels = np.asanyarray(nib.load(tmp_path / "seg_labels.nii.gz").dataobj)  # type: ignore[attr-defined]
    assert np.unique(labels).tolist() == [0, 1]
    assert labels.dtype == np.uint8


@pytest.mark.parametrize("method", ["nearest", "linear", "bspline"])
def test_nan_is_kept_and_not_spread(folder: Path, tmp_path: Path, method: str) -> None:
    still = save(tmp_path / "still.nii.gz", ARRAYS["con"], AFFINE)
    sitk.WriteTransform(sitk.Transform(3, sitk.sitkIdentity), str(tmp_path / "id.tfm"))
    (out,) = apply(tmp_path / "id.tfm", [still], tmp_path / "out", reference=still, interpolation=method)
    np.testing.assert_allclose(np.asanyarray(nib.load(out).dataobj), ARRAYS["con"], atol=1e-5, equal_nan=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fill", [None, -50.0, math.nan])
def test_register_fills_what_the_moving_image_does_not_cover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: float | None
) -> None:
    fixed = save(tmp_path / "fixed.nii.gz", ARRAYS["ct"], AFFINE)
    shifted = AFFINE.copy()
    shifted[2, 3] += 15  # six slices
    moving = save(tmp_path / "moving.nii.gz", ARRAYS["ct"], shifted)
    told = ["--bundle", "none", "--affine", "none", "--refine", 1, "-o", tmp_path / "out"]
    told += [] if fill is None else ["--fill", fill]
    assert regpipe(monkeypatch, "register", fixed, moving, *told) == 0
    found = np.asanyarray(nib.load(tmp_path / "out/moving_to_fixed/warped.nii.gz").dataobj)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found[..., :5], np.full_like(found[..., :5], -1000 if fill is None else fill))


def test_what_is_no_data_does_not_lead_a_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texture = ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2)
    scene = np.where(BODY, 300 + 100 * texture / texture.std(), 20).astype(np.float32)
    files = []
    for name, hidden in (("fixed", np.s_[:11]), ("moving", np.s_[9:13, 9:15])):
        image = scene.copy()
        image[hidden] = np.nan
        files.append(save(tmp_path / f"{name}.nii.gz", image, AFFINE))
    told = ["--bundle", "none", "--affine", "none", "--refine", 20, "-o", tmp_path / "out"]
    assert regpipe(monkeypatch, "register", *files, *told) == 0
    case = tmp_path / "out/moving_to_fixed"
    d = np.asanyarray(nib.load(case / "displacement.nii.gz").dataobj)[..., 0, :]  # type: ignore[attr-defined]
    seen = BODY & np.isfinite(np.asanyarray(nib.load(files[0]).dataobj))  # type: ignore[attr-defined]
    assert np.linalg.norm(d[seen], axis=-1).mean() < 0.4  # mm, of voxels of 2; 1.0 where the gaps are dark
    warped = np.asanyarray(nib.load(case / "warped.nii.gz").dataobj)  # type: ignore[attr-defined]
    assert 0 < np.isnan(warped).mean() < 0.2


def test_noise_about_zero_is_no_reason_to_fill_with_its_lowest_value() -> None:
    rng = np.random.default_rng(0)
    inside = 100 + 50 * rng.random((12, 12, 12))  # a head that the field of view cuts on all sides
    inside[4:6, 4:6, 4:6] = rng.normal(0, 0.5, (2, 2, 2))
    assert inside.min() < 0 and background.outside(inside) == 0
    dark = np.where(rng.random(inside.shape) < 0.3, inside, rng.normal(0, 3, inside.shape))  # and where it shows air
    assert dark.min() < -5 and background.outside(dark) == 0
    assert background.outside(inside - 120) == (inside - 120).min()  # z-scores, or a CT: 0 may be anything
