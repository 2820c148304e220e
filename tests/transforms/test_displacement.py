"""Truth: affine maps in closed form; the independent judge of files, points and images is ITK."""

from __future__ import annotations

from typing import NamedTuple

import itk
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from helpers.judges import itk_resampled, itk_transform
from regpipe.io.images import Grid, Image, InputError, read_image, to_grid
from regpipe.transforms import displacement
from regpipe.utils import files


class Pair(NamedTuple):
    fixed: Image
    moving: Image
    fixed_affine: np.ndarray  # working voxel -> RAS mm
    moving_affine: np.ndarray
    grid: Grid


def placed(shape: tuple[int, ...], spacing: tuple[float, ...], angles: list[float], flip: int):
    """A smooth random image on an oblique grid whose axis ``flip`` runs backwards."""
    dim = len(shape)
    rotation = Rotation.from_euler("zyx", angles, degrees=True).as_matrix()[:dim, :dim]
    affine = np.eye(dim + 1)
    affine[:dim, :dim] = rotation * np.where(np.arange(dim) == flip, -1, 1) * spacing
    affine[:dim, dim] = [12.5, -40.0, 33.0][:dim]
    noise = np.random.default_rng(sum(shape)).random(shape)
    smooth = ndimage.gaussian_filter(noise, 1.5)
    return Image(((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32), affine)


def oblique_pair(dim: int) -> Pair:
    """Fixed and moving of different shape, spacing and orientation."""
    if dim == 3:
        fixed = placed((30, 26, 12), (0.9, 1.1, 3.0), [20, -10, 15], flip=0)
        moving = placed((22, 24, 25), (1.3, 1.2, 1.4), [-15, 25, 5], flip=1)
        grid = Grid((24, 20, 20), (1.2, 1.5, 1.8))
    else:
        fixed = placed((30, 26), (0.9, 1.1), [20, 0, 0], flip=0)
        moving = placed((22, 34), (1.3, 0.8), [-15, 0, 0], flip=1)
        grid = Grid((28, 24), (1.0, 1.2))
    return Pair(fixed, moving, to_grid(fixed, grid), to_grid(moving, grid), grid)


def affine_displacement(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """``u(i) = (M - I) i`` (D, *grid) and its M (D+1, D+1): linear interpolation is exact on it."""
    dim = len(pair.grid.shape)
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] += 0.05 * np.random.default_rng(1).standard_normal((dim, dim))
    matrix[:dim, dim] = [0.7, -1.1, 0.4][:dim]
    at = np.indices(pair.grid.shape).astype(float)
    moved = np.tensordot(matrix[:dim, :dim], at, 1) + matrix[:dim, dim].reshape(-1, *[1] * dim)
    return moved - at, matrix


def curved_displacement(pair: Pair) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal((len(pair.grid.shape), *pair.grid.shape))
    smooth = np.stack([ndimage.gaussian_filter(n, 3) for n in noise])
    return 2.5 * smooth / np.abs(smooth).max()


def lps(points: np.ndarray) -> np.ndarray:
    return points * [-1, -1, 1][: points.shape[-1]]


def working_points(pair: Pair, k: int = 200) -> np.ndarray:
    """Points (K, D) in working voxels, well inside both the working grid and the fixed image."""
    shape = np.array(pair.grid.shape)
    return np.random.default_rng(3).uniform(0.3, 0.7, (k, len(shape))) * (shape - 1)


def place(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ affine[:-1, :-1].T + affine[:-1, -1]


def itk_points(path, points: np.ndarray) -> np.ndarray:
    transform = itk_transform(path, points.shape[1])
    return np.array([list(transform.TransformPoint(p.tolist())) for p in points])


def written(tmp_path, pair: Pair, d: np.ndarray) -> tuple[str, str, str]:
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving", "field")]
    displacement.write_image(paths[0], pair.fixed.array, pair.fixed.affine)
    displacement.write_image(paths[1], pair.moving.array, pair.moving.affine)
    displacement.write_displacement(paths[2], d, pair.fixed.affine)
    return paths[0], paths[1], paths[2]


def native(pair: Pair, u: np.ndarray) -> np.ndarray:
    return displacement.native_displacement(u, pair.fixed_affine, pair.moving_affine, pair.fixed)


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_moves_points_as_the_affine_in_closed_form(dim, tmp_path):
    pair = oblique_pair(dim)
    u, matrix = affine_displacement(pair)
    d = native(pair, u)
    _, _, field = written(tmp_path, pair, d)
    at = working_points(pair)
    fixed = lps(place(pair.fixed_affine, at))
    expected = lps(place(pair.moving_affine @ matrix, at))
    assert np.abs(itk_points(field, fixed) - expected).max() < 1e-3
    assert np.abs(displacement.map_points(fixed, d, pair.fixed.affine) - expected).max() < 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_agrees_on_points_between_the_voxels_of_a_curved_field(dim, tmp_path):
    pair = oblique_pair(dim)
    d = native(pair, curved_displacement(pair))
    _, _, field = written(tmp_path, pair, d)
    fixed = lps(place(pair.fixed_affine, working_points(pair)))
    ours = displacement.map_points(fixed, d, pair.fixed.affine)
    assert np.abs(itk_points(field, fixed) - ours).max() < 1e-3
    assert np.abs(ours - fixed).max() > 1


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_resamples_images_alike_up_to_the_rim(dim, tmp_path):
    pair = oblique_pair(dim)
    d = native(pair, curved_displacement(pair))
    fixed, moving, field = written(tmp_path, pair, d)
    theirs = itk_resampled(moving, fixed, field, dim)
    ours = displacement.resample_through(pair.moving, d, pair.fixed.affine, order=1)
    assert ours.shape == pair.fixed.array.shape and ours.dtype == np.float32
    filled = (ours != 0) & (theirs != 0)
    assert filled.mean() > 0.3
    assert np.abs(ours - theirs)[filled].max() < 1e-3
    # A voxel that lies on the moving image's very border may fall to either side.
    assert ((ours != 0) != (theirs != 0)).mean() < 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_resamples_labels_alike(dim, tmp_path):
    pair = oblique_pair(dim)
    labels = np.digitize(pair.moving.array, [0.4, 0.6]).astype(np.uint8)
    pair = pair._replace(moving=Image(labels, pair.moving.affine))
    d = native(pair, curved_displacement(pair))
    fixed, moving, field = written(tmp_path, pair, d)
    theirs = itk_resampled(moving, fixed, field, dim, nearest=True)
    ours = displacement.resample_through(pair.moving, d, pair.fixed.affine, order=0)
    assert ours.dtype == np.uint8
    assert (ours != theirs).mean() < 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_the_inverse_with_exchanged_images_leads_back(dim):
    pair = oblique_pair(dim)
    u, matrix = affine_displacement(pair)
    back = np.linalg.inv(matrix)
    at = np.indices(pair.grid.shape).astype(float)
    inverse = np.tensordot(back[:dim, :dim], at, 1) + back[:dim, dim].reshape(-1, *[1] * dim) - at
    d = native(pair, u)
    d_back = displacement.native_displacement(inverse, pair.moving_affine, pair.fixed_affine, pair.moving)
    fixed = lps(place(pair.fixed_affine, working_points(pair)))
    there = displacement.map_points(fixed, d, pair.fixed.affine)
    again = displacement.map_points(there, d_back, pair.moving.affine)
    assert np.abs(again - fixed).max() < 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_the_jacobian_of_a_linear_map_is_its_determinant_on_an_oblique_flipped_grid(dim):
    image = oblique_pair(dim).fixed
    linear = np.eye(dim) + 0.1 * np.random.default_rng(6).standard_normal((dim, dim))  # of LPS mm
    points = lps(place(image.affine, np.indices(image.array.shape).reshape(dim, -1).T))
    d = (points @ (linear - np.eye(dim)).T).T.reshape(dim, *image.array.shape)
    np.testing.assert_allclose(displacement.native_jacobian(d, image.affine), np.linalg.det(linear), rtol=1e-3)


def test_no_displacement_on_one_grid_is_zero_and_returns_the_image_to_its_rim():
    image = oblique_pair(3).fixed
    affine = to_grid(image, Grid((16, 16, 16), (1.5, 1.5, 1.5)))
    d = displacement.native_displacement(np.zeros((3, 16, 16, 16)), affine, affine, image)
    assert np.abs(d).max() < 1e-5
    back = displacement.resample_through(image, d, image.affine, order=1)
    np.testing.assert_allclose(back, image.array, atol=1e-4)


def test_outside_the_working_grid_the_rims_value_holds():
    # Native voxel 4 is working voxel 0, so natives 0 to 3 lie outside; one voxel is 2 mm.
    image = Image(np.zeros((12, 12), np.float32), np.diag([-2.0, -2.0, 1.0]))
    affine = image.affine @ np.array([[1, 0, 4], [0, 1, 4], [0, 0, 1.0]])
    u = np.zeros((2, 4, 4))
    u[0] = np.arange(4)[:, None] + 1
    d = displacement.native_displacement(u, affine, affine, image)
    np.testing.assert_allclose(d[0, :, 0], 2 * np.array([1, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4]))
    np.testing.assert_allclose(d[1], 0, atol=1e-6)


def test_for_a_picture_lps_millimetres_are_pixels():
    image = Image(np.zeros((8, 6), np.float32), np.diag([-1.0, -1.0, 1.0]))
    u = np.random.default_rng(4).standard_normal((2, 8, 6))
    d = displacement.native_displacement(u, image.affine, image.affine, image)
    np.testing.assert_allclose(d, u, atol=1e-6)


def test_a_missing_point_stays_missing_and_one_outside_takes_the_rims_value():
    d = np.full((2, 5, 5), 1.5, np.float32)
    points = np.array([[np.nan, np.nan], [1.0, 2.0], [100.0, -7.0]])
    moved = displacement.map_points(points, d, np.diag([-1.0, -1.0, 1.0]))
    np.testing.assert_allclose(moved, points + 1.5)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_displacement_returns_from_disk_and_from_itk(dim, tmp_path):
    pair = oblique_pair(dim)
    d = native(pair, curved_displacement(pair))
    path, copy = tmp_path / "field.nii.gz", tmp_path / "itk.nii.gz"
    displacement.write_displacement(path, d, pair.fixed.affine)
    itk.imwrite(itk.imread(str(path), itk.Vector[itk.F, dim]), str(copy))
    for file in (path, copy):
        again, affine = displacement.read_displacement(file)
        np.testing.assert_array_equal(again, d)
        np.testing.assert_allclose(affine, pair.fixed.affine, atol=1e-4)


def test_the_header_says_vector_field_in_millimetres(tmp_path):
    pair = oblique_pair(2)
    displacement.write_displacement(tmp_path / "d.nii.gz", np.zeros((2, 30, 26)), pair.fixed.affine)
    header = nib.Nifti1Image.from_filename(tmp_path / "d.nii.gz").header
    assert header.get_data_shape() == (30, 26, 1, 1, 2)
    assert header["intent_code"] == 1007 and header.get_xyzt_units()[0] == "mm"
    assert header["sform_code"] and header["qform_code"]
    assert header.get_data_dtype() == np.float32


def test_writing_twice_gives_equal_bytes_changes_nothing_and_leaves_no_other_file(tmp_path):
    pair = oblique_pair(3)
    d = native(pair, curved_displacement(pair))
    before = d.copy(), pair.fixed.affine.copy(), pair.fixed.array.copy()
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        written(out, pair, d)
        displacement.write_image(out / "p.png", np.arange(12).reshape(4, 3), np.eye(3))
    names = ["field.nii.gz", "fixed.nii.gz", "moving.nii.gz", "p.png"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stamp = (tmp_path / "a" / "field.nii.gz").read_bytes()[4:8]
    assert stamp == bytes(4)  # gzip's time of writing: both files are of one second here
    for old, new in zip(before, (d, pair.fixed.affine, pair.fixed.array), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_sheared_grid_claims_no_qform(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.3
    displacement.write_image(tmp_path / "i.nii", np.zeros((3, 4, 5), np.int16), affine)
    header = nib.Nifti1Image.from_filename(tmp_path / "i.nii").header
    assert header["qform_code"] == 0
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64])
def test_nifti_keeps_dtype_values_and_place(dtype, tmp_path):
    image = oblique_pair(3).fixed
    array = (100 * image.array).astype(dtype)
    displacement.write_image(tmp_path / "i.nii.gz", array, image.affine)
    kept = nib.Nifti1Image.from_filename(tmp_path / "i.nii.gz").get_data_dtype()
    assert kept == dtype
    again = read_image(tmp_path / "i.nii.gz")
    np.testing.assert_array_equal(again.array, array.astype(np.float32))
    np.testing.assert_allclose(again.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize(("top", "suffix"), [(255, ".png"), (65535, ".png"), (255, ".bmp")])
def test_a_picture_returns_as_it_was(top, suffix, tmp_path):
    array = np.random.default_rng(5).integers(0, top + 1, (7, 5)).astype(np.float32)
    array[0, 0] = top
    displacement.write_image(tmp_path / f"p{suffix}", array, np.eye(3))
    np.testing.assert_array_equal(read_image(tmp_path / f"p{suffix}").array, array)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("i.xyz", np.zeros((4, 4), np.uint8)),
        ("i.png", np.zeros((4, 4, 4), np.uint8)),
        ("i.png", np.full((4, 4), -1)),
        ("i.jpg", np.full((4, 4), 300)),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(name, array, tmp_path):
    with pytest.raises(InputError, match=name):
        displacement.write_image(tmp_path / name, array, np.eye(array.ndim + 1))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=f"full: '{path}'"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_lps_displacement_are_refused(tmp_path):
    ras = nib.Nifti1Image(np.zeros((4, 4, 4, 1, 3), np.float32), np.eye(4))
    ras.header["intent_code"] = 1006
    nib.save(ras, tmp_path / "ras.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "image.nii")
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b not really")
    for name in ("ras.nii", "image.nii", "broken.nii.gz", "missing.nii.gz"):
        with pytest.raises(InputError, match=name):
            displacement.read_displacement(tmp_path / name)
    with pytest.raises(InputError, match=r"d\.mha"):
        displacement.write_displacement(tmp_path / "d.mha", np.zeros((3, 4, 4, 4)), np.eye(4))


def test_a_transform_of_another_dimension_is_refused():
    with pytest.raises(InputError, match="3-D transform"):
        image = Image(np.zeros((4, 4), np.float32), np.eye(3))
        displacement.resample_through(image, np.zeros((3, 4, 4, 4)), np.eye(4), order=1)


def test_an_error_along_each_axis_is_a_length_in_mm_on_the_images_own_grid() -> None:
    """Voxels of 2 x 3 mm, turned: (1.5, 2) voxels are (3, 6) mm. The image's grid lies askew in it."""
    turn = np.array([[0.0, -3.0, 10.0], [2.0, 0.0, -4.0], [0.0, 0.0, 1.0]])
    error = np.stack([np.full((8, 6), 1.5), np.full((8, 6), 2.0)])
    image = Image(np.zeros((5, 7)), np.array([[0.8, 0.6, 1.0], [-0.6, 0.8, 2.0], [0.0, 0.0, 1.0]]))
    found = displacement.native_lengths(error, turn, turn, image)
    assert found.shape == (5, 7) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.hypot(3, 6), rtol=1e-6)
    larger = turn @ np.diag([1.5, 1.5, 1.0])  # the same voxel is longer in the moving image, as its TRE is
    np.testing.assert_allclose(displacement.native_lengths(error, turn, larger, image), 1.5 * np.hypot(3, 6), rtol=1e-6)
    ramp = np.stack([np.indices((8, 6))[0], np.zeros((8, 6))]).astype(float)  # voxels along the first axis: 2 mm each
    at = np.linalg.inv(turn) @ image.affine @ np.array([2.0, 3.0, 1.0])
    assert displacement.native_lengths(ramp, turn, turn, image)[2, 3] == pytest.approx(
        2 * np.clip(at[0], 0, 7), abs=1e-5
    )
