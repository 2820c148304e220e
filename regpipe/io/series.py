"""Files that hold several values at each place: frames in time, channels, colours, vectors, tensors.

Each value is an image of its own on one grid. What the file says of the values (the time between frames, the NIfTI
intent, the NRRD kind) is kept and written again.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from regpipe.io import dicom, dicom_frames, formats, pictures, planes
from regpipe.io.formats import ITK, NIFTI, PICTURE, load_nifti, locate, nifti_affine, nifti_array, squeezed
from regpipe.io.geometry import LPS
from regpipe.io.images import opened_file, opened_image, voxels_of
from regpipe.io.itk_files import image_bytes, segment_notes
from regpipe.io.labels import is_named_label, look_of
from regpipe.io.nifti_place import placed_image
from regpipe.io.planes import Plane
from regpipe.utils import limits
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file

FRAMES, VALUES, COLOURS, VECTOR, TENSOR = "frames", "values", "colours", "vector", "tensor"
INTENTS = {1005: TENSOR, 1006: VECTOR, 1007: VECTOR}
ITK_KINDS = {"rgb": COLOURS, "rgba": COLOURS, "vector": VECTOR, "covariant_vector": VECTOR}
ITK_KINDS |= {"symmetric_second_rank_tensor": TENSOR, "diffusion_tensor_3D": TENSOR}
NRRD_KINDS = {VALUES: "list", VECTOR: "vector", TENSOR: "3D-symmetric-matrix"}
RAS_VECTOR = 1006  # of NIfTI's intents: in RAS; the others as ITK takes them, in LPS


class Series(NamedTuple):
    """What a file of several values holds."""

    array: np.ndarray  # (*S, C)
    affine: np.ndarray  # (D+1, D+1), voxel index -> RAS mm
    dtype: np.dtype  # of the file
    kind: str  # FRAMES, ...
    label: bool = False  # whether the file says that it is a label map
    step: float = 1.0  # between frames, in the file's unit
    about: Any = None  # NIfTI's header
    notes: Mapping[str, str] | None = None  # of segments
    plane: Plane | None = None  # of slices stored in 3-D, see ``io.planes``

    @property
    def ras(self) -> bool:
        """Whether its vectors are in RAS."""
        return self.about is not None and int(self.about["intent_code"]) == RAS_VECTOR


def read_series(path: Path, file: BinaryIO | None = None) -> Series | None:
    """All values of a file; None where it holds one at each place, or one frame is asked for.

    ``file``: the same, open already.

    Raises:
        InputError: broken; of more axes than are known.
    """
    if locate(path)[1] is not None:
        return None
    try:
        with opened_file(path, file) as stream:
            found = _read(path, stream)
        if found is not None and found.array.dtype.kind == "f" and np.isinf(found.array).any():
            raise InputError(f"{path}: has infinite values; set them to a number, or to NaN")
        return found
    except (InputError, MemoryError):
        raise
    except Exception as cause:  # the libraries' own, for broken files
        raise formats.unreadable(path, cause) from cause


def _read(path: Path, stream: BinaryIO | None) -> Series | None:
    file, _ = locate(path)
    name = file.name.lower()
    for suffixes, reader in ((PICTURE, _colours), (NIFTI, _nifti), (ITK, _of_itk)):
        found = reader(file, stream) if stream is not None and name.endswith(suffixes) else None
        if found is not None and formats.in_mm(path):
            with opened_image(path, stream) as source:
                return found._replace(affine=source.affine)
        if found is not None:
            return found
    with opened_image(path, stream, film=True) as source:
        if len(source.shape) < 4:
            return None
        array, dim = voxels_of(source, path), len(source.affine) - 1
        shape = (*source.shape[:dim], source.shape[3])
        about = _about(file, stream) if stream is not None and name.endswith(NIFTI) else None
        step = _step(file, stream) if about is None else float(about["pixdim"][4])
        frames = array.reshape(shape)
        return Series(frames, source.affine, source.dtype, FRAMES, source.label, step, about, plane=source.plane)


def _about(file: Path, stream: BinaryIO) -> Any:
    """NIfTI's header."""
    header = load_nifti(file, stream).header
    return header if isinstance(header, nib.Nifti1Header) else None  # Analyze's says nothing of units and intents


