"""How unlike two images are: plain functions ``f(a, b, *, mask=None) -> scalar``, lower is better.

``a`` and ``b`` are (B, 1, *spatial) in [0, 1], 2D or 3D. ``mask`` (B, 1, *spatial) holds weights in [0, 1]: what lies
outside is neither summed in a window nor averaged. Each pair is averaged over its own mask, then the pairs that have
one; where no pair has any the result is 0, with a gradient graph. Everything is computed in float32, outside any
autocast, and is finite for flat images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regpipe.fields.algebra import window
from regpipe.networks.encoders import Encoder
from regpipe.networks.extractor import Extractor

P = ParamSpec("P")


def in_float32(function: Callable[Concatenate[Tensor, Tensor, P], Tensor]) -> Callable[..., Tensor]:
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


def centred(image: Tensor, mask: Tensor | None) -> Tensor:
    """The image (B, 1, *spatial) minus each pair's mean within its mask."""
    return image - _per_pair(image, mask).view(-1, *[1] * (image.ndim - 1))


@in_float32
def ncc(a: Tensor, b: Tensor, *, mask: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """1 - r, r the global correlation of each pair; in [0, 2], 1 for flat images.

    Not 1 - r^2: that one is as content with an inverted image, and its gradient vanishes where r is 0, which
    is where a bad start is. For contrasts that differ there are ``lncc``, ``mi`` and ``mind``.
    """
    a, b = centred(a, mask), centred(b, mask)
    var_a, var_b, covariance = (_per_pair(x, mask) for x in (a * a, b * b, a * b))
    r = covariance / ((var_a + epsilon) * (var_b + epsilon)).sqrt()
    return _over_pairs(1 - r, mask)


@in_float32
def mse(a: Tensor, b: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference."""
    return masked_mean((a - b).square(), mask)


def _mutual_information() -> Any:  # not kept: made while memory is predicted, its bins would have no numbers
    from monai.losses import GlobalMutualInformationLoss  # MONAI takes seconds to import

    return GlobalMutualInformationLoss(num_bins=32)  # the b-spline kernel is NaN on flat images


@in_float32
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
            difference = window(padded, one, size) - window(padded, other, size)
            ssd = _patch_mean(difference.square(), radius)
            at = [dilation * (axis == i or (axis == j and sign > 0)) for axis in range(dim)]
            mirrored = [dilation * (axis == j and sign < 0) for axis in range(dim)]
            channels += [window(ssd, at, shape), window(ssd, mirrored, shape)]
    return channels


def _patch_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over windows that lie inside: each axis is ``2 radius`` shorter. Sums of slices: exact 0 where x is 0."""
    width = 2 * radius + 1
    for axis in range(2, x.ndim):
        n = x.shape[axis] - 2 * radius
        x = functools.reduce(torch.add, [x.narrow(axis, k, n) for k in range(width)]) / width
    return x


@in_float32
def mind(a: Tensor, b: Tensor, *, mask: Tensor | None = None, radius: int = 1, dilation: int = 2) -> Tensor:
    """Mean squared difference of the images' MIND-SSC descriptors, over channels and voxels; in [0, 1].

    Squared as in ConvexAdam's refinement, which counts the sum over channels; radius and dilation are its defaults.
    The descriptors of voxels within ``radius + dilation`` of a mask's edge have seen what lies beyond it.
    """
    first, second = (mind_ssc(x, radius=radius, dilation=dilation) for x in (a, b))
    return masked_mean((first - second).square(), mask)


@in_float32
def feature_similarity(a: Tensor, b: Tensor, encoder: Encoder | Extractor, *, mask: Tensor | None = None) -> Tensor:
    """1 - cosine between the features of both images, mean over places, then over features by weight; in [0, 2].

    Deep-feature similarity (DeepSim, Czolbe et al., MIDL 2021), with the transferred backbone as its extractor. A place
    where both features are 0 counts as alike. ``encoder`` is used as it is: freeze it. Feature i looks at the
    image around voxel ``stride * i``, and takes the mask's value from there.
    """
    if any(p.device != a.device for p in encoder.parameters()):  # a dry run cannot move them
        encoder = encoder.to(a.device)
    weights = encoder.weights if isinstance(encoder, Extractor) else ()
    apart, total = a.new_zeros(()), 0.0
    for i, (x, y) in enumerate(zip(encoder(a), encoder(b), strict=True)):
        weight = weights[i] if weights else 1.0
        if weight:
            xx, yy, xy = ((p * q).sum(1, keepdim=True) + 1e-6 for p, q in ((x, x), (y, y), (x, y)))
            seen = mask
            if mask is not None and encoder.strides:
                every = slice(None, None, encoder.strides[i])
                seen = mask[:, :, every, every] if mask.ndim == 4 else mask[:, :, every, every, every]
            elif mask is not None:  # a file's: spread evenly
                seen = F.interpolate(mask, list(x.shape[2:]), mode="nearest")
            apart, total = apart + weight * masked_mean(1 - xy / (xx * yy).sqrt(), seen), total + weight
    return apart / total
