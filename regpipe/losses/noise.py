"""How much noise an image holds, and the image twice over with noise that is independent.

Where nothing can be found, noise is what a similarity follows: ``losses.terms`` counts contrast against it, and
``engines.judge`` looks at what an optimisation has not seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import smooth

SAMPLES = 200_000  # places that are looked at: a median of them is within 1 %
MAD = 1.4826  # a Gaussian's standard deviation over its median absolute deviation
CLASSES, LEAST = 12, 50  # of grey values, equally many places each, whose noise is measured apart; places in each
RISES, STEEP = 0.9, 10.0  # correlation of the noise with the grey value; its variance, brightest over darkest
FAINTEST = 0.05  # of the median variance, added to each: a class with almost no noise must not outweigh the others
SHARE = 0.5  # of the noise's standard deviation, added to one copy and taken from the other divided by this


def noise_variance(image: Tensor) -> Tensor:
    """(B,): variance of white noise in images (B, 1, *spatial), 2D or 3D, each its own.

    The median absolute deviation of the differences along all axes at once, in which edges along an axis cancel, over
    ``2 ** D``, the variance that white noise of 1 has there (Immerkaer 1996 with Donoho's median in place of the
    mean). Places where they are exactly 0 hold no noise, a background that was set, and are left out. Noise that was
    smoothed is underestimated. 0 for an image of less than 2 voxels along an axis.
    """
    return _variance(_differences(image), image)


def noise_level(image: Tensor) -> Tensor:
    """The noise's standard deviation, of an image (1, 1, *spatial): one number, or one at each voxel of speckle.

    Speckle's rises with the grey value: its variance is ``a + b m^2`` at a local mean m. The two are fitted to the
    noise of ``CLASSES`` of grey values, and count where it rises in a line, ``RISES`` to 1, and by much, ``STEEP`` to
    1. Rician noise does not rise so, nor does texture, of which the classes hold some; the counts of photons do, and
    so does white noise in tissue beside air that has little, of which the one number would say less than the truth.
    """
    differences = _differences(image)
    means = _some(_along_all_axes(image, lambda one, other: (one + other) / 2))
    values, means = differences[differences > 0], means[differences > 0]
    if len(values) > CLASSES * LEAST:
        classes = means.argsort().chunk(CLASSES)
        level = torch.cat([_spread(values[None, part]) for part in classes]) / 2 ** ((image.ndim - 2) / 2)
        mean = torch.stack([means[part].mean() for part in classes])
        a, b = _fitted(level.square(), mean.square())
        lowest, highest = a + b * float(mean[0]) ** 2, a + b * float(mean[-1]) ** 2
        if highest > STEEP * lowest and float(torch.corrcoef(torch.stack([level, mean]))[0, 1]) > RISES:
            smoothed = image.float()
            for axis in range(2, image.ndim):
                smoothed = smooth(smoothed, axis, 1.0)
            return (a + b * smoothed.square()).sqrt()
    return _variance(differences, image).sqrt()


def _fitted(variance: Tensor, square: Tensor) -> tuple[float, float]:
    """a and b >= 0 of ``variance = a + b square``, by least squares of the relative error."""
    weight = 1 / (variance + FAINTEST * variance.median())
    x, y = torch.stack([weight, weight * square], 1), weight * variance
    a, b = torch.linalg.lstsq(x, y[:, None]).solution.flatten().tolist()
    if min(a, b) >= 0:
        return a, b
    alone = [float((column * y).sum() / column.square().sum()) for column in x.T]
    return (alone[0], 0.0) if b < 0 else (0.0, alone[1])


def _differences(image: Tensor) -> Tensor:
    """Absolute differences along all axes at once, (B, places), of not too many places."""
    return _some(_along_all_axes(image, lambda one, other: one - other)).abs()


def _along_all_axes(image: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What ``join`` makes of each voxel and the one before it, along one axis after the other."""
    found = image.detach().float()
    for axis in range(2, image.ndim):
        size = found.shape[axis] - 1
        found = join(found.narrow(axis, 1, size), found.narrow(axis, 0, size))
    return found


def _some(values: Tensor) -> Tensor:
    return values.flatten(1)[:, :: max(1, values[0].numel() // SAMPLES)]


def _all_around(where: Tensor) -> Tensor:
    """Where a voxel and all its neighbours are True, (1, 1, *spatial)."""
    pool = nn.functional.max_pool2d if where.ndim == 4 else nn.functional.max_pool3d
    return pool((~where).float(), 3, stride=1, padding=1) == 0


def _variance(differences: Tensor, image: Tensor) -> Tensor:
    return _spread(differences).square() / 2 ** (image.ndim - 2)


def _spread(values: Tensor) -> Tensor:
    """(B,) standard deviations of differences (B, places) of 0 mean, but of what is exactly 0; 0 without any."""
    if not values.shape[1]:
        return values.new_zeros(len(values))
    return MAD * values.masked_fill(values == 0, torch.nan).nanmedian(1).values.nan_to_num()


class Halves(NamedTuple):
    """An image with two independent draws of its own noise, each (B, 1, *spatial)."""

    seen: Tensor  # of 1 + SHARE ** 2 times the noise's variance
    unseen: Tensor  # of 1 + 1 / SHARE ** 2 times
    noise: Tensor  # white noise of the image's own variance
    speckled: bool  # whether it rises with the grey value


def split_noise(image: Tensor) -> Halves:
    """``image`` (1, 1, *spatial) as two whose Gaussian noise is independent, as if it had been scanned twice.

    With noise n of the same variance ``x + g n`` and ``x - n / g`` are uncorrelated: data thinning, as Noisier2Noise
    and Recorrupted-to-Recorrupted (Pang et al., CVPR 2021, eq. 5) train by it. The draw
    is by the image's own bytes: the same image gives the same halves.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(image.float().cpu().numpy().tobytes()))
    white = torch.randn(image.shape, generator=generator).to(image.device)
    level = noise_level(image)
    clipped = (image <= 0) | (image >= 1)  # a background that was set, a saturated edge: no noise is left there
    speckled = level.numel() > 1
    if speckled:  # it saturates voxel by voxel: which of them is its noise too
        clipped = _all_around(clipped)
    noise = white.masked_fill_(clipped, 0) * level.view(-1, *level.shape[1:] or [1] * (image.ndim - 1))
    return Halves(image + SHARE * noise, image - noise / SHARE, noise, speckled)


NOISE_FLOOR = 4.0  # times the noise's variance: a window of less contrast says little (docs/results/harm.md)


def with_noise(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The target with ``fixed_noise`` and ``moving_noise`` (B,), the variance of each image's noise.

    What is absent is found: once, for a target that is looked at many times.
    """
    absent = [side for side in SIDES if f"{side}_noise" not in target]
    known = {**target, **{f"{side}_noise": noise_variance(target[f"{side}_image"]) for side in absent}}
    return known | in_channels(target, with_noise)


def in_channels(target: Mapping[str, Any], function: Callable[[Mapping[str, Any]], Any]) -> dict[str, list[Any]]:
    """The same of each channel, as ``channels``; nothing where there are none."""
    return {"channels": [function(view) for view in target["channels"]]} if "channels" in target else {}


def floors_of(target: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B,) each: the variance that a window of the fixed and of the moving image has to stand out from."""
    known = with_noise(target)
    return NOISE_FLOOR * known["fixed_noise"], NOISE_FLOOR * known["moving_noise"]
