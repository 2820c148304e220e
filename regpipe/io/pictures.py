"""PNG, JPEG, WebP, BMP, TIFF, GIF by Pillow: upright as viewers show them, grey; a warning says what is not kept.

LPS mm are the pixels of the upright picture, and the resolution tag is not used. A z-stack of ImageJ or OME is a
volume, whose voxel size those files give.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as Picture

from regpipe.io.formats import PathLike, Source, require_voxel_size, squeezed, warn_once
from regpipe.io.geometry import lps_matrix
from regpipe.utils.errors import InputError

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
DESCRIPTION, X_RESOLUTION, Y_RESOLUTION = 270, 282, 283  # TIFF tags
MM = {"nm": 1e-6, "um": 1e-3, "micron": 1e-3, "microns": 1e-3, "µm": 1e-3, "\\u00b5m": 1e-3, "μm": 1e-3}
MM |= {"mm": 1.0, "cm": 10.0, "m": 1000.0, "inch": 25.4, "": 1e-3}  # OME's default is the micron


class _Stack(NamedTuple):
    """What a TIFF says of its frames."""

    order: str  # of the axes Z, T, C in the file, fastest first
    counts: dict[str, int]
    size: tuple[float, float, float]  # mm


def open_picture(path: Path, file: BinaryIO, *, label: bool, values: bool = False) -> Source:
    """A picture of one frame, a film (X, Y, 1, T), or a volume (X, Y, Z[, T]); ``values``: its colours are frames."""
    with _opened(file) as picture:
        frames, size, mode = getattr(picture, "n_frames", 1), picture.size, picture.mode
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
        if turn in SIDEWAYS and not _turned_already(picture):
            size = size[::-1]
        _tell(path, picture, turn)
        stack = _stack(path, picture, frames) if frames > 1 else None
    indexed = mode in ("L", "F", "1") or mode.startswith("I") or (label and mode == "P")
    affine, shape = lps_matrix(np.eye(3), places=False), size if frames == 1 else (*size, 1, frames)
    if stack is not None:
        shape = (*size, stack.counts["Z"], stack.counts["T"])
        affine = np.diag([-stack.size[0], -stack.size[1], stack.size[2], 1.0])
        require_voxel_size(path, stack.size)
    shape = squeezed(shape)
    if values and frames == 1 and not indexed:
        shape = (*size, 1, 3)

    def voxels(frame: int | None) -> np.ndarray:
        if len(shape) == 4 and frames == 1:
            return _colours(path, file)[..., frame]
        if frames == 1:
            return _pixels(path, file, 0, indexed, label)
        film = [*range(frames)] if frame is None else [frame]
        wanted = film if stack is None else _wanted(stack, frame)
        array = np.stack([_pixels(path, file, i, indexed, label) for i in wanted], -1)
        return array.reshape(shape if frame is None else squeezed(shape[:3]))

    return Source(shape, affine, np.dtype("f4"), voxels)


def _wanted(stack: _Stack, frame: int | None) -> list[int]:
    """The frames of a volume, or of all volumes with the time running fastest."""
    strides, stride = {}, 1
    for axis in stack.order:
        strides[axis], stride = stride, stride * stack.counts[axis]
    times = range(stack.counts["T"]) if frame is None else [frame]
    return [z * strides["Z"] + t * strides["T"] for z in range(stack.counts["Z"]) for t in times]


@contextlib.contextmanager
def open_upright(file: BinaryIO) -> Iterator[Any]:
    """A picture of one frame, upright, whatever its colours; None where it has several frames."""
    with _opened(file) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            yield None
        else:
            picture.load()
            yield ImageOps.exif_transpose(picture) or picture


def frames_of(path: Path) -> int:
    """How many a picture has; 1 where it cannot be read, which who reads it says."""
    try:
        with path.open("rb") as file, _opened(file) as picture:
            return int(getattr(picture, "n_frames", 1))
    except (OSError, ValueError, SyntaxError):
        return 1


def encoded(path: PathLike, pixels: np.ndarray) -> bytes:
    """The file, by its suffix, of a picture's rows (Y, X) or (Y, X, 3 or 4).

    Raises:
        InputError: the format cannot hold them, e.g. 16 bits or what is transparent in a JPEG.
    """
    data = io.BytesIO()
    kind = Picture.registered_extensions()[Path(path).suffix.lower()]
    try:
        Picture.fromarray(np.ascontiguousarray(pixels)).save(data, format=kind)
    except OSError as cause:
        raise InputError(f"{path}: {cause}; name it .png or .nii.gz") from cause
    return data.getvalue()


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    """An open picture, of any size: whether it fits into memory is asked by who reads it, not by Pillow's limit."""
    limit, Picture.MAX_IMAGE_PIXELS = Picture.MAX_IMAGE_PIXELS, None
    try:
        with Picture.open(file) as picture:
            yield picture
    finally:
        Picture.MAX_IMAGE_PIXELS = limit


def _turned_already(picture: Any) -> bool:
    """Whether Pillow turns a TIFF upright by itself: it gives its width and height exchanged then."""
    return picture.format == "TIFF" and (picture.width, picture.height) != (picture.tag_v2[256], picture.tag_v2[257])


