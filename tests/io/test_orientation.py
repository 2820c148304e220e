"""Truth: the array that was saved, turned as EXIF defines its orientations; Pillow's own upright picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from PIL import ImageOps, TiffImagePlugin

from regpipe.io.images import header, read_image
from regpipe.io.labels import read_label
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
