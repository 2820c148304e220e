"""Where the working grid lies in the two images of a pair: the one map between files and what a network sees.

A *frame* is an affine (D+1, D+1), working voxel -> RAS mm of an image. The fixed image's frame is the grid laid around
its centre, along its own axes. The moving image's is the same grid carried over by the alignment ``T`` (fixed point ->
moving point): ``moving_frame = T @ fixed_frame``, so that what is left for the network is what no affine map can do.
``T`` is never applied to an image by itself: every file is resampled once, through everything. A homography (2-D) has
``T`` as its affine part, and the *bend* as the rest, see ``transforms.homography``. An initial transform that is not
linear has a field as its bend, see ``transforms.initial``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.data.pairs import SIDES, Case, fixed_grid
from regpipe.io import images
from regpipe.io.geometry import extent
from regpipe.io.images import Grid, Image
from regpipe.io.landmarks import pairing
from regpipe.io.source import Source
from regpipe.transforms import affine, homography, initial, projective
from regpipe.utils.errors import InputError
from regpipe.utils.settings import AffineOptions

if TYPE_CHECKING:
    from regpipe.data.cache import Store

FOREGROUND = 0.1  # of an image's range, for where its content is

log = logging.getLogger(__name__)


class Paired(NamedTuple):
    """The landmark files of a case."""

    fixed: np.ndarray  # (K, D) LPS mm
    moving: np.ndarray
    counts: tuple[int, int]  # in the files
    order: tuple[np.ndarray, np.ndarray] | None  # the rows of both that ``fixed`` and ``moving`` are; None: all


def paired_landmarks(case: Case, files: Source) -> Paired | None:
    """By their names, see ``io.landmarks.pairing``; None where one side has no file.

    Without names their numbers may differ.
    """
    if not all(f"{side}_landmarks" in case for side in SIDES):
        return None
    fixed, moving = (files.landmarks(case[f"{side}_landmarks"], case[f"{side}_image"]) for side in SIDES)
    order = pairing(fixed, moving, case["fixed_landmarks"], case["moving_landmarks"])
    rows = (slice(None), slice(None)) if order is None else order
    return Paired(fixed.points[rows[0]], moving.points[rows[1]], (len(fixed.points), len(moving.points)), order)


class Placed(NamedTuple):
    """The frames of a case, and the bend of a homography or of an initial transform, in working voxels."""

    fixed: np.ndarray
    moving: np.ndarray
    bend: np.ndarray | None = None  # (3, 3)
    field: np.ndarray | None = None  # (D, *grid)


class Frames:
    """``frames(case, files) -> Placed``.

    Args:
        grid: the working grid; None: of each pair its own, see ``data.pairs.fixed_grid``.
        asked: its ``affine`` is the stage: ``none``: both images share one space; ``centre``: their centres are laid
            onto each other; ``rigid``, ``similarity``, ``affine``: see ``transforms.affine``; ``projective``: in 2-D,
            further to a homography, see ``transforms.projective``; ``auto``: ``none`` for two images on the grid
            ``space``, else ``affine``. ``affine_from`` ``both``: the images, starting from the landmarks.
        space: shape and affine of the grid that all images of the training shared.
        store: where what is found is kept for other processes.

    A case's own initial transform (``transforms.initial``) stands in the place of ``none`` and ``centre``; the other
    stages go on from it.

    Raises:
        InputError: landmarks wanted where a case has none, images that do not overlap,
            ``projective`` in 3-D or without OpenCV, or after an initial transform that is not linear; an initial
            transform that cannot be read.
    """

    def __init__(
        self,
        grid: Grid | None,
        asked: AffineOptions,
        *,
        space: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ) -> None:
        self.stage, self.source, self.metric = asked.affine, asked.affine_from, asked.affine_metric
        if grid is not None:
            _check_dimension(self.stage, grid)
        if self.stage == "projective" and self.source != "landmarks":
            projective.opencv()  # told now, and not once a pair
        self.grid, self.space = grid, space
        self.store = store
        self._own: dict[tuple[str, Grid], np.ndarray] = {}
        self._found: dict[tuple[str | None, ...], affine.Alignment] = {}

    def __call__(self, case: Case, files: Source) -> Placed:
        grid, stage = self.grid_of(case, files), self.stage_of(case, files)
        _check_dimension(stage, grid)
        start, begin = self.around(case["fixed_image"], grid, files), initial.read(case, len(grid.shape), files)
        searched = stage not in ("none", "centre")
        if begin is not None and begin.matrix is None:
            linear = self._matrix(case, files, stage) if searched else np.eye(len(start))
            moving, field = initial.split(begin, linear, start, grid.shape)
            return Placed(start, moving, field=field)
        if begin is None and not searched:
            own = start if stage == "none" else self.around(case["moving_image"], grid, files)
            return Placed(start, own if stage == "none" else same_axes(own, start, grid.shape))
        matrix = self._matrix(case, files, stage) if begin is None or searched else begin.matrix
        assert matrix is not None  # else the initial transform was split above
        moving, bend = homography.split(matrix, start, grid.shape)
        return Placed(start, moving, bend if stage == "projective" else None)

    def grid_of(self, case: Case, files: Source | None = None) -> Grid:
        """The working grid of a case."""
        return self.grid or fixed_grid(case, files)

    def found(self, case: Case) -> dict[str, float]:
        """The overlap and the similarity before and after of a case that was aligned by its images."""
        known = self._found.get(_files(case))
        if known is None or math.isnan(known.overlap):
            return {}
        before, after = known.before, known.after
        return {"affine_overlap": known.overlap, "affine_similarity_before": before, "affine_similarity": after}

    def stage_of(self, case: Case, files: Source) -> str:
        """The stage of a case."""
        if self.stage != "auto":
            return self.stage
        known = self.space is not None and all(
            on_grid(files.header(case[f"{side}_image"]), self.space) for side in SIDES
        )
        return "none" if known else "affine"

    def around(self, path: str, grid: Grid, files: Source) -> np.ndarray:
        """The frame of a grid around one image, which does not depend on the other image."""
        key = (path, grid)
        if key not in self._own:
            self._own[key] = self._kept([path], {"frame": grid}, lambda: [_own_frame(path, grid, files)])[0]
        return self._own[key]

    def _matrix(self, case: Case, files: Source, stage: str) -> np.ndarray:
        """Fixed point -> moving point, RAS mm; found once. It goes before an initial transform that is not linear."""
        key = _files(case)
        if key not in self._found:
            grid = self.grid_of(case, files) if stage == "projective" else None  # the others are the same on any
            about: dict[str, Any] = {"stage": stage, "source": self.source, "metric": self.metric, "grid": grid}
            about |= {"initial": initial.keys(case)} if initial.keys(case) else {}
            matrix, *numbers = self._kept(key, about, lambda: self._find(case, files, stage))
            self._found[key] = affine.Alignment(matrix, *map(float, numbers))
        return self._found[key].matrix

    def _kept(
        self, files: Sequence[str | None], about: Mapping[str, Any], make: Callable[[], Sequence[Any]]
    ) -> list[np.ndarray]:
        """The arrays that ``make`` gives of these files, or gave in another process."""
        if self.store is None:
            return [np.asarray(value) for value in make()]
        return self.store.arrays(files, about, make)

    def _find(self, case: Case, files: Source, stage: str) -> affine.Alignment:
        begin = initial.read(case, len(self.grid_of(case, files).shape), files)
        if stage == "projective" and begin is not None and begin.matrix is None:
            raise InputError(f"{case['moving_image']}: --affine projective goes after a linear --initial; take affine")
        linear = self._align(case, files, "affine" if stage == "projective" else stage)
        return self._align_further(case, files, linear) if stage == "projective" else linear

    def _align_further(self, case: Case, files: Source, linear: affine.Alignment) -> affine.Alignment:
        """The homography, where it has no fold on the working grid; else what was there before."""
        grid = self.grid_of(case, files)
        frame = self.around(case["fixed_image"], grid, files)
        found = linear
        if self.source != "images":
            found = linear._replace(matrix=self._from_landmarks(case, files, "projective"))
        if self.source != "landmarks" and homography.is_gentle(found.matrix, frame, grid.shape):
            fixed, moving = (files.image(case[f"{side}_image"]) for side in SIDES)
            masks = {f"{side}_mask": counted(case, side, files) for side in SIDES}
            found = projective.align_projective(fixed, moving, found.matrix, metric=self.metric, **masks)
        if not homography.is_gentle(found.matrix, frame, grid.shape):
            log.warning("%s: its homography folds on the working grid; the affine map is kept", case["moving_image"])
            return linear
        return found._replace(before=linear.before)

    def _align(self, case: Case, files: Source, stage: str) -> affine.Alignment:
        start = None if self.source == "images" else self._from_landmarks(case, files, stage)
        if start is not None and self.source == "landmarks":
            return affine.Alignment(start, math.nan, math.nan, math.nan)
        fixed_mask, moving_mask = (counted(case, side, files) for side in SIDES)
        fixed, moving = (files.image(case[f"{side}_image"]) for side in SIDES)
        begin = initial.read(case, fixed.array.ndim, files)
        if begin is not None and begin.matrix is None:
            seen = np.ones(moving.array.shape) if moving_mask is None else moving_mask
            mask = initial.warped(moving._replace(array=seen.astype(np.uint8)), begin, fixed, method="nearest")
            moving, moving_mask = initial.warped(moving, begin, fixed), mask.array != 0
            start = np.eye(fixed.array.ndim + 1)
        elif begin is not None:
            start = begin.matrix
        try:
            return affine.align(
                fixed, moving, stage, metric=self.metric, fixed_mask=fixed_mask, moving_mask=moving_mask, start=start
            )
        except InputError as problem:
            raise InputError(f"{case['moving_image']}: {problem}") from None

    def _from_landmarks(self, case: Case, files: Source, stage: str) -> np.ndarray:
        if initial.keys(case):
            raise InputError(f"{case['moving_image']}: --affine_from {self.source} and --initial: give one of them")
        paired = paired_landmarks(case, files)
        if paired is None:
            missing = f"--affine_from {self.source} needs landmarks of both images; add them, or take images"
            raise InputError(f"{case['moving_image']}: {missing}")
        try:
            if stage == "projective":
                return projective.from_landmarks(paired.fixed, paired.moving)
            return affine.from_landmarks(paired.fixed, paired.moving, stage)
        except InputError as problem:
            raise InputError(f"{case['moving_landmarks']}: {problem}") from None


def _check_dimension(stage: str, grid: Grid) -> None:
    if stage == "projective" and len(grid.shape) != 2:
        raise InputError("--affine projective: projective is for 2D images; use affine")


def _files(case: Case) -> tuple[str | None, ...]:
    """What an alignment depends on."""
    of_images = [case.get(f"{side}_{kind}") for side in SIDES for kind in ("image", "mask", "landmarks", "ignore")]
    return (*of_images, *(part for key in initial.keys(case) for part in (key, case[key])))


def counted(case: Case, side: str, files: Source) -> np.ndarray | None:
    """Where an image counts: its mask file without what is ignored, and where it holds data; None: everywhere."""
    parts = [files.known(case[f"{side}_image"])]
    for kind, counts in (("mask", True), ("ignore", False)):
        if f"{side}_{kind}" in case:
            parts.append((files.label(case[f"{side}_{kind}"], image=case[f"{side}_image"])[0].array != 0) == counts)
    known = [part for part in parts if part is not None]
    return np.logical_and.reduce(known) if known else None


def _own_frame(path: str, grid: Grid, files: Source) -> np.ndarray:
    try:
        return frame_of(files.image(path), grid)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None


def frame_of(image: Image, grid: Grid) -> np.ndarray:
    """The frame of ``grid`` around the centre of an image; around its content on axes that the grid does not cover.

    Raises:
        InputError: an image of another dimension.
    """
    frame = images.to_grid(image, grid)
    low, high = extent(image.array.shape, image.affine, frame)
    short = (low < -1) | (high > np.array(grid.shape))
    if short.any():
        content = np.argwhere(images.normalise(image.array) > FOREGROUND)
        if len(content):
            at = apply_affine(np.linalg.inv(frame) @ image.affine, content[:: max(1, len(content) // 100_000)])
            middle = (at.min(0) + at.max(0)) / 2 - (np.array(grid.shape) - 1) / 2
            shift = np.where(short, np.rint(middle), 0)
            frame = frame.copy()
            frame[:-1, -1] += frame[:-1, :-1] @ shift
    return frame


def same_axes(own: np.ndarray, like: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The frame ``own`` with the axes of ``like``, turned about the grid's centre."""
    if np.allclose(own[:-1, :-1], like[:-1, :-1], rtol=0, atol=1e-4):
        return own  # to the bit, whatever the fixed image is
    middle = (np.array(shape) - 1) / 2
    turned = like.copy()
    turned[:-1, -1] = apply_affine(own, middle) - like[:-1, :-1] @ middle
    return turned


def on_grid(header: tuple[Sequence[int], np.ndarray], space: Mapping[str, Any]) -> bool:
    """Whether an image of this shape and affine has those of ``space``."""
    return [*header[0]] == [*space["shape"]] and np.allclose(header[1], space["affine"], atol=1e-3)


def common_space(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Shape and affine that all images of these cases share, by their headers; None where they differ."""
    paths = list(dict.fromkeys(case[f"{side}_image"] for case in cases for side in SIDES))
    shape, matrix = images.header(paths[0])
    for path in paths[1:]:
        other, its = images.header(path)
        if other != shape or not np.allclose(matrix, its, atol=1e-3):
            return None
    return {"shape": [*shape], "affine": matrix.tolist()}


def training_stage(stage: str, cases: Sequence[Case]) -> str:
    """The stage of a cohort in training: ``auto`` is ``none`` where all images share one grid, else ``centre``."""
    if stage != "auto":
        return stage
    return "none" if common_space(cases) else "centre"
