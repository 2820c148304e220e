"""Files of each format -> shape, RAS affine, and the voxels when they are wanted.

What a file says is passed on as it is; what regpipe accepts is decided in ``io.images``. Pictures: ``io.pictures``.
"""

from __future__ import annotations

import functools
import gzip
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder

from regpipe.io import headers, nifti_place, planes
from regpipe.io.planes import Plane
from regpipe.utils import limits
from regpipe.utils.errors import InputError, out_of_memory

log = logging.getLogger(__name__)

PathLike = str | Path

NIFTI = (".nii.gz", ".nii", ".hdr", ".img")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima")
PICTURE = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".webp",
    ".jfif",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
)
IN_MM = "#mm"  # behind a picture's name: its resolution is used
LABELS = (1002, 1003)  # NIfTI's intents for indices of labels and of anatomical names
SEGMENTS = (".seg.nrrd", ".seg.nhdr")  # of 3D Slicer
# of ITK's types; it has no Python images of some of them
COMPONENTS = {"unsigned_char": "u1", "char": "i1", "unsigned_short": "u2", "short": "i2", "unsigned_int": "u4"}
COMPONENTS |= {"int": "i4", "float": "f4", "double": "f8", "long_long": "i8", "unsigned_long_long": "u8"}
GZIP = b"\x1f\x8b"
DEFLATE = 1032  # bytes that one byte of gzip's stands for at most
SUFFIXES = NIFTI + ITK + DICOM + PICTURE


REASONS = {  # of a library's refusal, where the file may be sound
    r"w2 should be positive": "the quaternion of its qform is longer than 1; mend its header",
    r"invalid intercept": "its scl_inter is no number; mend its header",
    r"doesn't match dimension of space": "a slice in a space of more axes; save it with 3 axes, one of 1 voxel",
    r"cannot identify image file|cannot work out file type|not a gzip file|empty file": "is not what its name says, or "
    "truncated at its beginning; look what it is, or export it again",
    r"decompress(ed|or) data too large|text chunk": "its notes are longer than Pillow reads; save it without them",
    r"unsupported|not supported|not implemented|unknown (raw mode|compression|codec)|decoder .* not available"
    r"|codec configuration|unknown data ?type|not recogni[sz]ed": "is of a kind that is not read; save it "
    "uncompressed, of 8 or 16 bits",
}


class Source(NamedTuple):
    """An open file whose header has been read and whose voxels have not.

    A film, of any format, is 4-D: (X, Y, Z, T), or (X, Y, 1, T) of pictures.
    """

    shape: tuple[int, ...]  # without singleton axes at the end
    affine: np.ndarray  # (D+1, D+1) float64, voxel index -> RAS mm
    dtype: np.dtype
    voxels: Callable[[int | None], np.ndarray]  # of one frame of a film, or of all of the file
    label: bool = False  # whether the file says that it is a label map
    plane: Plane | None = None  # of one slice stored in 3-D


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time: one run opens a file several times."""
    log.warning(message)


def locate(path: PathLike) -> tuple[Path, int | None]:
    """``film.nii.gz#4`` -> the file, and the frame counted from 0; of any other path None. ``#mm`` is left out."""
    path = Path(path)
    if in_mm(path):
        path = path.with_name(path.name.removesuffix(IN_MM))
    name, _, frame = path.name.rpartition("#")
    if name and frame.isdecimal() and not path.exists():
        return path.with_name(name), int(frame)
    return path, None


def in_mm(path: PathLike) -> bool:
    """Whether a picture's resolution is asked for."""
    path = Path(path)
    return path.name.endswith(IN_MM) and path.name != IN_MM and not path.exists()


def unreadable(path: PathLike, cause: Exception) -> InputError:
    """What is said of a file that a library cannot read."""
    if out_of_memory(cause):
        return InputError(f"{path}: what its header says does not fit into memory; mend it, or save it coarser")
    if isinstance(cause, FileNotFoundError) and cause.filename:
        return InputError(f"{path}: {cause.filename} is missing; put it there")
    if isinstance(cause, OSError) and cause.errno:  # the system's own: no right to it, a disk that fails
        return InputError(f"{path}: cannot be read: {cause.strerror}; check the disk, and whether you may read it")
    told = re.sub(r"\.? Reason: [^.]*$", "", one_line(cause))  # ITK's is of whatever call failed last, "Success" too
    for pattern, reason in REASONS.items():
        if re.search(pattern, told, re.IGNORECASE):
            return InputError(f"{path}: {reason} ({told})")
    return InputError(f"{path}: broken or truncated ({told}); export it again")


def one_line(cause: Exception) -> str:
    """An error's text without line breaks, and without where in ITK it arose; its end where it is long."""
    told = re.sub(r".*ITK ERROR: (\w+\(0x\w+\): )?| ?<_io\.[^>]*>", "", " ".join(str(cause).split()))
    return (told or type(cause).__name__)[-160:]


