"""SYMNet, the study's reference: a network of two velocities, and its authors' weights in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regpipe.fields.algebra import resize_image
from regpipe.networks.encoders import CONV, two_convolutions
from regpipe.networks.symmetric import Prediction
from regpipe.networks.weights import read_state_dict
from regpipe.utils.errors import InputError


class SymNet(nn.Module):
    """SYMNet (Mok & Chung, CVPR 2020), the study's reference: images concatenated, a U-Net, two velocity heads.

    ``net(pair (B, 2, *spatial)) -> Prediction``: its velocity (B, D, *spatial) takes moving towards fixed's midway
    space and ``back`` fixed towards moving's, in voxels; see ``fields.algebra.register_midway``.

    Args:
        spatial_dims: 2 or 3 (the authors': 3).
        start_channels: width of the finest level (the authors': 7 or 8).
        limit: largest velocity in voxels along an axis; the heads end in a softsign.
    """

    def __init__(self, spatial_dims: int, *, start_channels: int = 8, limit: float = 100.0) -> None:
        super().__init__()
        self.limit = limit
        c = start_channels
        widths = (c, 2 * c, 4 * c, 8 * c)
        self.down = nn.ModuleList(
            two_convolutions(spatial_dims, a, b, b, stride=s)
            for a, b, s in zip((2, *widths), widths, (1, 2, 2, 2), strict=False)
        )
        self.bottom = two_convolutions(spatial_dims, 8 * c, 16 * c, 8 * c, stride=2)
        # in, middle and out of the four decoder levels, coarse to fine: the authors' own numbers
        self.up = nn.ModuleList(_transposed(spatial_dims, width) for width in (8 * c, 4 * c, 2 * c, 2 * c))
        shapes = ((16 * c, 8 * c, 4 * c), (8 * c, 4 * c, 2 * c), (4 * c, 4 * c, 2 * c), (3 * c, 2 * c, 2 * c))
        self.merge = nn.ModuleList(two_convolutions(spatial_dims, *shape) for shape in shapes)
        self.heads = nn.ModuleList(CONV[spatial_dims](2 * c, spatial_dims, 5, padding=2, bias=False) for _ in range(2))

    def forward(self, pair: Tensor) -> Tensor | Prediction:
        x, skips = pair, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([resize_image(up(x), skip.shape[2:]), skip], 1))
        back, velocity = (self.limit * F.softsign(head(x)) for head in self.heads)
        return torch.cat([back, velocity], 1) if torch.jit.is_tracing() else Prediction(velocity, back)


def _transposed(spatial_dims: int, width: int) -> nn.Sequential:
    conv = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[spatial_dims]
    return nn.Sequential(conv(width, width, 2, stride=2), nn.ReLU())


def load_symnet(path: str, *, limit: float = 100.0) -> SymNet:
    """The authors' 3D weights (their names, e.g. ``ec2.0.weight``) in our ``SymNet``.

    Raises:
        InputError: not a readable weight file, or not SYMNet's.
    """
    state = read_state_dict(path)
    if "eninput.0.weight" not in state:
        raise InputError(f"{path}: not SYMNet's weights, 'eninput.0.weight' is not in it; take the authors' .pth")
    net = SymNet(3, start_channels=state["eninput.0.weight"].shape[0], limit=limit)
    ours = {}
    for key, theirs in authors_names(net).items():
        ours[key] = state[theirs].flip(0) if key.startswith("heads") else state[theirs]  # their first is the last axis
    net.load_state_dict(ours)
    return net


def authors_names(net: SymNet) -> dict[str, str]:
    """Our name of each tensor -> its authors'."""
    blocks = [f"{block}.{i}" for block in ("down.0", "down.1", "down.2", "down.3", "bottom") for i in (0, 2)]
    theirs = dict(zip(blocks, ["eninput", *(f"ec{i}" for i in range(1, 10))], strict=True))
    theirs |= {f"merge.{k}.{i}": f"dc{2 * k + 1 + i // 2}" for k in range(4) for i in (0, 2)}
    theirs |= {f"up.{k}.0": f"up{k + 1}" for k in range(4)} | {"heads.0": "dc9", "heads.1": "dc10"}
    parts = {key: key.rpartition(".") for key in net.state_dict()}
    return {key: f"{theirs[module]}.0.{leaf}" for key, (module, _, leaf) in parts.items()}
