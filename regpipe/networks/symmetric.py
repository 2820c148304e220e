"""From a pair of images to a velocity: the symmetric coarse-to-fine network, and what any network says of a pair.

A network takes one tensor ``(B, 2, *spatial)``, channel 0 fixed and channel 1 moving; of images of C channels
``(B, 2 C, *spatial)``, the fixed one's first. One that gives a velocity alone
returns that tensor, as MONAI's bundle checks ask; one that gives more returns a ``Prediction``, and one tensor where it
is traced. Integration and warping are not theirs (``fields.algebra.register``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regpipe.fields.algebra import LAYERS, Layers, integrate_both, resize, resize_image, window
from regpipe.networks.encoders import CONV, VELOCITY_STRIDE, Encoder
from regpipe.networks.weights import channels_in, holds_decoder, lay_in_decoder
from regpipe.utils.errors import InputError

# Points of an image, and of a level, up to which both images, and both directions, are one batch: on the CPU torch
# convolves a single small volume 3 to 14 times slower. Of larger ones that is not so, and one takes half the memory.
SMALL_IMAGE, SMALL_LEVEL = 2**20, 2**17
STEPS = 4  # squarings of a level's velocity: coarse grids, small motions


class Prediction(NamedTuple):
    """What a network says of a pair."""

    velocity: Tensor  # (B, D, *grid), voxels of its own grid
    back: Tensor | None = None  # the same size: the way back's own velocity, where that is not minus ``velocity``
    structures: Tensor | None = None  # (B, 2 (K + 1), *full), logits, background first: fixed's, then moving's


def prediction(output: Tensor | Prediction) -> Prediction:
    """What any network returns, with names."""
    return output if isinstance(output, Prediction) else Prediction(output)


def joined(velocity: Tensor, structures: Tensor) -> Tensor:
    """Velocity and structures in one tensor: the logits, folded onto the velocity's grid, follow its channels."""
    return torch.cat([velocity, fold(structures)], 1)


def parted(output: Tensor) -> Prediction:
    """``joined`` backwards: of what a traced network with structures gives."""
    dim = output.ndim - 2
    return Prediction(output[:, :dim], structures=unfold(output[:, dim:]))


