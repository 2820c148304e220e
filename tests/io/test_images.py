"""Reading, orienting and resampling, held against ITK's reading and against physical positions."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from PIL import Image as Picture

from regpipe.io.images import (
    Grid,
    Image,
    InputError,
    load_grid,
    normalise,
    read_image,
    resample,
    save_grid,
    stem,
    to_grid,
)
from regpipe.io.labels import read_label
from regpipe.io.landmarks import read_landmarks

RNG = np.random.default_rng(0)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique(spacing: tuple[float, float, float] = (1.0, 1.3, 2.1)) -> np.ndarray:
    """Turned 20 and 15 degrees, axes permuted and one flipped: RAS affine."""
    a, b = np.deg2rad([20, 15])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    swap = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ swap * spacing
    affine[:3, 3] = [12, -30, 7]
    return affine


def blob(shape: tuple[int, ...], affine: np.ndarray, centre: np.ndarray, mm: float) -> np.ndarray:
    """A Gaussian ball around a physical point (RAS mm)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    off = apply_affine(affine, index) - centre
    return np.exp(-0.5 * (off**2).sum(-1) / mm**2).astype(np.float32)


def centroid(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), -1)
    return apply_affine(affine, (index * array[..., None]).reshape(-1, array.ndim).sum(0) / array.sum())


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def itk_affine(image: itk.Image) -> np.ndarray:
    """ITK's own reading: index -> LPS mm, as a matrix, then RAS."""
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr"])
def test_every_volume_format_agrees_with_itk_on_an_oblique_flipped_image(tmp_path: Path, suffix: str) -> None:
    array = RNG.random((5, 6, 7)).astype(np.float32)
    nifti = save(tmp_path / "a.nii.gz", array, oblique())
    path = tmp_path / f"b{suffix}"
    itk.imwrite(itk.imread(str(nifti)), str(path))
    image = read_image(path)
    np.testing.assert_array_equal(image.array, array)
    np.testing.assert_allclose(image.affine, itk_affine(itk.imread(str(path))), atol=1e-5)
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-5)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".jpg"])
def test_a_picture_is_indexed_column_first_and_its_lps_mm_are_its_pixels(tmp_path: Path, suffix: str) -> None:
    rows = np.tile(np.linspace(0, 255, 24, dtype=np.uint8), (16, 1))  # brighter to the right
    Picture.fromarray(rows).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    assert image.array.shape == (24, 16)
    np.testing.assert_allclose(image.array, rows.T, atol=3 if suffix == ".jpg" else 0)
    ras = apply_affine(image.affine, [[3, 5]])
    np.testing.assert_array_equal(ras * [-1, -1], [[3, 5]])


def test_a_colour_picture_becomes_grey_with_a_warning_and_a_grey_rgb_one_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grey = RNG.integers(0, 255, (8, 9), dtype=np.uint8)
    Picture.fromarray(np.stack([grey, grey, 255 - grey], -1)).save(tmp_path / "colour.png")
    Picture.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "colour.png").array.shape == (9, 8)
    assert "colour.png" in caplog.text
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png").array, grey.T)
    assert "grey.png" not in caplog.text


def test_sixteen_bits_of_a_png_survive(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65535, (8, 9), dtype=np.uint16)
    Picture.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, deep.T)


def test_a_2d_nifti_keeps_the_plane_of_its_affine_unless_that_is_singular(tmp_path: Path) -> None:
    array = RNG.random((6, 5)).astype(np.float32)
    affine = np.diag([-0.5, -0.7, 1, 1.0])
    affine[:2, 3] = [3, 4]
    axial = read_image(save(tmp_path / "a.nii", array, affine))
    expected = np.array([[-0.5, 0, 3], [0, -0.7, 4], [0, 0, 1]])
    np.testing.assert_allclose(axial.affine, expected, atol=1e-6)
    thick = read_image(save(tmp_path / "b.nii", array[..., None], affine))
    np.testing.assert_allclose(thick.affine, axial.affine)
    assert thick.array.shape == (6, 5)
    coronal = np.array([[0.5, 0, 0, 0], [0, 0, 1, 0], [0, 0.7, 0, 0], [0, 0, 0, 1.0]])
    flat = read_image(save(tmp_path / "c.nii", array, coronal))
    np.testing.assert_allclose(flat.affine, np.diag([0.5, 0.7, 1]), atol=1e-6)


