"""Truth: where nibabel's affine and SimpleITK put the voxels of the file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from helpers.folders import save
from helpers.series import write_series
from regpipe.io import images, planes
from regpipe.io.formats import locate
from regpipe.io.labels import read_label
from regpipe.io.source import Source
from regpipe.utils.errors import InputError

RNG = np.random.default_rng(6)
TURNS = {"straight": [0, 0, 0], "oblique": [20, -35, 10], "far": [170, 60, -80], "mirrored": [0, 0, 0]}
SHAPES = [(9, 7, 1), (9, 1, 7), (1, 9, 7)]


def affine_of(turn: str, axis: int = 2) -> np.ndarray:
    spacing = np.insert([1.5, 0.8], axis, 5.0)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zyx", TURNS[turn], degrees=True).as_matrix() * spacing
    affine[:3, 3] = [-40, 12, 45]
    if turn == "mirrored":
        affine[:3, 0] *= -1
    return affine


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_slice_is_2d_and_its_plane_says_where_it_was(tmp_path: Path, shape: tuple[int, ...], turn: str) -> None:
    array, affine = RNG.random(shape).astype(np.float32), affine_of(turn, shape.index(1))
    image = images.read_image(save(tmp_path / "a.nii.gz", array, affine))
    assert image.plane is not None
    np.testing.assert_array_equal(image.array, array.squeeze())
    np.testing.assert_allclose(image.spacing, [1.5, 0.8], atol=1e-5)
    back, place = planes.as_stored(image.array, image.affine, image.plane)
    np.testing.assert_array_equal(back, array)
    np.testing.assert_allclose(place, affine, atol=1e-4)
    np.testing.assert_allclose(image.plane.lift[:3, :2].T @ image.plane.lift[:3, :2], np.eye(2), atol=1e-6)
    field = RNG.random((3, *array.squeeze().shape))
    assert planes.as_stored(field, image.affine, image.plane)[0].shape == (3, *shape)


@pytest.mark.parametrize(("shape", "axes"), [((9, 7, 1), (0, 1)), ((9, 1, 7), (0, 2)), ((1, 9, 7), (1, 2))])
def test_coordinates_in_a_straight_plane_are_those_of_space(
    tmp_path: Path, shape: tuple[int, ...], axes: tuple[int, int]
) -> None:
    affine = affine_of("mirrored", shape.index(1))
    image = images.read_image(save(tmp_path / "a.nii.gz", RNG.random(shape), affine))
    at = np.array([[0, 0], [8, 6], [3, 5]])
    whole = np.insert(at, shape.index(1), 0, axis=1)
    np.testing.assert_allclose(apply_affine(image.affine, at), apply_affine(affine, whole)[:, axes], atol=1e-5)


def test_slices_of_one_plane_stored_in_two_ways_have_the_same_coordinates(tmp_path: Path) -> None:
    """An oblique slice as (X, Y, 1), and the same voxels as (1, Y, X) with the axes exchanged and one turned round."""
    array, affine = RNG.random((9, 7, 1)).astype(np.float32), affine_of("oblique")
    other = affine[:, [2, 1, 0, 3]].copy()
    other[:3, 3] += 6 * other[:3, 1]
    other[:3, 1] *= -1
    one = images.read_image(save(tmp_path / "one.nii.gz", array, affine))
    two = images.read_image(save(tmp_path / "two.nii.gz", array.transpose(2, 1, 0)[:, ::-1], other))
    for i, j in ((0, 0), (8, 0), (2, 5)):
        assert one.array[i, j] == two.array[6 - j, i]
        np.testing.assert_allclose(apply_affine(one.affine, [i, j]), apply_affine(two.affine, [6 - j, i]), atol=1e-4)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz"])
def test_itks_files_lie_where_simpleitk_puts_them(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(RNG.random((7, 1, 9)).astype(np.float32))
    image.SetSpacing([1.5, 4.0, 0.8])
    image.SetOrigin([-12, 33, 7])
    image.SetDirection(Rotation.from_euler("zyx", [20, -35, 10], degrees=True).as_matrix().ravel().tolist())
    file = tmp_path / f"a{suffix}"
    sitk.WriteImage(image, str(file))
    read = images.read_image(file)
    assert read.plane is not None and read.plane.axis == 1
    _, affine = planes.as_stored(read.array, read.affine, read.plane)
    place = image.TransformIndexToPhysicalPoint((8, 0, 5))
    np.testing.assert_allclose(apply_affine(affine, [8, 0, 5]) * [-1, -1, 1], place, atol=1e-4)


def test_one_slice_of_dicom_has_its_place(tmp_path: Path) -> None:
    affine = affine_of("oblique")
    (file,) = write_series(tmp_path / "s", RNG.integers(0, 900, (9, 7, 1)).astype(np.uint16), affine)
    for path in (file, file.parent):
        read = images.read_image(path)
        by_itk = sitk.ReadImage(str(file))
        assert read.plane is not None
        _, found = planes.as_stored(read.array, read.affine, read.plane)
        place = by_itk.TransformIndexToPhysicalPoint((8, 6, 0))
        np.testing.assert_allclose(apply_affine(found, [8, 6, 0]) * [-1, -1, 1], place, atol=1e-3)


def test_films_of_a_slice_and_its_labels_lie_in_its_plane(tmp_path: Path) -> None:
    affine = affine_of("oblique", 0)
    film = save(tmp_path / "film.nii.gz", RNG.random((1, 9, 7, 3)).astype(np.float32), affine)
    frame = images.read_image(f"{film}#2")
    assert locate(f"{film}#2")[1] == 2
    label, _ = read_label(save(tmp_path / "l.nii.gz", np.ones((1, 9, 7), np.uint8), affine))
    for one in (frame, label):
        assert one.array.shape == (9, 7)
        assert one.plane is not None and label.plane is not None
        np.testing.assert_allclose(one.plane.lift, label.plane.lift)


def test_what_has_a_plane_is_one_slice_in_3d_only(tmp_path: Path) -> None:
    assert images.read_image(save(tmp_path / "flat.nii.gz", RNG.random((9, 7)))).plane is None
    assert images.read_image(save(tmp_path / "volume.nii.gz", RNG.random((9, 7, 2)))).plane is None
    with pytest.raises(InputError, match="one voxel thick"):
        images.read_image(save(tmp_path / "line.nii.gz", RNG.random((9, 1, 1))))


def test_a_slice_without_a_thickness_has_one_of_a_millimetre(tmp_path: Path) -> None:
    affine = np.diag([2.0, 3.0, 0.0, 1.0])
    found = planes.laid_flat((9, 7, 1), affine)
    assert found is not None
    assert math.isclose(np.linalg.norm(found[2].lift[:3, 2]), 1)


def test_structures_and_landmarks_as_channels_of_a_slice(tmp_path: Path) -> None:
    channels = np.zeros((9, 1, 7, 3), np.uint8)
    channels[2:5, 0, 1:4, 0] = 1
    channels[6:8, 0, 5:, 1] = 1
    channels[8, 0, 3, 2] = 1
    path = save(tmp_path / "l.nii.gz", channels, affine_of("oblique", 1))
    label, points = read_label(path, landmark_channels=2)
    assert np.bincount(label.array.ravel()).tolist() == [50, 9, 4]
    assert points is not None
    np.testing.assert_allclose(points, [[8, 3]], atol=1e-5)
    assert label.plane is not None


def test_landmarks_of_a_slice_are_those_of_space(tmp_path: Path) -> None:
    affine = affine_of("oblique", 0)
    image = save(tmp_path / "a.nii.gz", RNG.random((1, 9, 7)).astype(np.float32), affine)
    at = np.array([[0, 1, 2], [0, 7.5, 3], [0, 4, 6]])
    rows = [",".join(f"{v:.5f}" for v in p) for p in apply_affine(affine, at) * [-1, -1, 1]]
    (tmp_path / "mm.csv").write_text("\n".join(["x,y,z", *rows, ",,"]))
    (tmp_path / "voxels.csv").write_text("i,j,k\n0,1,2\n0,7.5,3\n0,4,6\n,,\n")
    files = Source()
    for name in ("mm", "voxels"):
        found = files.landmarks(tmp_path / f"{name}.csv", image).points
        back = apply_affine(np.linalg.inv(images.read_image(image).affine), -found)  # LPS of the plane
        np.testing.assert_allclose(back, np.r_[at[:, 1:], [[np.nan, np.nan]]], atol=1e-3)
