"""The numbers of a comparison that never ran."""

from __future__ import annotations

from typing import Any


def result(dice: float, *, seconds: float = 0.5, **metrics: list[float]) -> dict[str, Any]:
    known = {"dice": [dice, dice - 0.1, dice + 0.1], "folds_percent": [0.0, 0.0, 0.0], **metrics}
    costs = {"parameters": 12_340_000, "flops": 5.6e9, "peak_memory_bytes": 2**30, "training_seconds": 90.0}
    return {"metrics": known, "seconds_per_pair": [seconds, seconds, seconds], **costs}


RESULTS = {
    "resnet18": result(0.7, dice_before=[0.5, 0.4, 0.6], seconds=0.25),
    "alexnet": {**result(0.8, tre=[1.234, 1.0, 1.5]), "training_seconds": None},
}
