"""Truth: affine maps and voxels in closed form; judges of objects and files: ITK, its own writer, SimpleITK."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import h5py
import itk
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from regpipe.io import itk_bridge


def oblique(dim: int) -> np.ndarray:
    """A rotated, anisotropic, left-handed RAS affine."""
    turn = Rotation.from_euler("zyx", [20, -10, 15], degrees=True).as_matrix()[:dim, :dim]
    affine = np.eye(dim + 1)
    affine[:dim, :dim] = np.linalg.qr(turn)[0] * [0.9, 1.1, 3.0][:dim]  # at right angles in 2-D too
    affine[:dim, dim] = [12.5, -40.0, 33.0][:dim]
    if np.linalg.det(affine) > 0:
        affine[:, 0] *= -1
    return affine


def shear_and_move(dim: int) -> np.ndarray:
    matrix = np.eye(dim + 1)
    matrix[:dim] += 0.1 * np.random.default_rng(4).standard_normal((dim, dim + 1))
    matrix[:dim, dim] = [5.0, -8.0, 3.0][:dim]
    return matrix


def lps(points: np.ndarray) -> np.ndarray:
    return points * [-1, -1, 1][: points.shape[-1]]


def moved(transform, points: np.ndarray) -> np.ndarray:
    return np.array([list(transform.TransformPoint([float(v) for v in p])) for p in points])


def small_field(dim: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((dim, 7, 6, 5)[: dim + 1])


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_an_image_goes_to_itk_and_back_unchanged(dim, dtype):
    array = np.random.default_rng(0).integers(0, 200, (7, 6, 5)[:dim]).astype(dtype)
    back = itk_bridge.from_itk(itk_bridge.to_itk(array, oblique(dim)))
    assert back.array.dtype == dtype
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_allclose(back.affine, oblique(dim), atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_sees_each_voxel_at_its_place_in_lps(dim):
    array = np.arange(7 * 6 * 5, dtype=np.float32)[: 7 * 6 * (5 if dim == 3 else 1)].reshape((7, 6, 5)[:dim])
    image = itk_bridge.to_itk(array, oblique(dim))
    index = [3, 1, 4][:dim]
    assert image.GetPixel(index) == array[tuple(index)]
    place = np.array(image.TransformIndexToPhysicalPoint(index))
    np.testing.assert_allclose(place, lps(apply_affine(oblique(dim), index)), atol=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[True, False]]), "uint8"),
        (np.array([[-32768, 32767]], np.int32), "int16"),
        (np.array([[0, 32768]], np.int64), "float64"),
        (np.array([[-1, 1]], np.int8), "int16"),
        (np.array([[0.5, 1]], np.float16), "float32"),
    ],
)
def test_other_pixel_types_become_one_that_itk_filters_know_and_keep_their_values(values, expected):
    back = itk_bridge.from_itk(itk_bridge.to_itk(values, np.eye(3)))
    assert back.array.dtype == expected
    np.testing.assert_array_equal(back.array, values)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_moves_points_as_its_matrix_does(dim):
    points = np.random.default_rng(1).uniform(-50, 50, (20, dim))  # RAS
    expected = lps(apply_affine(shear_and_move(dim), points))
    np.testing.assert_allclose(moved(itk_bridge.itk_affine(shear_and_move(dim)), lps(points)), expected, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_field_moves_each_voxel_by_its_vector_and_nothing_outside(dim):
    d, affine = small_field(dim), oblique(dim)
    field = itk_bridge.itk_field(d, affine)
    at = np.indices(d.shape[1:]).reshape(dim, -1).T
    places = lps(apply_affine(affine, at))
    np.testing.assert_allclose(moved(field, places) - places, d.reshape(dim, -1).T, atol=1e-9)
    outside = lps(apply_affine(affine, np.full((1, dim), -3.0)))
    np.testing.assert_array_equal(moved(field, outside), outside)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_composite_applies_its_parts_in_the_order_given(dim):
    d, affine, matrix = small_field(dim), oblique(dim), shear_and_move(dim)
    chain = itk_bridge.composite(itk_bridge.itk_field(d, affine), itk_bridge.itk_affine(matrix))
    at = [2, 3, 1][:dim]
    place = lps(apply_affine(affine, at))
    vector = d.reshape(dim, -1)[:, np.ravel_multi_index(at, d.shape[1:])]
    expected = lps(apply_affine(matrix, lps(place + vector)))
    np.testing.assert_allclose(moved(chain, place[None])[0], expected, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_file_is_what_itk_writes(dim, tmp_path):
    matrix = shear_and_move(dim)
    itk.transformwrite([itk_bridge.itk_affine(matrix)], str(tmp_path / "itk.mat"))
    assert itk_bridge.affine_mat(matrix) == (tmp_path / "itk.mat").read_bytes()


@pytest.mark.parametrize("dim", [2, 3])
def test_a_composite_file_has_the_layout_that_itk_writes(dim, tmp_path):
    d, affine, matrix = small_field(dim), oblique(dim), shear_and_move(dim)
    chain = itk_bridge.composite(itk_bridge.itk_field(d, affine), itk_bridge.itk_affine(matrix))
    itk.transformwrite([chain], str(tmp_path / "itk.h5"))
    ours = itk_bridge.composite_h5(itk_bridge.field_part(d, affine), itk_bridge.affine_part(matrix))
    (tmp_path / "ours.h5").write_bytes(ours)
    with h5py.File(tmp_path / "itk.h5") as a, h5py.File(tmp_path / "ours.h5") as b:
        names: list[str] = []
        a["TransformGroup"].visit(names.append)
        assert len(names) == 10  # a composite and two transforms
        for name in names:
            theirs, own = a["TransformGroup"][name], b["TransformGroup"][name]
            if name.endswith("Type"):
                assert own[()].tolist() == [theirs[0].replace(b"double", b"float")]
            elif isinstance(theirs, h5py.Dataset):
                np.testing.assert_allclose(own[()], theirs[()], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
def test_itk_and_simpleitk_read_a_composite_file(dim, tmp_path):
    d, affine, matrix = small_field(dim), oblique(dim), shear_and_move(dim)
    path = tmp_path / "composite.h5"
    path.write_bytes(itk_bridge.composite_h5(itk_bridge.affine_part(matrix), itk_bridge.field_part(d, affine)))
    inside = np.random.default_rng(6).uniform(0.5, 3.5, (20, dim))
    points = lps(apply_affine(np.linalg.inv(matrix) @ affine, inside))  # the affine takes them into the grid
    chain = itk_bridge.composite(itk_bridge.itk_affine(matrix), itk_bridge.itk_field(d, affine))
    expected = moved(chain, points)
    for read in (itk.transformread(str(path))[0], sitk.ReadTransform(str(path))):
        np.testing.assert_allclose(moved(read, points), expected, atol=1e-4)
    assert np.abs(expected - lps(apply_affine(matrix, lps(points)))).max() > 0.5  # the field counts


@pytest.fixture
def own_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has not been loaded yet."""
    (tmp_path / "torch.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.usefixtures("own_torch")
def test_torch_that_is_used_while_another_stands_in_for_it_is_loaded_and_stays() -> None:
    with itk_bridge._torch_later():
        stand_in = importlib.import_module("torch")
        assert importlib.util.find_spec("torch") is not None
        assert "answer" not in vars(sys.modules["torch"])
        assert stand_in.answer == vars(sys.modules["torch"])["answer"] == 42
    assert sys.modules["torch"].answer == stand_in.answer == 42


@pytest.mark.usefixtures("own_torch")
def test_what_stood_in_for_torch_is_gone_and_loads_it_later() -> None:
    with itk_bridge._torch_later():
        stand_in = importlib.import_module("torch")
    assert "torch" not in sys.modules
    assert stand_in.answer == 42 and "answer" in vars(sys.modules["torch"])
