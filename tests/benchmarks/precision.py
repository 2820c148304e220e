"""How far half and single precision move a displacement on the CPU, against the network in double precision.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py [--epochs 1] [-o FILE]

Each backbone is trained on phantoms, 2D (64 x 64) and 3D (32 x 32 x 32), and registers pairs that it has not seen,
once for each precision of the network; velocity, fields and loss are float32, as always (double for the reference).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor, nn

from regpipe import LoadPair, collate_pairs, list_pairs
from regpipe.bundle.write import write_bundle
from regpipe.engines.inferers import prepare_batch
from regpipe.fields.algebra import integrate, resize
from regpipe.io.images import Grid, make_grid
from regpipe.phantoms.cohort import write_cohort

SHAPES = {2: (64, 64), 3: (32, 32, 32)}
# voxels that a displacement is off by at most, of those of up to some voxels
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
MEAN_BOUNDS = {"float32": 1e-5, "bfloat16": 0.02}


def displacement(network: nn.Module, pair: Tensor, precision: str) -> Tensor:
    """(B, D, *S) float32, with the network in one of ``float64``, ``float32``, ``bfloat16``."""
    double = precision == "float64"
    network = network.double() if double else network.float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        velocity = network(pair.double() if double else pair.float())
    return resize(integrate(velocity.float()), pair.shape[2:])


def differences(network: nn.Module, pairs: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Precision -> (mean, largest) length in voxels of the difference from float64."""
    found = {}
    truth = [displacement(network, pair, "float64") for pair in pairs]
    for precision in BOUNDS:
        off = [(displacement(network, pair, precision) - u).norm(dim=1) for pair, u in zip(pairs, truth, strict=True)]
        found[precision] = (float(torch.stack([d.mean() for d in off]).mean()), float(torch.stack(off).max()))
    return found


def trained(backbone: str, data: Path, epochs: int, folder: Path) -> nn.Module:
    bundle = write_bundle(backbone, folder)
    flow = ConfigWorkflow(
        str(bundle / "configs" / "train.yaml"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        run_id="training",
        bundle_root=str(bundle),
        dataset_dir=str(data),
        max_epochs=epochs,
        pairs_per_epoch=20,
        max_val_pairs=1,
    )
    flow.initialize()
    flow.run()
    return flow.parser.get_parsed_content("network").eval()


def pairs_of(data: Path, grid: Grid) -> list[Tensor]:
    load = LoadPair(grid)
    return [prepare_batch(collate_pairs([load(case)]))[0] for case in list_pairs(str(data))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for dim, shape in SHAPES.items():
            data = write_cohort(Path(root) / f"data_{dim}", shape=shape, n_pairs=25)
            new = pairs_of(
                write_cohort(Path(root) / f"new_{dim}", shape=shape, n_pairs=10, seed=1), make_grid(shape, [1.0] * dim)
            )
            for backbone in ("resnet18", "vgg16", "alexnet"):
                network = trained(backbone, data, given.epochs, Path(root) / f"{backbone}_{dim}")
                length = float(torch.stack([displacement(network, pair, "float32").norm(dim=1) for pair in new]).max())
                for precision, (mean, most) in differences(network, new).items():
                    row = {"backbone": backbone, "D": dim, "longest": length, "precision": precision}
                    rows.append({**row, "mean": mean, "largest": most})
                    print(" | ".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in rows[-1].values()))
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    broken = [r for r in rows if r["largest"] > BOUNDS[r["precision"]] or r["mean"] > MEAN_BOUNDS[r["precision"]]]
    raise SystemExit(f"outside the bounds: {broken}" if broken else 0)


if __name__ == "__main__":
    main()
