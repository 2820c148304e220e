"""Does the error that is told come true? Known motions, registered from zero, with the error to expect.

    python tests/benchmarks/uncertainty.py [--kinds slice hippocampus] [-o uncertainty.csv]

Images of ``harm.KINDS``, each moved by a random diffeomorphism of its own, with fresh noise of its modality in both. A
line for each pair: error and expected error in voxels within the tissue, root mean squares, and their correlation; then
a table of all voxels by the error that was expected.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import harm
import numpy as np
import torch
import ultrasound
from tables import write_rows
from torch import Tensor

from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import zero_refiner
from regpipe.engines.uncertainty import Ensemble
from regpipe.fields.algebra import integrate_both, warp

COLUMNS = ("kind", "image", "noise", "rms_error", "rms_expected", "correlation")
FARTHEST = {2: 6.0, 3: 4.0}  # voxels
BINS = 8


def pair_of(image: Tensor, noise: harm.Noise, sigma: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed, moving and the displacement that warps moving onto fixed, (1, D, *S) voxels."""
    generator, dim = torch.Generator().manual_seed(seed), image.ndim - 2
    velocity = ultrasound.smooth_velocity(image.shape[2:], generator)
    there, back = integrate_both(velocity * FARTHEST[dim] / velocity.norm(dim=1).max())
    return noise(image, sigma, generator), noise(warp(image, back), sigma, generator), there


@torch.no_grad()
def errors(fixed: Tensor, moving: Tensor, truth: Tensor, tissue: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each: the error and the expected one in the tissue, voxels."""
    inferer = Ensemble(ZeroInferer(zero_refiner(), repair=True))
    found = inferer(torch.cat([fixed, moving], 1), torch.nn.Identity())
    inside = tissue[0, 0] > 0.05
    error, expected = (x[0].norm(dim=0)[inside].numpy() for x in (found["displacement"] - truth, found["uncertainty"]))
    return error, expected


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def table(error: np.ndarray, expected: np.ndarray) -> str:
    """As many voxels to a line, by the error that was expected."""
    edges = np.quantile(expected, np.linspace(0, 1, BINS + 1))
    lines = ["| expected, voxels | expected, rms | error, rms | within the expected |", "|---|---|---|---|"]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        of = (expected >= low) & (expected <= high)
        numbers = (
            root_mean_square(expected[of]),
            root_mean_square(error[of]),
            100 * np.mean(error[of] <= expected[of]),
        )
        lines.append("| {:.2f} to {:.2f} | {:.2f} | {:.2f} | {:.0f} % |".format(low, high, *numbers))
    return "\n".join(lines) + f"\n\ncorrelation of all voxels {np.corrcoef(error, expected)[0, 1]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REGPIPE_DATA", "../shared/data")))
    parser.add_argument("--kinds", nargs="+", choices=harm.KINDS, default=["slice", "hippocampus", "head_4mm"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.02, 0.1], help="of the range")
    parser.add_argument("-o", "--out", type=Path, default=Path("uncertainty.csv"))
    o = parser.parse_args()
    rows: list[dict[str, Any]] = []
    told = []
    for kind in o.kinds:
        read, noise = harm.KINDS[kind]
        for i, image in enumerate(read(o.data)):
            for sigma in o.noise:
                error, expected = errors(*pair_of(image, noise, sigma, i), image)
                told.append((error, expected))
                numbers = (root_mean_square(error), root_mean_square(expected), np.corrcoef(error, expected)[0, 1])
                rows.append(dict(zip(COLUMNS, (kind, i, sigma, *numbers), strict=True)))
                print(kind, i, sigma, *(f"{n:.3f}" for n in numbers), flush=True)
    write_rows(o.out, COLUMNS, rows)
    print(table(*(np.concatenate(part) for part in zip(*told, strict=True))))


if __name__ == "__main__":
    main()
