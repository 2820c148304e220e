"""The affine stage where the motion is large, with the search elsewhere and without; and how far its seed matters.

    OMP_NUM_THREADS=1 python tests/benchmarks/large_motion.py [--data ../shared/data] [-o docs/results/large_motion.csv]

Turns and shifts are written into the moving image's affine, or its field of view is cut and its place forgotten, so
that the truth is known but for what the undisturbed pair's own result is off. Errors are mean distances in mm over
points within the fixed image; 'fails' counts those over a tenth of its diagonal.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from regpipe.io.images import Image, read_image
from regpipe.transforms import affine
from regpipe.transforms.likeness import Side
from regpipe.transforms.starts import middle, onto

Sample = tuple[str, str, str]  # kind, fixed file, moving file
MOTIONS = ("none", "45", "90", "180", "any turn", "half the view", "60 of 96")


def samples(data: Path, pairs: int) -> Iterator[Sample]:
    """``pairs`` pairs of files of each kind."""
    rng = np.random.default_rng(0)
    for kind, pattern in {
        "hippocampus": "hippocampus_mr/images/*",
        "head": "brain_mr_3d_native/images/*",
        "slice": "brain_mr_2d/images/*",
        "liver": "ultrasound_2d/liver/*.png",
    }.items():
        files = sorted(map(str, data.glob(pattern)))
        for _ in range(pairs):
            fixed, moving = rng.choice(len(files), 2, replace=False)
            yield kind, files[fixed], files[moving]
    yield "lung", str(data / "lung_ct" / "baseline.nii.gz"), str(data / "lung_ct" / "followup.nii.gz")
    film = data / "ultrasound_3d" / "tee_4d.nii.gz"
    for frame in (0, 2):
        yield "echo", f"{film}#{frame}", f"{film}#4"
    sides = [sorted(map(str, data.glob(f"prostate_mrus/{side}_images/*"))) for side in ("fixed", "moving")]
    for i in range(0, 10 * pairs, 10):
        yield "prostate", sides[0][i], sides[1][i]


def disturbed(fixed: Image, moving: Image, motion: str, draw: int) -> tuple[Image, Image, np.ndarray, np.ndarray]:
    """Both images after ``motion``, and what takes their new places to the old ones (RAS mm)."""
    dim = fixed.array.ndim
    own = np.eye(dim + 1)
    if motion in ("45", "90", "180", "any turn", "none"):
        spin = Rotation.random(random_state=draw)
        if motion != "any turn":
            axis = np.eye(3)[2 if dim == 2 else draw % 3]
            spin = Rotation.from_rotvec(np.deg2rad(0 if motion == "none" else float(motion)) * axis)
        elif dim == 2:
            spin = Rotation.from_euler("z", spin.magnitude())
        centre = middle(Side(moving.array, moving.array > 0, moving.affine))
        away = onto(centre, centre, spin.as_matrix()[:dim, :dim])
        return fixed, moving._replace(affine=away @ moving.affine), own, np.linalg.inv(away)
    axis, common = draw % dim, 0.5 if motion == "half the view" else 36 / 96
    backs, cut = [], []
    for image, late in ((fixed, draw % 2 == 0), (moving, draw % 2 == 1)):
        width = int(image.array.shape[axis] / (2 - common))
        first = int(width * (1 - common)) if late else 0
        place = image.affine.copy()
        place[:-1, -1] = 0  # forgotten
        shift = np.zeros(dim)
        shift[axis] = first
        true = image.affine.copy()
        true[:-1, -1] += image.affine[:-1, :-1] @ shift
        cut.append(Image(np.take(image.array, np.arange(first, first + width), axis), place))
        backs.append(true @ np.linalg.inv(place))
    return cut[0], cut[1], backs[0], backs[1]


def distance(one: np.ndarray, other: np.ndarray, fixed: Image) -> float:
    """Mean distance in mm over 200 points within the fixed image."""
    inside = np.random.default_rng(0).uniform(0.2, 0.8, (200, fixed.array.ndim)) * fixed.array.shape
    points = apply_affine(fixed.affine, inside)
    return float(np.linalg.norm(apply_affine(one, points) - apply_affine(other, points), axis=1).mean())


def aligned(fixed: Image, moving: Image, *, search: bool, **how: Any) -> tuple[np.ndarray, float, bool]:
    """Matrix, processor seconds, whether it was said to be in doubt."""
    begun = time.process_time()
    stay: Callable[..., np.ndarray] = affine.elsewhere if search else lambda _pair, _fine, reached, _search: reached
    with mock.patch.object(affine, "elsewhere", stay), _Heard() as heard:
        matrix = affine.align(fixed, moving, "rigid", **how).matrix
    return matrix, time.process_time() - begun, any("in doubt" in message for message in heard.messages)


class _Heard(logging.Handler):
    messages: list[str]

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Heard:
        self.messages = []
        logging.getLogger("regpipe").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("regpipe").removeHandler(self)


def row(sample: Sample, motion: str, draw: int) -> dict[str, Any]:
    """One pair under one motion: errors and times with the search and without."""
    kind, *files = sample
    images = [read_image(file) for file in files]
    fixed, moving, fixed_back, moving_back = disturbed(images[0], images[1], motion, draw)
    true, _, _ = aligned(images[0], images[1], search=False)
    truth = np.linalg.inv(moving_back) @ true @ fixed_back
    found: dict[str, Any] = {"kind": kind, "fixed": Path(files[0]).name, "moving": Path(files[1]).name}
    found |= {"motion": motion, "draw": draw, "diagonal_mm": np.linalg.norm(fixed.spacing * fixed.array.shape)}
    for name, search in (("without", False), ("with", True)):
        matrix, spent, doubt = aligned(fixed, moving, search=search)
        found |= {f"{name}_mm": distance(matrix, truth, fixed), f"{name}_s": spent, f"{name}_doubt": doubt}
    return found


def seeds(sample: Sample) -> dict[str, Any]:
    """How far the results of five seeds lie from their mean, in mm and voxels."""
    kind, *files = sample
    fixed, moving = (read_image(file) for file in files)
    found = [aligned(fixed, moving, search=True, seed=seed)[0] for seed in range(5)]
    spread = float(np.mean([distance(matrix, np.mean(found, axis=0), fixed) for matrix in found]))
    return {"kind": kind, "fixed": Path(files[0]).name, "seed_mm": spread, "seed_voxels": spread / fixed.spacing.min()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """By kind and motion, in Markdown."""
    lines = [
        "| | motion | pairs | without: fails, median mm | with: fails, median mm, in doubt | time |",
        "|---" * 6 + "|",
    ]
    for kind, motion in dict.fromkeys((one["kind"], one["motion"]) for one in rows):
        these = [one for one in rows if (one["kind"], one["motion"]) == (kind, motion)]
        cells = []
        for name in ("without", "with"):
            errors = np.array([one[f"{name}_mm"] for one in these])
            fails = int(sum(one[f"{name}_mm"] > one["diagonal_mm"] / 10 for one in these))
            cells.append(f"{fails}, {np.median(errors):.1f}")
        doubt = sum(one["with_doubt"] for one in these)
        ratio = sum(one["with_s"] for one in these) / sum(one["without_s"] for one in these)
        lines.append(f"| {kind} | {motion} | {len(these)} | {cells[0]} | {cells[1]}, {doubt} | x {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--pairs", type=int, default=6)
    options.add_argument("--motions", nargs="*", default=MOTIONS)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    logging.getLogger("regpipe").propagate = False
    every = list(samples(given.data, given.pairs))
    rows = [row(sample, motion, draw) for draw, sample in enumerate(every) for motion in given.motions]
    print(table(rows), "\n")
    for one in [seeds(sample) for sample in every[:: max(1, given.pairs // 2)]]:
        print("{kind}, {fixed}: seeds {seed_mm:.3f} mm, {seed_voxels:.3f} voxels".format(**one), flush=True)
    if given.out:
        with given.out.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in one.items()} for one in rows)


if __name__ == "__main__":
    main()