def _colours(file: Path, stream: BinaryIO) -> Series | None:
    """A picture of one frame whose channels differ, as it is shown (upright, not on white) -> 8 bits of each."""
    with pictures.open_upright(stream) as picture:
        if picture is None or picture.mode in ("1", "L", "F") or picture.mode.startswith("I"):
            return None
        if picture.mode == "P":  # numbers of colours may be labels
            numbers = np.asarray(picture)
            if is_named_label(file) or look_of(numbers).label:
                return None
        clear = "A" in picture.getbands() or "transparency" in picture.info
        array = np.asarray(picture.convert("RGBA" if clear else "RGB")).swapaxes(0, 1)
    if clear and (array[..., 3] == 255).all():
        array = array[..., :3]
    if array.shape[2] == 3 and (array == array[..., :1]).all():
        return None
    return Series(array, np.diag([-1.0, -1.0, 1.0]), np.dtype(np.uint8), COLOURS)


def _nifti(file: Path, stream: BinaryIO) -> Series | None:
    """Colours, and values along the fifth axis; None of others."""
    image = load_nifti(file, stream)
    colours = image.get_data_dtype().names
    shape = tuple(image.shape)
    if len(shape) < 5 and not colours:
        return None
    if len(shape) > 5 or (len(shape) == 5 and shape[3] > 1 and shape[4] > 1):
        raise InputError(f"{file}: its shape is {shape}; frames in time, or several values, not both")
    limits.require_room(file, shape, 4)
    array = nifti_array(image)
    affine = nifti_affine(file, image)
    array = np.stack([array[name] for name in colours], -1) if colours else array
    about, dtype = image.header, array.dtype if colours else image.get_data_dtype()
    if dtype.kind not in "biuf":
        raise InputError(f"{file}: {dtype} voxels; save real values")
    array = array.reshape(*shape[:3], -1)
    if array.shape[-1] == 1:
        return None
    sides, affine, lies = planes.laid_flat(shape[:3], affine) or (shape[:3], affine, None)
    if len(sides) == 2 and lies is None:
        affine = formats.plane(affine, np.diag([*np.linalg.norm(affine[:3, :2], axis=0), 1.0]))
    array = array.reshape(*sides, -1)
    intent = int(about["intent_code"])
    kind = COLOURS if colours else INTENTS.get(intent, VALUES)
    return Series(array, affine, dtype, kind, intent in formats.LABELS, about=about, plane=lies)


def of_dimension(series: Series, dim: int) -> Series:
    """Its kind where there are as many values as that has in ``dim`` dimensions; else they are but values."""
    many = series.array.shape[-1]
    wanted = {VECTOR: dim, TENSOR: 6 if dim == 3 else -1}.get(series.kind, many)
    return series if many == wanted else series._replace(kind=VALUES)


def _step(file: Path, stream: BinaryIO | None) -> float:
    """Between frames: in the unit of the file, of DICOM in seconds; 1 where it is not said."""
    if file.name.lower().endswith(PICTURE):
        return 1.0
    if stream is None or not file.name.lower().endswith(ITK):
        tags = dicom_frames.read_tags(next(dicom.parts(file)) if file.is_dir() else file)
        rate = float(tags.get("CineRate") or tags.get("RecommendedDisplayFrameRate") or 0)
        ms = float(tags.get("FrameTime") or (1000 / rate if rate else 0) or tags.get("RepetitionTime") or 1000)
        return ms / 1000
    io = formats.itk_header(file, stream)
    return float(io.GetSpacing(3)) if io.GetNumberOfDimensions() > 3 else 1.0


