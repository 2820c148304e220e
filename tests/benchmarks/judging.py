"""What a displacement is worth: every method judged by the same measures, and its convention checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peers import Field
from torch import Tensor

from regpipe import InputError, measure
from regpipe.fields.algebra import Registration, identity_grid, warp
from regpipe.metrics.measures import dice, mean_of, shared_labels

CORTICAL = 1000  # FreeSurfer's ids from here on are cortical
SPLIT_DICE = ("dice_subcortical", "dice_cortical")
TOLERANCE = 0.02  # of the intensity range: our warp of a peer's displacement against its own warped image


def judge(field: Field, batch: Mapping[str, Any], spacing: Sequence[float]) -> dict[str, float]:
    """``measure`` of a displacement; what needs an inverse is NaN where the method gives none."""
    u = torch.from_numpy(field.displacement)[None]
    if u.shape[2:] != batch["fixed_image"].shape[2:] or not u.isfinite().all():
        raise InputError(f"displacement {tuple(u.shape)}: not finite or not on the working grid")
    inverse = torch.zeros_like(u) if field.inverse is None else torch.from_numpy(field.inverse)[None]
    warped = [warp(batch[f"{side}_image"], v) for side, v in (("moving", u), ("fixed", inverse))]
    row = measure(Registration(u, u, inverse, *warped), batch, spacing)
    if field.inverse is None:
        row["inverse_consistency"] = math.nan
    return row | split_dice(u, batch)


def split_dice(u: Tensor, batch: Mapping[str, Any]) -> dict[str, float]:
    """Dice over subcortical and over cortical labels, where there are any of the latter."""
    fixed, moving = batch["fixed_label"], batch["moving_label"]
    ids = shared_labels(fixed, moving)
    if not any(i >= CORTICAL for i in ids):
        return dict.fromkeys(SPLIT_DICE, math.nan)
    scores = dice(fixed, warp(moving, u, mode="nearest"), ids)
    parts = [[v for i, v in scores.items() if (i >= CORTICAL) == cortical] for cortical in (False, True)]
    return {name: mean_of(part) for name, part in zip(SPLIT_DICE, parts, strict=True)}


def disagreement(u: np.ndarray, image: Tensor, warped: np.ndarray) -> float:
    """Largest |our warp - the peer's own warped image| where both look inside the image: is the convention met?"""
    field = torch.from_numpy(u)[None]
    at = identity_grid(image.shape[2:]) + field
    last = torch.tensor(image.shape[2:]).view(1, -1, *[1] * (field.ndim - 2)) - 1
    inside = ((at >= 0) & (at <= last)).all(1)[0]
    return float((warp(image, field)[0, 0] - torch.from_numpy(warped)).abs()[inside].max())


def check_convention(method: str, field: Field, batch: Mapping[str, Any]) -> None:
    """Print how far our warps are from the peer's own; refuse a displacement that is turned, flipped or misscaled."""
    ways = [("moving", field.displacement, field.warped_moving), ("fixed", field.inverse, field.warped_fixed)]
    for side, u, warped in ways:
        if u is None or warped is None:
            continue
        off = disagreement(u, batch[f"{side}_image"], warped)
        print(f"{method}: our warp of {side} is within {off:.4f} of its own")
        if not off <= TOLERANCE:
            raise InputError(f"{method}: its displacement does not give its own warped {side} image, {off:.3f} off")
