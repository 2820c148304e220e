"""From coarse to fine: the levels of a refinement, and a pair on one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, linspace

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import resize_image, smooth
from regpipe.losses.noise import in_channels
from regpipe.losses.terms import Target

SMALLEST = 8  # voxels along an axis; coarser levels tell nothing of motion
FULL_RESOLUTION = 8_000_000  # voxels


class Level(NamedTuple):
    """One resolution: images every ``stride`` voxels, optimised for a share of the steps."""

    stride: int
    share: float


FROM_NETWORK = (Level(2, 0.5), Level(1, 0.5))
FROM_ZERO = (Level(8, 0.2), Level(4, 0.25), Level(2, 0.3), Level(1, 0.25))


def levels_of(shape: Sequence[int], from_network: bool, finest: int | None) -> list[Level]:
    """The levels for images of this shape, down to the stride ``finest``.

    None: full resolution up to ``FULL_RESOLUTION`` voxels, half beyond.
    """
    levels = FROM_NETWORK if from_network else FROM_ZERO
    finest = finest or (1 if math.prod(shape) <= FULL_RESOLUTION else 2)
    kept = [v for v in levels if v.stride >= finest and min(shape) >= SMALLEST * v.stride]
    return kept or [levels[-1]]


def pyramid_level(batch: Target, shape: Sequence[int]) -> dict[str, Any]:
    """What the loss needs of a batch on a coarser grid: images smoothed first, masks still 0 or 1, labels picked.

    What a mask leaves out is not smoothed into the rest. ``fixed_noise`` (B, 1, *spatial) is smoothed noise's variance.
    """
    level: dict[str, Any] = in_channels(batch, lambda view: pyramid_level(view, shape))
    for side in SIDES:
        image, mask = batch[f"{side}_image"], batch.get(f"{side}_mask")
        if mask is None or bool(mask.all()):
            level[f"{side}_image"] = coarsen(image, shape)
        else:
            level[f"{side}_image"] = coarsen(image * mask, shape) / coarsen(mask, shape).clamp(min=1e-3)
        if f"{side}_noise" in batch:
            noise = coarsen(batch[f"{side}_noise"], shape)
            level[f"{side}_noise"] = (noise.square().sum() / (noise != 0).sum().clamp(min=1)).view(1)
    level |= {key: (resize_image(batch[key], shape) > 0.5).float() for key in batch if key.endswith("mask")}
    level |= {key: _picked(batch[key], shape) for key in batch if key.endswith("label")}
    cells = [[max(n - 1, 1) for n in grid] for grid in (shape, batch["fixed_image"].shape[2:])]
    for key in (key for key in batch if key.endswith("landmarks")):
        new, old = (batch[key].new_tensor(n) for n in cells)
        level[key] = batch[key] * new / old
    return level | {key: batch[key] for key in ("anatomy", "landmark_weights", "speckled") if key in batch}


def _picked(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, 1, *spatial) ids on a coarser grid of the same extent: those of the nearest voxels."""
    for axis, (old, new) in enumerate(zip(labels.shape[2:], shape, strict=True), start=2):
        at = linspace(0, old - 1, new, device=labels.device).round().long()
        labels = labels.index_select(axis, at)
    return labels


def coarsen(image: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, C, *spatial) on a coarser grid of the same extent, first smoothed by 0.4 of the new spacing."""
    for axis, (old, new) in enumerate(zip(image.shape[2:], shape, strict=True)):
        sigma = 0.4 * (old - 1) / max(new - 1, 1)
        if old > new:
            image = smooth(image, 2 + axis, sigma, reach=3)
    return resize_image(image, shape)


def shares(levels: Sequence[Level], steps: int) -> list[int]:
    """``steps`` dealt out to the levels by their shares, at least one each."""
    total = sum(level.share for level in levels)
    return [max(1, round(steps * level.share / total)) for level in levels]


def coarser_shape(shape: Sequence[int], stride: int) -> tuple[int, ...]:
    """Points per axis of a grid of the same extent with about ``stride`` times the spacing."""
    return tuple(max(math.ceil((n - 1) / stride) + 1, min(n, 3)) for n in shape)
