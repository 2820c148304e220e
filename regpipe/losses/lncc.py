"""Local cross-correlation: its mean as a dissimilarity with a gradient in closed form, and its map.

By ``losses.similarity``'s conventions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regpipe.losses.similarity import centred, in_float32, masked_mean

VARIANCE = 1e-5  # of a window that counts as flat, where images have no noise: grey values are in [0, 1]
SMALL = 50_000  # voxels of a batch whose sums are taken at once: there the calls take longer than the sums


@in_float32
def lncc(
    a: Tensor,
    b: Tensor,
    *,
    mask: Tensor | None = None,
    window: int = 9,
    floors: Sequence[float | Tensor] = (VARIANCE, VARIANCE),
) -> Tensor:
    """1 - mean squared local correlation; in [0, 1], 0 for a perfect match up to local gain.

    A flat window has correlation 0. ``floors`` are the variances below which a window of each image counts as flat,
    numbers or one for each pair, (B,).
    Source: Avants et al. 2008 (ANTs' CC), normalised by the voxels really inside the window, and inside the mask.
    """
    a, b = (centred(x, mask) for x in (a, b))  # an offset would cost the sums of squares all digits
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (a, b)]
    return cast(Tensor, _LocalCorrelation.apply(a, b, mask, window, floors, wanted))


@in_float32
def local_correlation(
    a: Tensor,
    b: Tensor,
    *,
    mask: Tensor | None = None,
    window: int = 9,
    floors: Sequence[float | Tensor] = (VARIANCE, VARIANCE),
) -> Tensor:
    """The squared local correlation that ``lncc`` averages, (B, 1, *spatial) in [0, 1]; without a gradient graph."""
    with torch.no_grad():
        seen = _windows(centred(a, mask), centred(b, mask), mask, window, floors)
        return seen.covariance.square_().div_(seen.var_a).div_(seen.var_b)


class _Windows(NamedTuple):
    """What a window around each voxel holds, each (B, 1, *spatial)."""

    share: Tensor  # what a voxel counts in it
    mean_a: Tensor
    mean_b: Tensor
    covariance: Tensor
    var_a: Tensor  # with its floor
    var_b: Tensor


def _windows(a: Tensor, b: Tensor, mask: Tensor | None, window: int, floors: Sequence[float | Tensor]) -> _Windows:
    """Of two images whose mean is 0."""
    # less than a voxel in sight: as if the rest were of mean intensity
    share = _window_sizes(a, window) if mask is None else box_sum(mask, window).clamp_(min=1)
    share = share.reciprocal_()
    inside = (lambda x: x) if mask is None else (lambda x: mask * x)
    products = (inside(x if y is None else x * y) for x, y in ((a, None), (b, None), (a, b), (a, a), (b, b)))
    means = (summed.mul_(share) for summed in _box_sums(products, window, a))
    mean_a, mean_b = next(means), next(means)
    covariance = next(means).sub_(mean_a * mean_b)
    var_a, var_b = (
        square.sub_(middle * middle).clamp_(min=0).add_(_each_pair(floor, a))
        for square, middle, floor in zip(means, (mean_a, mean_b), floors, strict=True)
    )
    return _Windows(share, mean_a, mean_b, covariance, var_a, var_b)


def _each_pair(floor: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or (B,) as (B, 1, ...), of what a variance is never less than: ``VARIANCE`` at least."""
    if not isinstance(floor, Tensor):
        return floor
    return floor.clamp(min=VARIANCE).view(-1, *[1] * (like.ndim - 1))


class _LocalCorrelation(torch.autograd.Function):
    """``lncc`` with its gradient in closed form, worked out on the way: autograd would keep every window sum.

    With means A, B, covariance c, variances p, q of each window of n voxels and r = c^2 / (p q), the gradient in a is
    ``b S(g) + 2 a S(h) - S(g B + 2 h A)``; S the window sum, ``g = -2 w c / (p q n)``, ``h = w r / (p n)`` and w the
    window's share in the mean; as Avants et al. 2008, eq. 6, but exact to the rim.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        mask: Tensor | None,
        window: int,
        floors: Sequence[float | Tensor],
        wanted: Sequence[bool],
    ) -> Tensor:
        inside = (lambda x: x) if mask is None else (lambda x: mask * x)
        share, mean_a, mean_b, covariance, var_a, var_b = _windows(a, b, mask, window, floors)
        pull = covariance / var_a / var_b
        r = covariance.mul_(pull)
        value = masked_mean(1 - r, mask)
        if any(wanted):
            weights = share.mul_(_weights(a, mask))
            r, pull = r.mul_(weights), pull.mul_(weights).mul_(-2)
            sides = ((a, b, mean_a, mean_b, var_a), (b, a, mean_b, mean_a, var_b))
            asked = [side for side, want in zip(sides, wanted, strict=True) if want]
            sums = _box_sums(_summed(pull, r, asked), window, a)
            both = next(sums)
            found = iter([inside(_gradient(x, other, both, next(sums), next(sums))) for x, other, *_ in asked])
            ctx.save_for_backward(*(next(found) if want else None for want in wanted))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (*(None if x is None else scale * x for x in ctx.saved_tensors), None, None, None, None)


def _summed(g: Tensor, r: Tensor, sides: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
    """What ``_LocalCorrelation``'s gradient sums over windows: g, and of each side h and g B + 2 h A."""
    yield g
    for _, _, mean, other_mean, var in sides:
        h = r / var
        yield h
        yield torch.addcmul(g * other_mean, h, mean, value=2)


def _gradient(x: Tensor, other: Tensor, both: Tensor, h: Tensor, middle: Tensor) -> Tensor:
    """See ``_LocalCorrelation``: of ``x``, by the sums of ``_summed``."""
    return torch.addcmul(other * both, x, h, value=2).sub_(middle)


def _weights(like: Tensor, mask: Tensor | None) -> Tensor:
    """What each voxel counts in ``masked_mean`` of (B, 1, *spatial)."""
    if mask is None:
        return like.new_tensor(1 / like.numel())
    sizes = mask.sum(tuple(range(1, mask.ndim)), keepdim=True)
    pairs = (mask.flatten(1).amax(1) > 0).sum().clamp(min=1)
    return mask / sizes.clamp(min=1e-6) / pairs


def _window_sizes(like: Tensor, window: int) -> Tensor:
    """How many voxels of the image each window holds: (1, 1, *spatial)."""
    sizes = like.new_ones(1, 1, *[1] * (like.ndim - 2))
    for axis, n in enumerate(like.shape[2:]):
        line = like.new_ones(1, 1, *(n if i == axis else 1 for i in range(like.ndim - 2)))
        sizes = sizes * _slide(line, 2 + axis, window)
    return sizes


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over a centred window of ``window`` (odd) voxels per axis, cut off at the rim: (B, C, *spatial) -> the same.

    One axis after the other, sums of 1, 2, 4, 8 voxels each made of the one before: log(window) additions per axis.
    Running sums (``cumsum``) would be as many and lose digits along the axis.
    """
    for axis in range(2, x.ndim):
        x = _slide(x, axis, window)
    return x


def _box_sums(images: Iterable[Tensor], window: int, like: Tensor) -> Iterator[Tensor]:
    """``box_sum`` of each, of the shape of ``like``: small ones all at once, the same numbers; large ones by and by."""
    if like.numel() > SMALL:
        return (box_sum(x, window) for x in images)
    return iter(box_sum(torch.cat([*images], 1), window).split(like.shape[1], 1))


def _slide(x: Tensor, axis: int, window: int) -> Tensor:
    n = x.shape[axis]
    half = min(window // 2, n)
    width, power = 1, nn.functional.pad(x, [0, 0] * (x.ndim - 1 - axis) + [half, half])
    total, summed = None, 0
    for bit in reversed(bin(2 * half + 1)[2:]):
        if bit == "1":
            part = power.narrow(axis, summed, n)
            total = part if total is None else total + part
            summed += width
        if summed < 2 * half + 1:
            size = power.shape[axis] - width
            power = power.narrow(axis, 0, size) + power.narrow(axis, width, size)
            width *= 2
    assert total is not None
    return total
