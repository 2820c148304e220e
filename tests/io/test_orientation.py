"""Truth: the array that was saved, turned as EXIF defines its orientations; Pillow's own upright picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture
from PIL import ImageOps, TiffImagePlugin

from regpipe.io.images import header, read_image
from regpipe.io.labels import read_label
from regpipe.transforms.apply import apply
from regpipe.utils.errors import InputError

RNG = np.random.default_rng(12)
GREY = np.kron(RNG.integers(0, 255, (5, 8)), np.ones((8, 8))).astype(np.uint8)  # rows, columns
AS_STORED = {  # upright -> stored, by EXIF's table
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png", ".webp"])
@pytest.mark.parametrize("turn", AS_STORED)
def test_a_picture_is_upright_as_viewers_show_it(
    tmp_path: Path, turn: int, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Picture.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"{turn}{suffix}"
    options: dict[str, dict[str, Any]] = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}
    how = options.get(suffix, {})
    Picture.fromarray(np.ascontiguousarray(AS_STORED[turn](GREY))).save(path, exif=exif, **how)
    image = read_image(path)
    assert header(path)[0] == image.array.shape == GREY.T.shape
    np.testing.assert_allclose(image.array, GREY.T, atol=3)
    np.testing.assert_array_equal(image.affine, np.diag([-1, -1, 1]))
    with path.open("rb") as file, Picture.open(file) as theirs:  # by its path Pillow turns a TIFF wrongly
        theirs.load()
        np.testing.assert_allclose(image.array.T, np.array(ImageOps.exif_transpose(theirs).convert("L")), atol=1)
    assert ("EXIF orientation" in caplog.text) == (turn != 1)


def test_sixteen_bits_are_kept_of_grey_and_said_of_colour(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)
    exif = Picture.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.tif"):
        Picture.fromarray(np.rot90(deep, 1).copy()).save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / name).array, deep.T)
        np.testing.assert_array_equal(read_label(tmp_path / name)[0].array, deep.T)


def test_what_shines_through_is_laid_on_white_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alpha = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((40, 1), np.uint8)
    Picture.merge("LA", [Picture.fromarray(GREY), Picture.fromarray(alpha)]).save(tmp_path / "la.png")
    expected = np.where(alpha == 255, GREY, 255)
    np.testing.assert_array_equal(read_image(tmp_path / "la.png").array, expected.T)
    assert "la.png: is transparent in places" in caplog.text
    index = (np.arange(64) // 8 * np.ones((40, 1))).astype(np.uint8)
    palette = Picture.fromarray(index, mode="P")
    palette.putpalette(np.repeat(np.arange(8) * 30, 3).astype(np.uint8).tobytes())
    palette.save(tmp_path / "p.png", transparency=3)
    expected = np.where(index == 3, 255, index * 30)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").array, expected.T)
    np.testing.assert_array_equal(read_label(tmp_path / "p.png")[0].array, index.T)
    opaque = Picture.fromarray(GREY).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.png").array, GREY.T)
    assert "opaque.png" not in caplog.text


def test_a_printers_picture_is_grey_as_pillow_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rgb = RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Picture.fromarray(rgb).convert("CMYK").save(tmp_path / "c.tif", icc_profile=b"of a printer")
    np.testing.assert_allclose(
        read_image(tmp_path / "c.tif").array, np.array(Picture.fromarray(rgb).convert("L")).T, atol=1
    )
    assert "in colour" in caplog.text and "colour profile is not used" in caplog.text


def frames(path: Path, count: int, text: str, **more: Any) -> np.ndarray:
    stack = RNG.integers(0, 65535, (count, 5, 7)).astype(np.uint16)
    first, *others = [Picture.fromarray(page) for page in stack]
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = text
    first.save(path, save_all=True, append_images=others, tiffinfo=info, **more)
    return stack


def test_an_imagej_stack_is_a_volume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "ImageJ=1.53t\nimages=6\nslices=6\nspacing=3.0\nunit=micron\n"
    stack = frames(tmp_path / "a.tif", 6, text, x_resolution=2.0, y_resolution=4.0)
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.array, stack.T)
    np.testing.assert_allclose(image.affine, np.diag([-0.5e-3, -0.25e-3, 3e-3, 1]))
    text = "ImageJ=1.53t\nimages=6\nslices=3\nframes=2\nhyperstack=true\nspacing=2.0\n"
    stack = frames(tmp_path / "b.tif", 6, text)
    image = read_image(f"{tmp_path / 'b.tif'}#1")
    np.testing.assert_array_equal(image.array, stack[3:].T)
    np.testing.assert_allclose(image.affine, np.diag([-1, -1, 2, 1]))
    with pytest.raises(InputError, match="holds 2 frames"):
        read_image(tmp_path / "b.tif")
    frames(tmp_path / "c.tif", 6, "ImageJ=1.53t\nimages=6\nslices=3\nchannels=2\n")
    with pytest.raises(InputError, match="2 channels; save one channel"):
        read_image(tmp_path / "c.tif")


def test_an_ome_stack_is_a_volume(tmp_path: Path) -> None:
    pixels = 'DimensionOrder="XYTZC" SizeX="7" SizeY="5" SizeZ="3" SizeT="2" SizeC="1" PhysicalSizeX="0.5" '
    pixels += 'PhysicalSizeY="0.25" PhysicalSizeZ="0.002" PhysicalSizeZUnit="mm"'
    text = f'<?xml version="1.0"?><OME xmlns="x"><Image ID="Image:0"><Pixels ID="Pixels:0" {pixels}/></Image></OME>'
    stack = frames(tmp_path / "a.ome.tif", 6, text)
    image = read_image(f"{tmp_path / 'a.ome.tif'}#1")
    np.testing.assert_array_equal(image.array, stack[1::2].T)
    np.testing.assert_allclose(image.affine, np.diag([-0.5e-3, -0.25e-3, 2e-3, 1]))


def test_other_tiffs_of_several_frames_are_films(tmp_path: Path) -> None:
    stack = frames(tmp_path / "a.tif", 4, "a film")
    np.testing.assert_array_equal(read_image(f"{tmp_path / 'a.tif'}#2").array, stack[2].T)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_a_resolution_is_said_and_used_on_request(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"a{suffix}"
    Picture.fromarray(GREY).save(path, dpi=(254, 127))
    np.testing.assert_array_equal(read_image(path).affine, np.diag([-1, -1, 1]))
    assert "its resolution, 0.1 x 0.2 mm, is not used: a pixel is 1 mm; name it with #mm" in caplog.text
    caplog.clear()
    image = read_image(f"{path}#mm")
    np.testing.assert_allclose(image.affine, np.diag([-0.1, -0.2, 1]), rtol=1e-4)  # PNG counts pixels by the metre
    assert image.array.shape == GREY.T.shape and "resolution" not in caplog.text


def test_a_resolution_that_is_not_there_is_missed(tmp_path: Path) -> None:
    Picture.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="gives its pixels no size; leave out #mm"):
        read_image(f"{tmp_path / 'a.png'}#mm")


def test_a_resolution_turns_with_its_picture_and_follows_microscopes(tmp_path: Path) -> None:
    exif = Picture.Exif()
    exif[0x0112] = 6
    Picture.fromarray(GREY).save(tmp_path / "a.jpg", dpi=(254, 127), exif=exif)
    np.testing.assert_allclose(read_image(f"{tmp_path / 'a.jpg'}#mm").affine, np.diag([-0.2, -0.1, 1]))
    text = "ImageJ=1.53t\nunit=micron\n"
    Picture.fromarray(GREY).save(tmp_path / "b.tif", tiffinfo={270: text, 282: 2.0, 283: 4.0, 296: 1})
    np.testing.assert_allclose(read_image(f"{tmp_path / 'b.tif'}#mm").affine, np.diag([-0.5e-3, -0.25e-3, 1]))
    text = "<OME:OME><OME:Pixels PhysicalSizeX='2' PhysicalSizeXUnit='mm' PhysicalSizeY='3' PhysicalSizeYUnit='mm'/>"
    Picture.fromarray(GREY).save(tmp_path / "c.tif", tiffinfo={270: text})
    np.testing.assert_allclose(read_image(f"{tmp_path / 'c.tif'}#mm").affine, np.diag([-2, -3, 1]))


def test_a_picture_in_mm_is_moved_in_mm_in_all_its_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Picture.fromarray(colours).save(tmp_path / "a.tif", dpi=(50.8, 50.8))  # 0.5 mm
    sitk.WriteTransform(sitk.TranslationTransform(2, (1.0, -0.5)), str(tmp_path / "t.tfm"))
    told = f"{tmp_path / 'a.tif'}#mm"
    (out,) = apply(tmp_path / "t.tfm", [told], tmp_path / "out", reference=told)
    moved = sitk.ReadImage(str(out))
    np.testing.assert_allclose(moved.GetSpacing()[:2], (0.5, 0.5))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(moved).squeeze()[1:, :-2], colours[:-1, 2:])


def test_a_grey_that_is_transparent_is_laid_on_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Picture.fromarray(GREY).save(tmp_path / "a.png", transparency=int(GREY[0, 0]))
    expected = np.where(GREY[0, 0] == GREY, 255, GREY)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, expected.T)
    assert "laid on white" in caplog.text


def test_a_colour_of_16_bits_is_said_of_a_png_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 65536, (9, 12, 3)).astype(np.uint16))
    read_image(tmp_path / "a.png")
    assert "16 bits; 8 of them are read" in caplog.text


def test_of_a_phones_several_pictures_the_first_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = (Picture.fromarray(array) for array in (GREY, 255 - GREY))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other], quality=100)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg").array, GREY.T, atol=3)
    assert "holds 2 pictures (MPO); the first is read" in caplog.text


def test_what_pillow_does_not_read_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InputError, match="pillow-heif|is not what its name says"):
        read_image(tmp_path / "a.heic")
    cv2.imwrite(str(tmp_path / "a.tif"), np.random.default_rng(0).random((9, 12, 3)).astype(np.float32))
    with pytest.raises(InputError, match="is of a kind that is not read; save it uncompressed, of 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".jp2", ".avif", ".jfif"])
def test_other_pictures_are_read_as_pillow_reads_them(tmp_path: Path, suffix: str) -> None:
    if suffix not in Picture.registered_extensions():
        pytest.skip("Pillow is built without it")
    Picture.fromarray(GREY).save(tmp_path / f"a{suffix}")
    with (tmp_path / f"a{suffix}").open("rb") as file, Picture.open(file) as theirs:
        np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").array, np.array(theirs.convert("L")).T)
