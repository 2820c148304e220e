"""What a pair itself says of its registration: labels and landmarks that lead it, labels that stay rigid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regpipe.data.pairs import SIDES
from regpipe.engines.refine import GUIDES
from regpipe.engines.rigid import Motion
from regpipe.losses.terms import TERMS
from regpipe.utils.errors import InputError

LED = {"labels": "dice", "landmarks": "tre"}  # what the guides of a registration cannot judge
RIGID = 0.01  # mm that a place of a rigid label may be off


def truth_of(batch: Mapping[str, Any], guides: Sequence[str], only: Sequence[int] = ()) -> dict[str, Any]:
    """What a refiner is told of a batch of one pair that its own ``GUIDES``; ``only``: by these labels.

    Raises:
        InputError: a guide that not both images have.
    """
    truth: dict[str, Any] = {}
    for guide in guides:
        (needs,) = {TERMS[term].needs for term in GUIDES[guide]}
        mine = {f"{side}_{needs}": batch[f"{side}_{needs}"] for side in SIDES}
        if guide == "labels" and only:
            mine = {key: torch.where(torch.isin(x, x.new_tensor(only)), x, 0) for key, x in mine.items()}
        if not all(tensor.numel() and bool(tensor.any()) for tensor in mine.values()):
            told = f"labels {','.join(map(str, only))}" if guide == "labels" and only else guide
            raise InputError(f"--guide {guide}: needs {told} of both images; add them, or leave it out")
        truth |= mine
        weights = [batch[f"{side}_landmark_weights"] for side in SIDES if f"{side}_landmark_weights" in batch]
        truth |= {"landmark_weights": math.prod(weights)} if guide == "landmarks" and weights else {}
    return truth


def warnings(guides: Sequence[str], motions: Mapping[int, Motion]) -> list[str]:
    """What led does not judge, and what did not stay rigid."""
    told = [f"{LED[name]}: the {name} led the registration, and do not judge it" for name in guides]
    off = {i: motion.off for i, motion in motions.items() if motion.off > RIGID}
    return told + [f"rigid: label {i} is up to {mm:.2g} mm off its rigid motion" for i, mm in off.items()]


def told_of(motions: Mapping[int, Motion]) -> dict[str, Any]:
    """``rigid`` of ``metrics.json``: matrix (RAS mm, fixed point -> moving point), angle and rest of each label."""
    rows = {
        str(i): {"angle": motion.angle, "off": motion.off, "matrix": motion.matrix.tolist()}
        for i, motion in motions.items()
    }
    return {"rigid": rows} if rows else {}
