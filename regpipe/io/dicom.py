"""DICOM, read by ITK's GDCM: a file, or a folder with the slices of one series under any names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.io import dicom_frames, dicom_seg, headers
from regpipe.io.formats import PathLike, Source, is_plane, itk_array, itk_geometry, plane, squeezed, warn_once
from regpipe.io.geometry import flipped
from regpipe.io.planes import Plane, laid_flat
from regpipe.utils.errors import InputError

# By the frame increment pointer, frames follow each other in time: frame time, its vector, cine rate.
IN_TIME = ("0018,1063", "0018,1065", "0018,0040")
PIXEL_SPACINGS = ("0028|0030", "0018|1164")  # in the patient, at the detector


TELL_APART = (
    *("TemporalPositionIdentifier", "EchoNumbers", "EchoTime", "DiffusionBValue", "TriggerTime"),
    *("AcquisitionNumber", "ImageType", "AcquisitionTime", "ContentTime", "InstanceNumber"),
)


class _Slice(NamedTuple):
    path: Path
    shape: tuple[int, ...]  # (columns, rows)
    affine: np.ndarray  # (4, 4), RAS mm

    @property
    def normal(self) -> np.ndarray:
        """Across the slice, RAS, unit length."""
        return self.affine[:3, 2] / np.linalg.norm(self.affine[:3, 2])

    @property
    def plane(self) -> str:
        """Axial, coronal or sagittal."""
        return dicom_frames.name_of_plane(np.r_[self.affine[:3, 0], self.affine[:3, 1]])


def is_dicom(path: PathLike) -> bool:
    """Whether a file begins as DICOM PS3.10 wants it: 128 bytes of any kind, then DICM."""
    path = Path(path)
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_series(path: PathLike) -> bool:
    """Whether ``path`` is a folder with DICOM files directly in it: one image, not a folder of images."""
    return Path(path).is_dir() and any(True for _ in parts(path))


def parts(folder: PathLike) -> Iterator[Path]:
    """The DICOM files directly in a folder, by name."""
    return (f for f in sorted(Path(folder).iterdir()) if not f.name.startswith(".") and is_dicom(f))


def open_dicom(path: Path) -> Source:
    """One file: a slice, a volume, or a film (frames in time are (X, Y, 1, T)). Colour becomes grey and warns.

    Frames that say where they lie are put there, see ``io.dicom_frames``.
    """
    headers.check_dicom(path)
    tags = dicom_frames.read_tags(path)
    if tags.get("SOPClassUID") in dicom_seg.CLASSES:
        return dicom_seg.open_segmentation(path, tags)
    io = _header(path)
    dims = tuple(int(io.GetDimensions(i)) for i in range(io.GetNumberOfDimensions()))
    if "MOSAIC" in (tags.get("ImageType") or ()):
        raise InputError(f"{path}: a Siemens mosaic, many slices in one picture; convert it by dcm2niix")
    placed = dicom_frames.layout(path, tags) if dims[2] > 1 else None
    if placed is None:
        dims, affine = itk_geometry(io, path)
        film = any(tag in _text(io, "0028|0009") for tag in IN_TIME)
        order, shape = np.arange(dims[2])[None], (*dims[:2], 1, dims[2]) if film and dims[2] > 1 else squeezed(dims)
    else:
        order, affine = placed.order, placed.affine
        shape = squeezed((*dims[:2], *order.shape))
    if is_plane(shape):
        size = _pixel_size(path, io, tags, affine)
        affine[:3, :2] *= size / np.linalg.norm(affine[:3, :2], axis=0)
    in_space = placed is not None or bool(_text(io, "0020|0032"))
    shape, affine, lies = _flat(shape, affine, in_space=in_space)
    if io.GetNumberOfComponents() > 1:
        warn_once(f"{path}: is in colour; its luminance is used")

    def voxels(frame: int | None) -> np.ndarray:
        array = _frames(path, io, placed)[..., order.ravel()].reshape(shape)
        return array if frame is None else array[..., frame].reshape(squeezed(shape[:3]))

    return Source(shape, affine, np.dtype("f4"), voxels, plane=lies)


def _frames(path: Path, io: Any, placed: dicom_frames.Layout | None) -> np.ndarray:
    """The voxels (X, Y, frames) as they are stored, rescaled."""
    import itk

    scale = None if placed is None else placed.scale
    if placed is not None and len(placed.order) == 1:  # by GDCM no step along the stack, which ITK refuses
        stored = dicom_frames.pixels(path)
        return stored if scale is None else stored * scale[:, 0] + scale[:, 1]
    array = itk_array(path, itk.GDCMImageIO, itk.Image[itk.F, io.GetNumberOfDimensions()])
    by_gdcm = [io.GetRescaleSlope(), io.GetRescaleIntercept()]  # the first frame's, for all
    if scale is None or (scale == by_gdcm).all():
        return array
    return (array - by_gdcm[1]) / by_gdcm[0] * scale[:, 0] + scale[:, 1]


def _flat(
    shape: tuple[int, ...], affine: np.ndarray, *, in_space: bool = True
) -> tuple[tuple[int, ...], np.ndarray, Plane | None]:
    """Shape, affine and plane; of slices, (X, Y) or (X, Y, 1, T), as ``io.planes`` has it, or of a picture."""
    if not is_plane(shape):
        return shape, affine, None
    if not in_space:
        return shape, plane(affine, np.diag([*-np.linalg.norm(affine[:3, :2], axis=0), 1.0])), None
    return laid_flat((*shape[:2], 1, *shape[3:]), affine) or (shape, affine, None)


def _pixel_size(path: Path, io: Any, tags: Any, affine: np.ndarray) -> np.ndarray:
    """Width and height of a picture's pixels in mm."""
    if any(_text(io, tag) for tag in PIXEL_SPACINGS) or "PerFrameFunctionalGroupsSequence" in tags:
        return np.linalg.norm(affine[:3, :2], axis=0)
    region = dicom_frames.pixel_size(tags)
    if region is None:
        warn_once(f"{path}: gives no pixel spacing, nor an ultrasound region's; 1 mm is taken")
        return np.ones(2)
    return np.array(region)


