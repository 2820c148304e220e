"""Truth: SimpleITK, one value at a time; closed forms and scipy's polar decomposition for directions."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture
from scipy import ndimage
from scipy.linalg import polar
from scipy.spatial.transform import Rotation

from regpipe.transforms.apply import apply
from regpipe.utils.errors import InputError

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
TURN = Rotation.from_euler("zyx", (40, -25, 15), degrees=True).as_matrix()


def smooth(*shape: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape)
    return ndimage.gaussian_filter(noise, [1.5] * 3 + [0] * (len(shape) - 3)).astype(np.float32)


def shift(folder: Path, dim: int = 3) -> Path:
    sitk.WriteTransform(sitk.TranslationTransform(dim, (0.7, 0.3, 0.5)[:dim]), str(folder / "t.tfm"))
    return folder / "t.tfm"


def pulled(values: np.ndarray, affine: np.ndarray, transform: Path, method: int = sitk.sitkLinear) -> np.ndarray:
    """Each of the values (*S, C) by SimpleITK, which is LPS."""
    dim = values.ndim - 1
    out = []
    for i in range(values.shape[-1]):
        image = sitk.GetImageFromArray(values[..., i].T.astype(np.float64))
        image.SetSpacing(np.abs(np.diag(affine))[:dim].tolist())
        out.append(sitk.GetArrayFromImage(sitk.Resample(image, sitk.ReadTransform(str(transform)), method)).T)
    return np.stack(out, -1)


def nifti(path: Path, array: np.ndarray, intent: int = 0, step: float = 1.0, unit: str = "sec") -> Path:
    image = nib.Nifti1Image(array, AFFINE)
    image.header["intent_code"] = intent
    image.header.set_xyzt_units("mm", unit)
    if array.ndim == 4:
        image.header.set_zooms((2, 2, 3, step))
    nib.save(image, path)
    return path


def load(path: Path) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_filename(path)


@pytest.mark.parametrize(("dtype", "unit"), [(np.float32, "sec"), (np.int16, "msec")])
def test_all_frames_are_carried_and_keep_their_time(tmp_path: Path, dtype: type, unit: str) -> None:
    array: np.ndarray = (1000 * smooth(12, 11, 10, 4)).astype(dtype)
    path = nifti(tmp_path / "bold.nii.gz", array, step=2.5, unit=unit)
    reference = nifti(tmp_path / "r.nii.gz", array[..., 0])
    (out,) = apply(shift(tmp_path), [path], tmp_path / "out", reference=reference)
    moved = load(out)
    assert moved.header.get_zooms() == (2, 2, 3, 2.5) and moved.header.get_xyzt_units() == ("mm", unit)
    np.testing.assert_allclose(moved.get_fdata(), pulled(array, AFFINE, tmp_path / "t.tfm"), atol=1e-2)
    np.testing.assert_allclose(moved.affine, AFFINE, atol=1e-6)
    assert sitk.ReadImage(str(out)).GetSize() == (12, 11, 10, 4)


def test_fractions_that_a_slope_makes_of_whole_numbers_stay_fractions_with_nearest(tmp_path: Path) -> None:
    array = (np.random.default_rng(1).integers(0, 255, (8, 7, 6, 3)) / 255).astype(np.float32)
    image = nib.Nifti1Image(array, AFFINE)
    image.set_data_dtype(np.uint8)  # a slope of 1 / 255
    nib.save(image, tmp_path / "p.nii")
    reference = nifti(tmp_path / "r.nii", array[..., 0])
    (out,) = apply(shift(tmp_path), [tmp_path / "p.nii"], tmp_path / "o", reference=reference, interpolation="nearest")
    expected = pulled(array, AFFINE, tmp_path / "t.tfm", sitk.sitkNearestNeighbor)
    np.testing.assert_allclose(load(out).get_fdata(), expected, atol=3e-3)  # of 8 bits


def test_analyze_frames_are_carried_and_infinite_ones_refused(tmp_path: Path) -> None:
    array = smooth(8, 7, 6, 3)
    reference = nifti(tmp_path / "r.nii", array[..., 0])
    nib.save(nib.AnalyzeImage(array, AFFINE), tmp_path / "a.img")
    (out,) = apply(shift(tmp_path), [tmp_path / "a.img"], tmp_path / "o.nii", reference=reference)
    assert load(out).shape == (8, 7, 6, 3)
    array[2, 2, 2, 1] = np.inf
    with pytest.raises(InputError, match="infinite"):
        apply(shift(tmp_path), [nifti(tmp_path / "i.nii", array)], tmp_path / "i_out", reference=reference)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_frames_of_itks_formats_stay_there(tmp_path: Path, suffix: str) -> None:
    array = smooth(12, 11, 10, 3)
    film = sitk.GetImageFromArray(array.T, isVector=False)
    film.SetSpacing((2, 2, 3, 0.04))
    film.SetOrigin((5, -6, 7, 0))
    sitk.WriteImage(film, str(tmp_path / f"f{suffix}"))
    one = film[:, :, :, 1]
    sitk.WriteImage(one, str(tmp_path / "r.nrrd"))
    (out,) = apply(shift(tmp_path), [tmp_path / f"f{suffix}"], tmp_path / "out", reference=tmp_path / "r.nrrd")
    moved = sitk.ReadImage(str(out))
    np.testing.assert_allclose(moved.GetSpacing(), film.GetSpacing())
    np.testing.assert_allclose(moved.GetOrigin(), film.GetOrigin())
    expected = sitk.Resample(one, sitk.ReadTransform(str(tmp_path / "t.tfm")), sitk.sitkLinear)
    np.testing.assert_allclose(sitk.GetArrayFromImage(moved)[1], sitk.GetArrayFromImage(expected), atol=1e-5)


def test_probabilities_stay_fractions_and_labels_in_channels_stay_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft = smooth(12, 11, 10, 3)
    soft /= soft.sum(-1, keepdims=True)
    hard = (soft == soft.max(-1, keepdims=True)).astype(np.uint8)
    paths = [nifti(tmp_path / "a_probseg.nii", soft), nifti(tmp_path / "a_seg.nii", hard)]
    outs = apply(shift(tmp_path), paths, tmp_path / "out", reference=nifti(tmp_path / "r.nii", soft[..., 0]))
    told = capsys.readouterr().out
    assert "(3 frames, linear)" in told and "(3 frames, nearest)" in told
    probable, chosen = (load(out) for out in outs)
    np.testing.assert_allclose(probable.get_fdata()[1:-1, 1:-1, 1:-1].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(probable.get_fdata(), pulled(soft, AFFINE, tmp_path / "t.tfm"), atol=1e-5)
    assert chosen.get_data_dtype() == np.uint8
    nearest = pulled(hard, AFFINE, tmp_path / "t.tfm", sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(np.asarray(chosen.dataobj), nearest)


def test_all_colours_are_carried_in_every_format(tmp_path: Path) -> None:
    rgb = (smooth(12, 11, 10, 3) * 255).clip(0, 255).astype(np.uint8)
    typed = np.ascontiguousarray(rgb).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    image = nib.Nifti1Image(typed, AFFINE)
    nib.save(image, tmp_path / "c.nii.gz")
    volume = sitk.GetImageFromArray(np.moveaxis(rgb, -1, 0).T.copy(), isVector=True)
    volume.SetSpacing((2, 2, 3))
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(volume, str(tmp_path / f"c{suffix}"))
    paths = [tmp_path / f"c{suffix}" for suffix in (".nii.gz", ".nrrd", ".mha")]
    outs = apply(shift(tmp_path), paths, tmp_path / "out", reference=nifti(tmp_path / "r.nii", rgb[..., 0]))
    expected = pulled(rgb, AFFINE, tmp_path / "t.tfm")
    assert load(outs[0]).get_data_dtype() == typed.dtype
    found = [np.stack([np.asarray(load(outs[0]).dataobj)[name] for name in "RGB"], -1)]
    for out in outs[1:]:
        moved = sitk.ReadImage(str(out))
        assert (
            moved.GetNumberOfComponentsPerPixel() == 3
            and moved.GetPixelIDTypeAsString() == "vector of 8-bit unsigned integer"
        )
        found.append(np.moveaxis(sitk.GetArrayFromImage(moved), -1, 0).T)
    for colours in found:
        assert np.abs(colours.astype(float) - expected).max() <= 0.51


def test_a_file_in_time_is_a_reference_too_and_broken_ones_are_named(tmp_path: Path) -> None:
    path = nifti(tmp_path / "bold.nii.gz", smooth(12, 11, 10, 4))
    (out,) = apply(shift(tmp_path), [path], tmp_path / "out", reference=path)
    assert load(out).shape == (12, 11, 10, 4)
    for name in ("a.png", "a.nrrd", "a.mha", "a.nii", "a.tif"):
        (tmp_path / name).write_bytes(b"no image")
        with pytest.raises(InputError, match=name):
            apply(shift(tmp_path), [tmp_path / name], tmp_path / "out", reference=path)


def test_numbers_of_colours_that_fill_regions_are_labels(tmp_path: Path) -> None:
    labels = np.kron(np.random.default_rng(0).integers(0, 5, (6, 6)), np.ones((5, 5), int)).astype(np.uint8)
    picture = Picture.fromarray(labels)
    picture.putpalette([7 * i % 256 for i in range(768)])
    picture.save(tmp_path / "a.png")
    (out,) = apply(shift(tmp_path, 2), [tmp_path / "a.png"], tmp_path / "out", reference=tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Picture.open(out))[:-1, :-1], labels[:-1, 1:])


def test_a_coloured_picture_stays_one(tmp_path: Path) -> None:
    rgb = (ndimage.gaussian_filter(np.random.default_rng(0).random((20, 30, 3)), (2, 2, 0)) * 255).astype(np.uint8)
    Picture.fromarray(rgb).save(tmp_path / "he.png")
    (out,) = apply(shift(tmp_path, 2), [tmp_path / "he.png"], tmp_path / "out", reference=tmp_path / "he.png")
    moved = np.asarray(Picture.open(out)).swapaxes(0, 1)
    expected = pulled(rgb.swapaxes(0, 1), np.eye(3), tmp_path / "t.tfm")
    assert moved.shape == (30, 20, 3) and np.abs(moved - expected).max() <= 0.51


def linear(folder: Path, matrix: np.ndarray) -> Path:
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix.ravel().tolist())
    transform.SetCenter((12, 10, 15))
    sitk.WriteTransform(transform, str(folder / "turn.tfm"))
    return folder / "turn.tfm"


SHEARED = TURN @ np.array([[1.2, 0.3, 0], [0, 0.9, 0.1], [0, 0, 1.1]])
V = np.array([1.0, 2.0, -0.5])
D = np.array([[3, 0.5, -0.2], [0.5, 2, 0.1], [-0.2, 0.1, 1.0]])


@pytest.mark.parametrize("matrix", [TURN, SHEARED])
def test_vectors_and_tensors_turn_with_their_place(tmp_path: Path, matrix: np.ndarray) -> None:
    back = polar(matrix)[0].T  # from the image to the grid, LPS
    shape = (13, 12, 11)
    field = np.broadcast_to(V, (*shape, 3)).astype(np.float32)
    lower = np.broadcast_to(D[np.tril_indices(3)], (*shape, 6)).astype(np.float32)
    paths = [
        nifti(tmp_path / "lps.nii", field[:, :, :, None], 1007),
        nifti(tmp_path / "ras.nii", field[:, :, :, None] * [-1, -1, 1], 1006),
        nifti(tmp_path / "tensor.nii", lower[:, :, :, None], 1005),
        nifti(tmp_path / "said_nothing.nii", field[:, :, :, None]),
    ]
    image = sitk.GetImageFromArray(np.moveaxis(field, -1, 0).T.copy().astype(np.float64), isVector=True)
    image.SetSpacing((2, 2, 3))
    sitk.WriteImage(image, str(tmp_path / "v.nrrd"))
    outs = apply(
        linear(tmp_path, matrix),
        [*paths, tmp_path / "v.nrrd"],
        tmp_path / "out",
        reference=nifti(tmp_path / "r.nii", smooth(*shape)),
    )
    middle = (6, 6, 5)
    lps, ras, tensor, nothing = (np.asarray(load(out).dataobj)[middle].ravel() for out in outs[:4])
    np.testing.assert_allclose(lps, back @ V, atol=1e-5)
    np.testing.assert_allclose(ras, back @ V * [-1, -1, 1], atol=1e-5)
    np.testing.assert_allclose(tensor, (back @ D @ back.T)[np.tril_indices(3)], atol=1e-5)
    np.testing.assert_allclose(nothing, V, atol=1e-6)
    assert [int(load(out).header["intent_code"]) for out in outs[:3]] == [1007, 1006, 1005]
    assert load(outs[2]).shape == (*shape, 1, 6)
    np.testing.assert_allclose(sitk.ReadImage(str(outs[4]))[middle], back @ V, atol=1e-5)


def test_layers_of_a_slicer_segmentation_are_labels_each(tmp_path: Path) -> None:
    layers = np.stack(
        [np.kron(np.random.default_rng(i).integers(0, 3, (4, 4, 3)), np.ones((3, 3, 3), int)) for i in (0, 1)], -1
    )
    image = sitk.GetImageFromArray(np.moveaxis(layers, -1, 0).T.copy().astype(np.uint8), isVector=True)
    image.SetSpacing((2, 2, 3))
    for name, said in (("a", image), ("one", sitk.VectorIndexSelectionCast(image, 0))):
        said.SetMetaData("Segment0_Name", "left kidney")
        said.SetMetaData("Segment0_Extent", "0 5 0 5 0 5")
        sitk.WriteImage(said, str(tmp_path / f"{name}.seg.nrrd"))
    reference = nifti(tmp_path / "r.nii", smooth(12, 12, 9))
    paths = [tmp_path / "a.seg.nrrd", tmp_path / "one.seg.nrrd"]
    out, one = apply(shift(tmp_path), paths, tmp_path / "out", reference=reference)
    for file in (out, one):
        image = sitk.ReadImage(str(file))
        assert image.GetMetaData("Segment0_Name") == "left kidney" and not image.HasMetaDataKey("Segment0_Extent")
    moved = np.moveaxis(sitk.GetArrayFromImage(sitk.ReadImage(str(out))), -1, 0).T
    np.testing.assert_array_equal(moved, pulled(layers, AFFINE, tmp_path / "t.tfm", sitk.sitkNearestNeighbor))


def test_films_and_stacks_of_pictures_are_carried_whole(tmp_path: Path) -> None:
    frames = (np.moveaxis(smooth(30, 20, 5), -1, 0) * 255).astype(np.uint8)
    pictures = [Picture.fromarray(frame.T) for frame in frames]
    pictures[0].save(tmp_path / "film.tif", save_all=True, append_images=pictures[1:])
    said = "ImageJ=1.53t\nimages=5\nslices=5\nspacing=3\nunit=mm\n"
    pictures[0].save(
        tmp_path / "stack.tif", save_all=True, append_images=pictures[1:], description=said, resolution=(0.5, 0.5)
    )
    pictures[0].save(tmp_path / "r.png")
    (film,) = apply(shift(tmp_path, 2), [tmp_path / "film.tif"], tmp_path / "out", reference=tmp_path / "r.png")
    expected = pulled(np.moveaxis(frames, 0, -1), np.eye(3), tmp_path / "t.tfm")
    assert film.name == "film.nii.gz" and load(film).shape == (30, 20, 1, 5)
    np.testing.assert_allclose(load(film).get_fdata()[:, :, 0], expected, atol=1e-3)
    (stack,) = apply(shift(tmp_path, 3), [tmp_path / "stack.tif"], tmp_path / "o", reference=tmp_path / "stack.tif")
    volume = pulled(np.moveaxis(frames, 0, -1)[..., None], AFFINE, tmp_path / "t.tfm")
    np.testing.assert_allclose(load(stack).get_fdata(), volume[..., 0], atol=1e-3)
    np.testing.assert_allclose(load(stack).header.get_zooms(), (2, 2, 3), atol=1e-5)
