"""One physical picture, however it is stored: orientations, numbers, formats, frames, shears; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import inv_ornt_aff
from PIL import Image as Picture

from helpers.folders import save
from regpipe.io import images
from regpipe.io.formats import locate
from regpipe.io.images import Grid, Image, files, geometry, header, read_image, resample, stem, to_grid
from regpipe.io.labels import read_label
from regpipe.utils.errors import InputError

RNG = np.random.default_rng(0)


def turned(dim: int, degrees: float = 20) -> np.ndarray:
    """Turned about z (and 15 degrees about x), anisotropic, off the origin."""
    a, b = np.deg2rad([degrees, 15])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(dim + 1)
    affine[:-1, :-1] = (about_z @ about_x if dim == 3 else about_z[:2, :2]) * [1.0, 1.3, 2.1][:dim]
    affine[:-1, -1] = [12, -30, 7][:dim]
    return affine


def stored_every_way(image: Image) -> list[Image]:
    """The same image under every flip and permutation of its axes."""
    dim = image.array.ndim
    ways = []
    for order, signs in itertools.product(itertools.permutations(range(dim)), itertools.product((1, -1), repeat=dim)):
        orientation = np.array([*zip(order, signs, strict=True)])
        moved = nib.orientations.apply_orientation(image.array, orientation)
        ways.append(Image(moved, image.affine @ inv_ornt_aff(orientation, image.array.shape)))
    return ways


@pytest.mark.parametrize(("dim", "ways"), [(2, 8), (3, 48)])
@pytest.mark.parametrize("spacing", [(1.0, 1.3, 2.1), (1.4, 1.1, 1.7), (0.7, 0.7, 0.7)])
def test_the_working_grid_sees_one_image_in_every_orientation_of_its_file(
    dim: int, ways: int, spacing: tuple[float, float, float]
) -> None:
    image = Image(RNG.random((20, 17, 12)[:dim]).astype(np.float32), turned(dim))
    grid = Grid((24,) * dim, spacing[:dim])
    first = resample(image, to_grid(image, grid), grid.shape, order=1)
    others = stored_every_way(image)
    assert len(others) == ways
    for other in others:
        np.testing.assert_allclose(to_grid(other, grid), to_grid(image, grid), atol=1e-9)
        again = resample(other, to_grid(other, grid), grid.shape, order=1)
        np.testing.assert_allclose(again, first, atol=1e-4)


def test_orientations_survive_their_files_and_give_one_geometry(tmp_path: Path) -> None:
    image = Image(RNG.random((8, 7, 6)).astype(np.float32), turned(3))
    grid = Grid((12, 12, 12), (1.0, 1.2, 1.9))
    first = resample(image, to_grid(image, grid), grid.shape, order=1)
    for i, other in enumerate(stored_every_way(image)[::7]):
        path = save(tmp_path / f"{i}.nii", other.array, other.affine)
        itk.imwrite(itk.imread(str(path)), str(tmp_path / f"{i}.nrrd"))
        for file in (path, tmp_path / f"{i}.nrrd"):
            read = read_image(file)
            again = resample(read, to_grid(read, grid), grid.shape, order=1)
            np.testing.assert_allclose(again, first, atol=1e-4)
            assert geometry(file)[0] == (8, 7, 6)
            np.testing.assert_allclose(header(file)[1], read.affine)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_every_number_type_of_every_volume_format_is_the_same_picture(tmp_path: Path, kind: str) -> None:
    bits = int(kind.lstrip("uintfloa"))
    top = min(2 ** (bits - (kind[0] != "u")) - 1, 2**24)  # float32 is exact to 2^24
    array = RNG.integers(0 if kind[0] == "u" else -top, top, (5, 6, 7)).astype(kind)
    nrrd = {"int8": "signed char", "uint8": "unsigned char", "float32": "float", "float64": "double"}.get(kind, kind)
    head = f"NRRD0004\ntype: {nrrd}\ndimension: 3\nsizes: 5 6 7\nencoding: raw\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + array.tobytes("F"))
    named = {"int8": "CHAR", "int16": "SHORT", "int32": "INT", "float32": "FLOAT", "float64": "DOUBLE"}
    element = named.get(kind) or "U" + named[kind[1:]]
    head = f"ObjectType = Image\nNDims = 3\nDimSize = 5 6 7\nElementType = MET_{element}\n"
    (tmp_path / "a.mha").write_bytes(f"{head}ElementDataFile = LOCAL\n".encode() + array.tobytes("F"))
    (tmp_path / "a.mhd").write_text(f"{head}ElementDataFile = a.raw\n")
    (tmp_path / "a.raw").write_bytes(array.tobytes("F"))
    paths = [save(tmp_path / "a.nii.gz", array), *(tmp_path / f"a.{s}" for s in ("nrrd", "mha", "mhd"))]
    for path in paths:
        np.testing.assert_array_equal(read_image(path).array, array)
        np.testing.assert_array_equal(read_label(path)[0].array, array)


def test_the_scale_of_a_nifti_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(0.5, -7)
    whole = image.to_bytes()
    (tmp_path / "a.nii").write_bytes(whole)
    stored = np.frombuffer(whole[-120:], "<i2").reshape(3, 4, 5, order="F")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").array, 0.5 * stored - 7)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "b.tif", "c.tif", "d.tif", "a.gif", "a.bmp"])
def test_pictures_of_every_depth_are_one_picture_and_their_resolution_is_ignored(tmp_path: Path, name: str) -> None:
    kinds = {"a.png": np.uint16, "a.tif": np.uint16, "b.tif": np.int32, "c.tif": np.float32, "d.tif": np.uint8}
    array = RNG.integers(0, 250, (8, 9)).astype(kinds.get(name, np.uint8))
    Picture.fromarray(array).save(tmp_path / name, dpi=(300, 300))
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, array.T)
    np.testing.assert_array_equal(image.affine, np.diag([-1, -1, 1]))


def warnings_of(caplog: pytest.LogCaptureFixture, path: Path) -> str:
    """What reading an image says the first time; the second time it says nothing more."""
    caplog.clear()
    read_image(path)
    said = caplog.text
    read_image(path)
    assert caplog.text == said
    return said


def test_two_places_of_a_nifti_are_said_and_one_or_equal_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = turned(3)
    moved[0, 3] += 4
    for name, sform, qform, word in (
        ("both", (turned(3), 1), (moved, 1), "sform and qform are 4 mm apart at a corner, the sform is used"),
        ("equal", (turned(3), 1), (turned(3), 1), ""),
        ("sform", (turned(3), 2), (None, 0), ""),
        ("qform", (None, 0), (moved, 1), ""),
        ("none", (None, 0), (None, 0), "neither sform nor qform is set"),
    ):
        image = nib.Nifti1Image(RNG.random((5, 6, 7)).astype(np.float32), turned(3))
        image.set_sform(sform[0], code=sform[1])
        image.set_qform(qform[0], code=qform[1])
        nib.save(image, tmp_path / f"{name}.nii")
        said = warnings_of(caplog, tmp_path / f"{name}.nii")
        assert word in said and bool(said) == bool(word), said
        assert not word or f"{name}.nii: " in said
    np.testing.assert_allclose(read_image(tmp_path / "both.nii").affine, turned(3), atol=1e-5)
    np.testing.assert_allclose(read_image(tmp_path / "qform.nii").affine, moved, atol=1e-5)
    analyze = nib.AnalyzeImage(RNG.random((5, 6, 7)).astype(np.float32), np.diag([-2.0, 2, 2, 1]))
    nib.save(analyze, tmp_path / "old.img")
    assert "old.hdr: neither sform nor qform" in warnings_of(caplog, tmp_path / "old.hdr")


def sheared(dim: int) -> np.ndarray:
    affine = turned(dim)
    affine[:-1, :-1] @= np.eye(dim) + 0.25 * np.eye(dim, k=1)
    return affine


@pytest.mark.parametrize("dim", [2, 3])
def test_a_sheared_image_is_resampled_in_place_and_its_labels_with_it(
    tmp_path: Path, dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    shape = (30, 28, 20)[:dim]
    placed = np.eye(4)
    keep = [*range(dim), 3]
    placed[np.ix_(keep, keep)] = sheared(dim)
    place = apply_affine(sheared(dim), np.moveaxis(np.indices(shape), 0, -1))
    centre = place.reshape(-1, dim).mean(0)
    ball = np.exp(-0.5 * ((place - centre) ** 2).sum(-1) / 6**2).astype(np.float32)
    path = save(tmp_path / "ball.nii", ball, placed)
    image = read_image(path)
    assert "ball.nii: its axes are not at right angles" in caplog.text
    axes = image.affine[:-1, :-1] / image.spacing
    np.testing.assert_allclose(axes.T @ axes, np.eye(dim), atol=1e-9)
    np.testing.assert_allclose(image.spacing, np.linalg.norm(sheared(dim)[:-1, :-1], axis=0), rtol=1e-5)
    where = apply_affine(image.affine, np.moveaxis(np.indices(image.array.shape), 0, -1))
    truth = np.exp(-0.5 * ((where - centre) ** 2).sum(-1) / 6**2)
    back = apply_affine(np.linalg.inv(sheared(dim)) @ image.affine, np.moveaxis(np.indices(image.array.shape), 0, -1))
    inside = ((back >= 0) & (back <= np.array(shape) - 1)).all(-1)
    assert np.abs(image.array - truth)[inside].max() < 0.03  # linear interpolation of a 6 mm ball
    corners = [*itertools.product(*[(-0.5, n - 0.5) for n in shape])]
    at = apply_affine(np.linalg.inv(image.affine) @ sheared(dim), corners)
    assert (at > -0.51).all() and (at < np.array(image.array.shape) - 0.49).all()  # covered
    assert header(path)[0] == image.array.shape
    np.testing.assert_allclose(header(path)[1], image.affine)
    label, _ = read_label(save(tmp_path / "label.nii", (ball > 0.5).astype(np.uint8), placed))
    assert label.array.shape == image.array.shape and set(np.unique(label.array)) == {0, 1}
    np.testing.assert_allclose(label.affine, image.affine)
    overlap = 2 * (label.array & (truth > 0.5)).sum() / (label.array.sum() + (truth > 0.5).sum())
    assert overlap > 0.93  # nearest neighbour


def test_landmark_channels_of_a_sheared_label_keep_their_place(tmp_path: Path) -> None:
    channels = np.zeros((9, 8, 7, 2), np.uint8)
    channels[2, 3, 4, 1] = channels[..., 0] = 1
    _, points = read_label(save(tmp_path / "a.nii", channels, sheared(3)), landmark_channels=1)
    label, _ = read_label(tmp_path / "a.nii")
    assert points is not None
    place = apply_affine(label.affine, points[0])
    np.testing.assert_allclose(place, apply_affine(sheared(3), [2, 3, 4]), atol=1e-5)


def test_a_frame_is_asked_for_behind_the_name(tmp_path: Path) -> None:
    film = RNG.random((6, 5, 4, 3)).astype(np.float32)
    path = save(tmp_path / "tee.nii.gz", film, turned(3))
    for k in range(3):
        frame = read_image(f"{path}#{k}")
        np.testing.assert_array_equal(frame.array, film[..., k])
        np.testing.assert_allclose(frame.affine, turned(3), atol=1e-5)
    assert geometry(f"{path}#1")[0] == (6, 5, 4)
    flat = read_image(f"{save(tmp_path / 'flat.nii', film[:, :, :1])}#2")
    np.testing.assert_array_equal(flat.array, film[:, :, 0, 2])
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(film.T)), str(tmp_path / "tee.nrrd"))
    np.testing.assert_array_equal(read_image(tmp_path / "tee.nrrd#1").array, film[..., 1])
    pages = RNG.integers(0, 255, (3, 5, 6), dtype=np.uint8)
    for name in ("film.gif", "film.tif"):
        pictures = [Picture.fromarray(page) for page in pages]
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}#2").array, pages[2].T)
    assert stem(f"{path}#2") == "tee_2" and files(f"{path}#2") == [path]
    assert locate(tmp_path / "#3") == (tmp_path / "#3", None)
    (tmp_path / "odd#1").write_text("a name of its own")
    assert locate(tmp_path / "odd#1") == (tmp_path / "odd#1", None)


def refused(path: str | Path, *words: str) -> None:
    for read in (read_image, read_label, header):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_films_without_a_frame_and_frames_that_are_not_there_are_refused(tmp_path: Path) -> None:
    film = RNG.integers(0, 9, (6, 5, 4, 3)).astype(np.uint8)
    path = save(tmp_path / "film.nii.gz", film)
    with pytest.raises(InputError, match="film.nii.gz: holds 3 frames; ask for one frame: write #0 to #2 after"):
        read_image(path)
    assert read_label(path)[0].array.shape == (6, 5, 4)  # a structure per channel
    refused(f"{path}#3", "film.nii.gz: has no frame 3", "3 frames")
    refused(f"{save(tmp_path / 'one.nii', film[..., 0])}#0", "one.nii: has no frames", "leave out #0")
    refused(save(tmp_path / "five.nii", np.stack([film] * 2, -1)), "five.nii: its shape is (6, 5, 4, 3, 2)")
    refused(f"{tmp_path / 'none.nii'}#1", "none.nii: no such file")
    pages = [Picture.fromarray(page) for page in film[..., 0].transpose(2, 1, 0)]
    pages[0].save(tmp_path / "film.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "film.tif", "film.tif: holds 4 frames")


def test_impossible_geometry_is_refused_in_a_line(tmp_path: Path) -> None:
    array = RNG.integers(0, 9, (4, 5, 6)).astype(np.uint8)
    for name, column in (("zero", 0.0), ("nan", np.nan), ("parallel", [1e-8, 1, 0])):
        stored = bytearray(nib.Nifti1Image(array, np.eye(4)).to_bytes())
        np.frombuffer(stored, "<f4", 12, offset=280).reshape(3, 4)[:, 2] = column  # of the sform
        (tmp_path / f"{name}.nii").write_bytes(stored)
        refused(tmp_path / f"{name}.nii", f"{name}.nii: its affine is singular or not finite; mend its header")
    for name, spacing in (("none", "1 0 1"), ("small", "1 1e-09 1")):
        head = f"ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementSpacing = {spacing}\nElementType = MET_UCHAR\n"
        data = f"{head}ElementDataFile = LOCAL\n".encode() + array.tobytes("F")
        (tmp_path / f"{name}.mha").write_bytes(data)
        refused(tmp_path / f"{name}.mha", f"{name}.mha: voxel size {spacing.replace(' ', ' x ')} mm; mend its header")
    refused(tmp_path, "a folder without DICOM files is no image")


def test_ids_that_no_label_can_have_are_refused(tmp_path: Path) -> None:
    for name, value in (("inf", np.inf), ("big", 2.0**64)):
        array = np.zeros((4, 5, 6))
        array[1, 2, 3] = value
        with pytest.raises(InputError, match=f"{name}.nii: label ids reach"):
            read_label(save(tmp_path / f"{name}.nii", array))


def test_a_tilted_plane_keeps_its_pixel_size(tmp_path: Path) -> None:
    affine = turned(3)  # 15 degrees off axial: its block in x and y would shrink a pixel
    image = images.read_image(save(tmp_path / "a.nii", RNG.random((6, 5, 1)).astype(np.float32), affine))
    np.testing.assert_allclose(image.spacing, [1.0, 1.3], rtol=1e-6)


def test_a_picture_and_a_plane_stored_the_ras_way_are_worked_on_as_the_picture_is_stored(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (12, 8), dtype=np.uint8)
    Picture.fromarray(pixels).save(tmp_path / "a.png")
    plane = save(tmp_path / "a.nii", pixels.T[::-1, ::-1].copy(), np.eye(4))
    for path in (tmp_path / "a.png", plane):
        image, grid = read_image(path), Grid((8, 12), (1.0, 1.0))
        np.testing.assert_array_equal(resample(image, to_grid(image, grid), grid.shape, order=1), pixels.T)
