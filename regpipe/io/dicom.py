"""DICOM, read by ITK's GDCM: a file, or a folder with the slices of one series under any names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.io import headers
from regpipe.io.formats import PathLike, Source, is_plane, itk_array, itk_geometry, plane, squeezed, warn_once
from regpipe.utils.errors import InputError

# By the frame increment pointer, frames follow each other in time: frame time, its vector, cine rate.
IN_TIME = ("0018,1063", "0018,1065", "0018,0040")
PIXEL_SPACINGS = ("0028|0030", "0018|1164")  # in the patient, at the detector


class _Slice(NamedTuple):
    path: Path
    shape: tuple[int, ...]  # (columns, rows)
    affine: np.ndarray  # (4, 4), RAS mm

    @property
    def normal(self) -> np.ndarray:
        """Across the slice, RAS, unit length."""
        return self.affine[:3, 2] / np.linalg.norm(self.affine[:3, 2])


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
    """One file: a slice, a volume, or a film (frames in time are (X, Y, 1, T)). Colour becomes grey and warns."""
    import itk  # takes a second, and most cohorts are NIfTI

    io = _header(path)
    dims, affine = itk_geometry(io, path)
    film = any(tag in _text(io, "0028|0009") for tag in IN_TIME)
    shape = (*dims[:2], 1, dims[2]) if film and dims[2] > 1 else squeezed(dims)
    if is_plane(shape):
        affine = plane(affine, np.diag([-io.GetSpacing(0), -io.GetSpacing(1), 1.0]))
        if not any(_text(io, tag) for tag in PIXEL_SPACINGS):
            warn_once(f"{path}: gives no pixel spacing (an ultrasound region's is not read); 1 mm is taken")
    if io.GetNumberOfComponents() > 1:
        warn_once(f"{path}: is in colour; its luminance is used")

    def voxels(frame: int | None) -> np.ndarray:
        array = itk_array(path, itk.GDCMImageIO, itk.Image[itk.F, len(dims)]).reshape(shape)  # rescaled
        return array if frame is None else array[:, :, 0, frame]

    return Source(shape, affine, np.dtype("f4"), voxels)


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
    first = slices[0]
    for other in slices[1:]:
        if other.shape != first.shape or not np.allclose(other.affine[:3, :3], first.affine[:3, :3], atol=1e-3):
            raise InputError(f"{other.path}: not parallel and equal in size to {first.path.name}; keep one stack")
    slices.sort(key=lambda s: s.affine[:3, 3] @ first.normal)
    affine = first.affine.copy()
    affine[:3, 3] = slices[0].affine[:3, 3]
    affine[:3, 2] = (slices[-1].affine[:3, 3] - slices[0].affine[:3, 3]) / (len(slices) - 1)
    _check_positions(folder, slices, first.normal)

    def voxels(frame: int | None) -> np.ndarray:
        return np.stack([open_dicom(s.path).voxels(None) for s in slices], -1)

    return Source((*first.shape, len(slices)), affine, np.dtype("f4"), voxels)


def _one_series(folder: Path) -> list[Path]:
    import itk

    for file in parts(folder):
        headers.check_dicom(file)
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)  # tells apart what some scanners give one UID: other sizes, thicknesses, sequences
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


def _check_positions(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> None:
    """Even steps to 5 % (positions are written rounded) and 0.02 mm, along one line."""
    origins = np.array([s.affine[:3, 3] for s in slices])
    at = origins @ normal
    steps = np.diff(at)
    usual = float(np.median(steps))
    slack = max(0.05 * usual, 0.02)
    for one, other, step, place in zip(slices[:-1], slices[1:], steps, at, strict=False):
        pair = f"{one.path.name} and {other.path.name}"
        if step < slack:
            raise InputError(f"{folder}: {pair} are at one place ({place:.2f} mm along the stack); keep one of them")
        if abs(step - usual) > slack:
            what = "slices are missing" if step > usual else "a slice is out of step"
            raise InputError(
                f"{folder}: {what}: a gap of {step:.2f} mm between {pair} ({place:.2f} mm along the stack), "
                f"elsewhere it is {usual:.2f} mm; export the whole series"
            )
    line = origins[0] + np.linspace(0, 1, len(at))[:, None] * (origins[-1] - origins[0])
    off = np.linalg.norm(origins - line, axis=1)
    if off.max() > 2 * slack:
        bad = slices[int(off.argmax())].path.name
        raise InputError(f"{folder}: {bad} is {off.max():.2f} mm off the line of the others; export the series again")


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
