"""Headers that point at other files, or that would end the process inside ITK or GDCM: refused in a line."""

from __future__ import annotations

import contextlib
import io
import resource
from pathlib import Path

import itk
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from helpers.folders import RNG
from regpipe.io import headers, images
from regpipe.utils.errors import InputError

PLACED = "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n" + PLACED + "encoding: raw\nendian: little\n"
)
META = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"

# --- voxels in other files ---

DETACHED = {
    "a.mhd": META + "DimSize = 2 2 2\nElementDataFile = {}\n",
    "b.mha": META + "DimSize = 2 2 2\nElementDataFile = {}\n",
    "c.nhdr": NRRD + "sizes: 2 2 2\ndata file: {}\n",
    "d.nrrd": NRRD.replace("\n", "\r\n") + "sizes: 2 2 2\r\ndatafile: {}\r\n\r\n",
    "e.mhd": META + "DimSize = 2 2 2\nElementDataFile = LIST\na.raw\n{}\n",
    "f.nhdr": NRRD + "sizes: 2 2 2\ndata file: LIST\na.raw\n{}\n",
}


@pytest.mark.parametrize("name", DETACHED)
@pytest.mark.parametrize("voxels", ["/etc/passwd", "../secret.raw", "sub/../../secret.raw", r"C:\secret.raw"])
def test_voxels_in_another_folder_are_not_fetched(tmp_path: Path, name: str, voxels: str) -> None:
    (tmp_path / name).write_bytes(DETACHED[name].format(voxels).encode())
    with pytest.raises(InputError, match=f"{name}: takes its voxels from another folder"):
        images.read_image(tmp_path / name)


# before or instead of the line that names the voxels: what ITK steps over, and a search by lines would not
CONCEALED: tuple[str, ...] = (
    "{}",
    "\x0b{}",
    "\x0c{}",
    "Comment = a\rElementDataFile = LOCAL\r{}",
    "Comment\nElementDataFile = LOCAL\n{}",
)
CONCEALED += ("Offset =\nElementDataFile = LOCAL\n{}", "Comment : ElementDataFile = LOCAL\n{}")


@pytest.mark.parametrize("before", CONCEALED)
@pytest.mark.parametrize("key", ["ElementDataFile =", "ElementDataFile\n=", "ElementDataFile\0=", "ElementDataFile:"])
def test_voxels_in_another_folder_are_not_fetched_however_the_header_says_so(
    tmp_path: Path, before: str, key: str
) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(range(16)))
    (tmp_path / "data").mkdir()
    header = META + "DimSize = 2 2 2\n" + before.format(f"{key} {tmp_path / 'secret.raw'}\n")
    (tmp_path / "data" / "a.mha").write_bytes(header.encode())
    with pytest.raises(InputError, match=r"a.mha: (takes its voxels from another|does not say in a line)"):
        images.read_image(tmp_path / "data" / "a.mha")


@pytest.mark.parametrize("name", ["a.mhd", "c.nhdr"])
@pytest.mark.parametrize("voxels", ["%s%n 1 1 1", "a%d 1 9 0", "a%d%d 1 1 1"])
def test_a_name_that_would_end_the_process_is_refused(tmp_path: Path, name: str, voxels: str) -> None:
    (tmp_path / name).write_text(DETACHED[name].format(voxels))
    with pytest.raises(InputError, match=f"{name}: takes its voxels from {voxels}"):
        images.read_image(tmp_path / name)


