"""Moves images, label maps, points and meshes through a registration; chains registrations.

ITK resamples each image once, whatever the transform consists of. Points need the inverse of the map that resamples
images: of a case the transform of the other direction is used, so that a point lands where the moved image shows it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import itk_bridge
from regpipe.io.geometry import flipped
from regpipe.io.images import SUFFIXES, opened_file, stem
from regpipe.io.itk_files import segment_notes
from regpipe.io.planes import standing
from regpipe.io.points import READERS, is_points, read_points, write_points
from regpipe.io.series import read_series
from regpipe.transforms import displacement, volume
from regpipe.transforms.read import Space, composite_bytes, find, grid_of, read_transform
from regpipe.transforms.resample import INTERPOLATIONS, fill_value, read_voxels, resample, result_suffix, write_voxels
from regpipe.transforms.several import carry_series
from regpipe.utils import console
from regpipe.utils.errors import InputError, out_of_memory
from regpipe.utils.files import absolute, replace_file

log = logging.getLogger(__name__)

NO_MEMORY = "out of memory: free some, or give a --reference with fewer voxels"


class _Carrier(NamedTuple):
    """The transforms and grids for all inputs."""

    images: Any  # itk.Transform that pulls images onto the grid; None without images
    points: Any  # itk.Transform that maps points; None without points
    grid: Space | None  # of the resampled images
    source: Space | None  # where the inputs lie, as far as known
    interpolation: str
    fill: float | None = None  # outside of images; None: as each has it
    target: Space | None = None  # where the results lie, as far as known
    ratio: np.ndarray | None = None  # of volumes, by which intensities are multiplied; None: they stay


def apply(
    transform: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    to: str = "fixed",
    reference: str | Path | None = None,
    interpolation: str = "auto",
    fill: float | None = None,
    modulate: bool = False,
    problems: dict[str, str] | None = None,
) -> list[Path]:
    """Move files ``to`` the ``fixed`` or the ``moving`` image; their suffix says what they are.

    Args:
        transform: a case's folder or its transform.json; or a transform file, which maps points as the file says.
        inputs: images and label maps; points (.csv, .fcsv, .mrk.json) and meshes (.vtk, .stl), see ``io.points``.
        out: a folder, made where needed; with a single input also a file name.
        reference: the image whose grid the results get; by default the target's of the case. A file needs it.
        interpolation: of images: see ``transforms.resample``.
        fill: value outside of images; None: each image's own, see ``io.background``. Of label maps it is 0.
        modulate: multiply intensities by the change of volume (``transforms.volume``), so that their sum over a region
            times the voxel's size stays: of densities, counts per mL, CT numbers + 1000; outside is 0, and where the
            transform folds they are negative.
        problems: gets a line for each input that cannot be moved; None: the first one raises.

    Returns:
        The files written. Images are float32 (pictures: rounded), label maps of their own type; of frames in time,
        channels and vectors each, see ``transforms.several``.

    Raises:
        InputError: no such transform (see ``find``, ``read_transform``), no reference; a broken or unsuitable input.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"--interpolation {interpolation}: choose among {', '.join(INTERPOLATIONS)}")
    if modulate and fill:
        raise InputError(f"--fill {fill:g}: what is modulated is 0 outside; leave it out")
    paths, out = [Path(path) for path in inputs], Path(out)
    carrier = _carrier(transform, paths, to, reference, interpolation)
    if modulate and carrier.images is not None and carrier.grid is not None:
        ratio = volume.ratio(carrier.images, carrier.grid)
        carrier = carrier._replace(ratio=ratio * np.sign(np.median(ratio)))  # a mirrored image keeps its sign
    carrier = carrier._replace(fill=0.0 if modulate else fill)
    single = out.name.lower().endswith((*SUFFIXES, *READERS)) and not out.is_dir()
    if single and len(paths) > 1:
        raise InputError(f"{out}: {len(paths)} results do not go into one file; give a folder")
    given = {absolute(path) for path in paths}
    written: list[Path] = []
    files: list[dict[str, Any]] = []
    console.tell(files=files)
    for path in console.Progress(paths, what="applying", unit="files"):
        try:
            grid = None if is_points(path) else carrier.grid
            target = out if single else out / (path.name if grid is None else stem(path) + result_suffix(path, grid))
            if target in written or absolute(target) in given:
                raise InputError(f"{path}: its result would overwrite {target}; give another --out")
            done = _carry_points(path, target, carrier) if is_points(path) else _carry_image(path, target, carrier)
            console.say(f"{path} -> {target} ({done})")
            written.append(target)
            files.append({"input": path, "output": target, "how": done})
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not out_of_memory(error):
                raise
            problem = error if isinstance(error, InputError) else InputError(f"{path}: {NO_MEMORY}")
            if problems is None:
                raise problem from error
            problems[str(path)] = str(problem)
    return written


