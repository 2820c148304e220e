"""A registration with everything that the terms of the loss look at, and one term's value."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regpipe.fields.algebra import Registration, register, resize_image
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.encoders import Encoder

WAYS = ("displacement", "inverse")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(batch: int, channels: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Random in [0, 1], on a grid four times coarser, then interpolated."""
    return resize_image(noise(batch, channels, *[n // 4 + 2 for n in shape], seed=seed), shape)


def two(shape: Sequence[int], batch: int = 1) -> tuple[Tensor, Tensor]:
    """Images that correlate, but not everywhere alike."""
    a = noise(batch, 1, *shape)
    return a, 0.5 * a + 0.5 * noise(batch, 1, *shape, seed=1)


def box(shape: Sequence[int], *sizes: int) -> Tensor:
    """A mask (1, 1, *shape): 1 in the corner of these sizes."""
    mask = torch.zeros(1, 1, *shape)
    mask[(slice(None), slice(None), *[slice(n) for n in sizes])] = 1
    return mask


@functools.cache
def random_encoder(dim: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder("alexnet", dim)


def fields_only(u: Tensor, inverse: Tensor | None = None, velocity: Tensor | None = None) -> Registration:
    image = torch.zeros(len(u), 1, *u.shape[2:])
    return Registration(u if velocity is None else velocity, u, -u if inverse is None else inverse, image, image)


def constant(shape: Sequence[int], *vector: float) -> Tensor:
    return torch.tensor(vector).view(1, -1, *[1] * len(shape)).expand(1, -1, *shape)


def term(name: str, r: Registration, target: dict[str, Tensor], **options: Any) -> Tensor:
    if name == "features":
        options["encoder"] = random_encoder(r.displacement.shape[1])
    if name == "anatomy":
        options.setdefault("label_ids", (1, 2))
    return RegistrationLoss({name: 1.0}, **options)(r._asdict(), target)


def example(shape: Sequence[int], *, half: bool = True, masks: bool = False) -> tuple[Registration, dict[str, Tensor]]:
    """A registration by a velocity of some voxels, with everything that the terms look at."""
    grid = [n // 2 + 1 for n in shape] if half else list(shape)
    velocity = 4 * smooth(2, len(shape), grid, seed=1) - 2
    fixed, moving = smooth(2, 1, shape, seed=2), smooth(2, 1, shape, seed=3)
    points = 1 + 7 * noise(2, 5, len(shape), seed=4)
    target = {"fixed_image": fixed, "moving_image": moving, "fixed_landmarks": points, "moving_landmarks": points + 0.5}
    target |= {"fixed_label": (3 * fixed).int(), "moving_label": (3 * moving).int()}
    target["anatomy"] = 4 * noise(2, 6, *grid, seed=6) - 2
    target |= {f"{side}_clean": smooth(2, 1, shape, seed=9 + i) for i, side in enumerate(("fixed", "moving"))}
    target |= {way: 4 * smooth(2, len(shape), shape, seed=7 + i) - 2 for i, way in enumerate(WAYS)}
    if masks:
        seen = smooth(4, 1, shape, seed=5) > 0.4
        target |= {"fixed_mask": seen[:2].float(), "moving_mask": seen[2:].float()}
    return register(fixed, moving, velocity), target
