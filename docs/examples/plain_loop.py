"""A plain torch loop: python docs/examples/plain_loop.py DATA, a folder of pairs as docs/data.md has them."""

from __future__ import annotations

import sys

import torch
from monai.data import DataLoader, Dataset

import regpipe


def main(data: str, epochs: int = 5) -> list[dict[str, float]]:
    """Fine-tune the network that came with regpipe; returns the metrics of each held-out pair."""
    cases = {part: regpipe.list_pairs(data, split=part) for part in ("training", "validation")}
    load = regpipe.LoadPair(regpipe.working_grid(cases["training"] + cases["validation"]))
    loaders = {
        part: DataLoader(Dataset(those, load), collate_fn=regpipe.collate_pairs, shuffle=part == "training")
        for part, those in cases.items()
    }
    assert load.grid is not None
    network = regpipe.SymmetricNet(len(load.grid.shape), "resnet18", pretrained="shipped")  # its decoder, too
    loss = regpipe.RegistrationLoss({"lncc": 1.0, "diffusion": 0.7}, window=7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)
    for epoch in range(epochs):
        for batch in loaders["training"]:
            fixed, moving = batch["fixed_image"], batch["moving_image"]
            found = regpipe.register(fixed, moving, network(torch.cat([fixed, moving], 1)))
            value = loss(found.tensors(), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {value.item():.3f}")
    rows = []
    with torch.no_grad():
        for batch in loaders["validation"]:
            fixed, moving = batch["fixed_image"], batch["moving_image"]
            found = regpipe.register(fixed, moving, network(torch.cat([fixed, moving], 1)))
            rows.append(regpipe.measure(found, batch, load.grid.spacing))
    return rows


if __name__ == "__main__":
    for row in main(sys.argv[1]):
        print(f"NCC {row['ncc_before']:.3f} -> {row['ncc']:.3f}, Dice {row['dice_before']:.3f} -> {row['dice']:.3f}")
