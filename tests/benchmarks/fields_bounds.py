"""Random fields through integrate, invert, compose, write and read; the errors must stay inside the bounds stated here.

    OMP_NUM_THREADS=1 python tests/benchmarks/fields_bounds.py [--fields 10000] [--seed 0]

Half of the fields are 2D (24 x 24), half 3D (12 x 12 x 12): smoothed noise that vanishes at the rim, so that nothing
leaves the grid, its largest vector between 0.05 and 4 voxels, no two neighbours more than 0.7 voxels apart. What is
compared with is computed in another way, in float64.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from regpipe.fields.algebra import compose, differences, integrate_both, jacobian_determinant, warp
from regpipe.io.images import Image
from regpipe.transforms.displacement import (
    grid_displacement,
    native_displacement,
    read_displacement,
    write_displacement,
)

SHAPES = {2: (24, 24), 3: (12, 12, 12)}
BATCH = 250
STEEPEST = 0.7  # voxels between neighbours
STEPS = 32  # of the reference flow
# What is measured -> the largest that may be. The first three are in units of `bend`: how far linear interpolation of
# what is sampled is off at most; float32 adds ROUNDING voxels. `warp` is given twice its unit, for an image that was
# pulled once already bends more than it did. A file holds its affine in float32: 200 mm of offset are known to 1.5e-5
# mm, and a voxel may be 0.3 mm. Compose is in voxels too, and folds are the share of voxels with det J <= 0.
BOUNDS = {"integrate": 1.0, "invert": 1.0, "warp": 2.0, "compose": 1e-5, "write and read": 1e-4, "folds": 0.0}
ROUNDING = 2e-5


def velocities(generator: torch.Generator, count: int, dim: int) -> Tensor:
    """Random fields (count, dim, *SHAPES[dim]), float64, voxels."""
    shape = SHAPES[dim]
    sigma = 1.5 + 2 * float(torch.rand(1, generator=generator))
    v = torch.randn(count, dim, *shape, generator=generator, dtype=torch.float64)
    v = torch.from_numpy(ndimage.gaussian_filter(v.numpy(), [0, 0, *[sigma] * dim], mode="wrap"))
    for axis, n in enumerate(shape):
        window = torch.sin(math.pi * torch.arange(n, dtype=torch.float64) / (n - 1)) ** 2
        v *= window.view(-1, *[1] * (dim - 1 - axis))
    wanted = 0.05 * 80 ** torch.rand(count, generator=generator, dtype=torch.float64)
    steepest = torch.stack([differences(v, axis).abs().flatten(1).amax(1) for axis in range(dim)]).amax(0)
    scale = torch.minimum(wanted / v.norm(dim=1).flatten(1).amax(1), STEEPEST / steepest)
    return v * scale.view(-1, *[1] * (dim + 1))


def sample(u: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of u (B, C, *S) at voxel places (B, D, *S), in its own precision."""
    last = at.new_tensor([n - 1 for n in u.shape[2:]]).view(1, -1, *[1] * (at.ndim - 2))
    return F.grid_sample(u, (2 * at / last - 1).flip(1).movedim(1, -1), padding_mode="border", align_corners=True)


def places(v: Tensor) -> Tensor:
    axes = [torch.arange(n, dtype=v.dtype) for n in v.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].expand(len(v), *[-1] * (v.ndim - 1))


def flow(v: Tensor) -> Tensor:
    """exp(v): each voxel followed along the velocity for unit time, by Runge and Kutta's fourth order."""
    x, h = places(v), 1 / STEPS
    for _ in range(STEPS):
        a = sample(v, x)
        b = sample(v, x + h / 2 * a)
        c = sample(v, x + h / 2 * b)
        x = x + h / 6 * (a + 2 * b + 2 * c + sample(v, x + h * c))
    return x - places(v)


def bend(u: Tensor) -> Tensor:
    """How far linear interpolation of a field is off at most (B,): an eighth of its second differences, summed."""
    second = [torch.diff(u, n=2, dim=axis).abs().flatten(1).amax(1) for axis in range(2, u.ndim)]
    return torch.stack(second).sum(0) / 8


def worst(error: Tensor) -> Tensor:
    """The largest length (B,) of error vectors (B, D, *S)."""
    return error.double().norm(dim=1).flatten(1).amax(1)


def field_errors(v: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Errors (B,) of what is done with velocities (B, D, *S) and images (B, 1, *S), in the units of ``BOUNDS``."""
    u, inverse = (field.double() for field in integrate_both(v.float()))
    unit = bend(u) + bend(inverse) + bend(v)
    both = compose(u.float(), inverse.float()).double()
    exact = inverse + sample(u, places(u) + inverse)
    once, twice = warp(image.float(), both.float()), warp(warp(image.float(), u.float()), inverse.float())
    blur = bend(image) * 2 + worst(both - exact)  # twice interpolated, once interpolated
    return {
        "integrate": (worst(u - flow(v)) - ROUNDING).clamp(min=0) / unit,
        "invert": (worst(both) - ROUNDING).clamp(min=0) / unit,
        "warp": ((once - twice).abs().flatten(1).amax(1).double() - ROUNDING).clamp(min=0) / blur,
        "compose": worst(both - exact),
        "folds": (jacobian_determinant(u.float()) <= 0).flatten(1).double().mean(1),
    }


def random_affine(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Oblique, of uneven voxels, maybe mirrored, anywhere within 200 mm."""
    turned, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    affine = np.eye(dim + 1)
    affine[:-1, :-1] = turned * rng.uniform(0.3, 4, dim)
    affine[:-1, -1] = rng.uniform(-200, 200, dim)
    return affine


def file_error(u: np.ndarray, rng: np.random.Generator, folder: Path) -> float:
    """Voxels by which (D, *S) differs after it was written in mm and read again."""
    dim, shape = len(u), u.shape[1:]
    affine, path = random_affine(rng, dim), folder / "displacement.nii"
    write_displacement(path, native_displacement(u, affine, affine, Image(np.zeros(shape), affine)), affine)
    d, stored = read_displacement(path)
    return float(np.linalg.norm(grid_displacement(d, stored, affine, affine, shape) - u, axis=0).max())


def measure(count: int, seed: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(dimension, errors by name) batch after batch, over ``count`` fields."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for dim in SHAPES:
            left = count // 2
            while left > 0:
                v = velocities(generator, min(left, BATCH), dim)
                image = velocities(generator, len(v), dim)[:, :1]
                written = [file_error(u.numpy(), rng, Path(folder)) for u in integrate_both(v)[0]]
                yield dim, {**field_errors(v, image), "write and read": torch.tensor(written, dtype=torch.float64)}
                left -= len(v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[tuple[str, int], list[Tensor]] = {}
    for dim, errors in measure(given.fields, given.seed):
        for name, values in errors.items():
            found.setdefault((name, dim), []).append(values)
    print("| | D | fields | mean | 99 % | largest | bound |\n|---|---|---|---|---|---|---|")
    broken = 0
    for (name, dim), parts in sorted(found.items()):
        values = torch.cat(parts)
        numbers = (float(values.mean()), float(values.quantile(0.99)), float(values.max()), BOUNDS[name])
        print(f"| {name} | {dim} | {len(values)} | " + " | ".join(f"{number:.2g}" for number in numbers) + " |")
        broken += int((values > BOUNDS[name]).sum())
    raise SystemExit(f"{broken} outside the bounds" if broken else 0)


if __name__ == "__main__":
    main()
