"""DICOM segmentations (PS3.3, A.51): their frames are slices of segments, of which the empty ones are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from regpipe.io import dicom_frames
from regpipe.io.formats import Source, require_voxel_size, squeezed, warn_once
from regpipe.io.planes import laid_flat
from regpipe.utils import limits
from regpipe.utils.errors import InputError

CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # segments apart; a label map
SMALLEST = 0.02  # mm between slices


def open_segmentation(path: Path, tags: Any) -> Source:
    """The label map of a segmentation: the number of each segment, of overlapping ones the later's.

    What is fractional counts from half on.

    Raises:
        InputError: frames that do not say where they lie, or not on one lattice.
    """
    frames = dicom_frames.frames_of(tags)
    turns = [frame.turn for frame in frames if frame.turn is not None]
    places = np.array([frame.position for frame in frames if frame.position is not None])
    if not frames or len(turns) < len(frames) or len(places) < len(frames):
        raise InputError(f"{path}: a segmentation whose frames do not say where they lie; export it as NIfTI or NRRD")
    if not np.allclose(turns, turns[0], atol=1e-3):
        raise InputError(f"{path}: a segmentation of slices that are not parallel; export each part by itself")
    turn, size = turns[0], frames[0].size if frames[0].size is not None else np.ones(2)
    thick = frames[0].thickness
    index, step = _slices(path, places, turn, None if thick is None else abs(float(thick[0])))
    affine = dicom_frames.affine_of(path, places[index.argmin()][None], turn, size, step)
    require_voxel_size(path, np.linalg.norm(affine[:3, :3], axis=0))
    shape = (int(tags.Columns), int(tags.Rows), int(index.max()) + 1)
    limits.require_room(path, shape)

    def voxels(_: int | None) -> np.ndarray:
        return _labels(path, tags, frames, index, shape).reshape(squeezed(shape))

    flat, affine, lies = laid_flat(shape, affine) or (squeezed(shape), affine, None)
    return Source(flat, affine, np.dtype(np.uint16), voxels, True, lies)


def _slices(path: Path, places: np.ndarray, turn: np.ndarray, thick: float | None) -> tuple[np.ndarray, float]:
    """Which slice of the volume each frame is, and the mm between slices: as said, or the smallest that occurs."""
    normal = np.cross(turn[:3], turn[3:])
    along = places @ normal
    gaps = np.diff(np.sort(along))
    gaps = gaps[gaps > SMALLEST]
    known = [step for step in (thick, *([gaps.min()] if len(gaps) else [])) if step]
    for step in known or [1.0]:
        index = np.rint((along - along.min()) / step)
        line = places[along.argmin()] + index[:, None] * step * normal
        if np.linalg.norm(places - line, axis=1).max() <= max(0.1 * step, SMALLEST):
            return index.astype(int), float(step)
    raise InputError(f"{path}: the slices of its segments are not evenly apart; export it as NIfTI or NRRD")


def _labels(path: Path, tags: Any, frames: Any, index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    import pydicom

    stored = np.asarray(pydicom.pixels.pixel_array(path)).reshape(len(frames), shape[1], shape[0]).swapaxes(1, 2)
    kind = str(tags.get("SegmentationType") or "BINARY")
    least = float(tags.get("MaximumFractionalValue") or 1) / 2 if kind == "FRACTIONAL" else 1
    labels: np.ndarray = np.zeros(shape, np.uint16)
    twice = False
    for frame, z, pixels in zip(frames, index, stored, strict=True):
        if kind == "LABELMAP":
            labels[..., z] = pixels
            continue
        inside = pixels >= least
        twice |= bool((labels[..., z][inside] != 0).any())
        labels[..., z][inside] = frame.segment
    if twice:
        warn_once(f"{path}: its segments overlap; where they do, the later one counts")
    return labels
