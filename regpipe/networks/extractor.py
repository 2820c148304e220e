"""What images are compared by where their features are: an encoder that learned something, or anybody's TorchScript."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from regpipe.networks.encoders import CONV, TRANSFERRED, Encoder
from regpipe.utils.errors import InputError
from regpipe.utils.files import sha256

DEFAULT = "resnet18"  # the one that came with regpipe
WEIGHTS = re.compile(r"=([0-9.eE+,-]+)$")
PROBES = (32, 45)  # voxels a side of the images that a file is tried on: refinement asks for many sizes


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
    name, weights = _parts(source)
    backbone, _, pretrained = name.partition(":")
    if backbone in TRANSFERRED and pretrained != "none":
        found: nn.Module = Encoder(backbone, spatial_dims, pretrained=pretrained or "shipped")
    elif name.endswith(".ts"):
        found = _script(Path(name).expanduser())
    else:
        known = ", ".join(TRANSFERRED)
        raise InputError(f"--features {source}: give one of {known}, BACKBONE:WEIGHTS, or a TorchScript FILE.ts")
    made = Extractor(found.eval(), weights).requires_grad_(False)
    count = max(_tried(made, source, spatial_dims, size) for size in PROBES)
    if weights and len(weights) != count:
        raise InputError(f"--features {source}: {len(weights)} weights, and it gives {count} features")
    return made


def extractors(source: str) -> dict[int, Extractor]:
    """``extractor`` of each dimension that it has; a TorchScript file has one.

    Raises:
        InputError: it has none.
    """
    found, problems = {}, []
    for dim in CONV:
        try:
            found[dim] = extractor(source, dim)
        except InputError as problem:
            problems.append(str(problem))
    if not found:
        raise InputError("; ".join(dict.fromkeys(problems)))
    return found


def described(source: str) -> dict[str, str]:
    """What results say of it: names without folders, and the hash of a file."""
    name, _ = _parts(source)
    backbone, _, pretrained = name.partition(":")
    path = Path(pretrained if backbone in TRANSFERRED else name).expanduser()
    if not path.is_file():
        return {"features": source}
    return {"features": source.replace(str(path.parent) + "/", ""), "features_sha256": sha256([path])}


def _parts(source: str) -> tuple[str, list[float]]:
    """The name and the weights behind it."""
    ending = WEIGHTS.search(source)
    if ending is None:
        return source, []
    try:
        found = [float(word) for word in ending[1].split(",")]
    except ValueError:
        found = [-1.0]
    if not any(found) or not all(0 <= w < float("inf") for w in found):
        raise InputError(f"--features {source}: its weights are numbers from 0 on with commas between, not all 0")
    return source[: ending.start()], found


def _script(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"--features {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of the format
            found: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as cause:
        raise InputError(f"--features {path}: no TorchScript; save it by torch.jit.trace(...).save(...)") from cause
    return found


@torch.enable_grad()
def _tried(made: Extractor, source: str, dim: int, size: int) -> int:
    """How many features it gives of an image. Raises ``InputError`` where it takes none, or nothing follows them."""
    image = torch.rand(1, 1, *[size] * dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    try:
        features = made(image)
    except Exception as cause:  # TorchScript raises whatever its author did
        reason = str(cause).strip().rpartition("\n")[2][:200]
        raise InputError(
            f"--features {source}: takes no image {tuple(image.shape)} ({reason}); wrap it in a module that does"
        ) from cause
    if not features or not all(isinstance(x, Tensor) and x.ndim == dim + 2 and len(x) == 1 for x in features):
        raise InputError(f"--features {source}: has to give tensors (1, channels, *{dim} axes) of an image")
    if any(not x.is_floating_point() or not x.requires_grad for x in features):
        raise InputError(f"--features {source}: its features do not follow the image: no gradient")
    return len(features)
