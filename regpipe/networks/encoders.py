"""The transferred backbones, resnet18, vgg16 and alexnet, and two yardsticks, in 2D and 3D, behind one contract.

Contract of an encoder
----------------------
``encoder(image (B, C, *spatial)) -> list of features``, C = 1 or as it is told, finest first; feature ``i`` is
``(B, channels[i], *ceil(spatial / strides[i]))`` for any input size, odd sizes included.
``channels`` and ``strides`` are attributes; whoever uses an encoder reads these and never its name.

The layers are torchvision's (``networks.layouts``); the yardsticks are ``plain``, whose layers are SYMNet's, and
``pooled``, which has no features: the image itself, averaged. Three things are done to
them:

- grey for RGB: the stem's three input channels are summed, and images in [0, 1] are shifted and
  scaled by the mean of ImageNet's statistics, so that a pretrained stem sees what it was trained on; of C channels
  each has a C-th of that, three those of the colours;
- inflation to 3D (Carreira & Zisserman 2017): kernels are repeated along the new axis and divided by its
  length, so that a volume constant along that axis gives the 2D features (away from its two ends);
- centred padding, so that feature ``i`` looks at the image around voxel ``stride * i`` and no size is too small
  (VGG16's 2 x 2 windows begin at that voxel: it looks half a stride further on).

Batch statistics make no sense with one pair in a batch: BatchNorm is frozen when weights are transferred
(its statistics belong to them) and replaced by GroupNorm when they are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regpipe.networks import layouts
from regpipe.networks.weights import lay_in, read_weights
from regpipe.utils.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = 0.449, 0.226  # the means over the three colours
MAX_STRIDE = 16  # a coarser feature map, of two or three voxels, tells nothing of motion
VELOCITY_STRIDE = 2  # the velocity lives at half resolution: the network's finest level
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class Backbone(NamedTuple):
    """How to cut a network into stages, finest first, and how coarse each is."""

    build: Callable[[], nn.Module]
    stages: Callable[[nn.Module], list[nn.Module]]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    # VGG16's stride-1 first stage costs more than all else together, and the velocity lives at half
    # resolution anyhow: its images are averaged 2x first. The other two begin with a strided stem.
    halve_first: bool = False


def _resnet18_stages(net: Any) -> list[nn.Module]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu)
    return [stem, nn.Sequential(net.maxpool, net.layer1), net.layer2, net.layer3, net.layer4]


def _vgg16_stages(net: Any) -> list[nn.Module]:
    layers = list(net.features)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    for i in pools:
        layers[i].ceil_mode = True  # an odd last row is kept
    starts = [0, *pools[:-1]]
    return [nn.Sequential(*layers[a:b]) for a, b in zip(starts, pools, strict=True)]


def _alexnet_stages(net: Any) -> list[nn.Module]:
    layers = list(net.features)
    layers[0].padding = (5, 5)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    for i in pools:
        layers[i].padding = 1
    return [nn.Sequential(*layers[a:b]) for a, b in zip([0, *pools[:-1]], pools, strict=True)]


class Plain(nn.Module):
    """The way down of SYMNet's U-Net (Mok & Chung, CVPR 2020) for one RGB image: pairs of 3 x 3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 8, 16, 32, 64), (1, 2, 2, 2)
        down = [two_convolutions(2, a, b, b, stride) for a, b, stride in zip(widths, widths[1:], strides, strict=False)]
        self.down = nn.ModuleList(down)
        self.bottom = two_convolutions(2, 64, 128, 64, stride=2)


def two_convolutions(spatial_dims: int, first: int, middle: int, last: int, stride: int = 1) -> nn.Sequential:
    """SYMNet's block."""
    conv = CONV[spatial_dims]
    return nn.Sequential(
        conv(first, middle, 3, stride=stride, padding=1), nn.ReLU(), conv(middle, last, 3, padding=1), nn.ReLU()
    )


