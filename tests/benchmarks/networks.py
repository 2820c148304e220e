"""The learned methods of ``peers.py``: how a trained bundle is read, run and refined. Imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from monai.bundle import ConfigParser
from peers import Pair
from torch import Tensor, nn

from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import Registration
from regpipe.networks.symnet import SymNet, load_symnet

STEPS = 50  # of refining a network's answer


class Model(NamedTuple):
    """A trained network and what turns its output into a registration."""

    network: nn.Module
    inferer: Any


def load_bundle(folder: Path) -> Model:
    """The network of a trained bundle, with the overlays that its comparison recorded (``eval/command.json``)."""
    parser = ConfigParser()
    parser.read_config([str(folder / "configs" / "train.yaml")])
    for overlay in (*_recorded(folder), (folder / "configs" / "evaluate.yaml").read_text()):
        parser.update(yaml.safe_load(overlay))
    parser["bundle_root"] = str(folder)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True))
    return Model(network.eval(), parser.get_parsed_content("train::inferer"))


def _recorded(folder: Path) -> list[str]:
    record = folder / "eval" / "command.json"
    return list(json.loads(record.read_text())["overlays"]) if record.is_file() else []


@torch.no_grad()
def infer(model: Model, pair: Pair) -> Registration:
    return _registration(model.inferer(torch.cat(_images(pair), 1), model.network, masks=_masks(pair)))


def _registration(found: Mapping[str, Tensor]) -> Registration:
    return Registration.of(found)


def regpipe_refined(model: Model | None, pair: Pair) -> Registration:
    """Optimisation of this pair's velocity, from the network's or from zero. The one place that calls it."""
    images = torch.cat(_images(pair), 1)
    with torch.no_grad():
        if model is None:
            from_zero = ZeroInferer(zero_refiner(), repair=True)
            return _registration(from_zero(images, nn.Identity(), masks=_masks(pair)))
        structures = 0 if model.network.anatomy is None else 1
        refiner = make_refiner(STEPS, refinement_loss("lncc", structures=structures))
        inferer = RegistrationInferer(cascades=model.inferer.cascades, refiner=refiner, repair=True)
        return _registration(inferer(images, model.network, masks=_masks(pair)))


def _masks(pair: Pair) -> list[Tensor]:
    return [_batched(mask) for mask in (pair.fixed_mask, pair.moving_mask) if mask is not None]


def load_authors_symnet(path: Path) -> SymNet:
    return load_symnet(str(path)).eval()


@torch.no_grad()
def infer_symnet(net: SymNet, pair: Pair) -> Registration:
    """SYMNet as its authors trained it: images turned to L I A axes and scaled to [0, 1] by their extremes."""
    fixed, moving = (to_lia(_unit(image)) for image in _images(pair))
    found = Registration.of(RegistrationInferer()(torch.cat([fixed, moving], 1), net))
    u, inverse = field_from_lia(found.displacement), field_from_lia(found.inverse)
    return Registration(found.velocity, u, inverse, from_lia(found.warped_moving), from_lia(found.warped_fixed))


def to_lia(image: Tensor) -> Tensor:
    """(B, C, *R A S) -> (B, C, *L I A): regpipe's working axes point right, anterior, superior."""
    return image.transpose(3, 4).flip(2, 3)


def from_lia(image: Tensor) -> Tensor:
    """The way back of ``to_lia``."""
    return image.flip(2, 3).transpose(3, 4)


def field_from_lia(u: Tensor) -> Tensor:
    """A displacement (B, 3, *L I A) in voxels -> (B, 3, *R A S): its vectors turn as well."""
    left, inferior, anterior = from_lia(u).unbind(1)
    return torch.stack([-left, anterior, -inferior], 1)


def _unit(image: Tensor) -> Tensor:
    return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)


def _images(pair: Pair) -> tuple[Tensor, Tensor]:
    return _batched(pair.fixed), _batched(pair.moving)


def _batched(array: Any) -> Tensor:
    return torch.from_numpy(array).float()[None, None]
