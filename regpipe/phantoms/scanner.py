"""Simulates a scanner for ``phantoms.synthetic``: blur, shading, noise, speckle, gamma, a smaller field of view.

Images are (1, 1, *S). All random numbers come from one ``torch.Generator``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from regpipe.fields.algebra import identity_grid, resize_image
from regpipe.phantoms.noise import blur, chance, integer, normal, smooth, smooth_noise, uniform


def scan(label: Tensor, texture: Tensor, greys: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """An image in [0, 1] and its mask, both (1, 1, *S), of labels, a texture and a grey value for each label (K,)."""
    g, shape = generator, label.shape[2:]
    image = greys[label.long()]
    image = image + uniform(g, 0, 0.12) * texture * (image > 0.05)
    image = blur(image, uniform(g, 0.35, 1.1))
    if chance(g, 0.25):
        image = _coarse(image, g)
    bias = smooth_noise(shape, 1, torch.full((len(shape),), 0.5 * max(shape)), generator=g)
    image = image * torch.exp(uniform(g, 0, 0.3) * bias)
    noise = math.exp(uniform(g, math.log(0.003), math.log(0.08)))
    if chance(g, 0.2):
        image = _ultrasound(image, g)
    else:
        image = image + noise * torch.randn(image.shape, generator=g, device=g.device)
    image = normalise(image) ** math.exp(0.35 * float(normal(g, 1)))
    if chance(g, 0.15):
        image = 1 - image
    return _cut(image, g) if chance(g, 0.2) else (image, torch.ones_like(image))


def normalise(image: Tensor) -> Tensor:
    """(1, 1, *S) in [0, 1] by percentiles 0.5 and 99.5, as ``io.images.normalise``; of 8000 voxels at most."""
    values = image.flatten()
    values = values[:: max(1, len(values) // 8000)].sort().values
    low, high = (values[round(share * (len(values) - 1))] for share in (0.005, 0.995))
    return ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _coarse(image: Tensor, g: Generator) -> Tensor:
    """The image as if scanned at a lower resolution, along one axis (thick slices) or all."""
    shape = list(image.shape[2:])
    axis, factor = integer(g, 0, len(shape)), uniform(g, 1.5, 4)
    fewer = [max(4, round(n / factor)) if axis in (i, len(shape)) else n for i, n in enumerate(shape)]
    for i, (n, m) in enumerate(zip(shape, fewer, strict=True)):
        if n != m:
            image = smooth(image, 2 + i, 0.4 * n / m)
    return resize_image(resize_image(image, fewer), shape)


def _ultrasound(image: Tensor, g: Generator) -> Tensor:
    """Speckle and log compression, half of the time in a convex probe's sector; 0 outside."""
    echo = 10 ** ((normalise(image) - 1) * uniform(g, 0.8, 1.8))  # 16 to 36 dB between black and white
    scatter = torch.randn(2, *image.shape[1:], generator=g, device=g.device)
    for axis in range(2, image.ndim):
        scatter = smooth(scatter, axis, uniform(g, 0.3, 1.2))
    envelope = echo * (scatter / scatter.std()).norm(dim=0, keepdim=True)
    image = normalise(torch.log10(envelope + 10 ** -uniform(g, 1.5, 3)))
    return image * _sector(image.shape[2:], g) if chance(g, 0.5) else image


def _sector(shape: Sequence[int], g: Generator) -> Tensor:
    """1 in the sector of a probe above the middle of an axis (1, 1, *shape)."""
    axis = integer(g, 0, len(shape) - 1)
    last = torch.tensor(shape, device=g.device).view(1, -1, *[1] * len(shape)) - 1
    q = 2 * identity_grid(shape, device=g.device) / last - 1
    if chance(g, 0.5):
        q = -q
    apex = uniform(g, 1.1, 2.0)
    along = q[:, axis : axis + 1] + apex
    across = (q.square().sum(1, keepdim=True) - q[:, axis : axis + 1].square()).clamp(min=0).sqrt()
    depth, angle = torch.hypot(along, across), torch.atan2(across, along)
    near, far, half = apex - 1 + uniform(g, 0, 0.2), apex + uniform(g, 0.8, 1.2), uniform(g, 0.4, 0.9)
    return ((depth > near) & (depth < far) & (angle < half)).float()


def _cut(image: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """A smaller field of view: outside the mask is 0, and the image is 0 or repeats its rim."""
    mask = torch.ones_like(image)
    for axis in range(image.ndim - 2):
        if chance(g, 0.5):
            n = image.shape[2 + axis]
            lost = integer(g, 0, n // 5)
            places = torch.arange(n, device=g.device)
            kept = places.clamp(min=lost) if chance(g, 0.5) else places.clamp(max=n - 1 - lost)
            image = image.index_select(2 + axis, kept)
            mask = mask * (kept == places).float().view(-1, *[1] * (image.ndim - 3 - axis))
    return image * mask if chance(g, 0.5) else image, mask
