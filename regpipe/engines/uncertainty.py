"""How certain a registration is at each place, by how much its result depends on the start.

The moving image is moved by a small random diffeomorphism, registered again, and both motions composed: what the images
determine comes out the same, what they leave open comes out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regpipe.engines.inferers import Inferer
from regpipe.fields.algebra import compose, integrate, resize_image, warp
from regpipe.losses.lncc import box_sum

MEMBERS = 6  # registrations more
START = 2.0  # voxels, root mean square: how far each begins elsewhere
KNOTS = 6  # of such a start, along an axis
BESIDE = 110  # bytes a voxel
REACH = 9  # voxels of a side over which the spread is averaged: of six members it is rough
# Error of known motions over spread, root mean squares: docs/results/harm.md#how-sure
FLOOR, FACTOR = 0.25, 0.85  # voxels, and voxels per voxel


class Ensemble(Inferer):
    """An inferer whose answer also says ``uncertainty`` (B, D, *spatial): the error to expect along each axis.

    It is a root mean square in voxels of the grid. The answer itself is the inferer's own. It takes ``MEMBERS`` times
    as long again; ``BESIDE`` is what it holds meanwhile.
    """

    def __init__(self, inferer: Any) -> None:
        self.inferer = inferer

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Any],
        *args: Any,
        masks: Sequence[Tensor] = (),
        **told: Any,
    ) -> dict[str, Any]:
        found: dict[str, Any] = self.inferer(inputs, network, *args, masks=masks, **told)
        channels = told.get("channels")
        shape, u = inputs.shape[2:], found["displacement"]
        generator = torch.Generator().manual_seed(0)
        squares, (fixed, moving) = torch.zeros_like(u), inputs.float().chunk(2, dim=1)
        for _ in range(MEMBERS):
            start = integrate(random_velocity(shape, generator).to(u)).expand_as(u)
            pair = torch.cat([fixed, warp(moving, start)], 1)
            seen = [masks[0], (warp(masks[1].float(), start) > 0.5).float()] if masks else ()
            if channels:
                told["channels"] = channels[0], warp(channels[1].float(), start)
            other = self.inferer(pair, network, *args, masks=seen, **told)["displacement"]
            squares += (compose(start, other) - u).square() / MEMBERS
            del start, pair, other
        spread = box_sum(squares, REACH) / box_sum(torch.ones_like(squares), REACH)
        return {**found, "uncertainty": (FLOOR**2 / len(shape) + FACTOR**2 * spread).sqrt()}


def random_velocity(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Smooth (1, D, *shape), of ``START`` voxels in the root mean square."""
    knots = torch.randn(1, len(shape), *[min(KNOTS, max(2, n // 8)) for n in shape], generator=generator)
    velocity = resize_image(knots, shape)
    return START * velocity / velocity.norm(dim=1).square().mean().sqrt()
