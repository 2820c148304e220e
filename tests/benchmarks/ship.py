"""Put a trained model into a bundle of the repository.

    python tests/benchmarks/ship.py TRAINED bundles/symreg_resnet18 2

``TRAINED`` is a bundle's folder after ``configs/synthetic.yaml``. What inference reads goes to ``models/2d`` or ``3d``,
the weights in half precision; the training's manifest, where it has ended, with the hashes of what is shipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from regpipe.data import manifest
from regpipe.engines import record
from regpipe.networks.weights import read_state_dict
from regpipe.utils.files import replace_file

LARGEST = 25_000_000  # bytes of a file: what a code host takes without large-file storage, with room


def ship(trained: Path, bundle: Path, dim: int) -> Path:
    """Write the model's folder; returns it."""
    source, target = trained / "models", bundle / "models" / f"{dim}d"
    target.mkdir(parents=True, exist_ok=True)
    state = read_state_dict(source / "model.pt")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    broken = [name for name, tensor in half.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise SystemExit(f"{broken[0]}: out of half precision's range")
    torch.save(half, target / "model.pt")
    if (target / "model.pt").stat().st_size > LARGEST:
        raise SystemExit(f"{target / 'model.pt'}: more than {LARGEST / 1e6:.0f} MB")
    replace_file(target / "working_grid.json", (source / "working_grid.json").read_bytes())
    about = json.loads((source / record.NAME).read_text()) | {"dataset_dir": None, "training_images": []}
    replace_file(target / record.NAME, (json.dumps(about, indent=1) + "\n").encode())
    if (source / manifest.NAME).is_file():
        content = json.loads((source / manifest.NAME).read_text())
        content["files"] = manifest.hashes(target, manifest.BESIDE)
        replace_file(target / manifest.NAME, (json.dumps(content, indent=1) + "\n").encode())
    return target


if __name__ == "__main__":
    folder = ship(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    for item in manifest.model_files(folder):
        print(item["file"], item["sha256"], (folder / item["file"]).stat().st_size)
