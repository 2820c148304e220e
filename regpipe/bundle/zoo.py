"""A bundle as MONAI's model zoo takes one: its metadata say what its one model is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regpipe.bundle.write import METADATA
from regpipe.data.pairs import SIDES
from regpipe.io.images import load_grid
from regpipe.networks.encoders import MAX_STRIDE, VELOCITY_STRIDE
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json, replace_file


def state_format(bundle: str | Path, shape: Sequence[int], *, any_size: bool, channels: int = 1) -> None:
    """Say in a bundle's metadata what its network takes and gives; a folder without metadata is left alone.

    Args:
        bundle: its folder.
        shape: of the working grid.
        channels: of each image.
        any_size: images of other sizes are registered, too; else the grid's alone, which a trace is made for.
    """
    path = Path(bundle) / METADATA
    if not path.is_file():
        return
    metadata = parse_json(path.read_bytes())
    if not isinstance(metadata, dict) or not isinstance(metadata.get("network_data_format"), dict):
        return  # nothing that could be wrong
    stated = _stated(metadata["network_data_format"], len(shape), channels, None if any_size else shape)
    if stated != metadata["network_data_format"]:
        metadata["network_data_format"] = stated
        replace_file(path, (json.dumps(metadata, indent=2) + "\n").encode())


def _stated(about: dict[str, Any], dim: int, many: int, shape: Sequence[int] | None) -> dict[str, Any]:
    image, velocity = about["inputs"]["image"], about["outputs"]["pred"]
    sizes: tuple[list[Any], list[Any]] = ([f"{MAX_STRIDE}*n"] * dim, [f"{MAX_STRIDE // VELOCITY_STRIDE}*n+1"] * dim)
    if shape is not None:
        cells = [-(-(int(n) - 1) // MAX_STRIDE) for n in shape]
        sizes = [int(n) for n in shape], [MAX_STRIDE // VELOCITY_STRIDE * n + 1 for n in cells]
    axes = {str(axis): f"along array axis {axis}" for axis in range(dim)}
    sides = [f"{side}{f', channel {i}' if many > 1 else ''}" for side in SIDES for i in range(1, many + 1)]
    seen = {"num_channels": len(sides), "channel_def": {str(i): side for i, side in enumerate(sides)}}
    return {
        **about,
        "inputs": {**about["inputs"], "image": {**image, **seen, "spatial_shape": sizes[0]}},
        "outputs": {
            **about["outputs"],
            "pred": {**velocity, "num_channels": dim, "spatial_shape": sizes[1], "channel_def": axes},
        },
    }


def write_for_zoo(bundle: str | Path, dim: int, target: str | Path) -> Path:
    """Copy a bundle with one of the models that it came with, as ``models/model.pt``; returns ``target``.

    Args:
        bundle: its folder.
        dim: of the model: 2 or 3.
        target: a folder that is not there yet.

    Raises:
        InputError: the bundle came without a model of that dimension, or ``target`` is there.
    """
    bundle, target = Path(bundle), Path(target)
    models = bundle / "models" / f"{dim}d"
    if not (models / "model.pt").is_file():
        raise InputError(f"{models / 'model.pt'}: no such file; the bundle came without a model for {dim}D images")
    if target.exists():
        raise InputError(f"{target}: is there already; give a new folder")
    for part in ("configs", "docs"):
        shutil.copytree(bundle / part, target / part)
    shutil.copy(bundle / "LICENSE", target / "LICENSE")
    shutil.copytree(models, target / "models")
    record = parse_json((models / "training.json").read_bytes())
    grid = load_grid(models / "working_grid.json")
    state_format(target, grid.shape, any_size=record["own_grids"], channels=record.get("image_channels", 1))
    return target