class SymmetricNet(nn.Module):
    """One encoder for both images, then a velocity refined from coarse to fine, antisymmetric in the two.

    ``net(pair (B, 2 C, *spatial)) -> velocity (B, D, *half)``, in voxels of its own grid of ``half`` points
    per axis, about ``spatial / 2``, of the same extent as the images. Swapping fixed and moving flips its sign,
    exactly: at each level ``v += (g(a, b) - g(b, a)) / 2``, a and b the features of both images in the midway
    space (moving warped by exp(v/2), fixed by exp(-v/2); Mok & Chung, CVPR 2020).

    Args:
        spatial_dims: 2 or 3.
        backbone: ``resnet18``, ``vgg16``, ``alexnet``, ``plain`` or ``pooled``.
        pretrained: where the encoder's weights come from, see ``networks.weights``.
        freeze: how many encoder stages keep their weights.
        max_stride: the encoder's coarser stages are cut off, see ``networks.encoders.Encoder``.
        transfer: what is taken from ``pretrained``: its ``encoder``, or the whole ``network``; None: of a network that
            was trained here the whole, else the encoder.
        width: channels of the decoder's coarse levels; the finest has half as many.
        correlation: radius in voxels of the local correlation that each level sees; 0 for none.
        structures: how many labelled structures the network shall tell apart, where labels supervise. It then returns
            a ``Prediction``; and the levels see the logits as features.
        layers: what warps the features and integrates, in ``STEPS`` squarings at most.
        image_channels: C, of each image; None: as a network trained here has it, else 1.

    """

    checkpointing = False

    def __init__(
        self,
        spatial_dims: int,
        backbone: str,
        *,
        pretrained: str = "none",
        freeze: int = 0,
        max_stride: int | None = None,
        transfer: str | None = None,
        width: int = 32,
        correlation: int = 1,
        structures: int = 0,
        layers: Layers = LAYERS,
        image_channels: int | None = None,
    ) -> None:
        super().__init__()
        if transfer not in (None, "encoder", "network"):
            raise InputError(f"transfer is '{transfer}': choose encoder or network")
        transfer = transfer or ("network" if holds_decoder(pretrained, backbone, spatial_dims) else "encoder")
        self.backbone, self.pretrained, self.freeze, self.transfer = backbone, str(pretrained), freeze, transfer
        self.image_channels = image_channels or channels_in(pretrained, backbone, spatial_dims)
        asked: dict[str, Any] = {"freeze": freeze, "max_stride": max_stride, "image_channels": self.image_channels}
        self.encoder = Encoder(backbone, spatial_dims, pretrained=pretrained, **asked)
        self.max_stride = self.encoder.strides[-1]
        self.detail = _Detail(spatial_dims, width // 2, self.image_channels)
        channels = {VELOCITY_STRIDE: width // 2}
        for stride, count in zip(self.encoder.strides, self.encoder.channels, strict=True):
            channels[stride] = channels.get(stride, 0) + count
        self.strides = tuple(sorted(channels, reverse=True))  # coarse to fine
        widths = [width // 2 if stride == VELOCITY_STRIDE else width for stride in self.strides]
        seen = [channels[stride] for stride in self.strides]
        self.pyramid = _Pyramid(spatial_dims, seen, widths)
        self.anatomy = _Anatomy(spatial_dims, width // 2, structures + 1, self.image_channels) if structures else None
        extra = structures + 1 if structures else 0
        self.levels = nn.ModuleList(
            _Level(spatial_dims, count + extra, count, correlation, layers.in_steps(STEPS)) for count in widths
        )
        if transfer == "network":
            lay_in_decoder(self, pretrained, backbone)

    def forward(self, pair: Tensor, *, structures_only: bool = False) -> Tensor | Prediction:
        """``structures_only``: of a network with structures; its velocity is zero, in a third of the time."""
        logits = None if self.anatomy is None else self._structures(self.anatomy, pair)  # (2B, K + 1, *grid)
        inner = self.inner_shape(pair.shape[2:])
        if structures_only:
            still = pair.new_zeros(len(pair), len(inner), *(math.ceil(n / VELOCITY_STRIDE) for n in inner))
            return self._named(still, logits, inner)
        return self._named(self._velocity(pair, logits, inner), logits, inner)

    def _named(self, velocity: Tensor, logits: Tensor | None, inner: Sequence[int]) -> Tensor | Prediction:
        if logits is None:
            return velocity
        structures = torch.cat(resize_image(logits, inner).chunk(2), 1)
        if torch.jit.is_tracing():
            return joined(velocity, structures)
        return Prediction(velocity, structures=structures)

    def _velocity(self, pair: Tensor, logits: Tensor | None, inner: Sequence[int]) -> Tensor:
        images = resize_image(pair, inner)
        seen = [self._part(self._see, both) for both in together(images.chunk(2, 1), SMALL_IMAGE)]
        maps = [torch.cat(parts) for parts in zip(*seen, strict=True)]  # (2B, C, *grid) each: fixed first
        if logits is not None:
            tissue = logits.softmax(1)
            maps = [torch.cat([x, resize_image(tissue, x.shape[2:])], 1) for x in maps]
        velocity: Tensor | None = None
        for level in self.levels:
            velocity = self._part(level, maps.pop(0), velocity)  # a map is let go of when its level has warped it
        assert velocity is not None  # every backbone has a level
        return velocity

    def checkpoint(self) -> None:
        """From now on each part's activations are freed and computed again for the gradient (Chen et al. 2016).

        The gradient is the same to the bit; it takes less memory and more time.
        """
        self.checkpointing = True

    def _part(self, compute: Callable[..., Any], *given: Tensor | None) -> Any:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return compute(*given)
        return checkpoint(compute, *given, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn

    def _see(self, images: Tensor) -> list[Tensor]:
        """(N, C, *inner) -> what each level sees of them, coarse to fine."""
        finest = {VELOCITY_STRIDE: [self.detail(images)]}
        lateral = dict(zip(self.strides, self.pyramid.lateral, strict=True))
        beside = {}
        for stride, feature in zip(self.encoder.strides, self.encoder.features(images), strict=True):
            beside[stride] = lateral[stride](*finest.pop(stride, []), feature)
        beside |= {stride: lateral[stride](*parts) for stride, parts in finest.items()}
        return self.pyramid([beside.pop(stride) for stride in self.strides])

    def _structures(self, anatomy: nn.Module, pair: Tensor) -> Tensor:
        """(B, 2 C, *spatial) -> logits (2B, K + 1, *grid), fixed's first, on a grid that a U-Net halves four times."""
        # 16 k points; of 16 an axis one would be left at the bottom, and instance norm refuses a single one
        images = resize_image(pair, [max(n - 1, 32) for n in self.inner_shape(pair.shape[2:])])
        return torch.cat([self._part(anatomy, both) for both in together(images.chunk(2, 1), SMALL_IMAGE)])

    def inner_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid that images of ``shape`` are looked at on."""
        # On grids of 16 k + 1 points every level's first and last voxel sit on the image's corners,
        # as align_corners says; on others a velocity of stride 16 would be 15 voxels off at the far end.
        coarsest = self.strides[0]
        return tuple(-(-(int(n) - 1) // coarsest) * coarsest + 1 for n in shape)


class _Detail(nn.Module):
    """A cheap, untransferred view of the full-resolution image: the cells that ``fold`` makes of it, at stride 2."""

    def __init__(self, spatial_dims: int, width: int, channels: int) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        first, then = conv(channels * 2**spatial_dims, width, 3, padding=1), conv(width, width, 3, padding=1)
        rectify = functools.partial(nn.LeakyReLU, 0.2, inplace=True)
        self.texture = nn.Sequential(first, rectify(), then, rectify())

    def forward(self, images: Tensor) -> Tensor:
        return self.texture(fold(images))


class _Anatomy(nn.Module):
    """Images -> logits of the structures in them, by a residual U-Net (MONAI's; Kerfoot et al. 2018) of its own.

    It costs less than the full-resolution features that a head on the encoder would need, and sees more
    (docs/results/accuracy.md, prostate).
    """

    def __init__(self, spatial_dims: int, width: int, classes: int, image_channels: int) -> None:
        from monai.networks.nets import UNet  # MONAI takes seconds to import

        super().__init__()
        channels = [width << i for i in range(5)]
        self.net = UNet(spatial_dims, image_channels, classes, channels, strides=(2, 2, 2, 2), num_res_units=2)
        self.classes = CONV[spatial_dims](classes, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.net(images))


def fold(x: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C 2^D, *half), half = ceil(spatial / 2): the points of each cell of two become channels.

    So that what is known at full resolution fits into one tensor with the velocity. An odd last one is doubled.
    """
    odd = [int(n) % 2 for n in reversed(x.shape[2:])]
    x = F.pad(x, [end for n in odd for end in (0, n)], mode="replicate")
    dims = x.ndim - 2
    half = [int(n) // 2 for n in x.shape[2:]]
    cells = x.reshape(*x.shape[:2], *(size for n in half for size in (n, 2)))
    within, between = [3 + 2 * i for i in range(dims)], [2 + 2 * i for i in range(dims)]
    return cells.permute(0, 1, *within, *between).reshape(len(x), -1, *half)


def unfold(x: Tensor) -> Tensor:
    """``fold`` backwards, for grids of an odd number of points: (B, C 2^D, *half) -> (B, C, *(2 half - 1))."""
    dims = x.ndim - 2
    half = [int(n) for n in x.shape[2:]]
    cells = x.reshape(len(x), -1, *([2] * dims), *half)
    order = [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]
    whole = cells.permute(0, 1, *order).reshape(len(x), -1, *(2 * n for n in half))
    return window(whole, [0] * dims, [2 * n - 1 for n in half])


class _Pyramid(nn.Module):
    """Encoder features, coarse to fine, each joined by what the coarser ones know of its place (Lin et al. 2017)."""

    def __init__(self, spatial_dims: int, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        self.lateral = nn.ModuleList(
            _OfParts(conv(count, width, 1), nn.GroupNorm(4, width))
            for count, width in zip(channels, widths, strict=True)
        )
        self.merge = nn.ModuleList(
            _OfParts(conv(coarse + width, width, 3, padding=1), nn.LeakyReLU(0.2, inplace=True), nn.GroupNorm(4, width))
            for coarse, width in itertools.pairwise(widths)
        )

    def forward(self, beside: Sequence[Tensor]) -> list[Tensor]:
        """``beside``: what ``lateral`` made of each level's features."""
        maps = [beside[0]]
        for merge, feature in zip(self.merge, beside[1:], strict=True):
            maps.append(merge(resize_image(maps[-1], feature.shape[2:]), feature))
        return maps


class _OfParts(nn.Sequential):
    """A convolution, and what follows it, of features in several tensors: as of the joined ones, without the copy."""

    def forward(self, *parts: Tensor) -> Tensor:
        conv = cast("nn.Conv2d | nn.Conv3d", self[0])
        convolve: Callable[..., Tensor] = {4: F.conv2d, 5: F.conv3d}[parts[0].ndim]
        kernels = conv.weight.split([x.shape[1] for x in parts], 1)
        bias = [conv.bias, *[None] * (len(parts) - 1)]
        seen = (convolve(x, w, b, padding=conv.padding) for x, w, b in zip(parts, kernels, bias, strict=True))
        x = functools.reduce(torch.add, seen)
        for module in self[1:]:
            x = module(x)
        return x


class _Level(nn.Module):
    """One resolution: a map of both images and the velocity so far -> the velocity here."""

    def __init__(self, spatial_dims: int, channels: int, width: int, correlation: int, layers: Layers) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        reach = range(-correlation, correlation + 1) if correlation else range(0)
        self.offsets = list(itertools.product(reach, repeat=spatial_dims))
        seen = 2 * channels + len(self.offsets)
        self.head = _OfParts(
            conv(seen, width, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            conv(width, width, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.layers = layers
        self.flow = conv(width, spatial_dims, 3, padding=1, bias=False)
        nn.init.normal_(self.flow.weight, std=1e-3)  # begin near the identity

    def forward(self, features: Tensor, velocity: Tensor | None) -> Tensor:
        if velocity is not None:
            # integrated where it was made: an eighth of the points, and the same to interpolation
            forward, backward = integrate_both(velocity / 2, layers=self.layers)
            features = self.layers.warp(features, resize(torch.cat([backward, forward]), features.shape[2:]))
            velocity = resize(velocity, features.shape[2:])
        a, b = features.chunk(2)
        sides: list[tuple[Tensor, ...]] = [(a, b), (b, a)]
        if self.offsets:
            alike = local_correlations(a, b, self.offsets)
            sides = [(*both, torch.cat(list(x), 1)) for both, x in zip(sides, alike, strict=True)]
        batches = zip(*(together(parts, SMALL_LEVEL) for parts in zip(*sides, strict=True)), strict=True)
        ours, theirs = torch.cat([self.flow(self.head(*parts)).float() for parts in batches]).chunk(2)
        residual = (ours - theirs) / 2
        return residual if velocity is None else velocity + residual


def together(parts: Sequence[Tensor], points: int) -> Sequence[Tensor]:
    """(B, C, *grid) each -> one batch of them all; themselves, where a grid has more than so many points."""
    return [torch.cat(list(parts))] if math.prod(int(n) for n in parts[0].shape[2:]) <= points else parts


def local_correlations(a: Tensor, b: Tensor, offsets: list[tuple[int, ...]]) -> tuple[list[Tensor], Iterator[Tensor]]:
    """How alike b is at each offset from a, and a from b: (B, C, *grid) twice -> two series of (B, 1, *grid).

    ``ahead_o(x) = mean over channels of a(x) b(x + o)``, 0 where x + o is off the grid; ``back`` has a and b
    swapped, and is the same products seen from their other end: ``back_o(x) = ahead_-o(x + o)``.
    """
    radius, grid = max(offsets[-1]), a.shape[2:]
    rim = [radius] * 2 * (b.ndim - 2)
    padded = F.pad(b, rim)
    ahead = [_channel_mean(a * window(padded, [radius + o for o in offset], grid)) for offset in offsets]
    opposite = zip(offsets, reversed(ahead), strict=True)  # offsets are symmetric about 0
    back = (window(F.pad(x, rim), [radius + o for o in offset], grid) for offset, x in opposite)
    return ahead, back


def _channel_mean(x: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, 1, *grid), to the bit the same wherever a voxel lies, which ``x.mean(1)`` is not."""
    count = x.shape[1]
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        halves = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([halves, x[:, 2 * half :]], 1) if x.shape[1] % 2 else halves
    return x / count
