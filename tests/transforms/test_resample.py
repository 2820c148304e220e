"""Truth: SimpleITK with the same files, a naive sum over labels, shifts by whole pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture

from helpers.folders import save
from helpers.registered import (
    Pair,
    at,
    lps_place,
    nifti,
    simpleitk,
    voxels,
    write_affine,
)
from regpipe.io.images import read_image
from regpipe.transforms.apply import apply


def labelled(folder: Path, pair: Pair, dtype: type = np.uint8) -> tuple[Path, np.ndarray]:
    """Four regions of the moving image, in a folder that says nothing."""
    values = voxels(pair.moving)
    labels: np.ndarray = np.digitize(values, np.quantile(values, [0.4, 0.6, 0.8])).astype(dtype)
    return save(folder / "regions.nii.gz", labels, nifti(pair.moving).affine), labels


def test_a_label_map_keeps_its_labels_and_its_type(tmp_path: Path, pair: Pair) -> None:
    path, _ = labelled(tmp_path, pair, np.int16)
    (out,) = apply(pair.case, [path], tmp_path / "out")
    expected = simpleitk(path, pair.fixed, pair.case / "moving_to_fixed.h5", sitk.sitkNearestNeighbor)
    assert voxels(out).dtype == np.int16
    assert (voxels(out) != expected).mean() < 1e-3  # ties


def test_label_interpolation_is_the_largest_of_the_linear_shares(tmp_path: Path, flat: Pair) -> None:
    path, labels = labelled(tmp_path, flat)
    (out,) = apply(flat.case, [path], tmp_path / "out", interpolation="label")
    found = voxels(out)
    array, affine, *_ = read_image(flat.fixed)
    moving = read_image(flat.moving).affine
    checked = 0
    for voxel in np.random.default_rng(1).integers(0, array.shape, (400, 2)):
        place = flat.to_moving(lps_place(affine, voxel[None])) * [-1, -1]
        x, y = at(np.linalg.inv(moving), place)[0]
        if not (0 < x < labels.shape[0] - 1 and 0 < y < labels.shape[1] - 1):
            assert (-0.49 < x < labels.shape[0] - 0.51 and -0.49 < y < labels.shape[1] - 0.51) or not found[
                tuple(voxel)
            ]
            continue
        i, j, a, b = int(x), int(y), x % 1, y % 1
        shares = np.zeros(4)
        for corner, weight in zip(
            [(0, 0), (1, 0), (0, 1), (1, 1)], [(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], strict=True
        ):
            shares[labels[i + corner[0], j + corner[1]]] += weight
        first, second = np.sort(shares)[::-1][:2]
        if first - second > 1e-4:
            assert found[tuple(voxel)] == shares.argmax()
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("us.nii.gz", 200, "linear"),
        ("us.nii.gz", 8, "nearest"),
        ("us.nii.gz", 30, "linear"),
        ("us_seg.nii.gz", 200, "nearest"),
        ("labels/us.nii.gz", 200, "nearest"),
        ("labels/us.nii.gz", None, "linear"),
    ],
)
def test_auto_tells_label_maps_by_whole_numbers_and_name_or_few_values(
    tmp_path: Path, flat: Pair, capsys: pytest.CaptureFixture[str], name: str, values: int | None, expected: str
) -> None:
    shape, rng = voxels(flat.moving).shape, np.random.default_rng(0)
    array = rng.random(shape).astype(np.float32) if values is None else rng.integers(0, values, shape).astype(np.uint8)
    path = save(tmp_path / name, array, nifti(flat.moving).affine)
    apply(flat.case, [path], tmp_path / "out")
    assert f"({expected})" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itks_formats_come_back_as_they_went_in(tmp_path: Path, pair: Pair, suffix: str) -> None:
    path, _ = labelled(tmp_path, pair, np.uint8)
    same = tmp_path / f"regions{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(path)), str(same))
    same_nifti, own = apply(pair.case, [path, same], tmp_path / "out")
    image = sitk.ReadImage(str(own))
    assert own.name == same.name and image.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, voxels(same_nifti))
    np.testing.assert_allclose(image.GetOrigin(), sitk.ReadImage(str(pair.fixed)).GetOrigin(), atol=1e-3)


def test_a_picture_stays_one_on_a_picture_grid_and_becomes_nifti_elsewhere(tmp_path: Path, flat: Pair) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    Picture.fromarray(pixels).save(tmp_path / "us.png")
    write_affine(tmp_path / "shift.tfm", np.array([[1.0, 0, -3], [0, 1, -2], [0, 0, 1]]))  # LPS: +3, +2 pixels
    (out,) = apply(tmp_path / "shift.tfm", [tmp_path / "us.png"], tmp_path / "o", reference=tmp_path / "us.png")
    moved = np.array(Picture.open(out))
    assert out.name == "us.png" and moved.dtype == np.uint8
    np.testing.assert_array_equal(moved[:-2, :-3], pixels[2:, 3:])
    assert not moved[-2:].any() and not moved[:, -3:].any()
    (out,) = apply(tmp_path / "shift.tfm", [tmp_path / "us.png"], tmp_path / "o", reference=flat.fixed)
    assert out.name == "us.nii.gz" and voxels(out).shape == voxels(flat.fixed).shape


def test_an_empty_mask_and_one_frame_of_a_film_are_images_too(tmp_path: Path, flat: Pair) -> None:
    affine, frame = nifti(flat.moving).affine, voxels(flat.moving)
    empty = save(tmp_path / "empty.nii.gz", np.zeros(frame.shape, np.uint8), affine)
    film = save(tmp_path / "film.nii.gz", np.stack([frame * 0, frame], -1)[:, :, None], affine)
    outs = apply(flat.case, [empty, f"{film}#1", flat.moving], tmp_path / "out")
    assert [out.name for out in outs] == ["empty.nii.gz", "film_1.nii.gz", "moving.nii.gz"]
    assert not voxels(outs[0]).any() and voxels(outs[0]).dtype == np.uint8
    np.testing.assert_array_equal(voxels(outs[1]), voxels(outs[2]))
    (whole,) = apply(flat.case, [film], tmp_path / "whole")
    np.testing.assert_array_equal(voxels(whole)[..., 0, 1], voxels(outs[2]))
