"""Where each frame of a multi-frame DICOM file lies, by its own attributes; GDCM takes them in the file's order.

Enhanced files describe each frame in functional groups (PS3.3, C.7.6.16), whose items are each frame's own or shared; a
dose has offsets along its normal. An ultrasound image has the size of its pixels in its regions (C.8.5.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.utils.errors import InputError

SEVERAL = "; split it into files of one stack each, by dcm2niix or dcmtk"
CENTIMETRES, PLANE = 3, 1  # units of a region's pixels; 2-D and no trace of a curve
NO_TIME = ("PlanePositionSequence", "InStackPositionNumber", "StackID")


class Layout(NamedTuple):
    """The frames of a file as one volume, or as many in time."""

    order: np.ndarray  # (Z, T) of frames: along the stack, in time
    affine: np.ndarray  # (4, 4), voxel index -> RAS mm
    scale: np.ndarray | None  # (frames, 2): slopes and intercepts


def read_tags(path: Path) -> Any:
    """The attributes of a file without its voxels: ``pydicom``'s data set."""
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def pixels(path: Path) -> np.ndarray:
    """The stored values (X, Y, frames) of a grey multi-frame file, as pydicom decodes them."""
    import pydicom

    stored = np.asarray(pydicom.pixels.pixel_array(path))
    return stored.transpose(2, 1, 0).astype(np.float32)


def frames_of(tags: Any) -> list[_Frame]:
    """What functional groups say of each frame; nothing of a file without them."""
    shared = (tags.get("SharedFunctionalGroupsSequence") or [None])[0]
    return [_Frame(item, shared) for item in tags.get("PerFrameFunctionalGroupsSequence") or ()]


def layout(path: Path, tags: Any) -> Layout | None:
    """What the file says of its frames; None where it says nothing of their places.

    Raises:
        InputError: several stacks, uneven steps, places with different numbers of frames.
    """
    count = int(tags.get("NumberOfFrames") or 1)
    frames = frames_of(tags)
    if len(frames) == count:
        if any(frame.position is None or frame.turn is None for frame in frames):
            return None
        return _of_frames(path, tags, frames)
    offsets = tags.get("GridFrameOffsetVector")
    if offsets is not None and len(offsets) == count > 1 and tags.get("ImageOrientationPatient"):
        return _of_dose(path, tags, np.array(offsets, float))
    return None


class _Frame:
    """What functional groups say of one frame."""

    def __init__(self, item: Any, shared: Any) -> None:
        self.groups = [group for group in (item, shared) if group is not None]
        self.position = self._numbers("PlanePosition", "ImagePositionPatient", "ImagePositionVolume")
        self.turn = self._numbers("PlaneOrientation", "ImageOrientationPatient", "ImageOrientationVolume")
        self.size = self._numbers("PixelMeasures", "PixelSpacing")
        self.thickness = self._numbers("PixelMeasures", "SpacingBetweenSlices", "SliceThickness")
        slope = self._numbers("PixelValueTransformation", "RescaleSlope")
        intercept = self._numbers("PixelValueTransformation", "RescaleIntercept")
        self.scale = None if slope is None or intercept is None else (slope[0], intercept[0])
        segment = self._numbers("SegmentIdentification", "ReferencedSegmentNumber")
        self.segment = 1 if segment is None else int(segment[0])
        content = self._item("FrameContent")
        self.stack = "" if content is None else str(content.get("StackID") or "")
        self.time = 0 if content is None else int(content.get("TemporalPositionIndex") or 0)
        indices = () if content is None else content.get("DimensionIndexValues") or ()
        self.indices = (int(indices),) if isinstance(indices, int) else tuple(int(i) for i in indices)

    def _item(self, kind: str) -> Any:
        for group in self.groups:
            for name in (f"{kind}Sequence", f"{kind}VolumeSequence"):
                if group.get(name):
                    return group[name][0]
        return None

    def _numbers(self, kind: str, *names: str) -> np.ndarray | None:
        item = self._item(kind)
        for name in names:
            value = None if item is None else item.get(name)
            if value is not None and value != "":
                return np.atleast_1d(np.array(value, float))
        return None


def _of_frames(path: Path, tags: Any, frames: Sequence[_Frame]) -> Layout:
    turns = [frame.turn for frame in frames if frame.turn is not None]  # all, which ``layout`` has looked at
    stacks = {(frame.stack, tuple(np.round(turn, 3) + 0.0)) for frame, turn in zip(frames, turns, strict=True)}
    if len(stacks) > 1:
        planes = sorted({name_of_plane(turn) for _, turn in stacks})
        raise InputError(f"{path}: holds {len(stacks)} stacks of slices ({', '.join(planes)}){SEVERAL}")
    turn, places = turns[0], np.array([frame.position for frame in frames])
    size = frames[0].size if frames[0].size is not None else np.array(tags.get("PixelSpacing") or [1.0, 1.0], float)
    order = in_order(path, places, turn, _times(tags, frames))
    thick = 1.0 if frames[0].thickness is None else abs(float(frames[0].thickness[0]))
    affine = affine_of(path, places[order[:, 0]], turn, size, thick or 1.0)
    scales = [frame.scale for frame in frames]
    return Layout(order, affine, None if None in scales else np.array(scales, float))