class Pooled(nn.Module):
    """No features at all: the image, averaged over 2, 4, 8 and 16 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(_Halve() for _ in range(4))


class _Halve(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return halve(image)


def _plain_stages(net: Any) -> list[nn.Module]:
    return [nn.Sequential(net.down[0], net.down[1]), net.down[2], net.down[3], net.bottom]


def _pooled_stages(net: Any) -> list[nn.Module]:
    return [nn.Sequential(pool) for pool in net.pools]


BACKBONES: dict[str, Backbone] = {
    "resnet18": Backbone(layouts.ResNet18, _resnet18_stages, (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
    "vgg16": Backbone(layouts.vgg16, _vgg16_stages, (64, 128, 256, 512, 512), (2, 4, 8, 16, 32), halve_first=True),
    "alexnet": Backbone(layouts.alexnet, _alexnet_stages, (64, 192, 256), (4, 8, 16)),
    "plain": Backbone(Plain, _plain_stages, (16, 32, 64, 64), (2, 4, 8, 16)),
    "pooled": Backbone(Pooled, _pooled_stages, (1, 1, 1, 1), (2, 4, 8, 16)),
}
# Names of the study for one that ends early, so that depth alone differs: (backbone, ``max_stride``).
CUT = {"vgg16_4": ("vgg16", 4), "vgg16_8": ("vgg16", 8)}
STAGE, LEVEL = re.compile(r"(?:encoder\.)?stages\.(\d+)\."), re.compile(r"levels\.(\d+)\.")  # names in a file of ours
TRANSFERRED = ("resnet18", "vgg16", "alexnet")  # weights of these are published


class Encoder(nn.Module):
    """A backbone's stages up to ``max_stride``; see the contract above.

    Args:
        backbone: a key of ``BACKBONES``.
        spatial_dims: 2 or 3.
        pretrained: ``none``, ``imagenet``, ``medicalnet`` or a file; see ``networks.weights``.
        freeze: how many stages, finest first, keep their weights during training.
        max_stride: coarser stages are cut off; None: as many stages as a network trained here has, else ``MAX_STRIDE``.
        image_channels: of an image.

    Raises:
        InputError: unknown backbone, dimension, a stride finer than the finest, or weights that do not fit.
    """

    def __init__(
        self,
        backbone: str,
        spatial_dims: int,
        *,
        pretrained: str = "none",
        freeze: int = 0,
        max_stride: int | None = None,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise InputError(f"unknown backbone '{backbone}': choose one of {', '.join(BACKBONES)}")
        if spatial_dims not in (2, 3):
            raise InputError(f"spatial_dims is {spatial_dims}: images are 2D or 3D")
        spec = BACKBONES[backbone]
        state = read_weights(pretrained, backbone, spatial_dims)
        kept = _kept(backbone, max_stride, state or {})
        if not 0 <= freeze <= len(kept):
            raise InputError(f"freeze is {freeze}: {backbone} has {len(kept)} stages here")
        self.strides = tuple(spec.strides[i] for i in kept)
        with torch.device("meta"):  # the classifiers, nine tenths of all weights, are never made
            net = spec.build()
        stages = nn.ModuleList(spec.stages(net)[: len(kept)])
        names = _original_names(net, stages)
        _make_room(stages)
        has_stem = _take(stages, image_channels)
        self.channels = tuple(spec.channels[i] * (1 if has_stem else image_channels) for i in kept)
        keep_norm = state is not None and any(name.endswith("running_mean") for name in state)
        self.stages = nn.ModuleList(adapt(stage, spatial_dims, keep_statistics=keep_norm) for stage in stages)
        self.stages.apply(_initialise)
        if state is not None:
            lay_in(self.stages, state, names, source=pretrained)
        self.halve_first = spec.halve_first
        self.stages[:freeze].requires_grad_(False)
        self.train()  # which keeps transferred BatchNorm from learning, from the first image on

    def train(self, mode: bool = True) -> Encoder:
        """Frozen stages, and the statistics of transferred BatchNorm, stay as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        return list(self.features(image))

    def features(self, image: Tensor) -> Iterator[Tensor]:
        """The same one by one: whoever lets go of each before the next needs half the memory."""
        x = (image - IMAGENET_MEAN) / IMAGENET_STD
        if self.halve_first:
            x = halve(x)
        for stage in self.stages:
            x = stage(x)
            yield x


