"""MONAI's registration networks as peers: trained and evaluated by the same bundle, see ``configs/voxelmorph.yaml``.

Both take what ours take, one tensor ``(B, 2, *spatial)``, channel 0 fixed and channel 1 moving, of any size: the
sides are continued beyond the rim to what the network's poolings ask for, and its field is cut back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks import nets
from torch import Tensor, nn

from regpipe.fields.algebra import Registration, warp, window
from regpipe.networks.symmetric import Prediction

DIVISOR = 8  # three poolings by two, in both networks


class VoxelMorph(nn.Module):
    """MONAI's VoxelMorph with its own defaults: ``net(pair) -> velocity (B, D, *spatial)``, voxels.

    Its U-Net is kept; integration and warps are ``fields.algebra.register``'s. MONAI's own pads with zeros, which
    drags the field to nothing at the rim, gives no inverse, and its half resolution scales velocities the wrong way.
    Source: Balakrishnan et al., IEEE TMI 2019; diffeomorphic: Dalca et al., MedIA 2019.

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # 'Using PyTorch native grid_sample', of the warp not used
            self.unet = nets.VoxelMorph(spatial_dims=spatial_dims).backbone

    def forward(self, pair: Tensor) -> Tensor:
        return divisible(self.unet, pair.flip(1))  # MONAI's order: moving, fixed


class LocalNet(nn.Module):
    """MONAI's LocalNet: ``net(pair) -> Prediction``, both (B, D, *spatial) displacements in voxels, not integrated.

    ``velocity`` warps moving onto fixed. ``back``, the same network on the swapped pair, warps fixed onto moving:
    LocalNet gives no inverse, and a loss that looks both ways needs one.
    Source: Hu et al., 'Weakly-supervised convolutional neural networks for multimodal image registration', MedIA 2018.

    Args:
        spatial_dims: 2 or 3.
        channels: width of the finest level; it doubles with each pooling.
    """

    def __init__(self, spatial_dims: int, *, channels: int = 8) -> None:
        super().__init__()
        self.net = nets.LocalNet(
            spatial_dims=spatial_dims,
            in_channels=2,
            out_channels=spatial_dims,
            num_channel_initial=channels,
            extract_levels=(0, 1, 2, 3),  # type: ignore[arg-type]  # MONAI's annotation says one
            out_kernel_initializer="zeros",  # begin at the identity
        )

    def forward(self, pair: Tensor) -> Tensor | Prediction:
        forward, backward = divisible(self.net, torch.cat([pair, pair.flip(1)])).chunk(2)
        return torch.cat([forward, backward], 1) if torch.jit.is_tracing() else Prediction(forward, backward)


def divisible(network: Callable[[Tensor], Tensor], pair: Tensor) -> Tensor:
    """``network(pair)`` with sides continued at their far end to multiples of ``DIVISOR``, cut back afterwards."""
    shape = pair.shape[2:]
    missing = [side for n in reversed(shape) for side in (0, -n % DIVISOR)]
    field = network(nn.functional.pad(pair, missing, mode="replicate"))
    return window(field, [0] * len(shape), shape)


class DisplacementInferer(Inferer):
    """Network -> two displacements (B, D, *spatial) -> a dict of ``Registration``'s fields.

    Stands where ``engines.inferers.RegistrationInferer`` does, and takes masks and channels as that does, without a use
    for them. ``velocity`` and ``back`` hold the displacements too, so that regularity terms count them.
    """

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Prediction],
        *args: Any,
        masks: Sequence[Tensor] = (),
        channels: Sequence[Tensor] = (),
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        found = network(inputs, *args, **kwargs)
        assert found.back is not None  # LocalNet's
        with torch.autocast(inputs.device.type, enabled=False):
            fixed, moving = inputs.float().chunk(2, dim=1)
            forward, backward = found.velocity.float(), found.back.float()
            warped = warp(torch.cat([moving, fixed]), torch.cat([forward, backward]))
            return Registration(forward, forward, backward, *warped.chunk(2))._replace(back=backward).tensors()
