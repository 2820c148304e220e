"""Bundles under MONAI's own commands, and one that moves things without a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from helpers.places import QUICK
from regpipe.bundle.write import write_bundle
from regpipe.io.images import Grid, save_grid
from regpipe.networks.symmetric import SymmetricNet

Command = Callable[..., None]


def train(command: Command, bundle: Path, data: Path, *options: object, overlay: Path = QUICK) -> None:
    configs = str([str(bundle / "configs" / "train.yaml"), str(overlay)])
    command("run", "training", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", data, *options)


def evaluate(command: Command, bundle: Path, data: Path, *options: object, overlay: Path = QUICK) -> None:
    configs = str([str(file) for file in (bundle / "configs/train.yaml", overlay, bundle / "configs/evaluate.yaml")])
    command("run", "evaluating", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", data, *options)


def infer(command: Command, bundle: Path, data: Path, out: Path, *options: object) -> None:
    config = bundle / "configs" / "inference.yaml"
    command(
        "run", "--config_file", config, "--bundle_root", bundle, "--dataset_dir", data, "--output_dir", out, *options
    )


def deforming_bundle(folder: Path, grid: Grid, *, backbone: str = "alexnet", gain: float = 300.0) -> Path:
    """A bundle whose model was never trained but moves things by voxels: flow weights of 0.001 raised by ``gain``."""
    bundle = write_bundle(backbone, folder)
    torch.manual_seed(0)
    net = SymmetricNet(len(grid.shape), backbone)
    for level in net.levels:
        level.flow.weight.data *= gain  # type: ignore[union-attr, operator]
    torch.save(net.state_dict(), bundle / "models" / "model.pt")
    save_grid(bundle / "models" / "working_grid.json", grid)
    return bundle