def require_voxel_size(path: PathLike, sizes: Sequence[float] | np.ndarray) -> None:
    """Raises ``InputError`` unless all are lengths in mm, from ten nanometres to a thousand kilometres.

    Spacings are rounded to a nanometre, see ``data.pairs.working_grid``.
    """
    if not all(1e-5 <= mm < 1e9 for mm in sizes):
        raise InputError(f"{path}: voxel size {' x '.join(f'{mm:g}' for mm in sizes)} mm; mend its header")


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without the singleton axes at its end; never less than 2-D for that."""
    shape = tuple(int(n) for n in shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def is_plane(shape: tuple[int, ...]) -> bool:
    """Whether a shape is a picture's or a film's of pictures."""
    return len(shape) == 2 or (len(shape) == 4 and shape[2] == 1)


def plane(affine: np.ndarray, upright: np.ndarray) -> np.ndarray:
    """The (3, 3) affine of a picture that lies in space as ``affine`` (4, 4) says.

    An axial one keeps its place. Any other has no x and y in space: ``upright`` (3, 3) is taken.
    """
    across = np.abs(affine[2, :2]) / np.maximum(np.linalg.norm(affine[:3, :2], axis=0), 1e-30)
    return upright if across.max() > 1e-3 else affine[np.ix_([0, 1, 3], [0, 1, 3])]


def open_nifti(path: Path, file: BinaryIO, *, values: bool = False) -> Source:
    """NIfTI-1, NIfTI-2 and Analyze, placed as ITK places them, see ``io.nifti_place``.

    ``values``: those along the fifth axis are frames.
    """
    image = load_nifti(path, file)
    sides = tuple(image.shape)
    if values and len(sides) == 5 and sides[3] == 1:
        sides = (*sides[:3], sides[4])
    shape = squeezed(sides)
    _require_bytes(path, image)
    affine = nifti_affine(path, image)
    lies = None
    if len(image.shape) == 2:
        affine = plane(affine, np.diag([*np.linalg.norm(affine[:3, :2], axis=0), 1.0]))
    else:
        shape, affine, lies = planes.laid_flat(sides, affine) or (shape, affine, None)

    def voxels(frame: int | None) -> np.ndarray:
        if frame is None:
            return nifti_array(image).reshape(shape)
        return nifti_array(image, (..., frame)).reshape(squeezed(shape[:3]))

    said = int(image.header.get("intent_code", 0)) in LABELS
    return Source(shape, affine, image.get_data_dtype(), voxels, said, lies)


def load_nifti(path: PathLike, file: BinaryIO) -> Any:
    """nibabel's image of an open file, its header checked and read; its voxels are read from the same opening.

    A header and its voxels in two files are opened by nibabel, and what is no NIfTI is refused by it.
    """
    file.seek(0)
    packed = file.read(2) == GZIP  # whatever its name says
    file.seek(0)
    name = str(path).lower()
    if name.endswith((".nii", ".nii.gz")) and packed != name.endswith(".gz"):
        warn_once(f"{path}: is {'' if packed else 'not '}packed by gzip, which its name does not say")
    stream: Any = gzip.GzipFile(fileobj=file) if packed else file
    limits.check_nifti(path, stream)
    try:
        stream.seek(0)
        head = stream.read(nib.Nifti2Header.sizeof_hdr)
    except (OSError, EOFError, zlib.error):
        head = b""
    for kind in nifti_place.IMAGES if name.endswith((".nii", ".nii.gz")) else ():
        if kind.header_class.may_contain_header(head):
            image = kind.from_file_map({"image": FileHolder(str(path), stream)})
            if image.dataobj.offset < image.header.sizeof_hdr:
                raise InputError(f"{path}: its voxels begin within its header, by its vox_offset; mend that")
            return image
    return nib.load(path)


def nifti_array(image: Any, part: Any = ...) -> np.ndarray:
    """The array of a NIfTI from ``load_nifti``, or a part of it; a ``.gz`` is unpacked to its end.

    Only there stands its checksum: nibabel stops at the last voxel, and damaged ones would pass for sound.
    As ITK has it, ``scl_inter`` is added where ``scl_slope`` is 0 or none, too.
    """
    header = _raw_header(image)
    slope, inter = (float(header[f"scl_{name}"]) if nifti_place.is_nifti(header) else 0 for name in ("slope", "inter"))
    array = np.asanyarray(image.dataobj[part])
    if inter and math.isfinite(inter) and (slope == 0 or not math.isfinite(slope)):
        warn_once(f"{image.get_filename()}: scl_inter, {inter:g}, is added, as ITK does; its scl_slope is none")
        array = array + inter
    stream = image.file_map["image"].fileobj
    if isinstance(stream, gzip.GzipFile):
        while stream.read(2**20):
            pass
    return array


def _require_bytes(path: Path, image: Any) -> None:
    """Refuse a header that promises more voxels than its file can hold, before memory is asked for them."""
    file = Path(image.file_map["image"].filename)
    packed = isinstance(image.file_map["image"].fileobj, gzip.GzipFile) or file.name.lower().endswith(".gz")
    unpacked = file.stat().st_size * (DEFLATE if packed else 1)
    if image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize > unpacked:
        raise InputError(f"{path}: truncated: its header says {image.shape}, the file holds less; export it again")


def _raw_header(image: Any) -> Any:
    """As it stands in the file: nibabel takes the scale out, and checking exchanges voxel sizes below 0."""
    with image.file_map.get("header", image.file_map["image"]).get_prepare_fileobj("rb") as file:
        return type(image.header).from_fileobj(file, check=False)


def nifti_affine(path: PathLike, image: Any) -> np.ndarray:
    """RAS affine (4, 4) by ITK's rules; what other programs might see otherwise is said once.

    Raises:
        InputError: voxel sizes that are none: nibabel and ITK take 0 for 1 mm and say nothing.
    """
    header = _raw_header(image)
    require_voxel_size(path, np.abs(header["pixdim"][1 : 1 + min(len(squeezed(image.shape)), 3)]))
    by_nibabel = np.asarray(image.affine, np.float64)
    affine = nifti_place.itk_place(header, by_nibabel, min(len(image.shape), 3))
    if affine is None:
        lies = len(image.shape) > 2 or np.allclose(by_nibabel[2, :2], 0, atol=1e-3)
        told = "sheared); placed by nibabel" if lies else "2-D, not axial); its place is left out, voxel sizes are kept"
        warn_once(f"{path}: ITK refuses where its header puts it ({told}")
        return by_nibabel
    told = nifti_place.told(header, affine, by_nibabel, image.shape)
    if told:
        warn_once(f"{path}: {told}")
    return affine


def itk_header(path: Path, file: BinaryIO) -> Any:
    """The ``itk.ImageIOBase`` of a MetaImage or NRRD, its header looked through and read."""
    import itk  # takes a second, and most cohorts are NIfTI

    headers.check_header(path, file)
    # not whatever can read it: HDF5 under this name may take its voxels from anywhere
    io = (itk.MetaImageIO if path.suffix.lower() in (".mha", ".mhd") else itk.NrrdImageIO).New()
    if not io.CanReadFile(str(path)):
        raise InputError(f"{path}: ITK does not recognise its header; export it again")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    return io


def open_itk(path: Path, file: BinaryIO, *, values: bool = False) -> Source:
    """MetaImage and NRRD: what ITK reads, turned from LPS; ``values``: several at each place are frames."""
    import itk

    io = itk_header(path, file)
    many = int(io.GetNumberOfComponents())
    if many != 1 and not values:
        raise InputError(f"{path}: {io.GetNumberOfComponents()} values per voxel; save one")
    dims, affine = itk_geometry(io, path)
    shape, affine, lies = planes.laid_flat(dims, affine) or (squeezed(dims), affine, None)

    stored = itk_dtype(io)
    # ITK's Python has no int8 or int64 images: the one is read as double, the other as unsigned, of the same bits
    into = itk.ULL if stored.kind in "iu" and stored.itemsize == 8 else itk.D

    if many > 1:
        shape = (*shape, 1)[:3] + (many,)

    def voxels(frame: int | None) -> np.ndarray:
        kind = itk.Image[into, len(dims)] if many == 1 else itk.VectorImage[itk.D, len(dims)]
        array = itk_array(path, type(io), kind).astype(stored)
        array = (array if many == 1 else np.moveaxis(array, 0, -1)).reshape(shape)
        return array if frame is None else array[..., frame].reshape(squeezed(shape[:3]))

    return Source(shape, affine, stored, voxels, path.name.lower().endswith(SEGMENTS), lies)


def itk_dtype(io: Any) -> np.dtype:
    """Of the voxels of an ``itk.ImageIOBase`` that has read its header."""
    name, size = io.GetComponentTypeAsString(io.GetComponentType()), io.GetComponentSize()
    if name in ("long", "unsigned_long"):  # 4 bytes on Windows
        return np.dtype(f"{'u' if name.startswith('u') else 'i'}{size}")
    return np.dtype(COMPONENTS.get(name, "f8"))


def itk_array(path: Path, kind: Any, into: Any) -> np.ndarray:
    """The voxels [x, y, ...] of a file that an ``itk.ImageIOBase`` of ``kind`` reads, as an ``itk.Image``, ``into``.

    Not by ``itk.imread``: that has all formats that ITK knows look at the file first.
    """
    import itk

    reader = itk.ImageFileReader[into].New(FileName=str(path), ImageIO=kind.New())
    reader.Update()
    voxels: np.ndarray = itk.array_from_image(reader.GetOutput()).T
    return voxels


def itk_geometry(io: Any, path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and RAS affine (at most 4, 4) of an ``itk.ImageIOBase`` that has read its header.

    Raises:
        InputError: a voxel size of 0, which ITK would refuse with the voxels; below 0 it mirrors.
    """
    shape = tuple(int(io.GetDimensions(i)) for i in range(io.GetNumberOfDimensions()))
    dim = min(len(shape), 3)
    spacing = [io.GetSpacing(i) for i in range(dim)]
    require_voxel_size(path, np.abs(spacing))
    affine = np.eye(dim + 1)
    for i in range(dim):
        affine[:dim, i] = np.array(io.GetDirection(i)[:dim]) * spacing[i]
        affine[i, dim] = io.GetOrigin(i)
    affine[:2] *= -1  # LPS -> RAS
    return shape, affine