def test_slices_in_numbered_files_are_read(tmp_path: Path) -> None:
    slices = RNG.integers(0, 1000, (2, 4)).astype("<i2")
    for i, values in enumerate(slices):
        (tmp_path / f"s{i + 1:02d}.raw").write_bytes(values.tobytes())
    for name in ("a.mhd", "c.nhdr"):
        (tmp_path / name).write_text(DETACHED[name].format("s%02d.raw 1 2 1"))
        np.testing.assert_array_equal(images.read_image(tmp_path / name).array.ravel("F"), slices.ravel())


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("units: " + 2000 * "a", "a line of its header is longer than 500 bytes"),
        ("Dimension: 16", "an image has at most 5 axes"),
    ],
)
def test_a_nrrd_that_would_end_the_process_is_refused(tmp_path: Path, field: str, said: str) -> None:
    head = NRRD.replace("dimension: 3", field) if "imension" in field else NRRD + field + "\n"
    (tmp_path / "a.nrrd").write_bytes(f"{head}sizes: 2 2 2\nkey:={4000 * 'b'}\n\n".encode() + bytes(range(16)))
    with pytest.raises(InputError, match=f"a.nrrd: .*{said}"):
        images.read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_another_format_under_a_known_name_is_not_read_by_its_own_rules(tmp_path: Path, name: str) -> None:
    itk.imwrite(itk.image_from_array(RNG.integers(0, 9, (4, 4, 4)).astype(np.uint8)), str(tmp_path / "a.h5"))
    (tmp_path / "a.h5").rename(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: ITK does not recognise its header"):
        images.read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mhd", "c.nhdr"])
def test_voxels_beside_their_header_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(DETACHED[name].format("a.raw"))
    array = RNG.integers(0, 1000, 8).astype("<i2")
    (tmp_path / "a.raw").write_bytes(array.tobytes())
    np.testing.assert_array_equal(images.read_image(tmp_path / name).array.ravel("F"), array)


def test_a_header_too_long_to_be_looked_through_is_refused(tmp_path: Path) -> None:
    hidden = NRRD + "# nothing\n" * 120_000 + "sizes: 2 2 2\ndata file: /etc/passwd\n"
    (tmp_path / "a.nhdr").write_text(hidden)
    with pytest.raises(InputError, match="a.nhdr: its header is longer"):
        images.read_image(tmp_path / "a.nhdr")


# --- DICOM: GDCM takes gigabytes for a few bytes that claim them ---


def dicom(syntax: UID = uid.ExplicitVRLittleEndian, *, packed: bool = False, endless: bool = True) -> bytes:
    """A slice with a sequence in a sequence, of given or open length; its pixels as they are or in pieces."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.is_undefined_length_sequence_item = "7", endless
    outer.PurposeOfReferenceCodeSequence = [inner]
    data.SourceImageSequence = [outer, outer]
    for part, name in ((data, "SourceImageSequence"), (outer, "PurposeOfReferenceCodeSequence")):
        part[name].is_undefined_length = endless
    data.Rows, data.Columns = 2, 3
    data.PixelData = encapsulate([bytes(6)]) if packed else bytes(6)
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", packed
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


DICOMS = {
    "explicit": dicom(),
    "of given lengths": dicom(endless=False),
    "implicit": dicom(uid.ImplicitVRLittleEndian),
    "big endian": dicom(uid.ExplicitVRBigEndian),
    "in pieces": dicom(uid.JPEGBaseline8Bit, packed=True),
    "packed as a whole": dicom(uid.DeflatedExplicitVRLittleEndian),
}


@pytest.mark.parametrize("name", DICOMS)
def test_a_sound_dicom_passes_and_one_cut_off_does_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(DICOMS[name])
    headers.check_dicom(path)
    if name == "packed as a whole":
        return
    path.write_bytes(DICOMS[name][: -3 if name != "in pieces" else -11])  # the end of pieces is no loss
    with pytest.raises(InputError, match=r"a\.dcm: not DICOM, or cut off \(its element \(\w{4},\w{4}\) is longer"):
        headers.check_dicom(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x08\x00\x00\x01SH\x02\x00", b"\x08\x00\x00\x01SH\xff\xff"),  # within two sequences
        (b"\x08\x00\x00\x01SH\x02\x00", b"\x08\x00\x00\x01OB\x00\x00\xfe\xff\xff\xff"),
        (b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00\x01S"),  # no type: GDCM would try it without types
    ],
)
def test_a_dicom_that_claims_gigabytes_is_refused_and_they_are_not_asked_for(tmp_path: Path, old, new) -> None:
    assert old in DICOMS["explicit"]
    (tmp_path / "a.dcm").write_bytes(DICOMS["explicit"].replace(old, new))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in (tmp_path / "a.dcm", tmp_path):  # a file; a series
        with pytest.raises(InputError, match=r"a\.dcm: not DICOM, or cut off"):
            images.read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500e3  # kilobytes


def test_what_pydicom_is_tested_with_passes_where_gdcm_reads_it() -> None:
    folder, read = Path(pydicom.__file__).parent / "data" / "test_files", 0
    for path in sorted(folder.glob("*.dcm")):
        with contextlib.suppress(RuntimeError):  # GDCM's, for what it cannot read
            if itk.GDCMImageIO.New().CanReadFile(str(path)):
                headers.check_dicom(path)
                read += 1
    assert read > 20 or not folder.is_dir()


# --- NRRD: ITK writes what it complains of into 1024 bytes ---

SMALL = "NRRD0004\ntype: uint8\ndimension: 2\nsizes: 3 2\nencoding: {}\n{}\n"
NINES = "9" * 2000
OVERLONG = {
    "an unknown field": SMALL.format("raw", f"{NINES}: 3\n") + "123456",
    "a number": SMALL.format("raw", f"spacings: 1 {NINES}\n") + "123456",
    "a number before a lone return": SMALL.format("raw", f"spacings: 1 {NINES[:400]}\r{NINES}\n") + "123456",
    "a name": SMALL.format("raw", f"data file: {NINES}\n"),
    "a voxel": SMALL.format("ascii", "") + f"1 2 3 4 5 {NINES}",
    "no end of the header": SMALL.format("raw", f"{NINES}: 3")[:-1],
    "voxels in another file": SMALL.format("ASCII", "data file: a.txt\n"),
}


@pytest.mark.parametrize("what", OVERLONG)
def test_a_nrrd_that_would_overrun_itk_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.nrrd").write_bytes(OVERLONG[what].encode())
    with pytest.raises(InputError, match=r"a\.nrrd: .*(export it again|save them with it, or raw)"):
        images.read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize("note", ["# " + NINES + "\n", NINES + ":=" + NINES + "\n", ""])
@pytest.mark.parametrize(("encoding", "data"), [("raw", "123456"), ("text", "1 2 3\n4 5 6\n")])
def test_a_nrrd_with_long_notes_is_read(tmp_path: Path, note: str, encoding: str, data: str) -> None:
    (tmp_path / "a.nrrd").write_bytes((SMALL.format(encoding, note) + data).encode())
    array = images.read_image(tmp_path / "a.nrrd").array
    assert (array - array[0, 0]).T.tolist() == [[0, 1, 2], [3, 4, 5]]
