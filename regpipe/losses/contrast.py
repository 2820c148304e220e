"""Two images of unlike contrasts in one: grey values of one mapped to what the other shows there on average.

Local correlation takes a line for the relation of both images' grey values. Where a curve tells much more, a T2 image
onto a T1 say, one image is mapped by that curve first: the conditional mean, whose share of explained variance is
the correlation ratio (Roche et al., MICCAI 1998); as Guimond et al. (IEEE TMI 2001) correct intensities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 1_000_000  # voxels that are looked at
BINS = 32  # knots of the curve: finer ones follow single voxels
SEEN = 1e-3  # of the voxels that each knot would have, were they spread evenly: below, its neighbours tell
MORE = 0.1  # of the variance: what a curve has to explain beyond a line
ENOUGH = 0.25  # of the variance: what it has to explain at all; images that lie far apart have no curve to tell

AS_IT_IS, FIXED, MOVING = "as it is", "fixed mapped", "moving mapped"


class Contrast(NamedTuple):
    """Both images (1, 1, *spatial), of which one may be mapped to the other's contrast, and which."""

    fixed: Tensor
    moving: Tensor
    how: str


class _Curve(NamedTuple):
    knots: Tensor  # (BINS,) in [0, 1]: the least is 0 and the largest 1
    explained: float  # share of the variance


@torch.no_grad()
def in_one(fixed: Tensor, moving: Tensor, warped_moving: Tensor, seen: Tensor | None = None) -> Contrast:
    """The pair with one image mapped to the contrast of the other, or as it is where no curve tells more than a line.

    Args:
        fixed, moving: (1, 1, *spatial) in [0, 1].
        warped_moving: on the fixed image's grid, as far as they are aligned by now.
        seen: where both count, on the fixed image's grid, in [0, 1]; None: everywhere.
    """
    inside = torch.ones_like(fixed, dtype=torch.bool) if seen is None else seen > 0.5
    every = max(1, fixed.numel() // SAMPLES)
    a, b = (x[inside][::every].double().cpu() for x in (fixed, warped_moving))
    if len(a) < BINS:
        return Contrast(fixed, moving, AS_IT_IS)
    of_moving, of_fixed = _curve(b, a), _curve(a, b)
    line = float(torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num() ** 2)
    best = max(of_moving.explained, of_fixed.explained)
    if best < max(line + MORE, ENOUGH):
        return Contrast(fixed, moving, AS_IT_IS)
    if of_moving.explained >= of_fixed.explained:
        return Contrast(fixed, _mapped(moving, of_moving.knots.to(moving)), MOVING)
    return Contrast(_mapped(fixed, of_fixed.knots.to(fixed)), moving, FIXED)


def _curve(given: Tensor, of: Tensor) -> _Curve:
    """The mean of ``of`` (N,) where the other image is ``given`` (N,), as a curve of straight pieces."""
    at = given.clamp(0, 1) * (BINS - 1)
    low = at.floor().long().clamp(max=BINS - 2)
    share = at - low
    counts, sums = (given.new_zeros(BINS) for _ in range(2))
    for knot, weight in ((low, 1 - share), (low + 1, share)):
        counts.index_add_(0, knot, weight)
        sums.index_add_(0, knot, weight * of)
    counts, sums = (_smooth(x) for x in (counts, sums))
    known = (counts > SEEN * len(given) / BINS).nonzero()[:, 0]
    knots = torch.from_numpy(np.interp(np.arange(BINS), known, (sums / counts)[known]))  # where unknown, a line
    told = _mapped(given, knots)
    explained = torch.corrcoef(torch.stack([told, of]))[0, 1].nan_to_num() ** 2
    return _Curve((knots - knots.min()) / (knots.max() - knots.min()).clamp(min=1e-6), float(explained))


def _smooth(x: Tensor) -> Tensor:
    padded = nn.functional.pad(x[None, None], (1, 1), mode="replicate")[0, 0]
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4


def _mapped(image: Tensor, knots: Tensor) -> Tensor:
    at = image.clamp(0, 1) * (len(knots) - 1)
    low = at.floor().long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[low], knots[low + 1], at - low)
