"""MONAI's ``Warp`` and ``DVF2DDF`` on the algebra of this room: the same values, faster.

Whatever takes MONAI's layers takes these, and whatever takes these takes MONAI's: a bundle names both, ``warp`` and
``dvf2ddf``, and all that warps or integrates in its run goes through the two. Where no bundle names any, the functions
of ``algebra`` serve as they are, ``LAYERS``: MONAI takes seconds to import.
"""

from __future__ import annotations

import warnings

from monai.networks import blocks
from monai.utils import GridSampleMode, GridSamplePadMode
from torch import Tensor

from regpipe.fields.algebra import SQUARINGS, integrate, warp

BILINEAR, BORDER = GridSampleMode.BILINEAR.value, GridSamplePadMode.BORDER.value


class Warp(blocks.Warp):
    """MONAI's ``Warp``: ``layer(image (B, C, *spatial), ddf (B, D, *spatial)) -> image(x + ddf(x))``, in voxels.

    Computed in float32 whatever the autocast; the result has the image's type. With ``jitter``, MONAI's own.

    Args:
        mode: ``bilinear`` (linear in any dimension), ``nearest`` or ``bicubic`` (2D).
        padding_mode: beyond the rim: ``border``, ``zeros`` or ``reflection``.
        jitter: see MONAI's.

    Raises:
        ValueError: no such mode; at a call, an image that is not on the displacement's grid.
    """

    def __init__(self, mode: str = BILINEAR, padding_mode: str = BORDER, jitter: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it would sample by torch
            super().__init__(mode, padding_mode, jitter)
        self.mode, self.padding = GridSampleMode(mode).value, GridSamplePadMode(padding_mode).value

    def forward(self, image: Tensor, ddf: Tensor) -> Tensor:
        if self.jitter:
            jittered: Tensor = super().forward(image, ddf)
            return jittered
        return warp(image, ddf, mode=self.mode, padding=self.padding)


class DVF2DDF(blocks.DVF2DDF):
    """MONAI's ``DVF2DDF``: ``layer(velocity (B, D, *spatial)) -> displacement``, by scaling and squaring, in voxels.

    Computed in float32 whatever the autocast. It pads with the border where MONAI's own pads with zeros, unless told:
    zeros bend every field at the rim.

    Args:
        num_steps: squarings.
        mode, padding_mode: as ``Warp``'s.

    Raises:
        ValueError: no step, or no such mode.
    """

    warp_layer: Warp

    def __init__(self, num_steps: int = SQUARINGS, mode: str = BILINEAR, padding_mode: str = BORDER) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # as above
            super().__init__(num_steps, mode, padding_mode)
        self.warp_layer = Warp(mode, padding_mode)

    def forward(self, dvf: Tensor) -> Tensor:
        layer = self.warp_layer
        return integrate(dvf, squarings=self.num_steps, mode=layer.mode, padding=layer.padding)
