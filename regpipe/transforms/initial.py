"""Initial transforms: files that come before what regpipe finds, as one map fixed point -> moving point.

A linear one is a matrix, as an affine stage finds it, and nothing is approximated. Any other is split over the working
grid, as a homography is, into the nearest affine frame and a bend ``R(x) = x + b(x)`` in working voxels:

    moving_frame R(x) = I(A(fixed_frame x))

``I`` is the files' map, ``A`` what an affine stage finds after it. The moving image is seen at ``R``, and what is found
on the grid, ``x -> x + u(x)``, is followed by ``R``; the way back needs ``R``'s inverse, found point by point.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import itk_bridge
from regpipe.io.geometry import flipped, lps_matrix
from regpipe.io.images import Image
from regpipe.io.source import Source
from regpipe.transforms import homography, lift
from regpipe.transforms.affine import matrix_of
from regpipe.transforms.displacement import interpolate
from regpipe.transforms.read import CASE, Space, as_its_class, find, read_transform
from regpipe.transforms.resample import resample
from regpipe.utils.errors import InputError

INVERSE = ",inverse"  # after a file's name
IMAGES = ("fixed_image", "moving_image")  # of a case
KEY = re.compile(r"initial_([1-9])(_inverse)?")  # of a case: its files in the order in which they move an image
MOST = 9
LATTICE = 33  # places an axis that the affine part is fitted at
CLOSE, TRIES = 0.01, 100  # voxels that an inverse may be off, and how long it is looked for
OFF = 0.001  # share of a grid beyond which an inverse that is off is told

log = logging.getLogger(__name__)


class Initial(NamedTuple):
    """What the files of a case say."""

    transform: Any  # itk.Transform: fixed point -> moving point, LPS mm
    matrix: np.ndarray | None  # (D+1, D+1) RAS mm, where that is all


def named(files: Iterable[str | Path]) -> dict[str, Path]:
    """``FILE`` and ``FILE,inverse``, in the order in which they move an image -> key of a case, file.

    A folder of a registered case is its ``transform.json``.

    Raises:
        InputError: more than ``MOST``.
    """
    found = {}
    for i, given in enumerate(map(str, files), start=1):
        path = Path(given.removesuffix(INVERSE))
        key = f"initial_{i}_inverse" if given.endswith(INVERSE) else f"initial_{i}"
        found[key] = path / CASE if path.is_dir() else path
    if len(found) > MOST:
        raise InputError(f"--initial: {len(found)} files; chain them first, with regpipe compose")
    return found


def keys(case: Mapping[str, Any]) -> list[str]:
    """The keys of a case that name its initial transforms, in order."""
    return sorted(key for key in case if KEY.fullmatch(key))


def read(case: Mapping[str, str], dim: int, files: Source | None = None) -> Initial | None:
    """The initial transform of a case; None where it has none.

    Where both images are slices stored in 3-D, files that are 3-D become a map from one slice's plane to the other's.

    Args:
        case: names the files.
        dim: of the images; 2 for slices.
        files: knows the planes of slices; None: there are no slices.

    Raises:
        InputError: see ``read_transform``; another dimension; a file without an inverse is to be inverted; together the
            files take the fixed slice off the moving one's plane.
    """
    parts = [_part(Path(case[key]), inverse=key.endswith("_inverse")) for key in keys(case)]
    if not parts:
        return None
    of = [part.GetInputSpaceDimension() for part in parts]
    planes = [files.plane(case[key]) for key in IMAGES] if files is not None and dim == 2 and set(of) == {3} else []
    lies = [plane for plane in planes if plane is not None]
    for key, own in zip(keys(case), of, strict=True):
        if own != dim and len(lies) < 2:
            raise InputError(f"{case[key]}: is {own}-D, the images are {dim}-D")
    chain = itk_bridge.composite(*reversed(parts))  # the last one's fixed point goes first
    if len(lies) == 2 and files is not None:
        try:
            chain = itk_bridge.composite(lift.in_planes(chain, *files.header(case[IMAGES[0]]), lies[0], lies[1]))
        except InputError as problem:
            raise InputError(f"{', '.join(case[key] for key in keys(case))}: {problem}") from problem
    chain.FlattenTransformQueue()
    return Initial(chain, matrix_of(chain, dim) if chain.IsLinear() else None)


def _part(path: Path, *, inverse: bool) -> Any:
    case = path.suffix.lower() == ".json"
    transform = read_transform(find(path, "moving" if inverse and case else "fixed").images)
    return _inverse(transform, path) if inverse and not case else transform


def _inverse(transform: Any, path: Path) -> Any:
    """Of a composite part by part; of a field on its own grid."""
    kind, dim = transform.GetNameOfClass(), transform.GetInputSpaceDimension()
    if transform.IsLinear():
        return itk_bridge.itk_affine(np.linalg.inv(matrix_of(transform, dim)))
    if kind == "CompositeTransform":
        transform.FlattenTransformQueue()
        parts = [as_its_class(transform.GetNthTransform(i)) for i in range(transform.GetNumberOfTransforms())]
        return itk_bridge.composite(*(_inverse(part, path) for part in parts))  # a point met the last one first
    if kind != "DisplacementFieldTransform":
        raise InputError(f"{path}: a {kind} is not inverted here; give the file of its other way, or a displacement")
    d, affine = itk_bridge.from_itk(transform.GetDisplacementField())[:2]
    to_lps = lps_matrix(affine, places=False)[:-1, :-1]
    u = np.tensordot(np.linalg.inv(to_lps), d, axes=1)
    places = np.indices(u.shape[1:], dtype=np.float64)
    v = back(u, places, str(path)) - places
    return itk_bridge.itk_field(np.tensordot(to_lps, v, axes=1), affine)


def warped(moving: Image, initial: Initial, fixed: Image, *, method: str = "linear") -> Image:
    """The moving image on the fixed one's grid, 0 outside: the affine stage goes on from it."""
    return Image(resample(moving, initial.transform, Space(fixed.array.shape, fixed.affine), method), fixed.affine)


