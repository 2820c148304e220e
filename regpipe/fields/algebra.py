"""Field algebra: warp, compose, integrate, resize, Jacobian. The one convention of regpipe stands here.

Convention
----------
- A displacement ``u`` is ``(B, D, *spatial)`` in **voxels of the grid it lives on** (the fixed grid);
  channel ``i`` moves along array axis ``i``; D is 2 or 3.
- Fields pull: ``warp(image, u)(x) = image(x + u(x))``.
- ``compose(u, v)(x) = v(x) + u(x + v(x))``, so that ``warp(warp(I, u), v) = warp(I, compose(u, v))``.
- A velocity ``v`` is stationary; ``exp(v)`` is its displacement after unit time and ``exp(-v)`` the inverse.
- Grids are corner-aligned (``align_corners=True``) and images continue beyond the rim (border padding).
- Everything is computed in float32, whatever the autocast: a half-precision grid is off by 0.1 voxel.
- On disk, and only there, displacements are LPS millimetres: see ``transforms.displacement``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARINGS = 7
EXACT = 2**24  # whole numbers below it are float32's


class Registration(NamedTuple):
    """What registering a batch of pairs gives. Fields are in voxels, see the convention above."""

    velocity: Tensor  # (B, D, *grid), voxels of its own grid, maybe coarser than the images
    displacement: Tensor  # (B, D, *spatial): warps moving onto fixed
    inverse: Tensor  # (B, D, *spatial): warps fixed onto moving
    warped_moving: Tensor  # (B, C, *spatial)
    warped_fixed: Tensor  # (B, C, *spatial)
    back: Tensor | None = None  # as ``velocity``: the way back's own, of networks that are not symmetric

    @classmethod
    def of(cls, prediction: Mapping[str, Any], cases: slice = slice(None)) -> Registration:
        """Of what an inferer gives, some cases' own; what else that holds is left."""
        return cls(**{name: prediction[name][cases] for name in cls._fields if prediction.get(name) is not None})

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, without ``back`` where there is none."""
        return {name: field for name, field in self._asdict().items() if field is not None}


# A field is sampled in grid_sample's own units, from -1 to 1 across the grid and the last axis first. Integration stays
# in them from its first step to its last: MONAI's Warp, whose values these are, converts at each call, which costs as
# much again as the sampling.


@functools.lru_cache(maxsize=8)
def _places(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the grid's points are (1, D, *shape), and how long a voxel is (1, D, 1, ...), in grid_sample's units."""
    with torch.inference_mode(False), torch.no_grad():  # it outlives whatever mode it is first asked for in
        cells = torch.tensor([max(n - 1, 1) for n in reversed(shape)], device=device).view(1, -1, *[1] * len(shape))
        # divided last, as in MONAI's Warp: 2 i / n is rounded once
        return 2 * identity_grid(shape, device=device).flip(1) / cells - 1, 2 / cells