def open_series(folder: Path) -> Source:
    """The one series of a folder, its slices sorted by their position; rescale slopes are applied.

    The affine is that of the slices' own positions, so that of a tilted gantry is sheared.

    Raises:
        InputError: no readable image, several series, slices unlike each other, missing or doubled.
    """
    files = _one_series(folder)
    if len(files) == 1:
        return open_dicom(files[0])
    slices = [_slice(file) for file in files]
    _require_one_stack(folder, slices)
    first = slices[0]
    turn = np.r_[flipped(first.affine[:3, 0]), flipped(first.affine[:3, 1])]
    groups = dicom_frames.places_of(np.array([flipped(s.affine[:3, 3]) for s in slices]), turn)
    counts = {len(group) for group in groups}
    several = counts != {1} and len(counts) == 1
    order = _in_time(folder, slices, groups) if several else np.concatenate(groups)[:, None]
    stack = [slices[i] for i in order[:, 0]]
    affine = first.affine.copy()
    affine[:3, 3] = stack[0].affine[:3, 3]
    if len(stack) > 1:
        affine[:3, 2] = (stack[-1].affine[:3, 3] - stack[0].affine[:3, 3]) / (len(stack) - 1)
    origins = np.array([s.affine[:3, 3] for s in stack])
    dicom_frames.require_even(folder, origins, first.normal, [s.path.name for s in stack])
    shape, affine, lies = _flat(squeezed((*first.shape, *order.shape)), affine)

    def voxels(frame: int | None) -> np.ndarray:
        wanted = order if frame is None else order[:, frame : frame + 1]
        array = np.stack([open_dicom(slices[i].path).voxels(None) for i in wanted.ravel()], -1)
        return array.reshape(shape if frame is None else squeezed((*first.shape, len(order))))

    return Source(shape, affine, np.dtype("f4"), voxels, plane=lies)


