"""How unlike two images are: plain functions ``f(a, b, *, mask=None) -> scalar``, lower is better.

``a`` and ``b`` are (B, 1, *spatial) in [0, 1], 2D or 3D. ``mask`` (B, 1, *spatial) holds weights in [0, 1]: what lies
outside is neither summed in a window nor averaged. Each pair is averaged over its own mask, then the pairs that have
one; where no pair has any the result is 0, with a gradient graph. Everything is computed in float32, outside any
autocast, and is finite for flat images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from regpipe.networks.encoders import Encoder

P = ParamSpec("P")


def _in_float32(function: Callable[Concatenate[Tensor, Tensor, P], Tensor]) -> Callable[..., Tensor]:
    """Both images in float32 and no autocast, whatever the caller's: half precision is noise here."""

    @functools.wraps(function)
    def wrapped(a: Tensor, b: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return function(a.float(), b.float(), *args, **kwargs)

    return wrapped


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, C, *spatial) over each pair's mask (B, 1, *spatial), then over the pairs that have one."""
    return values.mean() if mask is None else _over_pairs(_per_pair(values, mask), mask)


def _per_pair(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, *spatial) -> (B,): the mean of each pair within its mask; 0 within an empty one."""
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return values.mean(axes)
    return (values * mask).sum(axes) / (values.shape[1] * mask.sum(axes)).clamp(min=1e-6)


def _over_pairs(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) -> the mean over the pairs whose mask is not empty."""
    if mask is None:
        return values.mean()
    seen = mask.flatten(1).amax(1) > 0
    return (values * seen).sum() / seen.sum().clamp(min=1)


def _centred(image: Tensor, mask: Tensor | None) -> Tensor:
    """The image (B, 1, *spatial) minus each pair's mean within its mask."""
    return image - _per_pair(image, mask).view(-1, *[1] * (image.ndim - 1))


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over a centred window of ``window`` (odd) voxels per axis, cut off at the rim: (B, C, *spatial) -> the same.

    One axis after the other, sums of 1, 2, 4, 8 voxels each made of the one before: log(window) additions per axis.
    Running sums (``cumsum``) would be as many and lose digits along the axis.
    """
    for axis in range(2, x.ndim):
        x = _slide(x, axis, window)
    return x


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


@_in_float32
def lncc(a: Tensor, b: Tensor, *, mask: Tensor | None = None, window: int = 9, epsilon: float = 1e-5) -> Tensor:
    """1 - mean squared local correlation; in [0, 1], 0 for a perfect match up to local gain.

    A flat window has correlation 0. ``epsilon`` is the variance below which a window counts as flat.
    Source: Avants et al. 2008 (ANTs' CC), normalised by the voxels really inside the window, and inside the mask.
    """
    # an offset would cost the sums of squares all digits
    a, b = (x - x.mean() if mask is None else _centred(x, mask) for x in (a, b))
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (a, b)]
    return cast(Tensor, _LocalCorrelation.apply(a, b, mask, window, epsilon, wanted))


class _LocalCorrelation(torch.autograd.Function):
    """``lncc`` with its gradient in closed form, worked out on the way: autograd would keep every window sum.

    With means A, B, covariance c, variances p, q of each window of n voxels and r = c^2 / (p q), the gradient in a is
    ``b S(g) + 2 a S(h) - S(g B + 2 h A)``; S the window sum, ``g = -2 w c / (p q n)``, ``h = w r / (p n)`` and w the
    window's share in the mean; as Avants et al. 2008, eq. 6, but exact to the rim.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, mask: Tensor | None, window: int, epsilon: float, wanted: Sequence[bool]
    ) -> Tensor:
        inside = (lambda x: x) if mask is None else (lambda x: mask * x)
        # less than a voxel in sight: as if the rest were of mean intensity
        share = _window_sizes(a, window) if mask is None else box_sum(mask, window).clamp_(min=1)
        share = share.reciprocal_()
        mean_a, mean_b = (box_sum(inside(x), window).mul_(share) for x in (a, b))
        covariance = box_sum(inside(a * b), window).mul_(share).sub_(mean_a * mean_b)
        var_a, var_b = (
            box_sum(inside(x * x), window).mul_(share).sub_(mean * mean).clamp_(min=0).add_(epsilon)
            for x, mean in ((a, mean_a), (b, mean_b))
        )
        pull = covariance / var_a / var_b
        r = covariance.mul_(pull)
        value = masked_mean(1 - r, mask)
        if any(wanted):
            weights = share.mul_(_weights(a, mask))
            r, pull = r.mul_(weights), pull.mul_(weights).mul_(-2)
            both = box_sum(pull, window)
            found = [
                inside(_gradient(*sides, r / var, pull, both, window)) if want else None
                for want, sides, var in (
                    (wanted[0], (a, b, mean_a, mean_b), var_a),
                    (wanted[1], (b, a, mean_b, mean_a), var_b),
                )
            ]
            ctx.save_for_backward(*found)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (*(None if x is None else scale * x for x in ctx.saved_tensors), None, None, None, None)