def _kept(backbone: str, max_stride: int | None, state: dict[str, Tensor]) -> range:
    """Which stages: as far as ``max_stride``, or as ``state`` has them, if it is of a network trained here."""
    strides = BACKBONES[backbone].strides
    if max_stride is not None and not isinstance(max_stride, int):
        raise InputError(f"--max_stride {max_stride}: give a whole number, {strides[0]} to {MAX_STRIDE}, or null")
    asked = sum(stride <= (MAX_STRIDE if max_stride is None else max_stride) for stride in strides)
    if not asked:
        raise InputError(f"--max_stride {max_stride}: {backbone}'s finest stage has stride {strides[0]}; give no less")
    stages, levels = (1 + max((int(m[1]) for m in map(part.match, state) if m), default=-1) for part in (STAGE, LEVEL))
    if levels:  # one for each stride; a stage may have no tensors
        held = max(k for k in range(len(strides) + 1) if len({VELOCITY_STRIDE, *strides[:k]}) <= levels)
    elif stages:
        held = min(stages, len(strides))
    else:
        return range(asked)
    if max_stride is not None and asked > held:
        raise InputError(f"--max_stride {max_stride}: those weights end at stride {strides[held - 1]}; give no more")
    return range(held if max_stride is None else asked)


def _original_names(net: nn.Module, stages: nn.Module) -> dict[str, str]:
    """Module path within ``stages`` -> path within torchvision's ``net``, of which they are parts."""
    original = {module: name for name, module in net.named_modules()}
    return {name: original[m] for name, m in stages.named_modules() if m in original}


def _make_room(stages: nn.Module) -> None:
    """Memory for tensors of the meta device, as ``to_empty``, which imports sympy: a quarter of a second."""
    for module in stages.modules():
        for name, tensor in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _take(stages: nn.Module, channels: int) -> bool:
    """Give the stem so many input channels; its weights are laid in afterwards. Whether there is one."""
    stem = next((m for m in stages.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is not None:
        stem.weight = nn.Parameter(stem.weight.detach()[:, :1].repeat(1, channels, 1, 1))
        stem.in_channels = channels
    return stem is not None


def adapt(module: nn.Module, spatial_dims: int, *, keep_statistics: bool) -> nn.Module:
    """A stage's layers for ``spatial_dims``: convolutions and pools inflated, BatchNorm kept or replaced."""
    for name, child in module.named_children():
        setattr(module, name, adapt(child, spatial_dims, keep_statistics=keep_statistics))
    if isinstance(module, nn.ReLU):
        return nn.ReLU(inplace=True)  # each stage begins with what leaves its input alone
    if isinstance(module, nn.BatchNorm2d):
        return _norm(module, spatial_dims, keep_statistics)
    if spatial_dims == 3 and isinstance(module, nn.Conv2d):
        return _conv3d(module)
    if spatial_dims == 3 and isinstance(module, nn.MaxPool2d):
        size, stride, padding = (_first(v) for v in (module.kernel_size, module.stride, module.padding))
        return nn.MaxPool3d(size, stride, padding, ceil_mode=module.ceil_mode)
    return module


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]  # every kernel here is square


def _conv3d(conv: nn.Conv2d) -> nn.Conv3d:
    size, stride, padding = (_first(v) for v in (conv.kernel_size, conv.stride, conv.padding))  # type: ignore[arg-type]
    return nn.Conv3d(conv.in_channels, conv.out_channels, size, stride, padding, bias=conv.bias is not None)


def _norm(norm: nn.BatchNorm2d, spatial_dims: int, keep_statistics: bool) -> nn.Module:
    if not keep_statistics:
        return nn.GroupNorm(16, norm.num_features)
    return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[spatial_dims](norm.num_features)


def halve(image: Tensor) -> Tensor:
    """Average of 2 voxels along every axis, (B, C, *n) -> (B, C, *ceil(n / 2)); an odd last one stays as it is."""
    odd = [int(n) % 2 for n in reversed(image.shape[2:])]  # an int also while tracing
    padded = F.pad(image, [end for n in odd for end in (0, n)], mode="replicate")
    return {4: F.avg_pool2d, 5: F.avg_pool3d}[image.ndim](padded, 2)


def _initialise(module: nn.Module) -> None:
    # He et al. 2015
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
