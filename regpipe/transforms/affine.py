"""The affine stage before the network: one matrix that aligns two images, found by elastix.

The alignment matrix ``T`` (D+1, D+1) is in RAS mm and takes a fixed point to its moving point. The images' places in
space count, so they may differ in shape, spacing, direction and field of view; intensities are arbitrary.

    reduced to a common size -> a coarse rigid search from each start -> the most similar one, or where it looks poor
    one found from any rotation -> rigid -> affine

A stage that makes the images less similar is dropped. The result does not depend on the number of threads, nor on how
an image is stored: it is turned to the closest RAS first.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, NamedTuple

import numpy as np

from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image
from regpipe.io.itk_bridge import itk_affine, to_itk, wrapped
from regpipe.transforms.likeness import Side, Sides, make_sides, overlap, reduced, similarity
from regpipe.transforms.starts import STARTS, elsewhere, middle, onto, usual
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.settings import STAGES as OFFERED

log = logging.getLogger(__name__)

STAGES = tuple(stage for stage in OFFERED if stage not in ("auto", "projective"))
ELASTIX = {"rigid": ("Euler",), "similarity": ("Euler", "Similarity"), "affine": ("Euler", "Affine")}  # elastix's names
METRICS = {"mi": "AdvancedMattesMutualInformation", "ncc": "AdvancedNormalizedCorrelation"}
COARSE = 40  # voxels a side (the geometric mean) at which the starts are compared
FINE = {2: 256, 3: 100}  # and at which the result is found: an affine map needs no finer grid
LITTLE = 0.3  # overlap below which a warning is logged


class Alignment(NamedTuple):
    """What ``align`` found."""

    matrix: np.ndarray  # (D+1, D+1) RAS mm, fixed point -> moving point
    overlap: float  # Dice of both masks (without: fields of view) in mm, after alignment
    before: float  # similarity of the start, see ``transforms.likeness``
    after: float  # similarity of the result: never less, except after ``centre``, which looks at no voxel


class _Search(NamedTuple):  # the effort of one run of elastix
    levels: int
    iterations: int  # at each level
    samples: int  # at each iteration
    erode: bool  # the masks, by up to 9 voxels: slightly more accurate, but a small image is found by its rim alone

    @property
    def work(self) -> int:
        return self.levels * self.iterations * self.samples


LOOK = _Search(levels=3, iterations=100, samples=1500, erode=False)
FIND = _Search(levels=3, iterations=200, samples=4000, erode=True)


def align(
    fixed: Image,
    moving: Image,
    stage: str = "affine",
    *,
    metric: str = "mi",
    fixed_mask: np.ndarray | None = None,
    moving_mask: np.ndarray | None = None,
    start: np.ndarray | None = None,
    seed: int = 0,
) -> Alignment:
    """Align two images (2-D or 3-D) up to ``stage``; the same arguments give the same matrix.

    Args:
        stage: ``none``: the start, or the images' places in space. ``centre``: the middle of one field of view onto
            that of the other. ``rigid``, ``similarity``, ``affine``: found by elastix, from the best of three starts
            (places in space, middles, centres of mass), or from any rotation, see ``transforms.starts``.
        metric: ``mi``, mutual information; ``ncc``, correlation, for images of one contrast.
        fixed_mask: (*S) of the fixed image, nonzero where it counts; without, where it is not dark.
        moving_mask: the same of the moving image; without, everywhere.
        start: a matrix to start from instead, e.g. from ``from_landmarks``.

    Raises:
        InputError: an unknown stage or metric, unlike dimensions, a mask that is empty or on another grid, or
            images that share nothing after alignment.
    """
    _check(fixed, moving, stage, metric, start)
    fine, seen = make_sides(fixed, moving, fixed_mask, moving_mask, size=FINE[fixed.array.ndim])
    coarse = Sides(*(reduced(side, COARSE) for side in seen))
    begin = np.eye(fixed.array.ndim + 1) if start is None else np.asarray(start, np.float64)
    matrix = begin
    if stage == "centre":
        matrix = onto(*(middle(side) for side in fine))
    elif stage != "none":
        starts = usual(*coarse) if start is None else [begin]
        work = (len(starts) + STARTS) * LOOK.work + len(ELASTIX[stage]) * FIND.work  # those elsewhere are seldom needed
        with Progress(what="aligning", unit="", total=work) as bar:

            def look(begun: np.ndarray) -> np.ndarray:
                return _improved(coarse, begun, "Euler", metric, LOOK, seed, bar)

            matrix = max(map(look, starts), key=lambda m: similarity(*coarse, m, metric))
            if similarity(*seen, matrix, metric) < similarity(*seen, begin, metric):
                matrix = begin
            if start is None:
                matrix = elsewhere(coarse, seen, matrix, look)
            bar.update((len(starts) + STARTS) * LOOK.work - bar.n)
            for kind in ELASTIX[stage]:
                matrix = _improved(seen, matrix, kind, metric, FIND, seed, bar)
    shared = overlap(*fine, matrix)
    _judge(shared, stage)
    return Alignment(matrix, shared, *(similarity(*seen, m, metric) for m in (begin, matrix)))


def from_landmarks(fixed: np.ndarray, moving: np.ndarray, stage: str) -> np.ndarray:
    """The matrix of ``stage`` that takes fixed to moving landmarks with the least squared distance.

    Rigid and similarity: Umeyama, PAMI 1991, eq. 40-42, without mirroring. A row with NaN in either is left out.

    Args:
        fixed: (K, D) LPS mm.
        moving: (K, D) LPS mm, the same anatomical places row by row.

    Returns:
        (D+1, D+1) RAS mm, as ``start`` of ``align`` takes it.

    Raises:
        InputError: an unknown stage, different shapes, or too few or too flat points to determine the matrix.
    """
    fixed, moving = np.asarray(fixed, np.float64), np.asarray(moving, np.float64)
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} is unknown; use one of {' '.join(STAGES)}")
    if fixed.shape != moving.shape or fixed.ndim != 2:
        raise InputError(f"landmarks: {fixed.shape} fixed and {moving.shape} moving ones; give the same places in both")
    known = np.isfinite(fixed).all(axis=1) & np.isfinite(moving).all(axis=1)
    x, y = fixed[known], moving[known]
    dim = x.shape[1]
    _check_spread(x, y, {"none": -1, "centre": 0, "affine": dim}.get(stage, dim - 1))
    matrix = np.eye(dim + 1)
    if stage == "none":
        return matrix
    linear = _linear(x - x.mean(axis=0), y - y.mean(axis=0), stage)
    matrix[:-1, :-1], matrix[:-1, -1] = linear, y.mean(axis=0) - linear @ x.mean(axis=0)
    return lps_matrix(matrix)


def _check_spread(x: np.ndarray, y: np.ndarray, rank: int) -> None:
    """Raises InputError unless both point sets (K, D) span ``rank`` dimensions."""
    if len(x) <= rank:
        raise InputError(f"landmarks: {len(x)} are known in both images; this stage needs {rank + 1}")
    for points in (x, y) if rank > 0 else ():
        spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        if spread[rank - 1] <= 1e-6 * max(spread[0], 1e-6):
            raise InputError(f"landmarks: lie on one point, line or plane; place them in {rank} dimensions")


def _linear(x: np.ndarray, y: np.ndarray, stage: str) -> np.ndarray:
    """(D, D) with ``y = linear x`` in the least-squares sense, of centred points (K, D)."""
    if stage == "centre":
        return np.eye(x.shape[1])
    if stage == "affine":
        return np.linalg.lstsq(x, y, rcond=None)[0].T
    u, stretch, v = np.linalg.svd(y.T @ x)
    sign = np.ones(len(stretch))
    sign[-1] = np.sign(np.linalg.det(u) * np.linalg.det(v))  # -1: the best orthogonal map is a mirror
    scale = (stretch * sign).sum() / (x**2).sum() if stage == "similarity" else 1.0
    return scale * (u * sign) @ v


def _check(fixed: Image, moving: Image, stage: str, metric: str, start: np.ndarray | None) -> None:
    for name, value, known in (("stage", stage, STAGES), ("metric", metric, METRICS)):
        if value not in known:
            raise InputError(f"{name} {value!r} is unknown; use one of {' '.join(known)}")
    dims = fixed.array.ndim, moving.array.ndim
    if dims[0] != dims[1]:
        raise InputError(f"a {dims[1]}-D moving image does not align with a {dims[0]}-D fixed one; pair like with like")
    if start is None:
        return
    if stage == "centre":
        raise InputError("stage 'centre' takes no start; use 'none' to keep the start as it is")
    if np.shape(start) != (dims[0] + 1,) * 2 or not np.abs(np.linalg.det(start)) > 0:
        raise InputError(f"start: shape {np.shape(start)}; give an invertible matrix {(dims[0] + 1,) * 2} in RAS mm")


def _improved(
    pair: Sides, matrix: np.ndarray, kind: str, metric: str, search: _Search, seed: int, bar: Progress
) -> np.ndarray:
    """``matrix`` refined by elastix's transform of ``kind``; ``matrix`` itself where that is not more similar."""
    try:
        found = _elastix(pair, matrix, kind, metric, search, seed)
    except RuntimeError:  # too few samples lie in the moving image or its mask; the message says only "see log"
        why = "for lack of overlap, or of slices (four at least)"
        log.warning("elastix gave up on the %s transform, most likely %s; the previous one is kept", kind, why)
        return matrix
    finally:
        bar.update(search.work)
    before, after = (similarity(*pair, m, metric) for m in (matrix, found))
    if after <= before:
        log.info("the %s transform is no improvement (%.4f to %.4f); the previous one is kept", kind, before, after)
    return found if after > before else matrix