def compose(transforms_: Sequence[str | Path], out: str | Path, *, reference: str | Path | None = None) -> Path:
    """Chain transforms into one file; they are given in the order in which they move an image.

    Args:
        transforms_: case folders (their way to the fixed image) and transform files. As maps of points they act in
            the reverse order: the last one's fixed point goes through all of them to the first one's moving point.
        out: .h5, an ITK composite of all parts, nothing resampled; or .nii.gz, one displacement in LPS mm per voxel.
        reference: the image whose grid the displacement has; by default the fixed image of the last case.

    Raises:
        InputError: a transform that cannot be read, of another dimension than the first; no reference; a suffix.
    """
    out = Path(out)
    dense = out.name.lower().endswith(displacement.WRITABLE)
    if not dense and out.suffix.lower() != ".h5":
        raise InputError(f"{out}: name it .h5 (a composite) or .nii.gz (a displacement)")
    moves = [find(path) for path in transforms_]
    parts = [read_transform(move.images) for move in moves]
    for move, part in zip(moves, parts, strict=True):
        if part.GetInputSpaceDimension() != parts[0].GetInputSpaceDimension():
            raise InputError(f"{move.images}: is {part.GetInputSpaceDimension()}-D, the first transform is not")
    for first, second in itertools.pairwise(moves):
        if first.target and second.source and not _alike(first.target, second.source):
            log.warning(
                "%s: does not begin where %s ends: another grid; is the order right?", second.images, first.images
            )
    chain = itk_bridge.composite(*reversed(parts))
    chain.FlattenTransformQueue()  # a file holds no composite within a composite
    if not dense:
        replace_file(out, composite_bytes(chain))
        return out
    grid = grid_of(reference, moves[-1].target, chain)
    displacement.write_displacement(out, itk_bridge.sampled(chain, grid.shape, grid.affine), grid.affine)
    return out


def _alike(one: Space, other: Space) -> bool:
    return one.shape == other.shape and np.allclose(one.affine, other.affine, atol=1e-3)


def _carrier(
    transform: str | Path, paths: Sequence[Path], to: str, reference: str | Path | None, interpolation: str
) -> _Carrier:
    """Reads only the transforms that the inputs need: those of a large case take time."""
    move = find(transform, to)
    points = [is_points(path) for path in paths]
    point_map = read_transform(move.points, points=True) if any(points) else None
    if all(points):
        return _Carrier(None, point_map, None, move.source, interpolation, target=move.target)
    image_map = read_transform(move.images)
    grid = grid_of(reference, move.target, image_map)
    return _Carrier(image_map, point_map, grid, move.source, interpolation, target=move.target)


