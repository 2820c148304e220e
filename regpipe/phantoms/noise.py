"""Smooth random functions and random numbers for synthetic pairs, all from one ``torch.Generator``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from regpipe.fields.algebra import resize_image, sample, smooth

MARGIN = 1.5  # size of a noise in sizes of the image: motion brings in what lies beyond the image


def noise_function(
    shape: Sequence[int], channels: int, scale: Tensor, *, generator: Generator
) -> Callable[[Tensor], Tensor]:
    """Smooth noise of about unit variance, as a function of places (1, D, *any) in voxels -> (1, channels, *any).

    ``scale`` (D,): the distance in voxels over which the noise changes.
    """
    steps = [max(3, math.ceil(MARGIN * n / max(float(s), 1.0)) + 1) for n, s in zip(shape, scale, strict=True)]
    table = torch.randn(1, channels, *steps, generator=generator, device=generator.device)
    if max(steps) <= 24:  # on a finer table, without the kinks of linear interpolation
        table = 1.4 * blur(resize_image(table, [3 * n - 2 for n in steps]), 1.2)
    side = torch.tensor(shape, device=generator.device) - 1.0

    def noise(places: Tensor) -> Tensor:
        column = [1, -1, *[1] * len(shape)]
        unit = (2 * places / side.view(column) - 1) / MARGIN
        return sample(table, unit.flip(1))

    return noise


def smooth_noise(shape: Sequence[int], channels: int, scale: Tensor, *, generator: Generator) -> Tensor:
    """(1, channels, *shape) noise that changes over ``scale`` (D,) voxels, of about unit variance."""
    steps = [max(2, math.ceil(n / max(float(s), 1.0)) + 1) for n, s in zip(shape, scale, strict=True)]
    table = torch.randn(1, channels, *steps, generator=generator, device=generator.device)
    finer = blur(resize_image(table, [min(n, 3 * m - 2) for n, m in zip(shape, steps, strict=True)]), 1.2)
    return 1.4 * resize_image(finer, shape)


def blur(image: Tensor, sigma: float) -> Tensor:
    for axis in range(2, image.ndim):
        image = smooth(image, axis, sigma)
    return image


def uniform(g: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=g, device=g.device))


def integer(g: Generator, low: int, high: int) -> int:
    """From ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=g, device=g.device))


def chance(g: Generator, share: float) -> bool:
    return uniform(g, 0, 1) < share


def normal(g: Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=g, device=g.device)
