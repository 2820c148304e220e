"""What images are compared by where their features are: an encoder that learned something, or anybody's TorchScript."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from regpipe.networks.encoders import TRANSFERRED, Encoder
from regpipe.utils.errors import InputError

DEFAULT = "resnet18"  # the one that came with regpipe
PROBE = 64  # voxels a side of the image that a file is tried on


class Extractor(nn.Module):
    """``extractor(image (B, 1, *S) in [0, 1]) -> features``, one or several (B, C, *K), K about S over a stride.

    Args:
        network: what gives them.
        weights: of each feature in the similarity; 0 leaves it out, none given: all count alike.
    """

    def __init__(self, network: nn.Module, weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.network, self.weights = network, tuple(weights)
        self.strides: tuple[int, ...] = getattr(network, "strides", ())  # of an ``Encoder``; else by the features' size

    def forward(self, image: Tensor) -> list[Tensor]:
        found = self.network(image)
        return [found] if isinstance(found, Tensor) else list(found)


def extractor(source: str, spatial_dims: int) -> Extractor:
    """What ``--features`` names, frozen.

    Args:
        source: a backbone that came with regpipe; ``BACKBONE:WEIGHTS``, as ``--pretrained`` names them; or a
            TorchScript file, ``FILE.ts``, with ``FILE.ts=1,0.5`` for the weights of its features.
        spatial_dims: of the images.

    Raises:
        InputError: none of these, or a file that does not take such images.
    """
    name, _, weights = source.partition("=")
    backbone, _, pretrained = name.partition(":")
    if backbone in TRANSFERRED:
        found: nn.Module = Encoder(backbone, spatial_dims, pretrained=pretrained or "shipped")
    elif name.endswith(".ts"):
        found = _script(Path(name))
    else:
        known = ", ".join(TRANSFERRED)
        raise InputError(f"--features {source}: give one of {known}, BACKBONE:WEIGHTS, or a TorchScript FILE.ts")
    made = Extractor(found.eval(), _weights(source, weights)).requires_grad_(False)
    count = _tried(made, source, spatial_dims)
    if made.weights and len(made.weights) != count:
        raise InputError(f"--features {source}: {len(made.weights)} weights, and it gives {count} features")
    return made


def _script(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"--features {path}: no such file")
    try:
        found: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as cause:
        raise InputError(f"--features {path}: no TorchScript; save it by torch.jit.trace(...).save(...)") from cause
    return found


def _weights(source: str, text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        found = [-1.0]
    if any(not 0 <= w < float("inf") for w in found) or (found and not any(found)):
        raise InputError(f"--features {source}: its weights are numbers from 0 on with commas between, not all 0")
    return found


def _tried(made: Extractor, source: str, dim: int) -> int:
    """How many features it gives of an image. Raises ``InputError`` where it takes none."""
    image = torch.zeros(1, 1, *[PROBE] * dim)
    try:
        features = made(image)
    except Exception as cause:  # TorchScript raises whatever its author did
        reason = str(cause).strip().rpartition("\n")[2][:200]
        raise InputError(
            f"--features {source}: takes no image {tuple(image.shape)} ({reason}); wrap it in a module that does"
        ) from cause
    if not all(isinstance(x, Tensor) and x.ndim == dim + 2 and len(x) == 1 for x in features):
        raise InputError(f"--features {source}: has to give tensors (1, channels, *{dim} axes) of an image")
    return len(features)
