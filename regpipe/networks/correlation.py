"""Local correlation of two feature maps: what tells a level of the network where to look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def local_correlations(a: Tensor, b: Tensor, offsets: list[tuple[int, ...]]) -> tuple[list[Tensor], Iterator[Tensor]]:
    """How alike b is at each offset from a, and a from b: (B, C, *grid) twice -> two series of (B, 1, *grid).

    ``ahead_o(x) = mean over channels of a(x) b(x + o)``, 0 where x + o is off the grid; ``back`` has a and b
    swapped, and is the same products seen from their other end: ``back_o(x) = ahead_-o(x + o)``.
    """
    radius = max(offsets[-1])
    rim = [radius] * 2 * (b.ndim - 2)
    padded = F.pad(b, rim)
    ahead = [_channel_mean(a * _shifted(padded, offset, radius, a.shape)) for offset in offsets]
    opposite = zip(offsets, reversed(ahead), strict=True)  # offsets are symmetric about 0
    back = (_shifted(F.pad(x, rim), offset, radius, a.shape) for offset, x in opposite)
    return ahead, back


def _channel_mean(x: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, 1, *grid), to the bit the same wherever a voxel lies, which ``x.mean(1)`` is not."""
    count = x.shape[1]
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        halves = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([halves, x[:, 2 * half :]], 1) if x.shape[1] % 2 else halves
    return x / count


def _shifted(padded: Tensor, offset: Sequence[int], radius: int, shape: Sequence[int]) -> Tensor:
    """The view of ``padded`` whose voxel x is the unpadded x + offset."""
    for axis, step in enumerate(offset, start=2):
        padded = padded.narrow(axis, radius + step, shape[axis])
    return padded
