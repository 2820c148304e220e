"""SYMNet by its authors' weights (Mok & Chung, CVPR 2020): what their ``Test_SYMNet.py`` does, on any grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regpipe.data.load import LoadPair
from regpipe.engines.inferers import RegistrationInferer
from regpipe.inference.folder import FolderRun
from regpipe.io.images import Grid
from regpipe.networks.symmetric import Prediction
from regpipe.networks.symnet import load_symnet
from regpipe.utils import distributed
from regpipe.utils.errors import InputError
from regpipe.utils.files import require_file, sha256
from regpipe.utils.settings import AffineOptions, taken

GRID = Grid((160, 224, 192), (1.0, 1.0, 1.0))  # the authors' 160 x 192 x 224, by axes to the right, front and top
# Where the authors' images lie, axes to the left, bottom and front: aligned with each other already.
SPACE: dict[str, Any] = {
    "shape": [160, 192, 224],
    "affine": [[-1.0, 0.0, 0.0, 80.0], [0.0, 0.0, 1.0, -112.0], [0.0, -1.0, 0.0, 96.0], [0.0, 0.0, 0.0, 1.0]],
}


class LoadAsAuthors(LoadPair):
    """``LoadPair`` with the authors' scaling: an image's extremes become 0 and 1."""

    @staticmethod
    def scale(array: np.ndarray) -> np.ndarray:
        low, high = float(array.min()), float(array.max())
        return np.asarray((array - low) / (high - low), np.float32)


class Turned(nn.Module):
    """SYMNet, whose images' axes lead left, down and to the front, on images whose axes lead right, front and up.

    ``net(pair (B, 2, *spatial)) -> Prediction``: as ``SymNet``'s, along the axes that are given.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pair: Tensor) -> Prediction:
        found = self.network(pair.transpose(3, 4).flip(2, 3))
        return Prediction(_turned_back(found.velocity), _turned_back(found.back))


def _turned_back(v: Tensor) -> Tensor:
    """A field (B, 3, *spatial) along left, down and front -> along right, front and up."""
    left, down, front = v.flip(2, 3).transpose(3, 4).unbind(1)
    return torch.stack([-left, front, -down], 1)


def by_authors(weights: str | None) -> Turned:
    """The authors' network with their weights, for upright images. Raises ``InputError`` as ``load_symnet``."""
    return Turned(load_symnet(_given(weights)))


def choices(weights: str | None, load: LoadPair) -> dict[str, Any]:
    """The settings of a registration with them; a case whose settings differ is registered again."""
    about = {**vars(load.alignment), "landmark_channels": load.landmark_channels}
    return {"network": "symnet", "weights": sha256([require_file(_given(weights))]), **about}


def _given(weights: str | None) -> str:
    if weights is None:
        raise InputError("--weights: give the authors' .pth")
    return weights


def register_by_symnet(
    dataset_dir: str,
    output_dir: str,
    *,
    weights: str,
    landmark_channels: int | None = None,
    strict: bool = False,
    jobs: int = 1,
    **how: Any,
) -> None:
    """Register every pair of a folder by SYMNet, both ways, on the authors' grid of 1 mm around the fixed image.

    ``weights``: the authors' .pth; ``how``: ``AffineOptions``, by default ``auto``, which takes two images in the
    authors' space as they are and aligns others; the rest as ``inference.from_zero``'s.

    Raises:
        InputError: not SYMNet's weights, no pair, an output folder that cannot be made.
        SystemExit: as ``FolderRun.register``.
    """
    distributed.join(hours=168)
    network = by_authors(weights).to(distributed.device())
    alignment = {"affine": "auto"} | taken(AffineOptions, how)
    load = LoadAsAuthors(GRID, landmark_channels=landmark_channels, cache=False, space=SPACE, **alignment)
    folder = FolderRun(dataset_dir, load=load, output_dir=output_dir, settings=choices(weights, load), **how)
    folder.register_by(network, RegistrationInferer(), strict=strict, processes=jobs)
