"""Register a folder without any network: each pair is optimised from zero."""

from __future__ import annotations

from typing import Any

import torch

from regpipe.data.load import LoadPair
from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import ZERO_STEPS, zero_refiner
from regpipe.inference.folder import FolderRun
from regpipe.networks.extractor import DEFAULT, described
from regpipe.utils import distributed
from regpipe.utils.settings import AffineOptions, RefinementOptions, taken


def register_from_zero(
    dataset_dir: str,
    output_dir: str,
    *,
    steps: int = ZERO_STEPS,
    landmark_channels: int | None = None,
    strict: bool = False,
    jobs: int = 1,
    **how: Any,
) -> None:
    """Register every pair of a folder without any network: each velocity is optimised from zero, folds are removed.

    ``strict``: see ``FolderRun.register``; ``jobs``: processes, see ``inference.jobs``; ``how``: the options
    ``AffineOptions``, by default ``affine``, and ``RefinementOptions``, and what ``FolderRun`` takes.

    Raises:
        InputError: no pair, no such similarity, a smoothness that is not above 0, an output folder that cannot be made.
        SystemExit: as ``FolderRun.register``.
    """
    distributed.join(hours=168)
    asked = RefinementOptions(**taken(RefinementOptions, how))
    refiner = zero_refiner(steps=steps, **vars(asked))
    alignment = {"affine": "affine"} | taken(AffineOptions, how)
    load = LoadPair(None, landmark_channels=landmark_channels, cache=False, **alignment)
    settings = {
        "network": "none",
        "refine": steps,
        "similarity": asked.similarity if isinstance(asked.similarity, str) else list(asked.similarity),
        "smoothness": asked.smoothness,
        "refine_loss": {f"{dim}D": loss.weights for dim, loss in refiner.losses.items()},
        "refine_window": {f"{dim}D": loss.window for dim, loss in refiner.losses.items()},
        "finest": refiner.finest,
        **({"guide": list(asked.guide)} if asked.guide else {}),
        **({"channel_weights": list(asked.channel_weights)} if asked.channel_weights else {}),
        **(described(asked.features or DEFAULT) if asked.first == "features" else {}),
        **vars(load.alignment),
        "grid": "of each fixed image",
        "landmark_channels": landmark_channels,
    }
    folder = FolderRun(dataset_dir, load=load, output_dir=output_dir, settings=settings, **how)
    folder.register_by(torch.nn.Identity(), ZeroInferer(refiner, repair=True), strict=strict, processes=jobs)
