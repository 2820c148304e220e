"""One's own trainer of MONAI's: python docs/examples/supervised_trainer.py DATA, a folder of pairs (docs/data.md)."""

from __future__ import annotations

import sys

import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import StatsHandler, ValidationHandler

import regpipe
from regpipe.engines import RegistrationInferer, metric_input, prepare_batch
from regpipe.metrics import CaseMetrics


def main(data: str, epochs: int = 5) -> dict[str, float]:
    """Fine-tune the network that came with regpipe; returns the means over the held-out pairs."""
    cases = {part: regpipe.list_pairs(data, split=part) for part in ("training", "validation")}
    grid = regpipe.working_grid(cases["training"] + cases["validation"])
    load = regpipe.LoadPair(grid)
    loaders = {
        part: DataLoader(Dataset(those, load), collate_fn=regpipe.collate_pairs, shuffle=part == "training")
        for part, those in cases.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = regpipe.SymmetricNet(len(grid.shape), "resnet18", pretrained="shipped").to(device)  # its decoder, too
    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=loaders["validation"],
        network=network,
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        key_val_metric={"key_metric": CaseMetrics(grid.spacing, key="ncc", output_transform=metric_input)},
        decollate=False,
    )
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=loaders["training"],
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=5e-4),
        loss_function=regpipe.RegistrationLoss({"lncc": 1.0, "diffusion": 0.7}, window=7),
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        train_handlers=[
            ValidationHandler(1, evaluator),
            StatsHandler(tag_name="loss", output_transform=lambda output: output["loss"].item()),
        ],
        decollate=False,
    )
    trainer.run()
    return evaluator.state.metrics


if __name__ == "__main__":
    print(main(sys.argv[1]))
