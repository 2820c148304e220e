"""Registration from zero on real ultrasound: a brain volume warped by a known field, an echo's frames, a liver's.

    python tests/benchmarks/ultrasound.py [--data ../shared/data] [-o ultrasound.csv]

The brain volume is moved by random smooth diffeomorphisms and gets fresh multiplicative noise; where there is tissue,
the field found is compared with the true one. The echo and the liver have no truth: correlation before and after.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.pyramid import coarsen
from regpipe.engines.refine import zero_refiner
from regpipe.fields.algebra import integrate_both, resize_image, warp
from regpipe.io import images
from regpipe.metrics.measures import folds_percent, ndv_percent, sdlogj

FIELDS, KNOTS, LARGEST = 3, 8, 5.0  # known fields: how many, control points an axis, voxels
SPEED = 20  # every 20th frame of the liver
Pair = tuple[str, Tensor, Tensor, Tensor | None]  # name, fixed and moving (1, 1, *S) in [0, 1], true displacement


def brain(data: Path) -> Iterator[Pair]:
    fixed = reduced_brain(data, 3)  # 1.2 mm: minutes, not hours
    for seed in range(FIELDS):
        generator = torch.Generator().manual_seed(seed)
        velocity = smooth_velocity(fixed.shape[2:], generator)
        velocity = velocity * LARGEST / velocity.abs().max()
        yield f"brain, known field {seed}", fixed, *moved(fixed, velocity, generator)


def reduced_brain(data: Path, factor: int) -> Tensor:
    volume = tensor(data / "ultrasound_3d" / "brain_case3.nii.gz")
    return coarsen(volume, [n // factor for n in volume.shape[2:]])


def smooth_velocity(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random (1, D, *shape), of no certain size."""
    knots = torch.randn(1, len(shape), *[KNOTS] * len(shape), generator=generator)
    return resize_image(knots, shape)


def moved(fixed: Tensor, velocity: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(the image moved by the velocity, with fresh multiplicative noise; the displacement that warps it back)."""
    there, back = integrate_both(velocity)
    noise = 1 + 0.1 * torch.randn(fixed.shape, generator=generator)
    return (warp(fixed, back) * noise).clamp(0, 1), there


def tissue(fixed: Tensor) -> Tensor:
    """(1, *S): where the ultrasound sees something."""
    return (fixed > 0.05)[:, 0]


def echo(data: Path) -> Iterator[Pair]:
    frames = np.asarray(nib.load(data / "ultrasound_3d" / "tee_4d.nii.gz").dataobj, np.float32)  # type: ignore[attr-defined]
    first, *others = [torch.from_numpy(images.normalise(frames[..., i]))[None, None] for i in range(frames.shape[-1])]
    for i, frame in enumerate(others, 1):
        yield f"echo, frame {i}", first, frame, None


def liver(data: Path) -> Iterator[Pair]:
    first, *others = sorted((data / "ultrasound_2d" / "liver").glob("**/*.png"))
    for path in others[SPEED - 1 :: SPEED]:
        yield f"liver, {path.stem}", tensor(first), tensor(path), None


def tensor(path: Path) -> Tensor:
    return torch.from_numpy(images.normalise(images.read_image(str(path)).array))[None, None].float()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@torch.no_grad()
def row(name: str, fixed: Tensor, moving: Tensor, truth: Tensor | None) -> dict[str, str | float]:
    started = time.perf_counter()
    inferer = ZeroInferer(zero_refiner(), repair=True)
    found = inferer(torch.cat([fixed, moving], 1), torch.nn.Identity())
    seconds = time.perf_counter() - started
    u = found["displacement"]
    result: dict[str, str | float] = {"pair": name, "seconds": seconds}
    result |= {"ncc_before": correlation(fixed, moving), "ncc": correlation(fixed, found["warped_moving"])}
    result |= {"folds_percent": folds_percent(u[0]), "ndv_percent": ndv_percent(u[0]), "sdlogj": sdlogj(u[0])}
    if truth is not None:
        size, error = ((x.square().sum(1).sqrt()[tissue(fixed)]) for x in (truth, u - truth))
        result |= {"true_median": float(size.median()), "error_median": float(error.median())}
        result |= {"error_p95": float(error.kthvalue(int(0.95 * len(error))).values)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REGPIPE_DATA", "../shared/data")))
    parser.add_argument("-o", "--out", type=Path, default=Path("ultrasound.csv"))
    options = parser.parse_args()
    rows = []
    for pairs in (echo, liver, brain):
        for pair in pairs(options.data):
            rows.append(row(*pair))
            print({k: v if isinstance(v, str) else round(v, 4) for k, v in rows[-1].items()}, flush=True)
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
