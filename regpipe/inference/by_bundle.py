"""Register a folder with a bundle whose configuration is regpipe's own: its ``inference.yaml`` as a function.

It makes the same objects and writes the same files, but imports nothing of MONAI, which takes seconds, and evaluates no
expression. ``python -m monai.bundle run`` does the same from the bundle itself.
"""

from __future__ import annotations

import logging.config
from pathlib import Path
from typing import Any

from regpipe.data.load import LoadPair
from regpipe.engines import describe, inferers, options, record
from regpipe.engines.channels import Channels
from regpipe.engines.refine import WINDOW, Refinement, refinement_loss
from regpipe.inference.folder import FolderRun
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.weights import read_state_dict
from regpipe.utils import distributed
from regpipe.utils.settings import AffineOptions, RefinementOptions, taken


def register_by_bundle(
    bundle: Path,
    backbone: str,
    dataset_dir: str,
    output_dir: str,
    *,
    ckpt_dir: str | None = None,
    refine: int = 0,
    pairing: str | None = None,
    uncertainty: bool = False,
    strict: bool = False,
    jobs: int = 1,
    **how: Any,
) -> None:
    """Register every pair of a folder by a bundle's network.

    Args:
        bundle: its folder; its ``logging.conf`` must be regpipe's own.
        backbone: its network's.
        ckpt_dir: where its model is; None: see ``engines.inferers.model_folder``.
        refine: steps of refinement.
        pairing: see ``regpipe.list_pairs``; None: as in training.
        jobs: processes, see ``inference.jobs``.
        how: the options ``AffineOptions``, by default as in training, and ``RefinementOptions``, and what ``FolderRun``
            takes.

    Raises:
        InputError: no trained model, no pair, an option that does not go, an output folder that cannot be made.
        SystemExit: as ``FolderRun.register``.
    """
    logging.config.fileConfig(bundle / "configs" / "logging.conf", disable_existing_loggers=False)
    ckpt_dir = ckpt_dir or inferers.model_folder(str(bundle / "models"), dataset_dir)
    options.check_switches(strict=strict, uncertainty=uncertainty)
    distributed.join(hours=168)
    known, dim = record.read(ckpt_dir), inferers.trained_dimension(ckpt_dir)
    structures, network = inferers.trained_structures(ckpt_dir), load_network(ckpt_dir, backbone)
    alignment = {"affine": record.stage_for_others(known), "affine_from": known["affine_from"]}
    alignment |= taken(AffineOptions, how)
    told = {name: known[name] for name in ("landmark_channels", "mask_rims", "space")}
    grid = None if known["own_grids"] else inferers.trained_grid(ckpt_dir)
    load = LoadPair(grid, cache=False, image_channels=network.image_channels, **alignment, **told)
    asked = RefinementOptions(**taken(RefinementOptions, how))
    weights = refinement_loss(**asked.loss, spatial_dims=dim, structures=structures)
    more: dict[str, Any] = {"finest": asked.finest, "guided": bool(asked.guide), "features": asked.features}
    more["channels"] = Channels.of(asked)
    refinement = Refinement(refine, weights, window=WINDOW[dim], spatial_dims=dim, **more)
    inferer = inferers.RegistrationInferer(cascades=known["cascades"], refiner=refinement.refiner(), repair=True)
    folder = FolderRun(
        dataset_dir,
        load=load,
        output_dir=output_dir,
        model=f"{ckpt_dir}/model.pt",
        pairing=pairing or known["pairing"],
        settings=describe.registrations(network, load, refinement=refinement, inferer=inferer),
        uncertainty=uncertainty,
        **how,
    )
    folder.register_by(network, inferer, strict=strict, processes=jobs)


def load_network(ckpt_dir: str, backbone: str) -> SymmetricNet:
    """The network of ``backbone`` with the model in ``ckpt_dir``, on this process's device.

    Raises:
        InputError: there is no model, or another network's.
    """
    network = inferers.trained_network(backbone, ckpt_dir).to(distributed.device())
    network.load_state_dict(read_state_dict(inferers.require_model(ckpt_dir, network), old=False))
    return network
