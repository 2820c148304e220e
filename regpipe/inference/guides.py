"""The labels and landmarks of a pair that lead its registration: what the refiner is given, what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from regpipe.data.pairs import SIDES
from regpipe.utils.errors import InputError

KEYS = {"labels": "label", "landmarks": "landmarks"}  # a guide -> the key of a batch
TOLD = {
    "labels": "dice: the labels led the registration, and do not judge it",
    "landmarks": "tre: the landmarks led the registration, and do not judge it",
}


def truth_of(batch: Mapping[str, Any], guides: Sequence[str]) -> dict[str, Tensor]:
    """What the refiner is told of a batch of one pair.

    Raises:
        InputError: a guide that not both images have.
    """
    truth: dict[str, Tensor] = {}
    for guide in guides:
        mine = {f"{side}_{KEYS[guide]}": batch[f"{side}_{KEYS[guide]}"] for side in SIDES}
        if not all(tensor.numel() and bool(tensor.any()) for tensor in mine.values()):
            raise InputError(f"--guide {guide}: needs {guide} of both images; add them, or leave it out")
        truth |= mine
    return truth
