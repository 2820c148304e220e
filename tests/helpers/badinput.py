"""The catalogue of bad files: what is wrong, where it lies, what is in it, and a word that the line about it must have.

``*`` in a place stands for the case's name. Everything else of the case is sound.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

from helpers.inprocess import as_if_in_its_own_process
from regpipe.cli import main as cli
from regpipe.utils.errors import printable

Content = bytes | Callable[[Path], None]
SIZE = (24, 24)
GOOD = ("plain", "größe 3 日本")  # blanks and any script are no mistake
POINTS = b"x,y\n-1,-2\n-3,-4\n"


def blob() -> np.ndarray:
    x, y = np.indices(SIZE) - 12
    return (100 * np.exp(-(x**2 + y**2) / 40) + np.random.default_rng(0).random(SIZE)).astype(np.float32)


def nifti(array: np.ndarray, affine: np.ndarray | None = None, **header: object) -> bytes:
    """An uncompressed NIfTI whose header is then changed behind nibabel's back."""
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    whole = image.to_bytes()
    fields = np.frombuffer(whole[:348], image.header.template_dtype).copy()
    for name, value in header.items():
        fields[name] = value
    return fields.tobytes() + whole[348:]


def sized(*pixdim: float) -> bytes:
    """Placed by its voxel sizes alone."""
    return nifti(blob(), pixdim=[[1, *pixdim, 1, 1, 1, 1, 1, 1][:8]], sform_code=0, qform_code=0)


def with_voxel(value: float, array: np.ndarray | None = None) -> bytes:
    changed = (blob() if array is None else array).copy()
    changed[0, 0] = value
    return nifti(changed)


def picture(form: str) -> bytes:
    data = io.BytesIO()
    Picture.fromarray(blob().astype(np.uint8)).save(data, format=form)
    return data.getvalue()


def colour(form: str) -> bytes:
    data = io.BytesIO()
    Picture.fromarray(np.random.default_rng(0).integers(0, 9, (*SIZE, 3)).astype(np.uint8)).save(data, format=form)
    return data.getvalue()


def mha(size: str = "24 24", spacing: str = "1 1", data: str = "LOCAL", axes: int = 2, voxels: int = 576) -> bytes:
    head = f"ObjectType = Image\nNDims = {axes}\nDimSize = {size}\nElementType = MET_UCHAR\n"
    return f"{head}ElementSpacing = {spacing}\nElementDataFile = {data}\n".encode() + bytes(
        i % 200 for i in range(voxels)
    )


def damaged(packed: bytes) -> bytes:
    """One byte of the voxels exchanged, so that the stream unpacks to its end and only the checksum knows."""
    raw = bytearray(gzip.decompress(packed))
    raw[400] ^= 1
    return gzip.compress(bytes(raw))[:-8] + packed[-8:]


