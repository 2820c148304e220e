"""Which normalisation stands in for BatchNorm when ResNet18 is trained from scratch with one pair in a batch?

    python tests/benchmarks/norms.py FOLDER > docs/results/norms.csv

Same phantoms, seeds and steps for each; Dice on held-out phantoms. FOLDER takes the phantoms.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from torch import nn

from regpipe import LoadPair, RegistrationLoss, SymmetricNet, collate_pairs, list_pairs, measure, working_grid
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.fields.algebra import Registration
from regpipe.metrics.measures import mean_of
from regpipe.networks import encoders
from regpipe.phantoms.cohort import write_cohort

STEPS, SEEDS = 250, 3
NORMS = {
    "group (16 groups)": lambda norm, *_: nn.GroupNorm(16, norm.num_features),
    "instance": lambda norm, *_: nn.GroupNorm(norm.num_features, norm.num_features),
    "batch, frozen at the identity": lambda norm, *_: nn.BatchNorm2d(norm.num_features),
    "none": lambda norm, *_: nn.Identity(),
}


def dice(norm: str, seed: int, folder: str) -> float:
    """Mean Dice on the held-out phantoms after training with one normalisation."""
    training, validation = (list_pairs(folder, split=split) for split in ("training", "validation"))
    grid = working_grid(training)
    load, infer = LoadPair(grid), RegistrationInferer()
    torch.manual_seed(seed)
    with mock.patch.object(encoders, "_norm", NORMS[norm]):
        net = SymmetricNet(2, "resnet18")
    optimizer = torch.optim.AdamW(net.parameters(), 5e-4)
    loss = RegistrationLoss({"lncc": 1.0, "diffusion": 1.0}, window=7)
    for _ in range(STEPS):
        case = training[int(torch.randint(len(training), ()))]
        pair, target, *_ = prepare_batch(collate_pairs([load(case)]))
        optimizer.zero_grad()
        loss(infer(pair, net), target).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    net.eval()
    rows = []
    with torch.no_grad():
        for case in validation:
            pair, target, *_ = prepare_batch(collate_pairs([load(case)]))
            rows.append(measure(Registration(**infer(pair, net)), target, grid.spacing))
    return mean_of(row["dice"] for row in rows)


if __name__ == "__main__":
    phantoms = str(write_cohort(f"{sys.argv[1]}/phantoms", n_pairs=100))
    print("norm," + ",".join(f"dice_seed_{seed}" for seed in range(SEEDS)))
    for name in NORMS:
        print(f'"{name}",' + ",".join(f"{dice(name, seed, phantoms):.4f}" for seed in range(SEEDS)), flush=True)
