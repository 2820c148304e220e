"""Writes a cohort of phantoms as a data set folder, like those of users."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np

from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image
from regpipe.phantoms import synthetic
from regpipe.phantoms.scenes import KINDS, MAGNITUDE, Phantom, checked_shape, make_pair
from regpipe.transforms import displacement
from regpipe.utils import console
from regpipe.utils.errors import InputError

SYNTHETIC = "synthetic"  # a kind beside those of ``phantoms.scenes``
COHORT_FORMAT = 1  # raise it when the same arguments give other voxels: no reuse of old cohorts
BUILTIN_SHAPES = {2: (64, 64), 3: (32, 32, 32)}
BUILTIN_PAIRS = {2: 150, 3: 60}


def write_cohort(
    out: str | Path,
    *,
    kind: str = "ultrasound",
    shape: Sequence[int] = (64, 64),
    n_pairs: int = 40,
    seed: int = 0,
    motion: float | None = None,
) -> Path:
    """Write ``n_pairs`` pairs as a data set folder; the same arguments give the same bytes.

    ``{fixed,moving}_{images,labels}/case_000.nii.gz`` (1 mm), ``displacements/case_000.nii.gz``
    (5-D, intent 1007, LPS mm: warps moving onto fixed), ``{fixed,moving}_landmarks/case_000.csv``
    (LPS mm) and ``phantom.json``, the arguments. A folder that holds this cohort already is
    returned at once. Several processes may call this together.

    Args:
        out: the folder; made where needed.
        kind, shape, motion: as ``phantoms.scenes.make_pair``, ``motion`` in voxels; or ``synthetic``: pairs of
            ``phantoms.synthetic``, whose motion cannot be chosen.
        n_pairs: number of pairs.
        seed: one number for all pairs.

    Raises:
        ValueError: if ``out`` holds anything else, or as ``make_pair``.
    """
    if n_pairs < 1:
        raise ValueError(f"phantom cohort of {n_pairs} pairs: give 1 or more")
    out, shape = Path(out), checked_shape(shape, MAGNITUDE, motion)
    maker = _maker(kind, motion)
    about: dict[str, object] = dict(format=COHORT_FORMAT, kind=kind, shape=shape, n_pairs=n_pairs, seed=seed)
    if motion is not None:  # without it the record is that of older cohorts, which are the same
        about["motion"] = float(motion)
    record = json.dumps(about) + "\n"
    if _holds(out, record):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder first, so that an interrupted cohort is never taken for a whole one.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        part = Path(aside) / "cohort"
        for case in console.Progress(range(n_pairs), what="writing phantoms", unit="pairs"):
            _write_case(part, f"case_{case:03d}", maker(shape, seed=(seed, case)))
        (part / "phantom.json").write_text(record)
        try:
            part.rename(out)
        except OSError:
            if not _holds(out, record):  # else another process was first
                raise
    return out


def _maker(kind: str, motion: float | None) -> Callable[..., Phantom]:
    """``f(shape, seed=...)`` that makes a pair of a kind."""
    if kind in KINDS:
        return functools.partial(make_pair, kind, motion=motion)
    if kind != SYNTHETIC:
        raise ValueError(f"unknown phantom kind {kind!r}; there are: {', '.join((*KINDS, SYNTHETIC))}")
    if motion is not None:
        raise InputError(f"phantoms of kind {SYNTHETIC} move by as much as is drawn: leave --motion out")
    return synthetic.make_phantom


def builtin_cohort(folder: str | Path, spatial_dims: int) -> str:
    """The cohort that a bundle trains on when it is given no data: ultrasound pairs, written once.

    Raises:
        InputError: ``spatial_dims`` is neither 2 nor 3.
    """
    if spatial_dims not in BUILTIN_SHAPES:
        raise InputError(f"spatial_dims is {spatial_dims}: images are 2D or 3D")
    out = Path(folder) / f"ultrasound_{spatial_dims}d"
    shape, n_pairs = BUILTIN_SHAPES[spatial_dims], BUILTIN_PAIRS[spatial_dims]
    with idist.one_rank_first():
        return str(write_cohort(out, shape=shape, n_pairs=n_pairs))


def _holds(out: Path, record: str) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = out / "phantom.json"
    if found.is_file() and found.read_text() == record:
        return True
    raise ValueError(f"{out}: holds something else than this cohort; name another folder")


def _write_case(out: Path, case: str, pair: Phantom) -> None:
    dim = len(pair.displacement)
    affine = lps_matrix(np.eye(dim + 1), places=False)  # RAS mm; in LPS mm, then, a voxel lies at its index
    for side in ("fixed", "moving"):
        for what in ("image", "label"):
            array = getattr(pair, f"{side}_{what}")
            displacement.write_image(out / f"{side}_{what}s" / f"{case}.nii.gz", array, affine)
        path = out / f"{side}_landmarks" / f"{case}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        points, header = getattr(pair, f"{side}_landmarks"), ",".join("xyz"[:dim])
        np.savetxt(path, points, fmt="%.9g", delimiter=",", header=header, comments="")
    lps = displacement.native_displacement(pair.displacement, affine, affine, Image(pair.fixed_image, affine))
    displacement.write_displacement(out / "displacements" / f"{case}.nii.gz", lps, affine)