def test_a_2d_itk_image_is_turned_from_lps(tmp_path: Path) -> None:
    image = itk.image_from_array(RNG.random((5, 6)).astype(np.float32))
    image.SetSpacing([0.5, 0.7])
    image.SetOrigin([3.0, 4.0])
    itk.imwrite(image, str(tmp_path / "a.mha"))
    expected = np.array([[-0.5, 0, -3], [0, -0.7, -4], [0, 0, 1]])
    np.testing.assert_allclose(read_image(tmp_path / "a.mha").affine, expected)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """name -> (file, a word its message must have)."""
    good = RNG.random((6, 7, 8)).astype(np.float32)
    whole = save(folder / "whole.nii.gz", good)
    cut = folder / "cut.nii.gz"
    cut.write_bytes(whole.read_bytes()[:600])
    text = folder / "text.png"
    text.write_text("not a picture")
    odd = folder / "odd.xyz"
    odd.write_text("?")
    mha = folder / "cut.mha"
    itk.imwrite(itk.imread(str(whole)), str(mha))
    mha.write_bytes(mha.read_bytes()[:700])
    frames = [Picture.fromarray(RNG.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    rgb = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    vector = itk.image_from_array(RNG.random((4, 4, 4, 3)).astype(np.float32), is_vector=True)
    itk.imwrite(vector, str(folder / "vector.mha"))
    return {
        "missing": (folder / "none.nii.gz", "no such file"),
        "truncated NIfTI": (cut, "truncated"),
        "truncated MHA": (mha, "truncated"),
        "not a picture": (text, "truncated"),
        "unknown suffix": (odd, "unknown format"),
        "NaN": (save(folder / "nan.nii.gz", good * np.float32(np.nan)), "NaN alone"),
        "constant": (save(folder / "flat.nii.gz", np.ones((4, 4, 4), np.uint8)), "constant"),
        "4-D": (save(folder / "film.nii.gz", np.stack([good] * 3, -1)), "one frame"),
        "complex": (save(folder / "k.nii.gz", good.astype(np.complex64)), "complex"),
        "colour NIfTI": (save(folder / "rgb.nii.gz", rgb), "one real value"),
        "vector": (folder / "vector.mha", "3 values per voxel"),
        "film": (folder / "film.gif", "one frame"),
        "1-D": (save(folder / "line.nii.gz", np.arange(5, dtype=np.float32)), "shape"),
    }


def test_every_broken_file_is_named_in_one_line_that_says_why(tmp_path: Path) -> None:
    for name, (path, word) in broken_files(tmp_path).items():
        with pytest.raises(InputError) as caught:
            read_image(path)
        message = str(caught.value)
        assert str(path) in message and word in message and "\n" not in message, (name, message)


def test_label_channels_become_ids_and_landmarks_their_centroids(tmp_path: Path) -> None:
    channels = np.zeros((8, 9, 10, 4), np.uint8)
    channels[1:6, 1:6, 1:6, 0] = 1
    channels[2:4, 3:6, 4:5, 1] = 1  # centroid (2.5, 4, 4)
    channels[7, 8, 9, 3] = 1  # channel 2 is empty
    path = save(tmp_path / "a.nii.gz", channels)
    label, points = read_label(path, landmark_channels=1)
    np.testing.assert_array_equal(label.array, channels[..., 0])
    np.testing.assert_array_equal(points, [[2.5, 4, 4], [np.nan] * 3, [7, 8, 9]])
    label, none = read_label(path)
    assert none is None
    assert label.array[3, 4, 4] == 2 and label.array[1, 1, 1] == 1 and label.array[7, 8, 9] == 4


def test_whole_floats_are_labels_and_fractions_are_not(tmp_path: Path) -> None:
    ids = np.arange(60, dtype=np.float32).reshape(3, 4, 5) + 1000
    label, points = read_label(save(tmp_path / "a.nii.gz", ids), landmark_channels=1)
    np.testing.assert_array_equal(label.array, ids)
    assert points is not None and points.shape == (0, 3)
    with pytest.raises(InputError, match="b.nii.gz.*whole numbers"):
        read_label(save(tmp_path / "b.nii.gz", ids + 0.5))


def test_eight_bit_signed_and_long_labels_are_read_through_itk(tmp_path: Path) -> None:
    for name, dtype in (("int8", np.int8), ("int64", np.int64)):
        ids = np.arange(24, dtype=dtype).reshape(4, 3, 2)
        head = f"NRRD0004\ntype: {name}\ndimension: 3\nsizes: 2 3 4\nencoding: raw\nendian: little\n\n"
        (tmp_path / f"{name}.nrrd").write_bytes(head.encode() + ids.tobytes())
        np.testing.assert_array_equal(read_label(tmp_path / f"{name}.nrrd")[0].array, ids.T)


def test_a_palette_picture_as_label_gives_its_indices(tmp_path: Path) -> None:
    ids = RNG.integers(0, 4, (6, 5), dtype=np.uint8)
    picture = Picture.fromarray(ids).convert("P")
    picture.putdata(ids.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png")[0].array, ids.T)
    picture.convert("RGB").save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png.*colour"):
        read_label(tmp_path / "b.png")


def test_landmark_files_are_read_by_their_header(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("name,x,y,z\na,1,2,3\nb,,,\n")
    np.testing.assert_array_equal(read_landmarks(file), [[1, 2, 3], [np.nan] * 3])
    file.write_text("x,y\n1.5,2\n")
    np.testing.assert_array_equal(read_landmarks(file), [[1.5, 2]])
    for text in ("1,2,3\n4,5,6\n", "x,y\n1,two\n", ""):
        file.write_text(text)
        with pytest.raises(InputError, match="p.csv"):
            read_landmarks(file)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.1, 1.7)])
def test_a_blob_keeps_its_physical_place_on_the_working_grid(
    spacing: tuple[float, float, float],
) -> None:
    affine, shape = oblique(), (40, 36, 24)
    centre = apply_affine(affine, [19.2, 17.7, 11.4])
    image = Image(blob(shape, affine, centre, 4.0), affine)
    grid = Grid((64, 64, 64), spacing)
    placed = to_grid(image, grid)
    array = resample(image, placed, grid.shape, order=1)
    np.testing.assert_allclose(centroid(array, placed), centre, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(placed[:3, :3], axis=0), spacing)
    assert nib.aff2axcodes(placed) == ("R", "A", "S")


def test_the_working_grid_is_centred_to_half_an_image_voxel() -> None:
    for n in (20, 21):
        for step in (0.4, 1.0, 2.0):
            image = Image(np.zeros((n, n, n)), np.diag([1.0, 1, 1, 1]))
            placed = to_grid(image, Grid((16, 16, 16), (step,) * 3))
            middle = apply_affine(placed, [7.5, 7.5, 7.5])
            assert np.abs(middle - (n - 1) / 2).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("spacing", [(1.0, 1.3, 2.1), (1.4, 1.1, 1.7), (0.7, 0.7, 0.7)])
def test_how_the_axes_are_stored_does_not_matter(spacing: tuple[float, float, float]) -> None:
    shape = (20, 17, 12)
    array = RNG.random(shape).astype(np.float32)
    labels = RNG.integers(0, 5, shape)
    flip = np.diag([-1.0, 1, -1, 1])
    flip[0, 3], flip[2, 3] = shape[0] - 1, shape[2] - 1
    grid = Grid((24, 24, 24), spacing)
    for values, order in ((array, 1), (labels, 0)):
        one = Image(values, oblique())
        other = Image(values[::-1, :, ::-1].copy(), oblique() @ flip)
        swapped = Image(values.transpose(2, 0, 1).copy(), oblique()[:, [2, 0, 1, 3]])
        first = resample(one, to_grid(one, grid), grid.shape, order=order)
        for image in (other, swapped):
            np.testing.assert_allclose(to_grid(image, grid), to_grid(one, grid), atol=1e-9)
            again = resample(image, to_grid(image, grid), grid.shape, order=order)
            np.testing.assert_allclose(again, first, atol=1e-4)


def test_equal_spacing_copies_voxels_without_blur_whatever_the_parity() -> None:
    array = RNG.random((9, 10, 11)).astype(np.float32)
    image = Image(array, np.diag([1.0, 1, 1, 1]))
    placed = to_grid(image, Grid((12, 12, 12), (1.0, 1.0, 1.0)))
    at = np.rint(-placed[:3, 3]).astype(int)
    out = resample(image, placed, (12, 12, 12), order=1)
    inside = tuple(slice(a, a + n) for a, n in zip(at, array.shape, strict=True))
    np.testing.assert_array_equal(out[inside], array)


def test_outside_an_image_the_rim_continues_and_labels_are_zero() -> None:
    image = Image(np.full((4, 4), 3.0), np.eye(3))
    placed = to_grid(image, Grid((8, 8), (1.0, 1.0)))
    assert (resample(image, placed, (8, 8), order=1) == 3).all()
    assert (resample(image, placed, (8, 8), order=0) == 3).sum() == 16


def test_normalising_forgets_scale_and_outliers() -> None:
    array = RNG.random((40, 40)).astype(np.float32)
    wild = array * 6e5 - 100
    wild[0, 0] = 1e9
    assert normalise(wild).dtype == np.float32
    assert normalise(wild).min() == 0 and normalise(wild).max() == 1
    np.testing.assert_allclose(normalise(wild)[1:], normalise(array)[1:], atol=0.01)
    sparse = np.zeros((100, 100), np.float32)
    sparse[0, :3] = 7
    np.testing.assert_array_equal(normalise(sparse), sparse / 7)


def test_a_grid_survives_its_file_and_a_wrong_file_is_named(tmp_path: Path) -> None:
    grid = Grid((32, 48), (1.0, 0.5))
    save_grid(tmp_path / "grid.json", grid)
    assert load_grid(tmp_path / "grid.json") == grid
    for text in ("{}", "no", '{"shape": [4, 4], "spacing": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="bad.json"):
            load_grid(tmp_path / "bad.json")


def test_a_2d_image_does_not_fit_a_3d_grid() -> None:
    with pytest.raises(InputError, match="2-D image"):
        to_grid(Image(np.zeros((4, 4)), np.eye(3)), Grid((4, 4, 4), (1.0, 1.0, 1.0)))


def test_stems_know_double_suffixes() -> None:
    assert [stem(n) for n in ("a.nii.gz", "b.1.png", "c.csv")] == ["a", "b.1", "c"]
