"""How much noise an image holds, and the image twice over with noise that is independent.

Where nothing can be found, noise is what a similarity follows: ``losses.terms`` counts contrast against it, and
``engines.judge`` looks at what an optimisation has not seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpipe.data.pairs import SIDES

SAMPLES = 200_000  # places that are looked at: a median of them is within 1 %
MAD = 1.4826  # a Gaussian's standard deviation over its median absolute deviation
SHARE = 0.5  # of the noise's standard deviation, added to one copy and taken from the other divided by this


def noise_variance(image: Tensor) -> Tensor:
    """(B,): variance of white noise in images (B, 1, *spatial), 2D or 3D, each its own.

    The median absolute deviation of the differences along all axes at once, in which edges along an axis cancel, over
    ``2 ** D``, the variance that white noise of 1 has there (Immerkaer 1996 with Donoho's median in place of the
    mean). Places where they are exactly 0 hold no noise, a background that was set, and are left out. Noise that was
    smoothed is underestimated. 0 for an image of less than 2 voxels along an axis.
    """
    dim = image.ndim - 2
    difference = image.detach().float()
    for axis in range(2, image.ndim):
        difference = difference.diff(dim=axis)
    values = difference.flatten(1).abs()
    if not values.shape[1]:
        return image.new_zeros(len(image), dtype=torch.float32)
    values = values[:, :: max(1, values.shape[1] // SAMPLES)]
    middle = values.masked_fill(values == 0, torch.nan).nanmedian(1).values.nan_to_num()
    return (MAD * middle).square() / 2**dim


class Halves(NamedTuple):
    """An image with two independent draws of its own noise, each (B, 1, *spatial)."""

    seen: Tensor  # of 1 + SHARE ** 2 times the noise's variance
    unseen: Tensor  # of 1 + 1 / SHARE ** 2 times
    noise: Tensor  # white noise of the image's own variance


def split_noise(image: Tensor) -> Halves:
    """``image`` (1, 1, *spatial) as two whose Gaussian noise is independent, as if it had been scanned twice.

    With noise n of the same variance ``x + g n`` and ``x - n / g`` are uncorrelated: data thinning, as Noisier2Noise
    and Recorrupted-to-Recorrupted (Pang et al., CVPR 2021, eq. 5) train by it. The draw
    is by the image's own bytes: the same image gives the same halves.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(image.float().cpu().numpy().tobytes()))
    white = torch.randn(image.shape, generator=generator).to(image.device)
    clipped = (image <= 0) | (image >= 1)  # a background that was set, a saturated edge: no noise is left there
    noise = white.masked_fill_(clipped, 0) * noise_variance(image).sqrt().view(-1, *[1] * (image.ndim - 1))
    return Halves(image + SHARE * noise, image - noise / SHARE, noise)


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