def _carry_image(path: Path, target: Path, carrier: _Carrier) -> str:
    """Resamples one file; returns the interpolation, and what lies outside where it is not 0."""
    assert carrier.grid is not None
    with opened_file(path) as file:
        series = read_series(path, file)
        if series is None:
            image, dtype, method = read_voxels(path, carrier.interpolation, file)
    if series is not None and carrier.ratio is not None:
        raise InputError(f"{path}: holds several values; name one frame (#0) to modulate it")
    if series is not None:
        return carry_series(path, target, series, carrier.images, carrier.grid, carrier.interpolation, carrier.fill)
    if carrier.ratio is not None and method in ("nearest", "label"):
        raise InputError(f"{path}: --modulate is for intensities, linear or bspline; leave it out for labels")
    dim = carrier.images.GetInputSpaceDimension()
    image = standing(image) if dim == 3 else image
    if image.array.ndim != dim:
        raise InputError(f"{path}: is {image.array.ndim}-D, the transform is {dim}-D; give an image of its kind")
    told = carrier.interpolation == "auto" and method == "nearest"  # a label map, also where it looks like an image
    fill = 0.0 if told else fill_value(path, image, carrier.fill)
    result = resample(image, carrier.images, carrier.grid, method, fill)
    if image.array.any() and (np.isnan(result) if np.isnan(fill) else result == fill).all():
        log.warning("%s: nothing of it lies on the result's grid; is it in the space of the moved image?", path)
    if carrier.ratio is not None:
        result, method = result * carrier.ratio, f"{method}, modulated"
    write_voxels(target, result, carrier.grid.affine, dtype, segment_notes(path))
    return f"{method}, {fill:g} outside" if fill else method


def _carry_points(path: Path, target: Path, carrier: _Carrier) -> str:
    """Moves one file of points; returns how many."""
    if not target.name.lower().endswith(path.suffix.lower()):
        raise InputError(f"{target}: points keep their format; name it {path.suffix}")
    file = read_points(path)
    points = _of_voxels(path, file.points, carrier) if file.voxels else file.points
    if carrier.source is not None:
        _warn_outside(path, points, carrier.source)
    try:
        moved = map_points(points, carrier.points)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem
    if file.voxels and carrier.target is not None:
        moved = apply_affine(np.linalg.inv(carrier.target.voxels), flipped(moved))
    write_points(target, file, moved)
    return f"{len(moved)} points"


def _of_voxels(path: Path, points: np.ndarray, carrier: _Carrier) -> np.ndarray:
    """LPS mm of voxels of the image that they are carried from; they come out as voxels of the other one."""
    if carrier.source is None or carrier.target is None or points.shape[1] != len(carrier.source.shape):
        raise InputError(f"{path}: counts in voxels, which only a case's images make mm; give x,y,z in LPS mm")
    return flipped(apply_affine(carrier.source.voxels, points))


def map_points(points: np.ndarray, transform: Any) -> np.ndarray:
    """Points (K, D) LPS mm through an ``itk.Transform``; NaN stays NaN. 3-D points of one plane take a 2-D one.

    Raises:
        InputError: another dimension.
    """
    dim = transform.GetInputSpaceDimension()
    known = np.isfinite(points).all(axis=1)
    flat = points.shape[1] == 3 and len(np.unique(points[known, 2])) <= 1  # files that always have a z
    if points.shape[1] != dim and not (dim == 2 and flat):
        raise InputError(f"is {points.shape[1]}-D, the transform is {dim}-D; give points of its images")
    moved = points.copy()
    moved[known, :dim] = [list(transform.TransformPoint(point)) for point in points[known, :dim].tolist()]
    return moved


def _warn_outside(path: Path, points: np.ndarray, source: Space) -> None:
    dim = len(source.shape)
    known = points[np.isfinite(points).all(axis=1), :dim]
    if known.shape[1] < dim or not len(known):
        return
    ras = flipped(known)
    at = np.linalg.solve(source.affine, np.c_[ras, np.ones(len(ras))].T)[:dim].T
    outside = ((at < -0.5) | (at > np.array(source.shape) - 0.5)).any(axis=1)
    if outside.mean() > 0.5:
        log.warning(
            "%s: %d of %d points lie outside the image they should be of; LPS mm? the right --to?",
            path,
            outside.sum(),
            len(known),
        )