def _of_itk(file: Path, stream: BinaryIO) -> Series | None:
    """Several components; None of one."""
    import itk

    io = formats.itk_header(file, stream)
    components, pixel = int(io.GetNumberOfComponents()), str(io.GetPixelTypeAsString(io.GetPixelType()))
    if components == 1:
        return None
    dims, affine = formats.itk_geometry(io, file)
    limits.require_room(file, (*dims, components))
    if len(squeezed(dims)) > 3:
        raise InputError(
            f"{file}: its shape is {dims}, of {components} values; frames in time, or values, but not both"
        )
    stored = formats.itk_dtype(io)
    read = formats.itk_array(file, type(io), itk.VectorImage[itk.D, len(dims)])  # (C, x, y, z)
    array = np.moveaxis(read, 0, -1).astype(stored)
    sides, affine, lies = planes.laid_flat(dims, affine) or (squeezed(dims), affine, None)
    array = array.reshape(*sides, components)
    kind = ITK_KINDS.get(pixel, VALUES)
    about = io.GetMetaDataDictionary()
    if about.HasKey("NRRD_kinds[pixel]") and about["NRRD_kinds[pixel]"] == "list":  # which ITK takes for a vector
        kind = VALUES
    elif pixel == "vector" and stored.kind != "f":  # a MetaImage's colours
        kind = COLOURS if components in (3, 4) and stored == np.uint8 else VALUES
    label = file.name.lower().endswith(formats.SEGMENTS)
    return Series(array, affine, stored, VALUES if label else kind, label, notes=segment_notes(file), plane=lies)


def write_series(path: Path, array: np.ndarray, affine: np.ndarray, series: Series) -> None:
    """Write values (*S, C) of the kind of ``series``: NIfTI, .mha, .nrrd; colours also as a picture.

    Raises:
        InputError: a suffix that cannot hold them.
    """
    suffix, name = path.suffix.lower(), path.name.lower()
    array = _as_stored(array, series, nifti=name.endswith((".nii", ".nii.gz")))
    if name.endswith((".nii", ".nii.gz")):
        data = _nifti_bytes(array, affine, series)
        replace_file(path, gzip.compress(data, compresslevel=1, mtime=0) if name.endswith(".gz") else data)
    elif suffix in (".mha", ".nrrd") and series.kind == FRAMES:
        longer = np.eye(len(affine) + 1)
        keep = [*range(len(affine) - 1), len(affine)]
        longer[np.ix_(keep, keep)] = affine
        longer[-2, -2] = series.step
        replace_file(path, image_bytes(suffix, array, longer))
    elif suffix in (".mha", ".nrrd"):
        kind = f"RGB{'A' * (array.shape[-1] - 3)}-color" if series.kind == COLOURS else NRRD_KINDS[series.kind]
        replace_file(path, image_bytes(suffix, array, affine, values=kind, notes=series.notes))
    elif suffix in PICTURE and series.kind == COLOURS:
        replace_file(path, pictures.encoded(path, array.swapaxes(0, 1)))
    else:
        raise InputError(f"{path}: cannot hold {array.shape[-1]} {series.kind}; name it .nii.gz")


def _as_stored(array: np.ndarray, series: Series, *, nifti: bool) -> np.ndarray:
    """The values of a file of one convention as the other has them."""
    if nifti == (series.about is not None):
        return array
    if series.kind == TENSOR:  # by rows, NIfTI its lower triangle and ITK its upper one: the third and fourth change
        return array[..., [0, 1, 3, 2, 4, 5]]
    return array * LPS[: array.shape[-1]].astype(array.dtype) if series.kind == VECTOR and series.ras else array


def _nifti_bytes(array: np.ndarray, affine: np.ndarray, series: Series) -> bytes:
    many, shape = array.shape[-1], (*array.shape[:-1], 1)[:3]
    if series.kind == COLOURS and many in (3, 4):
        typed = np.dtype([(name, "u1") for name in "RGBA"[:many]])
        whole = np.ascontiguousarray(array, np.uint8).view(typed).reshape(shape)
    else:
        whole = array.reshape(*shape, *((many,) if series.kind == FRAMES else (1, many)))
    image, about = placed_image(whole, affine), series.about
    image.header.set_xyzt_units("mm", "sec" if about is None else about.get_xyzt_units()[1])
    if series.kind == FRAMES:
        image.header["pixdim"][4] = series.step
    for key in ("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3", "toffset", "descrip"):
        if about is not None:
            image.header[key] = about[key]
    if about is None and series.kind in (VECTOR, TENSOR):
        image.header["intent_code"] = 1007 if series.kind == VECTOR else 1005
    data: bytes = image.to_bytes()
    return data
