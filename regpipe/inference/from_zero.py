"""Register a folder without any network: each pair is optimised from zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regpipe.data.load import LoadPair
from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import ZERO_STEPS, zero_refiner
from regpipe.inference.folder import FolderRun
from regpipe.networks.extractor import DEFAULT, described
from regpipe.utils import distributed


def register_from_zero(
    dataset_dir: str,
    output_dir: str,
    *,
    similarity: str = "auto",
    smoothness: float = 1.0,
    landmark_channels: int | None = None,
    steps: int = ZERO_STEPS,
    finest: int | None = None,
    guide: Sequence[str] = (),
    features: str = DEFAULT,
    affine: str = "affine",
    affine_from: str = "images",
    affine_metric: str = "mi",
    strict: bool = False,
    jobs: int = 1,
    **how: Any,
) -> None:
    """Register every pair of a folder without any network: each velocity is optimised from zero, folds are removed.

    ``similarity``, ``smoothness``, ``guide``: see ``engines.refine.refinement_loss``; ``features``: of that similarity,
    see ``networks.extractor``;
    ``affine``, ``affine_from``, ``affine_metric``: what goes before, see ``data.placement``;
    ``strict``: see ``FolderRun.register``; ``jobs``: processes, see ``inference.jobs``; ``how``: of ``FolderRun``.

    Raises:
        InputError: no pair, no such similarity, a smoothness that is not above 0, an output folder that cannot be made.
        SystemExit: as ``FolderRun.register``.
    """
    distributed.join(hours=168)
    refiner = zero_refiner(
        similarity, smoothness=smoothness, steps=steps, finest=finest, guide=guide, features=features
    )
    alignment: dict[str, Any] = {"affine": affine, "affine_from": affine_from, "affine_metric": affine_metric}
    settings = {
        "network": "none",
        "refine": steps,
        "similarity": similarity,
        "smoothness": smoothness,
        "refine_loss": {f"{dim}D": loss.weights for dim, loss in refiner.losses.items()},
        "refine_window": {f"{dim}D": loss.window for dim, loss in refiner.losses.items()},
        "finest": refiner.finest,
        **({"guide": list(guide)} if guide else {}),
        **(described(features) if similarity == "features" else {}),
        **alignment,
        "grid": "of each fixed image",
        "landmark_channels": landmark_channels,
    }
    load = LoadPair(None, landmark_channels=landmark_channels, cache=False, **alignment)
    folder = FolderRun(dataset_dir, load=load, output_dir=output_dir, settings=settings, **how)
    folder.register_by(torch.nn.Identity(), ZeroInferer(refiner, repair=True), strict=strict, processes=jobs)
