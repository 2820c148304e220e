"""How a film's motion is best made smooth over time: a phantom with known motion and noise, several filters.

    python tests/benchmarks/films.py OUT

A body breathes: one closed deformation, times a sine of the time, in which a cough falls. Each frame has noise of its
own. Told is the error of each filter: material points, seen in every frame, are carried to the mean, and how far a
frame's lie from where they lie on average is a root mean square in voxels, over points and frames. The filters are laid
on what one run of two rounds without any found; within a run the second round would begin with the first one's.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from regpipe.fields.algebra import integrate, resize
from regpipe.group import film
from regpipe.group.run import _velocity
from regpipe.group.subjects import list_subjects
from regpipe.group.template import Group
from regpipe.phantoms.motion import random_motion, unit_grid
from regpipe.phantoms.scenes import KINDS, paint
from regpipe.transforms.displacement import interpolate, write_image

SHAPE, FRAMES, LARGEST, COUGH = (64, 64), 24, 5.0, 2.0  # voxels; frames; voxels of motion, of a breath and of a cough
HALF = (SHAPE[0] - 1) / 2


def gaussian(frames: int, sigma: float) -> np.ndarray:
    """(N, N): a Gaussian over time, reflected at both ends."""
    return ndimage.gaussian_filter1d(np.eye(frames), sigma, axis=0, mode="reflect")


FILTERS: dict[str, Any] = {"none": functools.partial(film.shares, stiffness=0.0)}
FILTERS |= {f"accelerations {s:g}": functools.partial(film.shares, stiffness=s) for s in (0.5, 0.6, 0.7, 0.8, 1.0, 1.5)}
FILTERS |= {f"Gaussian {s:g}": functools.partial(gaussian, sigma=s) for s in (0.35, 0.5, 0.6, 0.7, 1.0)}


def write_frames(folder: Path, kind: str, period: float, noise: float) -> np.ndarray:
    """The frames, and material points in each (N, D, K), in voxels."""
    rng = np.random.default_rng(5)
    draw, scan = KINDS[kind]
    anatomy, grid = draw(rng, 2), unit_grid(SHAPE)
    motion = random_motion(rng, SHAPE, motion=LARGEST)
    inside = grid[:, paint(anatomy, grid)[0] > 0][:, ::7]
    points = []
    for i in range(FRAMES):
        amount = np.sin(2 * np.pi * i / period) + (COUGH / LARGEST if i == FRAMES // 2 else 0.0)
        phi = motion.scaled(float(amount))
        own = np.random.default_rng([7, i])
        image = scan(own, anatomy, phi.backward(grid), phi.forward)
        image = image + noise * np.ptp(image) * own.standard_normal(SHAPE)
        write_image(folder / f"frame_{i:02d}.nii.gz", image.astype(np.float32), np.diag([-1.0, -1.0, 1.0]))
        points.append((phi.forward(inside) + 1) * HALF)
    return np.array(points)


def error(group: Group, stage: Any, points: np.ndarray) -> tuple[float, float]:
    """Root mean square in voxels over all frames, and of the frame of the cough."""
    carried = []
    for one, there in zip(group.subjects, points, strict=True):
        field = group.field(one, stage)
        assert field is not None
        back = resize(integrate(-field), stage.space.shape)[0].numpy()
        carried.append(there + interpolate(back, there))
    off = np.square(np.array(carried) - np.mean(carried, axis=0)).sum(axis=1)
    return float(np.sqrt(off.mean())), float(np.sqrt(off[FRAMES // 2].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    for kind, period, noise in (("mr", 8.0, 0.05), ("ultrasound", 12.0, 0.0), ("mr", 16.0, 0.2)):
        folder = chosen.out / f"{kind}_{period:g}_{noise:g}"
        points = write_frames(folder / "frames", kind, period, noise)
        moved = np.square(points - points.mean(axis=0)).sum(axis=1)
        print(f"{kind}, a breath of {period:g} frames, noise {noise:g} more: {np.sqrt(moved.mean()):.2f} before")
        subjects = list_subjects(folder / "frames", film=True)
        velocity, _ = _velocity("none", subjects, refine=None, finest=None, similarity="auto", smoothness=1.0)
        told: dict[str, Any] = {"settings": {"filter": "none"}, "velocity": velocity}
        group = Group(subjects, folder / "none", over_time=FILTERS["none"](FRAMES), **told)
        last, _ = group.run("none", "mi", 2)
        for name, shares in FILTERS.items():
            group.over_time = shares(FRAMES)
            print("  {:20}{:.3f}, in the cough {:.3f}".format(name, *error(group, last, points)), flush=True)


if __name__ == "__main__":
    main()