def _elastix(pair: Sides, matrix: np.ndarray, kind: str, metric: str, search: _Search, seed: int) -> np.ndarray:
    """One run of elastix from ``matrix`` -> the refined matrix. Raises RuntimeError where elastix gives up."""
    _settle(len(matrix) - 1)
    return _run(pair, matrix, kind, metric, search, seed)


def _settle(dim: int) -> None:
    """Run elastix on next to nothing, in 3 ms: a run after ITK has read other files may draw other samples."""
    side = Side(np.indices((8,) * dim).sum(axis=0).astype(np.float32), np.ones((8,) * dim, bool), np.eye(dim + 1))
    _run(Sides(side, side), np.eye(dim + 1), "Euler", "mi", _Search(1, 1, 100, False), 0)


def _run(pair: Sides, matrix: np.ndarray, kind: str, metric: str, search: _Search, seed: int) -> np.ndarray:
    fixed, moving = (to_itk(side.array, side.affine) for side in pair)
    pixels = type(fixed).__name__.replace("itkImage", "I")
    method: Any = wrapped("ElastixRegistrationMethod", pixels * 2).New()
    method.SetFixedImage(fixed)
    method.SetMovingImage(moving)
    for side, give in zip(pair, (method.SetFixedMask, method.SetMovingMask), strict=True):
        if not side.mask.all():
            give(to_itk(side.mask, side.affine))
    stages = importlib.import_module("itk.elxParameterObjectPython").elastixParameterObject.New()
    settings = stages.GetDefaultParameterMap("rigid")  # adaptive stochastic gradient descent, random samples
    chosen = {
        "Transform": f"{kind}Transform",
        "Metric": METRICS[metric],
        "NumberOfResolutions": search.levels,
        "MaximumNumberOfIterations": search.iterations,
        "NumberOfSpatialSamples": search.samples,
        "AutomaticTransformInitialization": "false",
        "RequiredRatioOfValidSamples": 0.05,
        "ErodeMask": str(search.erode).lower(),
        "RandomSeed": seed + 1,  # elastix takes 0 as no seed
        "UseMultiThreadingForMetrics": "false",  # sums over threads depend on how many there are
        "WriteResultImage": "false",
    }
    for name, value in chosen.items():
        settings[name] = [str(value)]
    stages.AddParameterMap(settings)
    method.SetParameterObject(stages)
    method.SetExternalInitialTransform(itk_affine(matrix))
    method.SetLogToConsole(False)
    method.Update()
    return matrix_of(method.GetCombinationTransform(), len(matrix) - 1)


def matrix_of(transform: Any, dim: int) -> np.ndarray:
    """A linear ITK transform of any class as a matrix (D+1, D+1) in RAS mm, read off at D+1 points."""
    lps = np.eye(dim + 1)
    lps[:-1, -1] = transform.TransformPoint([0.0] * dim)
    for i, point in enumerate(np.eye(dim)):
        lps[:-1, i] = np.array(transform.TransformPoint(point.tolist())) - lps[:-1, -1]
    return lps_matrix(lps)


def _judge(shared: float, stage: str) -> None:
    """Warns where the images overlap little. Raises InputError where they do not overlap."""
    if shared == 0:
        raise InputError(f"the images share no place after stage {stage!r}; try 'centre', masks or landmarks as start")
    if shared < LITTLE:
        log.warning("the aligned images overlap by %.2f only (Dice); look at them, or give masks or landmarks", shared)
