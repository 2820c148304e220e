"""With Lightning: python docs/examples/lightning_module.py DATA, a folder of pairs as docs/data.md has them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as lightning
import torch
from monai.data import DataLoader, Dataset
from torch import Tensor

import regpipe


class Registering(lightning.LightningModule):
    """Network, loss and metrics of a registration.

    Args:
        network: pair (B, 2, *spatial) -> velocity.
        spacing: mm per voxel of the working grid.
    """

    def __init__(self, network: torch.nn.Module, spacing: Sequence[float]) -> None:
        super().__init__()
        self.network, self.spacing = network, spacing
        self.loss = regpipe.RegistrationLoss({"lncc": 1.0, "diffusion": 0.7}, window=7)

    def forward(self, batch: Mapping[str, Any]) -> regpipe.Registration:
        fixed, moving = batch["fixed_image"], batch["moving_image"]
        return regpipe.register(fixed, moving, self.network(torch.cat([fixed, moving], 1)))

    def training_step(self, batch: Mapping[str, Any], index: int) -> Tensor:
        value, terms = self.loss.weigh(self(batch).tensors(), batch)
        self.log_dict({f"training/{name}": term for name, term in terms.items()}, batch_size=1)
        return value

    def validation_step(self, batch: Mapping[str, Any], index: int) -> None:
        row = regpipe.measure(self(batch), batch, self.spacing)
        self.log_dict({f"validation/{name}": value for name, value in row.items()}, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=5e-4)


def main(data: str, epochs: int = 5) -> dict[str, float]:
    """Fine-tune the network that came with regpipe; returns the means over the held-out pairs."""
    cases = {part: regpipe.list_pairs(data, split=part) for part in ("training", "validation")}
    grid = regpipe.working_grid(cases["training"] + cases["validation"])
    loaders = [
        DataLoader(Dataset(those, regpipe.LoadPair(grid)), collate_fn=regpipe.collate_pairs) for those in cases.values()
    ]
    network = regpipe.SymmetricNet(len(grid.shape), "resnet18", pretrained="shipped")  # its decoder, too
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=epochs, log_every_n_steps=1, **quiet)
    trainer.fit(Registering(network, grid.spacing), *loaders)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main(sys.argv[1]))
