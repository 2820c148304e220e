"""What is sound is read whatever its name says; what is not is refused for its own reason, library by library."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from regpipe.io.formats import unreadable
from regpipe.io.images import header, read_image
from regpipe.io.labels import read_label
from regpipe.transforms.resample import read_voxels
from regpipe.utils import limits
from regpipe.utils.errors import InputError


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("packed", [False, True])
def test_gzip_is_known_by_its_first_bytes(
    tmp_path: Path, kind: type, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.random.default_rng(0).integers(0, 200, (7, 6, 5)).astype(np.int16)
    data = kind(array, np.diag([2.0, 2, 3, 1])).to_bytes()
    path = tmp_path / ("a.nii" if packed else "a.nii.gz")
    path.write_bytes(gzip.compress(data) if packed else data)
    np.testing.assert_array_equal(read_image(path).array, array)
    np.testing.assert_array_equal(read_label(path)[0].array, array)
    assert header(path)[0] == (7, 6, 5)
    assert read_voxels(path, "nearest")[1] == np.int16
    assert "gzip, which its name does not say" in caplog.text


def test_a_large_picture_is_judged_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Picture.new("L", (300, 200), 10)
    picture.paste(90, (30, 30, 90, 80))
    picture.save(tmp_path / "slide.png")
    monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 1000)  # 60 times as large: Pillow refuses at twice
    assert read_image(tmp_path / "slide.png").array.shape == (300, 200)
    assert Picture.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(limits, "UNASKED", 1000)
    monkeypatch.setattr("regpipe.utils.machine.free", lambda: 2000)
    with pytest.raises(InputError, match="300 x 200 values; that does not fit into memory.*save it coarser"):
        read_image(tmp_path / "slide.png")


def test_a_text_of_another_name_is_called_that(tmp_path: Path) -> None:
    for name in ("a.png", "a.nii", "a.nii.gz", "a.tif"):
        (tmp_path / name).write_text("<html>404 Not Found</html>" * 40)
        with pytest.raises(InputError, match="is not what its name says"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (PermissionError(13, "Permission denied", "a.png"), "Permission denied; check the disk, and whether you may"),
        (OSError(5, "Input/output error"), "Input/output error; check the disk"),
        (OSError("image file is truncated (3 bytes not processed)"), "truncated .*export it again"),
        (OSError("decoder jpeg2k not available"), "of a kind that is not read.*jpeg2k"),
        (ValueError("Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"), "notes are longer"),
        (nib.filebasedimages.ImageFileError('Cannot work out file type of "a.nii"'), "not what its name says"),
        (nib.spatialimages.HeaderDataError("data code 99 not supported"), "of a kind that is not read"),
        (RuntimeError("ITK ERROR: GDCMImageIO(0x55d): Unsupported transfer syntax"), "of a kind that is not read"),
        (EOFError("Compressed file ended before the end-of-stream marker"), "truncated.*export it again"),
        (MemoryError(), "does not fit into memory"),
    ],
)
def test_each_librarys_message_is_classified(cause: Exception, told: str) -> None:
    with pytest.raises(InputError, match=told):
        raise unreadable("a", cause)