def _tell(path: Path, picture: Any, turn: int) -> None:
    """What of a picture is changed or not used."""
    if turn != 1:
        warn_once(f"{path}: turned upright, as its EXIF orientation {turn} says and viewers show it")
    raw = [str(tile[3]) for tile in picture.tile]
    if picture.mode in ("RGB", "RGBA", "LA", "CMYK") and any(";16" in name for name in raw):
        warn_once(f"{path}: its colours have 16 bits; 8 of them are read")
    profile = picture.info.get("icc_profile")
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
        warn_once(f"{path}: its colour profile is not used; its numbers are taken as sRGB")
    if picture.format == "TIFF" and picture.tag_v2.get(296, 2) != 1:
        dpi = [float(picture.tag_v2.get(tag, 0) or 0) for tag in (X_RESOLUTION, Y_RESOLUTION)]
        if max(dpi) > 1 and not set(dpi) <= {72.0, 96.0}:
            unit = "cm" if picture.tag_v2.get(296) == 3 else "inch"
            warn_once(f"{path}: its resolution, {dpi[0]:g} x {dpi[1]:g} per {unit}, is not used: a pixel is 1 mm")


def _stack(path: Path, picture: Any, frames: int) -> _Stack | None:
    """A z-stack by ImageJ or OME; None of other pictures, whose frames follow each other in time."""
    text = str(picture.tag_v2.get(DESCRIPTION, "")) if picture.format == "TIFF" else ""
    stack = _of_imagej(text, picture) if text.startswith("ImageJ=") else _of_ome(text) if "OME" in text else None
    if stack is None or stack.counts["Z"] == 1:
        return None
    if stack.counts["C"] > 1:
        raise InputError(f"{path}: a stack of {stack.counts['C']} channels; save one channel")
    if np.prod(list(stack.counts.values())) != frames:
        raise InputError(f"{path}: says that it holds {stack.counts}, its frames are {frames}; save it again")
    return stack


def _of_imagej(text: str, picture: Any) -> _Stack:
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    counts = {axis: int(said.get(name, 1)) for axis, name in {"Z": "slices", "T": "frames", "C": "channels"}.items()}
    mm = MM.get(said.get("unit", "pixel").strip().lower())
    across = [float(picture.tag_v2.get(tag, 1) or 1) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    deep = abs(float(said.get("spacing", 1))) or 1.0
    if mm is None:  # in pixels: the slices' distance is, too
        return _Stack("CZT", counts, (1.0, 1.0, deep))
    return _Stack("CZT", counts, (mm / across[0], mm / across[1], deep * mm))


def _of_ome(text: str) -> _Stack | None:
    found = re.search(r"<(?:\w+:)?Pixels\b([^>]*)>", text)
    if found is None:
        return None
    said = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', found[1]))
    counts = {axis: int(said.get(f"Size{axis}", 1)) for axis in "ZTC"}
    units = [MM.get(said.get(f"PhysicalSize{axis}Unit", "").lower(), 1e-3) for axis in "XYZ"]
    known = all(f"PhysicalSize{axis}" in said for axis in "XYZ")
    size = (
        [float(said[f"PhysicalSize{axis}"]) * mm for axis, mm in zip("XYZ", units, strict=True)] if known else [1.0] * 3
    )
    order = said.get("DimensionOrder", "XYZCT").removeprefix("XY")
    return _Stack(order, counts, (size[0], size[1], size[2])) if sorted(order) == ["C", "T", "Z"] else None


def _pixels(path: Path, file: BinaryIO, frame: int, indexed: bool, label: bool) -> np.ndarray:
    """One frame (X, Y), upright."""
    with _opened(file) as opened:
        opened.seek(frame)
        opened.load()
        picture = ImageOps.exif_transpose(opened) or opened
        if indexed:
            return np.array(picture).T
        picture = _opaque(path, picture)
        rgb = np.array(picture.convert("RGB"))
        if (rgb != rgb[..., :1]).any():
            if label:
                raise InputError(f"{path}: a label map in colour ({opened.mode}); save one number per pixel")
            warn_once(f"{path}: is in colour; its luminance is used")
        return np.array(picture.convert("RGB").convert("L")).T


def _colours(path: Path, file: BinaryIO) -> np.ndarray:
    """Red, green and blue (X, Y, 3) of a picture of one frame, upright."""
    with _opened(file) as opened:
        opened.load()
        return np.array(_opaque(path, ImageOps.exif_transpose(opened) or opened).convert("RGB")).swapaxes(0, 1)


def _opaque(path: Path, picture: Any) -> Any:
    """What viewers show of a picture, on white where it lets its ground shine through."""
    if picture.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in picture.info:
        return picture
    whole = picture.convert("RGBA")
    if whole.getchannel("A").getextrema()[0] == 255:
        return whole
    warn_once(f"{path}: is transparent in places; it is laid on white")
    white = Picture.new("RGBA", whole.size, "white")
    return Picture.alpha_composite(white, whole)