def split(
    initial: Initial, linear: np.ndarray, frame: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The files' map after ``linear`` over a grid -> the moving frame (D+1, D+1) and b (D, *shape) in working voxels.

    Args:
        linear: A (D+1, D+1) RAS mm.
        frame: the fixed image's, working voxel -> RAS mm.
        shape: of the working grid.
    """
    chain = itk_bridge.composite(itk_bridge.itk_affine(linear), initial.transform)
    x = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    d = np.moveaxis(itk_bridge.sampled(chain, shape, frame), 0, -1)
    at = apply_affine(frame, x) + flipped(d.astype(np.float64))
    some = np.ix_(*(np.unique(np.linspace(0, n - 1, LATTICE).round().astype(int)) for n in shape))
    known = x[some].reshape(-1, len(shape))
    fitted = np.linalg.lstsq(np.c_[known, np.ones(len(known))], at[some].reshape(-1, len(shape)), rcond=None)[0]
    moving_frame = np.vstack([fitted.T, frame[-1]])
    return moving_frame, np.moveaxis(apply_affine(np.linalg.inv(moving_frame), at) - x, -1, 0)


def back(
    b: np.ndarray, places: np.ndarray, about: str = "the initial transform", *, start: np.ndarray | None = None
) -> np.ndarray:
    """``R^-1`` of places (D, ...) in voxels; NaN stays NaN. Where ``R`` folds or jumps the nearest that was found.

    ``start``: where it is looked for first; None: at the places.
    """
    known = np.isfinite(places).all(axis=0)
    found = places.astype(np.float64)
    target = found[:, known]
    x = target.copy() if start is None else start[:, known].astype(np.float64)
    left = np.arange(x.shape[1])
    for _ in range(TRIES):
        error = x[:, left] + interpolate(b, x[:, left]) - target[:, left]
        x[:, left] -= error / 2  # half of it: a whole one runs away where R stretches
        left = left[np.abs(error).max(axis=0) > CLOSE]
        if not len(left):
            break
    if len(left) > OFF * x.shape[1]:
        share = 100 * len(left) / x.shape[1]
        log.warning("%s: folds or jumps at %.1f %% of the places; the way back is off there", about, share)
    found[:, known] = x
    return found


def bent(
    u: np.ndarray, inverse: np.ndarray, frames: tuple[np.ndarray, np.ndarray], b: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both displacements of a pair, followed by the bend, and the frames that they lie on: ``homography.bent``."""

    def ahead(points: np.ndarray) -> np.ndarray:
        return points + interpolate(b, points.T).T

    return homography.bent_by(u, inverse, frames, ahead, lambda points: back(b, points.T).T)
