"""What to learn on synthetic pairs: short trainings by different losses and pairs, judged on slices nobody trained on.

    python tests/benchmarks/recipe.py --start MODEL.pt --steps 250 --loss clean=4,diffusion=0.2 --unlike 8

Every training is 2D, resnet18, batches of four pairs of 96 x 96 in bfloat16, AdamW at a constant rate, from the same
weights (or none) and the same random numbers. A line each: the mean Dice of the averaged weights on ``--pairs`` of
``brain_mr_2d`` as they are, with the moving image inverted and its gamma changed, SDlogJ, and how many voxels two
noisy copies of one image are moved by. Nothing is chosen here for any other data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from realpairs import Folders, Loaded, rician, slices

from regpipe import RegistrationLoss, SymmetricNet
from regpipe.engines.handlers import WeightAverage
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.fields.algebra import warp
from regpipe.metrics.measures import dice, mean_of, sdlogj, shared_labels
from regpipe.phantoms import synthetic

SIDE, BATCH, CLIP = 96, 4, 1.0


def train(given: argparse.Namespace) -> torch.nn.Module:
    """The averaged network after so many steps."""
    torch.manual_seed(0)
    pretrained: dict[str, Any] = {"pretrained": str(given.start), "transfer": "network"} if given.start else {}
    network = SymmetricNet(2, "resnet18", **pretrained)
    loss = RegistrationLoss(given.loss, window=7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=given.rate, fused=True)
    mean = WeightAverage(network, 100)
    generator = torch.Generator().manual_seed(1)
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.rate * min(1.0, (step + 1) / 50)
        batch = synthetic.make_batch((SIDE, SIDE), BATCH, generator=generator, same_contrast=given.same)
        pair, target, _, told = prepare_batch(batch, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            found = RegistrationInferer()(pair, network, **told)
        optimizer.zero_grad()
        loss(found, target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        mean._update()
    return mean.network.module.eval()  # type: ignore[union-attr]


@torch.no_grad()
def overlap(network: torch.nn.Module, seen: Loaded, *, inverted: bool) -> tuple[float, float]:
    """Dice by nearest neighbour, and SDlogJ."""
    batch = seen.batch
    moving = (1 - batch["moving_image"]) ** 0.7 if inverted else batch["moving_image"]
    u = RegistrationInferer()(torch.cat([batch["fixed_image"], moving], 1), network)["displacement"]
    warped = warp(batch["moving_label"].float(), u, mode="nearest").int()
    ids = shared_labels(batch["fixed_label"], batch["moving_label"])
    return mean_of(dice(batch["fixed_label"], warped, ids).values()), sdlogj(u[0])


@torch.no_grad()
def moved_by_noise(network: torch.nn.Module, seen: Loaded, *, sigma: float = 0.03) -> float:
    """Mean displacement in voxels between two noisy copies of one image; 0 is right."""
    generator = torch.Generator().manual_seed(0)
    copies = [rician(seen.batch["fixed_image"], sigma, generator) for _ in range(2)]
    u = RegistrationInferer()(torch.cat(copies, 1), network)["displacement"]
    return float(u.square().sum(1).sqrt().mean())


def terms(text: str) -> dict[str, float]:
    """``clean=4,diffusion=0.2`` as weights."""
    return {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--start", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--loss", type=terms, default=terms("clean=4,end_point=0.05,dice=0.5,diffusion=0.2"))
    parser.add_argument("--unlike", type=float, default=synthetic.UNLIKE)
    parser.add_argument("--same", type=float, default=synthetic.SAME_CONTRAST)
    given: Any = parser.parse_args(argv)
    synthetic.UNLIKE = given.unlike
    began = time.process_time()
    network = train(given)
    spent = time.process_time() - began
    every = slices(Folders(given.data, Path()))
    chosen = np.random.default_rng(0).permutation(len(every))[: given.pairs]
    seen = [every[i].load() for i in chosen]
    plain, inverted = (np.mean([overlap(network, one, inverted=way) for one in seen], 0) for way in (False, True))
    noise = np.mean([moved_by_noise(network, one) for one in seen[:8]])
    print(
        f"steps {given.steps}, {spent:.0f} processor s, unlike {given.unlike:g}, {given.loss}: Dice {plain[0]:.4f}, "
        f"inverted {inverted[0]:.4f}, SDlogJ {plain[1]:.3f}, moved by noise {noise:.2f} voxels"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