def rgb() -> np.ndarray:
    return np.zeros(SIZE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


def twice(path: Path) -> None:
    path.write_bytes(RAW)
    path.with_suffix(".mha").touch()


def unreadable(path: Path) -> None:
    path.write_bytes(RAW)
    path.chmod(0)


RAW = nifti(blob())
PACKED = gzip.compress(RAW)
ONES = np.ones(SIZE, np.uint8)
HUGE = nifti(blob(), dim=[[3, 30000, 30000, 30000, 1, 1, 1, 1]])
IMAGE, PLAIN, LABEL = "moving_images/*.nii.gz", "moving_images/*.nii", "fixed_labels/*.nii"
MASK, MARKS = "fixed_masks/*.nii", "fixed_landmarks/*.csv"

FILES: dict[str, tuple[str, Content, str]] = {
    # containers
    "zero bytes": (IMAGE, b"", "Empty file"),
    "gzip cut off": (IMAGE, PACKED[:800], "before the end-of-stream marker"),
    "gzip of other bytes than its checksum": (IMAGE, damaged(PACKED), "CRC check failed"),
    "gzip of nothing": (IMAGE, gzip.compress(b""), "file type"),
    "text named gz": (IMAGE, b"not an image", "not a gzip file"),
    "wrong magic": (PLAIN, RAW[:344] + b"XXXX" + RAW[348:], "file type"),
    "fewer voxels than the header says": (PLAIN, RAW[:-100], "the file holds less"),
    "header of 100 TB": (PLAIN, HUGE, "the file holds less"),
    "header of 100 TB, packed": (IMAGE, gzip.compress(HUGE), "the file holds less"),
    "header alone": ("moving_images/*.hdr", RAW[:348], ".img"),
    "voxels beyond the end": (PLAIN, nifti(blob(), vox_offset=1e9), "truncated"),
    "PNG cut off": ("moving_images/*.png", picture("png")[:200], "truncated"),
    "no PNG": ("moving_images/*.png", b"\x89PNG and no more", "truncated"),
    "JPEG cut off": ("moving_images/*.jpg", picture("jpeg")[:300], "truncated"),
    "TIFF cut off": ("moving_images/*.tif", picture("tiff")[:50], "truncated"),
    "MetaImage cut off": ("moving_images/*.mha", mha(voxels=99), "truncated"),
    "MetaImage without its voxels": ("moving_images/*.mhd", mha(data="gone.raw", voxels=0), "truncated"),
    "MetaImage of a million axes": ("moving_images/*.mha", mha(axes=10**6), "NDims = 1000000"),
    "MetaImage of 5 TB": ("moving_images/*.mha", mha("900000 900000"), "does not fit into memory"),
    "NRRD cut off": ("moving_images/*.nrrd", b"NRRD0004\ntype: float\ndimension: 2\nsizes: 24 24\n", "truncated"),
    "no DICOM": ("moving_images/*.dcm", b"garbage", "not DICOM"),
    "DICOM cut off": ("moving_images/*.dcm", bytes(128) + b"DICMgarbage", "not DICOM"),
    # voxels
    "NaN alone": (PLAIN, nifti(ONES * np.float32(np.nan)), "NaN alone"),
    "infinite": (PLAIN, with_voxel(np.inf), "infinite"),
    "constant": (PLAIN, nifti(3 * ONES), "is constant (3)"),
    "beyond single precision": (PLAIN, nifti(blob().astype("f8") * 1e300), "beyond single precision"),
    "at the end of single precision": (PLAIN, nifti((blob() - 50) * np.float32(6e36)), "beyond single precision"),
    "all but constant": (PLAIN, nifti(blob() * np.float32(1e-42)), "beyond single precision"),
    "complex": (PLAIN, nifti(blob().astype(np.complex64)), "complex64"),
    "colour": (PLAIN, nifti(rgb()), "one real value"),
    "unknown type": (PLAIN, nifti(blob(), datatype=77), "77"),
    # geometry
    "no voxel size": (PLAIN, sized(0, 1), "voxel size 0 x 1 mm"),
    "voxel size NaN": (PLAIN, sized(np.nan, 1), "voxel size nan x 1 mm"),
    "voxels smaller than atoms": (PLAIN, sized(1e-8, 1e-8), "voxel size 1e-08 x 1e-08 mm"),
    "voxels beyond the solar system": (PLAIN, sized(1e30, 1e30), "voxel size 1e+30"),
    "no voxel size of a MetaImage": ("moving_images/*.mha", mha(spacing="0 1"), "voxel size 0 x 1 mm"),
    "singular affine": (PLAIN, nifti(blob(), srow_x=0, srow_y=0, srow_z=0, sform_code=1), "singular"),
    "axes all but parallel": (PLAIN, nifti(blob(), srow_x=[[1, 50000, 0, 0]], sform_code=1), "singular"),
    "affine NaN": (PLAIN, nifti(blob(), srow_x=[[np.nan, 0, 0, 0]], sform_code=1), "not finite"),
    "quaternion too long": (PLAIN, nifti(blob(), quatern_b=5, qform_code=1, sform_code=0), "longer than 1"),
    "one pixel": (PLAIN, nifti(np.ones((1, 1), np.float32)), "one voxel thick"),
    "axis of no voxel": (PLAIN, nifti(blob(), dim=[[2, 0, 24, 1, 1, 1, 1, 1]]), "shape is (0, 24)"),
    "negative axis": (PLAIN, nifti(blob(), dim=[[2, -24, 24, 1, 1, 1, 1, 1]]), "shape is (-24, 24)"),
    "five axes": (PLAIN, nifti(np.random.default_rng(0).random((4, 4, 4, 4, 2))), "2-D or 3-D"),
    "a film": (PLAIN, nifti(np.random.default_rng(0).random((4, 4, 4, 5))), "holds 5 frames"),
    "3-D beside 2-D": (PLAIN, nifti(np.random.default_rng(0).random((6, 6, 6))), "2-D with 3-D"),
    # labels, masks, landmarks
    "label ids beyond 63 bits": (LABEL, nifti(ONES.astype(np.uint64) * 2**63), "below 2^63"),
    "labels with fractions": (LABEL, nifti(blob()), "whole numbers"),
    "a label NaN": (LABEL, nifti(ONES * np.float32(np.nan)), "whole numbers"),
    "a label infinite": (LABEL, with_voxel(np.inf, ONES.astype("f4")), "below 2^63"),
    "complex labels": (LABEL, nifti(ONES.astype(np.complex64)), "complex64"),
    "labels in colour": ("fixed_labels/*.png", colour("png"), "in colour"),
    "labels of another shape": (LABEL, nifti(np.ones((25, 24), np.uint8)), "not on its image's grid"),
    "labels of another place": (LABEL, nifti(ONES, np.diag([1.1, 1, 1, 1])), "not on its image's grid"),
    "an empty mask": (MASK, nifti(0 * ONES), "0 everywhere"),
    "a mask of another shape": (MASK, nifti(np.ones((24, 25), np.uint8)), "not on its image's grid"),
    "landmarks in words": (MARKS, b"x,y\nhere,there\n", "coordinates are numbers"),
    "no landmark": (MARKS, b"", "header x,y"),
    "landmarks in Latin-1": (MARKS, b"name,x,y\nf\xfc\xdfe,1,2\n", "UTF-8"),
    "fewer landmarks than the other side's": (MARKS, b"x,y\n-1,-2\n", "the fixed side 1"),
    "an infinite landmark": (MARKS, b"x,y\ninf,-2\n-3,-4\n", "infinite"),
    "landmarks in RAS": (MARKS, b"x,y\n9,8\n7,6\n", "are they RAS?"),
    "landmarks in 3-D": (MARKS, b"x,y,z\n-1,-2,0\n-3,-4,5\n", "differ in dimension"),
    # the file system
    "a loop of links": (PLAIN, lambda path: path.symlink_to(path.name), "no such file"),
    "a link to nothing": (PLAIN, lambda path: path.symlink_to("gone.nii"), "no such file"),
    "a pipe": (PLAIN, os.mkfifo, "a pipe or a device"),
    "two files of one stem": (PLAIN, twice, "same stem"),
    "labels of nobody": (LABEL, nifti(ONES), "no image of this stem"),
    "no partner": (PLAIN, RAW, "no partner in fixed_images"),
    "a name in two\nlines": (PLAIN, RAW, "not printable"),
    os.fsdecode(b"a name of no encoding \xff"): (PLAIN, RAW, "not printable"),
}
if os.geteuid():  # root reads all
    FILES["an unreadable file"] = (PLAIN, unreadable, "Permission denied")

ALONE = ("labels of nobody", "no partner")


def write_folder(root: Path) -> Path:
    """A data set of all of them and of ``GOOD``."""
    for name in (*GOOD, *FILES):
        place, content, _ = FILES.get(name, (PLAIN, RAW, ""))
        bad = root / place.replace("*", name)
        for side in ("fixed", "moving") if name not in ALONE else ():
            sound = root / f"{side}_images" / f"{name}.nii"
            put(sound, RAW)
            if bad.parent == sound.parent:
                sound.unlink()
        if place == MARKS:
            put(root / "moving_landmarks" / f"{name}.csv", POINTS)
        put(bad, content)
    return root


def put(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


# what a command says of them

REMEDY = re.compile(  # what to do, or what it should be
    ";|choose|give|one of|no such file|no trained model|known are|wanted|cannot be|make them|missing|needs|is it an"
)


class Told(NamedTuple):
    """What a command said: exit status, its JSON, and the lines about errors on stderr."""

    status: int
    result: dict[str, Any]
    error: str
    lines: list[str]


def regpipe(*arguments: object) -> Told:
    """``regpipe --json ARGUMENTS`` in this process; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, as_if_in_its_own_process():
        patch.setattr("sys.argv", ["regpipe", "--json", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    said = err.getvalue()
    assert "Traceback" not in said and "should not happen" not in said, said
    about = json.loads(out.getvalue())
    lines = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    return Told(int(end.value.code or 0), about["result"], about["error"] or "", lines)


def is_one_line(line: str, *words: str) -> None:
    assert line == printable(line) and len(line) < 1000 and REMEDY.search(line), line
    for word in words:
        assert word in line, line