def _require_one_stack(folder: Path, slices: list[_Slice]) -> None:
    """Refuses slices that do not go into one volume, with what they are."""
    kinds: list[list[_Slice]] = []
    for one in slices:
        same = (k for k in kinds if k[0].shape == one.shape)
        alike = next((k for k in same if np.allclose(k[0].affine[:3, :3], one.affine[:3, :3], atol=1e-3)), None)
        if alike is None:
            kinds.append([one])
        else:
            alike.append(one)
    if len(kinds) > 1:
        told = (f"{len(k)} x {k[0].plane} of {k[0].shape[0]} x {k[0].shape[1]} from {k[0].path.name}" for k in kinds)
        listed = ", ".join(told)
        raise InputError(f"{folder}: its slices are not parallel and equal in size ({listed}); a folder each, please")


def _in_time(folder: Path, slices: Sequence[_Slice], groups: Sequence[np.ndarray]) -> np.ndarray:
    """Slices (Z, T) where several lie at each place, by the first of ``TELL_APART`` that differs at each of them."""
    tags = [dicom_frames.read_tags(s.path) for s in slices]
    if len({str(t.get("SOPInstanceUID")) for t in tags}) < len(tags):
        return np.concatenate(groups)[:, None]  # the same files twice, which is said next
    for name in TELL_APART:
        values = [str(t.get(name)) if t.get(name) is not None else None for t in tags]
        held = [{values[i] for i in group} for group in groups]
        if all(None not in found and len(found) == len(groups[0]) for found in held):
            listed = ", ".join(sorted((str(v) for v in held[0]), key=_numeric)[:6])
            warn_once(f"{folder}: {len(groups[0])} slices at each place, frames by their {name}: {listed}")
            return np.array([sorted(group, key=lambda i: _numeric(str(values[i]))) for group in groups])
    return np.concatenate(groups)[:, None]


def _numeric(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return np.inf, text


def _one_series(folder: Path) -> list[Path]:
    import itk

    for file in parts(folder):
        headers.check_dicom(file)
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)  # one UID is one series, whatever its free texts say; see ``_one_stack``
    names.SetDirectory(str(folder))
    series = [[Path(f) for f in names.GetFileNames(uid)] for uid in names.GetSeriesUIDs()]
    if not series:
        raise InputError(f"{folder}: none of its DICOM files holds a readable image; export it again")
    if len(series) > 1:
        listed = ", ".join(f"{len(files)} x {_described(files[0])}" for files in series)
        raise InputError(f"{folder}: holds {len(series)} series ({listed}); a folder each, please")
    left = [f.name for f in parts(folder) if f not in series[0]]
    if left:
        warn_once(f"{folder}: {len(left)} DICOM files hold no readable image and are left out: {', '.join(left[:5])}")
    return series[0]


def _described(path: Path) -> str:
    io = _header(path)
    words = (_text(io, tag) for tag in ("0020|0011", "0008|103e"))
    return f"'{' '.join(filter(None, words)) or path.name}'"


def _slice(path: Path) -> _Slice:
    io = _header(path)
    dims, affine = itk_geometry(io, path)
    if dims[2] > 1 or not (_text(io, "0020|0032") and _text(io, "0020|0037")):
        raise InputError(f"{path}: one of several files, yet not a slice with its position; a folder each, please")
    return _Slice(path, dims[:2], affine)


def _header(path: Path) -> Any:
    import itk

    headers.check_dicom(path)
    io = itk.GDCMImageIO.New()
    if not io.CanReadFile(str(path)):
        raise InputError(f"{path}: not DICOM, or cut off; export it again")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    return io


def _text(io: Any, tag: str) -> str:
    """A tag as text, empty where there is none."""
    tags = io.GetMetaDataDictionary()  # a view: it must not outlive ``io``
    return str(tags[tag]).strip() if tags.HasKey(tag) else ""
