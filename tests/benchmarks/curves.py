"""Dice against SDlogJ over the weight of each regularity, and for each similarity: pairs registered from zero.

    python tests/benchmarks/curves.py DATA/hippocampus_mr [--pairs 6] [-o FOLDER]

Writes ``curves.csv`` (a line per loss: means over the pairs) and ``curves.svg``. No network takes part: what a loss
asks for is seen as it is. The rims of the crops count, as in configs/hippocampus_mr.yaml.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from regpipe import LoadPair, collate_pairs, list_pairs, working_grid
from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import REGULARITY_WEIGHTS, WINDOW, Refiner
from regpipe.fields.algebra import Registration
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.terms import TERMS
from regpipe.metrics.measured import measure
from regpipe.metrics.measures import mean_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

REGULARITIES: dict[str, tuple[Mapping[str, float], Sequence[float]]] = {  # weights, and what they are multiplied by
    "diffusion + divergence / 4": ({"diffusion": 1.0, "divergence": 0.25}, (0.2, 0.4, 0.8)),
    "diffusion": ({"diffusion": 1.0}, (0.5, 1.0, 2.0)),
    "bending": ({"bending": 1.0}, (0.5, 2.0, 8.0)),
    "elastic": ({"elastic": 1.0}, (0.05, 0.15, 0.45)),
    "log_jacobian": ({"log_jacobian": 1.0, "diffusion": 0.2}, (0.1, 0.3, 1.0)),
    "jacobian": ({"jacobian": 100.0, "diffusion": 1.0}, (0.2, 0.4)),
}
KEPT = ("dice_before", "dice", "sdlogj", "folds_percent", "ndv_percent")


def losses() -> list[tuple[str, str, float, dict[str, float]]]:
    """Kind, name, factor and weights of each loss."""
    curves = [
        ("regularity", name, factor, {"lncc": 1.0, **{term: factor * w for term, w in weights.items()}})
        for name, (weights, factors) in REGULARITIES.items()
        for factor in factors
    ]
    return curves + [
        ("similarity", name, 1.0, {name: term.weight, **REGULARITY_WEIGHTS})
        for name, term in TERMS.items()
        if term.weight is not None
    ]


@torch.no_grad()
def mean_row(batches: Sequence[Mapping[str, Any]], spacing: Sequence[float], weights: Mapping[str, float]) -> dict:
    inferer = ZeroInferer(Refiner(RegistrationLoss(weights, window=WINDOW[3]), steps=60))
    rows, started = [], time.process_time()
    for batch in batches:
        pair = torch.cat([batch["fixed_image"], batch["moving_image"]], 1)
        rows.append(measure(Registration(**inferer(pair, nn.Identity())), batch, spacing))
    cost = (time.process_time() - started) / len(batches)
    return {key: mean_of(row[key] for row in rows) for key in KEPT} | {"processor_seconds": cost}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["loss"] for row in rows):
        points = [row for row in rows if row["loss"] == name]
        marks = "o-" if points[0]["kind"] == "regularity" else "s"
        axes.plot([p["sdlogj"] for p in points], [p["dice"] for p in points], marks, label=name)
    axes.set(xlabel="SDlogJ", ylabel="Dice")
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("-o", "--out", type=Path, default=Path("."))
    options = parser.parse_args()
    every = [case for part in ("training", "validation") for case in list_pairs(options.data, split=part, holdout=40)]
    grid = working_grid(every)
    load = LoadPair(grid, mask_rims=False)
    held = list_pairs(options.data, split="validation", holdout=40, max_pairs=options.pairs)
    batches = [collate_pairs([load(case)]) for case in held]
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for kind, name, factor, weights in losses():
        rows.append({"kind": kind, "loss": name, "factor": factor, **mean_row(batches, grid.spacing, weights)})
        print({k: v if isinstance(v, str) else round(v, 4) for k, v in rows[-1].items()}, flush=True)
        with (options.out / "curves.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    plot(rows, options.out / "curves.svg")


if __name__ == "__main__":
    main()