def _gradient(
    x: Tensor, other: Tensor, mean: Tensor, other_mean: Tensor, h: Tensor, g: Tensor, both: Tensor, window: int
) -> Tensor:
    """See ``_LocalCorrelation``: of ``x``; ``both`` is S(g)."""
    middle = box_sum(torch.addcmul(g * other_mean, h, mean, value=2), window)
    return torch.addcmul(other * both, x, box_sum(h, window), value=2).sub_(middle)


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


@_in_float32
def ncc(a: Tensor, b: Tensor, *, mask: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """1 - r, r the global correlation of each pair; in [0, 2], 1 for flat images.

    Not 1 - r^2: that one is as content with an inverted image, and its gradient vanishes where r is 0, which
    is where a bad start is. For contrasts that differ there are ``lncc``, ``mi`` and ``mind``.
    """
    a, b = _centred(a, mask), _centred(b, mask)
    var_a, var_b, covariance = (_per_pair(x, mask) for x in (a * a, b * b, a * b))
    r = covariance / ((var_a + epsilon) * (var_b + epsilon)).sqrt()
    return _over_pairs(1 - r, mask)


@_in_float32
def mse(a: Tensor, b: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference."""
    return masked_mean((a - b).square(), mask)


@functools.cache
def _mutual_information() -> Any:
    from monai.losses import GlobalMutualInformationLoss  # MONAI takes seconds to import

    return GlobalMutualInformationLoss(num_bins=32)  # the b-spline kernel is NaN on flat images


@_in_float32
def mi(a: Tensor, b: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Minus global mutual information in nats (MONAI's Gaussian Parzen windows, 32 bins), 0 for flat images.

    Of a mask the voxels of weight above 0.5 are taken. Intensities beyond [0, 1] are clamped. Memory: several
    tensors of 32 floats a voxel are kept for the gradient.
    """
    if mask is None:
        return _mutual_information()(a, b)
    inside = mask > 0.5
    pairs = [(x[i][None, None], y[i][None, None]) for x, y, i in zip(a, b, inside, strict=True) if i.any()]
    if not pairs:
        return 0.0 * (a.sum() + b.sum())
    return torch.stack([_mutual_information()(x, y) for x, y in pairs]).mean()


def mind_ssc(image: Tensor, *, radius: int = 1, dilation: int = 2) -> Tensor:
    """Self-similarity context (Heinrich et al., MICCAI 2013): (B, 1, *spatial) -> (B, C, *spatial), C = 4 or 12.

    A channel compares two of the voxel's neighbours, ``dilation`` voxels away along two different axes: for each pair
    of axes i < j, ``(+i, +j), (-i, -j), (+i, -j), (-i, +j)``. With ``ssd`` the mean squared difference of the
    patches (``radius`` voxels to each side) around the two, the value is ``exp(-(ssd - min ssd) / v)``, min over
    channels, v the mean of ``ssd - min ssd`` over channels, kept within 0.001 and 1000 times its mean over the
    image, as in the authors' ConvexAdam. In (0, 1]; the same for any gain and offset. The image continues
    beyond the rim.
    """
    with torch.autocast(image.device.type, enabled=False):
        ssd = torch.cat(_patch_distances(image.float(), radius, dilation), 1)
        ssd = ssd - ssd.amin(1, keepdim=True)
        v = ssd.mean(1, keepdim=True)
        typical = v.mean(tuple(range(1, v.ndim)), keepdim=True)
        v = torch.minimum(torch.maximum(v, 1e-3 * typical), 1e3 * typical)
        return torch.exp(-ssd / v.clamp(min=1e-20))


def _patch_distances(image: Tensor, radius: int, dilation: int) -> list[Tensor]:
    """The channels of ``mind_ssc`` before their exponential, each (B, 1, *spatial).

    Both channels of a pair of axes and a relative sign are one map of differences, read at two places.
    """
    shape, dim = image.shape[2:], image.ndim - 2
    reach = dilation + radius
    padded = nn.functional.pad(image, [reach] * 2 * dim, mode="replicate")
    channels = []
    for i, j in itertools.combinations(range(dim), 2):
        for sign in (1, -1):
            size = [n + 2 * radius + dilation * (axis in (i, j)) for axis, n in enumerate(shape)]
            # the map's first voxel, in voxels of the padded image, such that the mirrored pair is in it too
            start = [reach - radius - dilation * (axis == i or (axis == j and sign > 0)) for axis in range(dim)]
            one, other = list(start), list(start)
            one[i] += dilation
            other[j] += sign * dilation
            difference = _window(padded, one, size) - _window(padded, other, size)
            ssd = _patch_mean(difference.square(), radius)
            at = [dilation * (axis == i or (axis == j and sign > 0)) for axis in range(dim)]
            mirrored = [dilation * (axis == j and sign < 0) for axis in range(dim)]
            channels += [_window(ssd, at, shape), _window(ssd, mirrored, shape)]
    return channels


def _window(x: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    for axis, (first, n) in enumerate(zip(start, size, strict=True)):
        x = x.narrow(2 + axis, first, n)
    return x


def _patch_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over windows that lie inside: each axis is ``2 radius`` shorter. Sums of slices: exact 0 where x is 0."""
    width = 2 * radius + 1
    for axis in range(2, x.ndim):
        n = x.shape[axis] - 2 * radius
        x = functools.reduce(torch.add, [x.narrow(axis, k, n) for k in range(width)]) / width
    return x


@_in_float32
def mind(a: Tensor, b: Tensor, *, mask: Tensor | None = None, radius: int = 1, dilation: int = 2) -> Tensor:
    """Mean squared difference of the images' MIND-SSC descriptors, over channels and voxels; in [0, 1].

    Squared as in ConvexAdam's refinement, which counts the sum over channels; radius and dilation are its defaults.
    The descriptors of voxels within ``radius + dilation`` of a mask's edge have seen what lies beyond it.
    """
    first, second = (mind_ssc(x, radius=radius, dilation=dilation) for x in (a, b))
    return masked_mean((first - second).square(), mask)


def _every(x: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th voxel along each spatial axis, from the first on."""
    for axis in range(2, x.ndim):
        x = x.index_select(axis, torch.arange(0, x.shape[axis], stride, device=x.device))
    return x


@_in_float32
def feature_similarity(a: Tensor, b: Tensor, encoder: Encoder, *, mask: Tensor | None = None) -> Tensor:
    """1 - cosine between the features of both images, mean over places, then over stages; in [0, 2].

    Deep-feature similarity (DeepSim, Czolbe et al., MIDL 2021), with the transferred backbone as its extractor. A place
    where both features are 0 counts as alike. ``encoder`` is used as it is: freeze it. Feature i looks at the
    image around voxel ``stride * i``, and takes the mask's value from there.
    """
    encoder = encoder.to(a.device)
    stages = []
    for stride, x, y in zip(encoder.strides, encoder(a), encoder(b), strict=True):
        xx, yy, xy = ((p * q).sum(1, keepdim=True) + 1e-6 for p, q in ((x, x), (y, y), (x, y)))
        stages.append(masked_mean(1 - xy / (xx * yy).sqrt(), None if mask is None else _every(mask, stride)))
    return torch.stack(stages).mean()
