"""Predicted and measured peak memory, each in a process of its own: python tests/benchmarks/memory.py [--quick]."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from regpipe import LoadPair, collate_pairs, list_pairs
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import register
from regpipe.inference import memory
from regpipe.inference.case_files import save_case
from regpipe.io.images import make_grid
from regpipe.io.source import Source
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.cost import peak_memory
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import machine

COLUMNS = ("task", "backbone", "grid", "predicted_gib", "measured_gib", "ratio")
BACKBONES = ("resnet18", "alexnet", "vgg16")
SMALL, MIDDLE, LARGE = "64,64,64", "96,112,96", "160,192,224"
STRUCTURES = 12  # that the network of a task of this name tells apart
QUICK = [("inference", "resnet18", SMALL)]
ALL = [
    *(("inference", backbone, grid) for grid in (SMALL, MIDDLE) for backbone in BACKBONES),
    ("inference", "resnet18", LARGE),
    *(("refinement", "resnet18", grid) for grid in (SMALL, MIDDLE)),
    *(("from_zero", "", grid) for grid in (SMALL, MIDDLE, "128,128,128")),
    *(("training", backbone, grid) for grid in ("48,48,48", SMALL) for backbone in BACKBONES),
    *(("structures", "resnet18", grid) for grid in ("48,48,48", SMALL)),
    *(("files", "", grid) for grid in (MIDDLE, "144,144,144")),
]


def one(task: str, backbone: str, shape: Sequence[int]) -> tuple[int, int]:
    """Bytes predicted and measured for a task that is done here and now."""
    torch.manual_seed(0)
    if task == "files":
        return _files(shape)
    structures = STRUCTURES if task == "structures" else 0
    network = SymmetricNet(3, backbone, structures=structures) if backbone else torch.nn.Identity()
    if task in ("training", "structures"):
        return _training(network, shape, structures)
    inferers = {
        "inference": RegistrationInferer(repair=True),
        "refinement": RegistrationInferer(refiner=make_refiner(8, refinement_loss("lncc")), repair=True),
        "from_zero": ZeroInferer(zero_refiner(steps=8), repair=True),
    }
    network.eval()
    predicted = machine.held() + memory.inference(inferers[task], network, shape)
    batch = _batch(shape)
    pair = torch.cat([batch["fixed_image"], batch["moving_image"]], 1)
    with torch.no_grad():
        inferers[task](pair, network, masks=(batch["fixed_mask"], batch["moving_mask"]))
    return predicted, peak_memory()


def _training(network: torch.nn.Module, shape: Sequence[int], structures: int) -> tuple[int, int]:
    weights = {"lncc": 1.0, "diffusion": 0.7, "divergence": 0.1} | ({"anatomy": 1.0, "dice": 1.0} if structures else {})
    loss = RegistrationLoss(weights, window=7, label_ids=range(1, structures + 1))
    inferer = RegistrationInferer()
    predicted = machine.held() + memory.training(inferer, network, loss, shape)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4)
    for _ in range(2):
        batch = _batch(shape)
        optimizer.zero_grad()
        loss(inferer(torch.cat([batch["fixed_image"], batch["moving_image"]], 1), network), batch).backward()
        optimizer.step()
    return predicted, peak_memory()


def _files(shape: Sequence[int]) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as name:
        folder, random = Path(name), np.random.default_rng(0)
        for part in ("fixed_images", "moving_images", "fixed_labels", "moving_labels"):
            (folder / part).mkdir()
            voxels = random.integers(0, 3 if "labels" in part else 255, shape).astype(np.uint8)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / part / "p.nii.gz")
        predicted = machine.held() + memory.native(shape, shape)
        case = list_pairs(str(folder))[0]
        load = LoadPair(make_grid(shape, (1.0, 1.0, 1.0)), cache=False)
        files = Source()
        batch = collate_pairs([load(case, files)])
        found = register(batch["fixed_image"], batch["moving_image"], torch.zeros(1, 3, *(n // 2 for n in shape)))
        save_case(case, batch, found._asdict(), load, folder / "out", files)
    return predicted, peak_memory()


def _batch(shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Smooth images and masks that are not full, as after an affine stage."""
    coarse = [max(4, n // 8) for n in shape]
    images = torch.nn.functional.interpolate(torch.rand(2, 1, *coarse), size=tuple(shape), mode="trilinear")
    masks = torch.ones(2, 1, *shape)
    masks[:, :, :2] = 0
    labels = (images * (STRUCTURES + 1)).int()
    sides = {"fixed": slice(0, 1), "moving": slice(1, 2)}
    kinds = {"image": images, "mask": masks, "label": labels}
    return {f"{side}_{kind}": x[part] for side, part in sides.items() for kind, x in kinds.items()}


def measure(task: str, backbone: str, grid: str) -> dict[str, str]:
    """A row of the table, from a process of its own."""
    command = [sys.executable, __file__, "--one", task, backbone, grid]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    numbers = (f"{predicted / machine.GIB:.3f}", f"{measured / machine.GIB:.3f}", f"{predicted / measured:.3f}")
    return dict(zip(COLUMNS, (task, backbone, grid.replace(",", "x"), *numbers), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("TASK", "BACKBONE", "GRID"), help="do one here, print both numbers")
    parser.add_argument("--quick", action="store_true", help="one small grid")
    parser.add_argument("--out", type=Path, help="a .csv for the table")
    given = parser.parse_args()
    if given.one:
        task, backbone, grid = given.one
        print(json.dumps(one(task, backbone, [int(n) for n in grid.split(",")])))
        return
    rows = []
    for wanted in QUICK if given.quick else ALL:
        rows.append(measure(*wanted))
        print(" ".join(rows[-1].values()), flush=True)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
