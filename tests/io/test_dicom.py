"""DICOM against the same volume as NIfTI, and against ITK's own reading of the same folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.affines import apply_affine
from pydicom.uid import (
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from helpers.folders import save
from helpers.series import LPS, write_dicom, write_series
from regpipe.io.images import Grid, Image, files, geometry, is_series, read_image, resample, to_grid
from regpipe.io.labels import read_label
from regpipe.utils.errors import InputError

RNG = np.random.default_rng(0)


def turned(spacing: tuple[float, float, float] = (0.8, 1.3, 2.5)) -> np.ndarray:
    a, b = np.deg2rad([20, 15])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = LPS @ about_z @ about_x * spacing
    affine[:3, 3] = [12, -30, 7]
    return affine


def counts(shape: tuple[int, int, int] = (9, 8, 7)) -> np.ndarray:
    return RNG.integers(-900, 2000, shape).astype(np.int16)


def test_a_series_is_the_nifti_of_the_same_volume_and_what_itk_reads(tmp_path: Path) -> None:
    stored, affine = counts(), turned()
    write_series(tmp_path / "ct", stored, affine, RescaleSlope="0.5", RescaleIntercept="-100")
    (tmp_path / "ct" / "notes.txt").write_text("not a slice")
    image = read_image(tmp_path / "ct")
    nifti = read_image(save(tmp_path / "ct.nii.gz", (0.5 * stored - 100).astype(np.float32), affine))
    np.testing.assert_array_equal(image.array, nifti.array)
    np.testing.assert_allclose(image.affine, nifti.affine, atol=1e-5)
    names = itk.GDCMSeriesFileNames.New(Directory=str(tmp_path / "ct"))
    theirs = itk.imread(names.GetInputFileNames(), itk.F)
    np.testing.assert_array_equal(itk.array_from_image(theirs).T, image.array)
    for index in ((0, 0, 0), (8, 0, 3), (2, 7, 6)):
        place = theirs.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(LPS @ apply_affine(image.affine, index), place, atol=1e-5)
    assert geometry(tmp_path / "ct")[0] == (9, 8, 7)
    assert is_series(tmp_path / "ct") and len(files(tmp_path / "ct")) == 7
    assert not is_series(tmp_path) and not is_series(tmp_path / "ct.nii.gz")


def test_slices_of_a_left_handed_stack_lie_where_the_nifti_has_them(tmp_path: Path) -> None:
    stored, affine = counts(), turned()
    affine[:3, 2] *= -1
    write_series(tmp_path / "ct", stored, affine)
    image, grid = read_image(tmp_path / "ct"), Grid((12, 12, 12), (1.0, 1.0, 2.0))
    nifti = Image(stored.astype(np.float32), affine)
    one, other = (resample(i, to_grid(i, grid), grid.shape, order=1) for i in (image, nifti))
    np.testing.assert_allclose(one, other, atol=1e-4 * np.ptp(stored))


def test_a_tilted_gantry_is_straightened_and_its_contents_stay_in_place(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[1, 2] = 2 * np.tan(np.deg2rad(15))
    index = np.stack(np.meshgrid(*map(np.arange, (30, 40, 20)), indexing="ij"), -1)
    place = apply_affine(affine, index)
    centre = place.reshape(-1, 3).mean(0)
    ball = 1000 * np.exp(-0.5 * ((place - centre) ** 2).sum(-1) / 5**2)
    write_series(tmp_path / "ct", ball.astype(np.int16), affine)
    image = read_image(tmp_path / "ct")
    size = image.spacing
    axes = image.affine[:3, :3] / size
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    where = apply_affine(
        image.affine, np.stack(np.meshgrid(*map(np.arange, image.array.shape), indexing="ij"), -1).reshape(-1, 3)
    )
    found = (where * image.array.reshape(-1, 1)).sum(0) / image.array.sum()
    np.testing.assert_allclose(found, centre, atol=0.05)
    truth = 1000 * np.exp(-0.5 * ((where - centre) ** 2).sum(-1) / 5**2)
    assert np.abs(truth - image.array.ravel()).max() < 40  # linear interpolation of a 5 mm ball at 2 mm: 2 %, and steps


def test_one_file_is_a_slice_a_volume_or_a_film(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sagittal: dict[str, Any] = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [1, 2, 3]}
    rows = counts()[:, :, 0]
    image = read_image(write_dicom(tmp_path / "a.dcm", rows, PixelSpacing=[0.7, 0.5], **sagittal))
    np.testing.assert_array_equal(image.array, rows.T)
    in_plane = np.array([[-0.5, 0, -2], [0, -0.7, 3], [0, 0, 1]])  # A and S; the file is LPS
    np.testing.assert_allclose(image.affine, in_plane)
    assert "spacing" not in caplog.text
    frames = RNG.integers(0, 255, (5, 6, 8), dtype=np.uint8)
    cine: dict[str, Any] = {"NumberOfFrames": 5, "FrameIncrementPointer": 0x00181063, "FrameTime": "40"}
    film = write_dicom(tmp_path / "film", frames, sop=UltrasoundMultiFrameImageStorage, **cine)
    np.testing.assert_array_equal(read_image(f"{film}#3").array, frames[3].T)
    assert "film: gives no pixel spacing" in caplog.text
    with pytest.raises(InputError, match="film: holds 5 frames.*#0 to #4"):
        read_image(film)
    stack = write_dicom(tmp_path / "stack.dcm", frames, sop=UltrasoundMultiFrameImageStorage, NumberOfFrames=5)
    np.testing.assert_array_equal(read_image(stack).array, frames.T)


def test_colour_becomes_grey_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rgb = RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = write_dicom(tmp_path / "us.dcm", rgb, sop=UltrasoundImageStorage, PlanarConfiguration=0)
    luminance = rgb @ [0.2125, 0.7154, 0.0721]  # ITK's
    np.testing.assert_allclose(read_image(file).array, luminance.T, atol=1)
    assert "us.dcm: is in colour" in caplog.text


def test_a_label_series_keeps_its_ids_on_the_grid_of_its_image(tmp_path: Path) -> None:
    ids = RNG.integers(0, 5, (9, 8, 7)).astype(np.uint16)
    write_series(tmp_path / "image", counts(), turned())
    write_series(tmp_path / "label", ids, turned())
    label, _ = read_label(tmp_path / "label")
    np.testing.assert_array_equal(label.array, ids)
    np.testing.assert_allclose(label.affine, read_image(tmp_path / "image").affine)


def expect(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_image(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_wrong_with_a_series_is_said_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def series(name: str) -> list[Path]:
        return write_series(tmp_path / name, counts(), turned())

    series("missing")[3].unlink()
    expect(tmp_path / "missing", "slices are missing: a gap of 5.00 mm between .* elsewhere it is 2.50 mm")
    twice = series("twice")
    data = pydicom.dcmread(twice[2])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["other"])
    data.save_as(tmp_path / "twice" / "again")
    expect(tmp_path / "twice", f"({twice[2].name} and again|again and {twice[2].name}) are at one place")
    series("two")
    write_series(tmp_path / "two", counts((9, 8, 3)), turned(), series="b")
    expect(tmp_path / "two", "holds 2 series .*7 x 'series a'.*3 x 'series b'|3 x 'series b'.*7 x 'series a'")
    series("thick")
    write_dicom(tmp_path / "thick" / "b", counts()[:, :, 0], SliceThickness="9")
    expect(tmp_path / "thick", "b: one of several files, yet not a slice with its position")
    series("askew")[0].unlink()
    write_series(tmp_path / "askew", counts((9, 8, 1)), turned() @ nib.affines.from_matvec(np.eye(3)[[1, 0, 2]]))
    expect(tmp_path / "askew", "not parallel")
    series("aside")
    moved = pydicom.dcmread(next((tmp_path / "aside").iterdir()))
    moved.ImagePositionPatient[0] = float(moved.ImagePositionPatient[0]) + 8
    moved.save_as(str(moved.filename))
    expect(tmp_path / "aside", "off the line|out of step|missing")
    (tmp_path / "none").mkdir()
    expect(tmp_path / "none", "folder without DICOM")
    (tmp_path / "none" / "x").write_bytes(b"\0" * 128 + b"DICM and no more")
    expect(tmp_path / "none", "none/x: not DICOM, or cut off")
    (tmp_path / "cut.dcm").write_bytes(series("cut")[0].read_bytes()[:300])
    expect(tmp_path / "cut.dcm", "cut.dcm: not DICOM, or cut off")
    last = sorted(f.name for f in (tmp_path / "cut").iterdir())[0]
    (tmp_path / "cut" / "x").write_bytes((tmp_path / "cut" / last).read_bytes()[:300])
    expect(tmp_path / "cut", "cut/x: not DICOM, or cut off")  # left out, a slice at the end would not be missed
    write_dicom(tmp_path / "cut" / "x", counts()[:, :, 0])
    record = pydicom.dcmread(tmp_path / "cut" / "x")
    del record.PixelData, record.Rows
    record.save_as(tmp_path / "cut" / "x")
    with caplog.at_level(logging.WARNING):
        assert read_image(tmp_path / "cut").array.shape == (9, 8, 7)
    assert "cut: 1 DICOM files hold no readable image and are left out: x" in caplog.text
