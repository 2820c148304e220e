"""Register a folder by a bundle whose configuration is regpipe's own: what ``inference.yaml`` says, as a function.

The same objects from the same parts, so the same files; but nothing of MONAI is imported, which takes seconds, and
no expression is run. ``python -m monai.bundle run`` remains the bundle's own way.
"""

from __future__ import annotations

import logging.config
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regpipe.data.load import LoadPair
from regpipe.engines import describe, inferers, options, record
from regpipe.engines.refine import WINDOW, Refinement, refinement_loss
from regpipe.inference.folder import FolderRun
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.weights import read_state_dict
from regpipe.utils import distributed


def register_by_bundle(
    bundle: Path,
    backbone: str,
    dataset_dir: str,
    output_dir: str,
    *,
    ckpt_dir: str | None = None,
    loss: Mapping[str, Any] | None = None,
    refine: int = 0,
    refine_finest: int | None = None,
    pairing: str | None = None,
    affine: str | None = None,
    affine_from: str | None = None,
    affine_metric: str = "mi",
    uncertainty: bool = False,
    strict: bool = False,
    jobs: int = 1,
    features: str | None = None,
    **how: Any,
) -> None:
    """Register every pair of a folder by a bundle's network. The options are its ``inference.yaml``'s.

    Args:
        bundle: its folder; its ``logging.conf`` must be regpipe's own.
        backbone: its network's.
        ckpt_dir: where its model is; None: see ``engines.inferers.model_folder``.
        jobs: processes, see ``inference.jobs``.
        loss: of the refinement, what ``refinement_loss`` is told; None: ``auto``.
        features: of its similarity of that name, see ``networks.extractor``.

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
    alignment: dict[str, Any] = {
        "affine": affine or record.stage_for_others(known),
        "affine_from": affine_from or known["affine_from"],
    }
    told = {name: known[name] for name in ("landmark_channels", "mask_rims", "space")}
    grid = None if known["own_grids"] else inferers.trained_grid(ckpt_dir)
    load = LoadPair(grid, cache=False, **alignment, **told)
    weights = refinement_loss(**{"similarity": "auto", "spatial_dims": dim, **(loss or {})}, structures=structures)
    guided = bool((loss or {}).get("guide"))
    refinement = Refinement(
        refine,
        weights,
        window=WINDOW[dim],
        finest=refine_finest,
        guided=guided,
        features=features,
        spatial_dims=dim,
    )
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
