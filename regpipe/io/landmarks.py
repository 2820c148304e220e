"""Landmarks: the points of a file, and which points of two files are the same place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import planes
from regpipe.io.formats import PathLike, warn_once
from regpipe.io.geometry import flipped
from regpipe.io.images import opened_image
from regpipe.io.planes import Plane
from regpipe.io.points import read_points
from regpipe.utils.errors import InputError

SUFFIXES = (".csv", ".fcsv", ".mrk.json", ".tag")  # of io.points' readers, those that hold single points


class Landmarks(NamedTuple):
    """The points of a file, and their names where it has any."""

    points: np.ndarray  # (K, D) LPS mm, or voxels; NaN where one is not known
    names: tuple[str, ...] | None
    voxels: bool = False  # of their image, counted from 0
    weights: np.ndarray | None = None  # (K,), of a column ``weight``; an empty cell is 1

    @property
    def flat(self) -> bool:
        """Whether they have a z that says nothing, as in files that always have one."""
        known = self.points[~np.isnan(self.points).any(axis=1)]
        return self.points.shape[1] == 3 and len(np.unique(known[:, 2])) <= 1


def read_landmarks(path: str | Path, file: BinaryIO | None = None) -> np.ndarray:
    """The points (K, D) LPS mm of a file, as ``named_landmarks``. Raises InputError for voxels, too."""
    found = named_landmarks(path, file)
    if found.voxels:
        raise InputError(f"{path}: counts in voxels, of which image is not known; give mm")
    return found.points


def named_landmarks(path: str | Path, file: BinaryIO | None = None) -> Landmarks:
    """Read landmarks with their names; an empty cell is NaN. ``file``: the same, open.

    Raises:
        InputError: as ``read_points``; a file of another kind; infinite coordinates.
    """
    if not str(path).lower().endswith(SUFFIXES):
        raise InputError(f"{path}: no landmarks; use one of {' '.join(SUFFIXES)}")
    found = read_points(path, file)
    if np.isinf(found.points).any():
        raise InputError(f"{path}: holds infinite coordinates; leave the cell empty where a landmark is not known")
    names = found.names
    if names is not None and not all(name.strip() for name in names):
        warn_once(f"{path}: not all of its landmarks have a name; they pair by their order")
        names = None
    weights = None if found.weights is None else np.nan_to_num(found.weights, nan=1.0)
    if weights is not None and not (np.isfinite(weights).all() and weights.min() >= 0 and weights.any()):
        raise InputError(f"{path}: has weights below 0, infinite, or all 0; give each landmark 0 or more")
    return Landmarks(found.points, names, found.voxels, weights)


def stored_affine(path: PathLike, file: BinaryIO | None = None) -> np.ndarray:
    """Of an image (D+1, D+1), voxel index -> RAS mm, as its file has it: ``header`` gives that of straight axes."""
    with opened_image(path, file) as source:
        return source.affine


def placed(found: Landmarks, dim: int, affine: np.ndarray | None, plane: Plane | None = None) -> Landmarks:
    """Landmarks of an image of ``dim`` axes in LPS mm; ``affine``: ``stored_affine`` of it, for voxels.

    Those of one slice stored in 3-D in its ``plane``, see ``io.planes``; how far off it they are is lost.
    """
    if plane is not None and found.points.shape[1] == 3:
        whole = flipped(found.points) if affine is None else apply_affine(planes.placed(affine, plane), found.points)
        flat = flipped(apply_affine(np.linalg.inv(plane.lift), whole)[:, :2])
        return found._replace(points=flat, voxels=False)
    points = found.points[:, :2] if dim == 2 and found.flat else found.points
    if affine is not None and points.shape[1] == dim:
        points = flipped(apply_affine(affine, points))
    return found._replace(points=points, voxels=False)


def pairing(
    fixed: Landmarks, moving: Landmarks, fixed_path: PathLike, moving_path: PathLike
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which rows of both are one place, by their names; None where row i is row i, as one of them has no names.

    What has no partner is left out, and a warning says so.

    Raises:
        InputError: no name in common; a name twice in a file.
    """
    if fixed.names is None or moving.names is None:
        return None
    one, other = ([_key(name) for name in names] for names in (fixed.names, moving.names))
    if one == other:
        return None
    for path, keys, names in ((fixed_path, one, fixed.names), (moving_path, other, moving.names)):
        twice = next((name for key, name in zip(keys, names, strict=True) if keys.count(key) > 1), None)
        if twice is not None:
            raise InputError(f"{path}: has two landmarks called {twice!r}; give each a name of its own")
    shared = [key for key in one if key in set(other)]
    if not shared:
        told = f"{moving.names[0]!r}, ... and {fixed.names[0]!r}, ..."
        raise InputError(f"{moving_path}: no name as in {fixed_path} ({told}); name them alike, or remove the names")
    for path, keys, names in ((fixed_path, one, fixed.names), (moving_path, other, moving.names)):
        alone = [name for key, name in zip(keys, names, strict=True) if key not in set(shared)]
        if alone:
            partner = moving_path if path == fixed_path else fixed_path
            warn_once(f"{path}: {', '.join(alone[:9])}: not in {partner}; left out")
    return np.array([one.index(key) for key in shared]), np.array([other.index(key) for key in shared])


def _key(name: str) -> str:
    """1, 01 and 1.0 are one name, and so are Nasion and nasion."""
    number = re.fullmatch(r"(\d+)(\.0*)?", name.strip())
    return str(int(number[1])) if number else name.strip().casefold()