def _at_hand(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """``_places``, kept between calls; but not while torch exports, whose fake tensors would be kept."""
    find = _places.__wrapped__ if torch.compiler.is_compiling() else _places
    return find(shape, device)


@contextlib.contextmanager
def places_anew() -> Iterator[None]:
    """Within it the grids' places are computed anew, and none of them is kept after it: for fake tensors, say."""
    _places.cache_clear()
    try:
        yield
    finally:
        _places.cache_clear()


def sample(image: Tensor, where: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """(B, C, *any) at places (B, D, *spatial), in grid_sample's units -> (B, C, *spatial)."""
    return F.grid_sample(image, where.movedim(1, -1), mode=mode, padding_mode=padding, align_corners=True)


def warp(image: Tensor, u: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Pull ``image`` (B, C, *spatial) through ``u`` (B, D, *spatial): ``image(x + u(x))``.

    Args:
        image: any dtype for ``mode="nearest"`` (labels); otherwise floating.
        u: displacement in voxels, on the image's own grid.
        mode: ``bilinear`` (linear in any dimension), ``nearest`` or ``bicubic``.
        padding: what lies beyond the rim: ``border``, ``zeros`` or ``reflection``.

    Raises:
        ValueError: if the grids differ.
    """
    if image.shape[2:] != u.shape[2:] or len(image) != len(u):
        raise ValueError(f"an image {tuple(image.shape)} is not on the grid of the displacement {tuple(u.shape)}")
    with torch.autocast(u.device.type, enabled=False):
        places, voxel = _at_hand(tuple(u.shape[2:]), u.device)
        where = torch.addcmul(places, u.float().flip(1), voxel)
        if image.dtype in (torch.int32, torch.int64) and image.abs().max() >= EXACT:
            return _sample_ids(image, where, mode, padding)
        return sample(image.float(), where, mode, padding).to(image.dtype)


def _sample_ids(labels: Tensor, where: Tensor, mode: str, padding: str) -> Tensor:
    """``sample`` of labels that float32 cannot hold: of their places in the list of ids, 0 for 0."""
    ids = torch.cat([labels.new_zeros(1), labels[labels != 0].unique()])
    places = torch.where(labels == 0, 0, torch.searchsorted(ids[1:], labels.contiguous()) + 1)
    return ids[sample(places.float(), where, mode, padding).long()]


def integrate(v: Tensor, *, squarings: int = SQUARINGS, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """exp(v) of a stationary velocity (B, D, *spatial) by scaling and squaring (Arsigny 2006), in float32.

    ``mode``, ``padding``: as ``warp``'s.
    """
    with torch.autocast(v.device.type, enabled=False):
        places, voxel = _at_hand(tuple(v.shape[2:]), v.device)
        unit = v.float().flip(1) * (voxel / 2**squarings)
        for _ in range(squarings):
            unit = unit + sample(unit, places + unit, mode, padding)
        return (unit / voxel).flip(1)


class Layers(NamedTuple):
    """What warps, ``warp(image, u)``, and what integrates, ``dvf2ddf(v)``: the functions above, or MONAI's layers."""

    warp: Callable[[Tensor, Tensor], Tensor]
    dvf2ddf: Callable[[Tensor], Tensor]

    def in_steps(self, most: int) -> Layers:
        """The same with ``most`` squarings, where the layer that integrates takes more (its ``num_steps``)."""
        if getattr(self.dvf2ddf, "num_steps", 0) <= most:
            return self
        quicker = copy.copy(self.dvf2ddf)
        quicker.num_steps = most  # type: ignore[attr-defined]  # MONAI's
        return Layers(self.warp, quicker)


class Integration:
    """``integrate`` as a layer, in ``num_steps`` squarings."""

    def __init__(self, num_steps: int = SQUARINGS) -> None:
        self.num_steps = num_steps

    def __call__(self, v: Tensor) -> Tensor:
        return integrate(v, squarings=self.num_steps)


LAYERS = Layers(warp, Integration())


def compose(u: Tensor, v: Tensor, *, layers: Layers = LAYERS) -> Tensor:
    """``compose(u, v)(x) = v(x) + u(x + v(x))``: the displacement of first v, then u. Both (B, D, *spatial)."""
    v = v.float()
    return v + layers.warp(u.float(), v)


def integrate_both(v: Tensor, *, layers: Layers = LAYERS) -> tuple[Tensor, Tensor]:
    """(exp(v), exp(-v)) in one batch."""
    forward, backward = layers.dvf2ddf(torch.cat([v, -v])).chunk(2)
    return forward, backward


def resize(u: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a field (B, D, *spatial) onto another grid of the same extent; its vectors scale with the grid.

    Corner-aligned: a grid of n points spans n-1 voxels, so axis i scales by ``(shape[i] - 1) / (n_i - 1)``.
    """
    u, old, new = u.float(), u.shape[2:], tuple(shape)
    if tuple(old) == new:
        return u
    scale = u.new_tensor([(n - 1) / max(o - 1, 1) for o, n in zip(old, new, strict=True)])
    return resize_image(u, new) * scale.view(1, -1, *[1] * len(new))


def resize_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample (B, C, *spatial) linearly onto a grid of the same extent, corner-aligned."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    mode = "bilinear" if image.ndim == 4 else "trilinear"
    return F.interpolate(image, size=tuple(shape), mode=mode, align_corners=True)


def smooth(x: Tensor, axis: int, sigma: float, *, reach: float = 2.5) -> Tensor:
    """(B, C, *spatial) by a Gaussian along one axis of the tensor, cut off at ``reach`` sigmas, the rim repeated."""
    radius, n = max(1, math.ceil(reach * sigma)), x.shape[axis]
    taps = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    at = torch.arange(-radius, n + radius, device=x.device).clamp(0, n - 1)
    padded, total = x.index_select(axis, at), torch.zeros_like(x)
    for i, weight in enumerate((taps / taps.sum()).tolist()):
        total.add_(padded.narrow(axis, i, n), alpha=weight)
    return total


def window(x: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """The part of the last axes that begins at ``start`` and has ``size``: a view."""
    for axis, (first, n) in enumerate(zip(start, size, strict=True), start=-len(start)):
        x = x.narrow(axis, first, n)
    return x


def identity_grid(shape: Sequence[int], *, device: torch.device | None = None) -> Tensor:
    """Voxel coordinates (1, D, *shape) of every voxel, float32."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample_at(u: Tensor, points: Tensor) -> Tensor:
    """Linear interpolation of a field (B, C, *spatial) at points (B, K, D) in voxels -> (B, K, C)."""
    dim = points.shape[-1]
    extent = points.new_tensor([max(n - 1, 1) for n in u.shape[2:]])
    unit = (2 * points / extent - 1).flip(-1)  # grid_sample wants (x, y, z) = last axis first
    where = unit.reshape(len(unit), -1, *[1] * (dim - 1), dim)
    values = F.grid_sample(u.float(), where.float(), mode="bilinear", padding_mode="border", align_corners=True)
    return values.flatten(2).transpose(1, 2)


def differences(u: Tensor, axis: int) -> Tensor:
    """Forward differences along spatial ``axis``; that axis is one shorter."""
    return torch.diff(u, dim=2 + axis)


def jacobian_determinant(u: Tensor) -> Tensor:
    """det(I + grad u) of (B, D, *spatial) -> (B, *spatial), by central differences, one-sided at the rim."""
    columns = torch.gradient(u.float(), dim=tuple(range(2, u.ndim)))
    jacobian = torch.stack(columns, dim=2).movedim((1, 2), (-2, -1))
    return determinant(jacobian + torch.eye(u.shape[1], device=u.device))


def determinant(matrix: Tensor) -> Tensor:
    """Determinant of (..., D, D) for D = 2 or 3, written out (torch.linalg.det is 20 times slower here)."""
    m = [[matrix[..., i, j] for j in range(matrix.shape[-1])] for i in range(matrix.shape[-1])]
    if len(m) == 2:
        return m[0][0] * m[1][1] - m[0][1] * m[1][0]
    return (
        m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
    )


def register(fixed: Tensor, moving: Tensor, velocity: Tensor, *, layers: Layers = LAYERS) -> Registration:
    """What a symmetric velocity (B, D, *grid) does to images (B, C, *spatial): exp(v) and exp(-v), both warps.

    The velocity may live on a coarser grid of the same extent: it is integrated there and the
    displacement is resized, which costs an eighth and differs by less than interpolation does.
    """
    both = (resize(u, fixed.shape[2:]) for u in integrate_both(velocity, layers=layers))
    return _registration(fixed, moving, velocity, *both, layers=layers)


def register_midway(
    fixed: Tensor, moving: Tensor, velocity: Tensor, back: Tensor, *, layers: Layers = LAYERS
) -> Registration:
    """The same for SYMNet's two velocities (B, D, *spatial), through the midway space (Mok & Chung 2020, eq. 5).

    ``back``, v_FM, takes fixed halfway to moving and ``velocity``, v_MF, moving halfway to fixed; so moving goes onto
    fixed by ``compose(exp(v_MF), exp(-v_FM))`` and fixed onto moving by ``compose(exp(v_FM), exp(-v_MF))``.
    """
    both = layers.dvf2ddf(torch.cat([back, velocity, -back, -velocity]))
    fm, mf, fm_back, mf_back = both.chunk(4)
    forward, backward = compose(mf, fm_back, layers=layers), compose(fm, mf_back, layers=layers)
    return _registration(fixed, moving, velocity, forward, backward, layers=layers)._replace(back=back)


def _registration(
    fixed: Tensor, moving: Tensor, velocity: Tensor, forward: Tensor, backward: Tensor, *, layers: Layers
) -> Registration:
    warped = warp_both(moving, fixed, forward, backward, layers=layers)
    return Registration(velocity, forward, backward, *warped)


def warp_both(
    moving: Tensor, fixed: Tensor, forward: Tensor, backward: Tensor, *, layers: Layers = LAYERS
) -> tuple[Tensor, Tensor]:
    """Moving onto fixed, and fixed onto moving; without a gradient one after the other, in half the memory."""
    if not torch.is_grad_enabled():
        return layers.warp(moving, forward), layers.warp(fixed, backward)
    both = layers.warp(torch.cat([moving, fixed]), torch.cat([forward, backward]))
    warped_moving, warped_fixed = both.chunk(2)
    return warped_moving, warped_fixed