def _times(tags: Any, frames: Sequence[_Frame]) -> list[tuple[int, ...]]:
    """What frames of one place follow each other by: their time, then all dimensions but those of the place."""
    import pydicom

    spatial = {pydicom.datadict.tag_for_keyword(name) for name in (*NO_TIME, "ImagePositionPatient")}
    spatial.add(pydicom.datadict.tag_for_keyword("PlanePositionVolumeSequence"))
    pointers = [item.get("DimensionIndexPointer") for item in tags.get("DimensionIndexSequence") or ()]
    groups = [item.get("FunctionalGroupPointer") for item in tags.get("DimensionIndexSequence") or ()]
    kept = [i for i, tag in enumerate(pointers) if tag not in spatial and groups[i] not in spatial]
    return [(frame.time, *(frame.indices[i] for i in kept if i < len(frame.indices))) for frame in frames]


def in_order(path: Path, places: np.ndarray, turn: np.ndarray, times: Sequence[Any]) -> np.ndarray:
    """Frames (Z, T) by their places along the normal and their times, which keep the file's order where alike.

    Raises:
        InputError: not as many frames at each place.
    """
    groups = places_of(places, turn)
    counts = {len(group) for group in groups}
    if len(counts) > 1:
        raise InputError(
            f"{path}: holds from {min(counts)} to {max(counts)} frames at its {len(groups)} places, not as many at "
            "each; export the whole of it"
        )
    return np.array([sorted(group, key=lambda i: (times[i], i)) for group in groups])


def places_of(places: np.ndarray, turn: np.ndarray) -> list[np.ndarray]:
    """The frames at each place along the normal; what differs by less than 5 % of a step is one place."""
    at = places @ _normal(turn)
    along = np.argsort(at, kind="stable")
    steps = np.diff(at[along])
    apart = steps[steps > 1e-4]
    return np.split(along, np.flatnonzero(steps > (0.05 * np.median(apart) if len(apart) else np.inf)) + 1)


def affine_of(path: Path, places: np.ndarray, turn: np.ndarray, size: np.ndarray, thick: float) -> np.ndarray:
    """Voxel -> RAS mm (4, 4) of slices at ``places`` (Z, 3) LPS mm, in their order.

    Raises:
        InputError: their steps differ by more than 5 % and 0.02 mm.
    """
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = turn[:3] * size[1], turn[3:] * size[0]
    affine[:3, 2] = _normal(turn) * thick
    affine[:3, 3] = places[0]
    if len(places) > 1:
        affine[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
        require_even(path, places, _normal(turn), [f"frame {i + 1}" for i in range(len(places))])
    affine[:2] *= -1  # LPS -> RAS
    return affine


def require_even(path: Path, origins: np.ndarray, normal: np.ndarray, names: Sequence[str]) -> None:
    """Even steps to 5 % (positions are written rounded) and 0.02 mm, along one line."""
    at = origins @ normal
    steps = np.diff(at)
    usual = float(np.median(steps))
    slack = max(0.05 * usual, 0.02)
    for one, other, step, place in zip(names[:-1], names[1:], steps, at, strict=False):
        pair = f"{one} and {other}"
        if step < slack:
            raise InputError(f"{path}: {pair} are at one place ({place:.2f} mm along the stack); keep one of them")
        if abs(step - usual) > slack:
            what = "slices are missing" if step > usual else "a slice is out of step"
            raise InputError(
                f"{path}: {what}: a gap of {step:.2f} mm between {pair} ({place:.2f} mm along the stack), "
                f"elsewhere it is {usual:.2f} mm; export the whole series"
            )
    line = origins[0] + np.linspace(0, 1, len(at))[:, None] * (origins[-1] - origins[0])
    off = np.linalg.norm(origins - line, axis=1)
    if off.max() > 2 * slack:
        bad = names[int(off.argmax())]
        raise InputError(f"{path}: {bad} is {off.max():.2f} mm off the line of the others; export the series again")


def _of_dose(path: Path, tags: Any, offsets: np.ndarray) -> Layout:
    turn = np.array(tags.ImageOrientationPatient, float)
    first = np.array(tags.ImagePositionPatient, float)
    places = first + (offsets - offsets[0])[:, None] * _normal(turn)
    order = in_order(path, places, turn, [()] * len(places))
    size = np.array(tags.get("PixelSpacing") or [1.0, 1.0], float)
    scale = np.tile([float(tags.get("DoseGridScaling") or 1), 0], (len(places), 1))
    return Layout(order, affine_of(path, places[order[:, 0]], turn, size, 1.0), scale)


def _normal(turn: np.ndarray) -> np.ndarray:
    normal = np.cross(turn[:3], turn[3:])
    return normal / max(float(np.linalg.norm(normal)), 1e-30)


def name_of_plane(turn: Sequence[float]) -> str:
    """Of six direction cosines: axial, coronal or sagittal, whichever is nearest."""
    return ("sagittal", "coronal", "axial")[int(np.abs(_normal(np.array(turn))).argmax())]


def pixel_size(tags: Any) -> tuple[float, float] | None:
    """Width and height of a pixel in mm by the largest 2-D region of an ultrasound image; None without one."""
    found = []
    for region in tags.get("SequenceOfUltrasoundRegions") or ():
        units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
        width, height = (abs(float(region.get(f"PhysicalDelta{axis}") or 0)) for axis in "XY")
        if units == (CENTIMETRES, CENTIMETRES) and region.get("RegionSpatialFormat") == PLANE and width * height:
            ends = [int(region.get(f"RegionLocation{end}") or 0) for end in ("MaxX1", "MinX0", "MaxY1", "MinY0")]
            found.append(((ends[0] - ends[1]) * (ends[2] - ends[3]), 10 * width, 10 * height))
    return max(found)[1:] if found else None
