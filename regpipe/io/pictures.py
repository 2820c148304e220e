"""PNG, JPEG, WebP, BMP, TIFF, GIF by Pillow: upright as viewers show them, grey; a warning says what is not kept.

LPS mm are the pixels of the upright picture, and the resolution tag is not used. A z-stack of ImageJ or OME is a
volume, whose voxel size those files give.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as Picture

from regpipe.io.formats import IN_MM, PathLike, Source, require_voxel_size, squeezed, warn_once
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


def open_picture(path: Path, file: BinaryIO, *, label: bool, values: bool = False, mm: bool = False) -> Source:
    """A picture of one frame, a film (X, Y, 1, T), or a volume (X, Y, Z[, T]).

    ``values``: its colours are frames; ``mm``: its resolution is used.
    """
    with _opened(file) as picture:
        frames, size, mode = _count(picture), picture.size, picture.mode
        _tell(path, picture)
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
        if turn in SIDEWAYS and not _turned_already(picture):
            size = size[::-1]
        if turn != 1:
            warn_once(f"{path}: turned upright, as its EXIF orientation {turn} says and viewers show it")
        stack = _stack(path, picture, frames) if frames > 1 else None
        if stack is None and not mm:
            _tell_size(path, picture)
        clear = mode == "L" and "transparency" in picture.info and not label
    indexed = (mode in ("L", "F", "1") and not clear) or mode.startswith("I") or (label and mode == "P")
    affine, shape = lps_matrix(np.eye(3), places=False), size if frames == 1 else (*size, 1, frames)
    if stack is not None:
        shape = (*size, stack.counts["Z"], stack.counts["T"])
        affine = np.diag([-stack.size[0], -stack.size[1], stack.size[2], 1.0])
        require_voxel_size(path, stack.size)
    shape = squeezed(shape)
    if mm:
        affine = _in_mm(affine, path, file)
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
        if _count(picture) > 1:
            yield None
        else:
            picture.load()
            yield ImageOps.exif_transpose(picture) or picture


def frames_of(path: Path) -> int:
    """How many a picture has; 1 where it cannot be read, which who reads it says."""
    try:
        with path.open("rb") as file, _opened(file) as picture:
            return _count(picture)
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
        file.seek(0)
        head = file.read(12)
        tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        if head[4:] in (b"ftypheic", b"ftypmif1", b"ftypheix"):
            _learn_heic(file)
        try:
            picture = Picture.open(file)
        except UnidentifiedImageError as cause:
            if tiff and _has_directory(file, head):
                raise OSError("a kind of TIFF not supported by Pillow") from cause
            raise
        with picture:
            yield picture
    finally:
        Picture.MAX_IMAGE_PIXELS = limit


def _has_directory(file: BinaryIO, head: bytes) -> bool:
    """Whether a TIFF holds all of its first directory, as it does not where it is cut off; BigTIFF is not looked at."""
    if head[2:4] in (b"+\0", b"\0+"):
        return True
    order = "<" if head[:1] == b"I" else ">"
    (start,) = struct.unpack(f"{order}I", head[4:8].ljust(4, b"\0"))
    end = file.seek(0, 2)
    file.seek(start)
    entries = file.read(2)
    return len(entries) == 2 and start + 6 + 12 * struct.unpack(f"{order}H", entries)[0] <= end


def _learn_heic(file: BinaryIO) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as cause:
        raise InputError(
            "HEIC, which Pillow alone does not read; pip install pillow-heif, or save it as PNG"
        ) from cause
    register_heif_opener()


def _turned_already(picture: Any) -> bool:
    """Whether Pillow turns a TIFF upright by itself: it gives its width and height exchanged then."""
    return picture.format == "TIFF" and (picture.width, picture.height) != (picture.tag_v2[256], picture.tag_v2[257])


def _count(picture: Any) -> int:
    """Its frames; one of a phone's MPO, whose others are the same scene again."""
    return 1 if picture.format == "MPO" else int(getattr(picture, "n_frames", 1))


def _tell(path: Path, picture: Any) -> None:
    """What of a picture is changed or not used; asked before anything else, as its EXIF may load it."""
    raw = [str(tile[3]) for tile in picture.tile]
    if picture.mode in ("RGB", "RGBA", "LA", "CMYK") and any(";16" in name for name in raw):
        warn_once(f"{path}: its colours have 16 bits; 8 of them are read")
    if picture.format == "MPO" and getattr(picture, "n_frames", 1) > 1:
        warn_once(f"{path}: holds {picture.n_frames} pictures (MPO); the first is read")
    profile = picture.info.get("icc_profile")
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
        warn_once(f"{path}: its colour profile is not used; its numbers are taken as sRGB")


def _tell_size(path: Path, picture: Any) -> None:
    size = _pixel_size(picture)
    if size is not None and not {round(25.4 / mm) for mm in size} <= {72, 96}:
        told = " x ".join(f"{mm:.4g}" for mm in size)
        warn_once(f"{path}: its resolution, {told} mm, is not used: a pixel is 1 mm; name it with {IN_MM} to use it")


def _pixel_size(picture: Any) -> list[float] | None:
    """Width and height of a pixel as it is stored, mm, as a picture says; None where it does not."""
    text = str(picture.tag_v2.get(DESCRIPTION, "")) if picture.format == "TIFF" else ""
    stack = _of_imagej(text, picture) if text.startswith("ImageJ=") else _of_ome(text) if "OME" in text else None
    if stack is not None and stack.size[:2] != (1.0, 1.0):
        return [*stack.size[:2]]
    dpi = [float(n) for n in picture.info.get("dpi", ())]
    return [25.4 / n for n in dpi] if len(dpi) == 2 and min(dpi) > 1 else None


def _in_mm(affine: np.ndarray, path: Path, file: BinaryIO) -> np.ndarray:
    with _opened(file) as picture:
        size = _pixel_size(picture)
        if size is None or len(affine) != 3:
            raise InputError(f"{path}: gives its pixels no size; leave out {IN_MM}")
        if picture.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS:
            size = size[::-1]
    require_voxel_size(path, size)
    return affine @ np.diag([*size, 1.0])


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
    said = {key: one or other for key, one, other in re.findall(r"""(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)')""", found[1])}
    counts = {axis: int(said.get(f"Size{axis}", 1)) for axis in "ZTC"}
    units = [MM.get(said.get(f"PhysicalSize{axis}Unit", "").lower(), 1e-3) for axis in "XYZ"]
    known = all(f"PhysicalSize{axis}" in said for axis in ("XYZ" if counts["Z"] > 1 else "XY"))
    sizes = [float(said.get(f"PhysicalSize{axis}", 1)) * mm for axis, mm in zip("XYZ", units, strict=True)]
    size = sizes if known else [1.0] * 3
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
