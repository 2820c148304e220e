"""A film as a group: how its motion is smooth over time, and what is made of its frames together.

Of velocities found frame by frame, ``v_i``, those are taken that minimise ``sum |w_i - v_i|^2 + b sum |w_i-1 - 2 w_i +
w_i+1|^2``: a quadratic penalty on accelerations (Whittaker 1923). What is steady or moves evenly stays as it is, and so
does the sum over all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.group.subjects import Subject
from regpipe.group.template import LABEL, SUBJECTS, TEMPLATE
from regpipe.io import images
from regpipe.io.geometry import carry, flipped
from regpipe.io.images import Image
from regpipe.io.labels import ids_of, read_label
from regpipe.io.landmarks import Landmarks
from regpipe.io.series import FRAMES, Series, read_series, write_series
from regpipe.io.source import Source
from regpipe.report.pictures import contact_sheet, save_png
from regpipe.transforms.apply import map_points
from regpipe.transforms.read import Space, find, read_transform
from regpipe.transforms.resample import resample
from regpipe.utils.files import csv_bytes, replace_file

FILM, FILM_LABEL, TABLE, PICTURE = "film.nii.gz", "film_label.nii.gz", "film.csv", "film.png"
SLIGHT = 1e-4  # shares of a frame in another one's motion that are left out
OVER_TIME = 0.7  # stiffness; measured: tests/benchmarks/films.py
PLACES = 500  # that drift is told at
BRIGHT = 0.1  # of the mean frame's range: where its content is


def shares(frames: int, stiffness: float) -> np.ndarray:
    """(N, N), symmetric, of rows that sum to 1: how much of each frame's motion is in each frame's.

    ``stiffness``: the length, in frames, below which motion to and fro is taken out: half of it at a period of
    2 pi ``stiffness``. 0: each frame has its own.
    """
    steps = np.diff(np.eye(frames), 2, axis=0)
    found = np.linalg.inv(np.eye(frames) + stiffness**4 * steps.T @ steps)
    found = np.where(np.abs(found) < SLIGHT, 0, (found + found.T) / 2)
    return found + np.diag(1 - found.sum(axis=1))


class Way(NamedTuple):
    """The maps of points of a frame."""

    there: Any  # itk.Transform: a place of the mean -> its place in the frame, LPS mm
    back: Any
    frame: Space


def way_of(out: Path, one: Subject) -> Way:
    """As it was written."""
    to_frame = find(out / SUBJECTS / one.name, "moving")  # its file for points takes the mean to the frame
    assert to_frame.target is not None
    return Way(read_transform(to_frame.points), read_transform(to_frame.images), to_frame.target)


def write_film(out: Path, frames: Sequence[Subject]) -> dict[str, Any]:
    """The frames warped to their mean and what is carried from the mean to each; what is told of it.

    Writes ``FILM``, of labels ``FILM_LABEL``, ``TABLE`` and ``PICTURE``.
    """
    mean = images.read_image(out / TEMPLATE)
    kind = read_series(images.locate(frames[0].image)[0]) or Series(mean.array, mean.affine, mean.array.dtype, FRAMES)
    film = np.stack([images.read_image(out / SUBJECTS / one.name / "warped.nii.gz").array for one in frames], -1)
    write_series(out / FILM, film, mean.affine, kind._replace(label=False))
    before = np.stack([_as_it_is(one, mean) for one in frames], -1)
    save_png(out / PICTURE, _over_time(before, film))
    rows, told = _along(out, frames, mean)
    inside = mean.array > BRIGHT * mean.array.max()
    flicker = [float(each[inside].std(axis=-1).mean() / np.ptp(before)) for each in (before, film)]
    replace_file(out / TABLE, csv_bytes(rows))
    if (out / LABEL).is_file():
        _carry_label(out, frames, kind)
    return {**told, "flicker_before": flicker[0], "flicker": flicker[1]}


def _along(out: Path, frames: Sequence[Subject], mean: Image) -> tuple[list[list[Any]], dict[str, Any]]:
    """The table, a row for each frame; and how far places and landmarks drift.

    Places of the mean go to each frame in turn and back: what is left at the end is the drift of the round trip. Of
    landmarks it is how far those of each frame, carried to the mean, lie from where they are on average.
    """
    start = places = _content(mean)
    named = [_landmarks(one) for one in frames]
    carried, rows = [], []
    for one, known in zip(frames, named, strict=True):
        way = way_of(out, one)
        there = map_points(places, way.there)
        rows.append([one.name, float(np.linalg.norm(there - places, axis=1).mean())])
        places = map_points(there, way.back)
        carried.append({name: map_points(point[None], way.back)[0] for name, point in known.items()})
    off = np.linalg.norm(places - start, axis=1)
    told: dict[str, Any] = {"drift_mm": float(off.mean()), "largest_drift_mm": float(off.max())}
    names = sorted({name for each in carried for name in each})
    middle = {name: np.mean([each[name] for each in carried if name in each], axis=0) for name in names}
    told |= _spread(carried, middle)
    for row, one in zip(rows, frames if names else (), strict=bool(names)):
        there = way_of(out, one).there  # read again: all of them would fill the memory
        row += [mm for name in names for mm in map_points(middle[name][None], there)[0].tolist()]
    axes = "xyz"[: mean.array.ndim]
    return [["frame", "motion_mm", *(f"{name}_{axis}" for name in names for axis in axes)], *rows], told


def _spread(carried: Sequence[dict[str, np.ndarray]], middle: dict[str, np.ndarray]) -> dict[str, float]:
    off = [np.linalg.norm(point - middle[name]) for each in carried for name, point in each.items()]
    many = len([each for each in carried if each])
    return {"landmarks_mm": float(np.mean(off))} if many > 1 else {}


def _landmarks(one: Subject) -> dict[str, np.ndarray]:
    """Name, or number, -> place in LPS mm, of those that are known."""
    if "landmarks" not in one.beside:
        return {}
    found: Landmarks = Source().landmarks(one.beside["landmarks"], one.image)
    names = found.names or [str(i) for i in range(1, len(found.points) + 1)]
    return {name: place for name, place in zip(names, found.points, strict=True) if np.isfinite(place).all()}


def _content(mean: Image) -> np.ndarray:
    """Places (K, D) LPS mm, evenly from where the mean frame is not dark."""
    at = np.argwhere(mean.array > BRIGHT * mean.array.max())
    at = at[:: -(-len(at) // PLACES)]
    return flipped(carry(mean.affine, at.astype(float)))


def _as_it_is(one: Subject, mean: Image) -> np.ndarray:
    """A frame on the grid of the mean."""
    found = Source().image(one.image)
    return images.resample(found, mean.affine, mean.array.shape, order=1)


def _carry_label(out: Path, frames: Sequence[Subject], kind: Series) -> None:
    """What the frames with labels vote for, on each frame's own grid."""
    label = read_label(out / LABEL)[0]

    def each() -> Iterator[np.ndarray]:
        for one in frames:
            way = way_of(out, one)
            yield resample(label, way.back, way.frame, "nearest")

    film = ids_of(np.stack([*each()], -1), FILM_LABEL)
    write_series(out / FILM_LABEL, film, way_of(out, frames[0]).frame.affine, kind._replace(label=True))


def _over_time(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The line of the image that changes most, over time, as it was and warped: (H, W, 3) uint8."""
    change = before.std(axis=-1)
    axis = max(range(change.ndim), key=lambda i: float(change.mean(axis=i).max()))
    at = np.unravel_index(change.mean(axis=axis).argmax(), np.delete(change.shape, axis))
    where = (*at[:axis], slice(None), *at[axis:])
    low, high = np.percentile(before[where], [0.5, 99.5])
    shown = [
        np.clip(255 * (film[where] - low) / max(high - low, 1e-6), 0, 255).astype(np.uint8) for film in (before, after)
    ]
    wide = [np.repeat(np.repeat(line, max(1, 400 // line.shape[1]), axis=1)[..., None], 3, axis=-1) for line in shown]
    return contact_sheet(wide, ["a line over time", "warped to the mean frame"], height=max(256, change.shape[axis]))
