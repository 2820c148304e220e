"""What training minimises: named terms, one weighted sum.

A term is a function ``(registration, target, options) -> scalar``, listed by name in ``TERMS``; its docstring
says what zero means and in which unit it counts. ``RegistrationLoss`` adds the terms that have a weight.
Every term is computed in float32, outside any autocast: LNCC in half precision is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from monai.losses import BendingEnergyLoss, GlobalMutualInformationLoss
from torch import Tensor, nn

from regpipe.errors import InputError
from regpipe.fields import (
    Registration,
    differences,
    integrate,
    jacobian_determinant,
    resize,
    sample_at,
    warp,
)

Target = Mapping[str, Tensor]  # a collated batch, see regpipe.pairs


class Options(NamedTuple):
    """What the terms may be told."""

    window: int = 9  # LNCC, voxels
    label_ids: tuple[int, ...] = ()  # structures that label supervision sees; empty: all that the batch holds


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over a centred window of ``window`` voxels per axis, cut off at the rim: (B, C, *spatial) -> the same.

    Running sums, one axis after the other: the cost does not depend on the window.
    """
    half = window // 2
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        total = nn.functional.pad(x.cumsum(axis).movedim(axis, -1), (1, 0))  # total[i] = sum of the first i
        where = torch.arange(n, device=x.device)
        ahead, behind = (where + half + 1).clamp(max=n), (where - half).clamp(min=0)
        x = (total[..., ahead] - total[..., behind]).movedim(-1, axis)
    return x


def lncc(a: Tensor, b: Tensor, *, window: int = 9, epsilon: float = 1e-5) -> Tensor:
    """1 - mean squared local correlation of images (B, 1, *spatial) in [0, 1]; 0 for a perfect match up to local gain.

    A flat window has correlation 0. ``epsilon`` is the variance below which a window counts as flat.
    Source: Avants et al. 2008 (ANTs' CC), normalised by the voxels really inside the window.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.float() - x.float().mean() for x in (a, b))  # an offset would cost the running sums all digits
        count = box_sum(torch.ones_like(a[:1]), window)
        mean = box_sum(torch.cat([a, b, a * a, b * b, a * b], 1), window) / count
        mean_a, mean_b, aa, bb, ab = mean.split(1, 1)
        covariance = ab - mean_a * mean_b
        var_a = (aa - mean_a * mean_a).clamp(min=0) + epsilon
        var_b = (bb - mean_b * mean_b).clamp(min=0) + epsilon
        return 1 - (covariance * covariance / (var_a * var_b)).mean()


def both_ways(r: Registration, target: Target, dissimilarity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of a dissimilarity over moving-onto-fixed and fixed-onto-moving."""
    forward = dissimilarity(r.warped_moving, target["fixed_image"])
    return (forward + dissimilarity(r.warped_fixed, target["moving_image"])) / 2


def _lncc(r: Registration, target: Target, options: Options) -> Tensor:
    """Local cross-correlation, both ways; in [0, 1]."""
    return both_ways(r, target, lambda a, b: lncc(a, b, window=options.window))


def _mse(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean squared difference of intensities in [0, 1], both ways."""
    return both_ways(r, target, nn.functional.mse_loss)


_mutual_information = GlobalMutualInformationLoss(num_bins=32)


def _mi(r: Registration, target: Target, options: Options) -> Tensor:
    """Minus global mutual information in nats (MONAI's Parzen windows), both ways."""
    return both_ways(r, target, _mutual_information)


def _midway(r: Registration, target: Target, options: Options) -> Tensor:
    """LNCC of both images in the midway space: exp(v/2) and exp(-v/2), or exp of SYMNet's two velocities."""
    moving, fixed = target["moving_image"], target["fixed_image"]
    if r.velocity.shape[1] == r.displacement.shape[1]:
        halves = torch.cat([r.velocity, -r.velocity]) / 2
    else:
        halves = torch.cat(r.velocity.chunk(2, dim=1)[::-1])
    u = resize(integrate(halves), moving.shape[2:])
    moving, fixed = warp(torch.cat([moving, fixed]), u).chunk(2)
    return lncc(moving, fixed, window=options.window)


def _diffusion(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean squared gradient of the velocity (forward differences): voxels per voxel, the same on any grid."""
    v = r.velocity
    return torch.stack([differences(v, axis).square().mean() for axis in range(v.ndim - 2)]).mean()


_bending_energy = BendingEnergyLoss()


def _bending(r: Registration, target: Target, options: Options) -> Tensor:
    """Bending energy of the velocity (MONAI's, Rueckert 1999), on the velocity's grid."""
    dim = r.displacement.shape[1]
    return torch.stack([_bending_energy(v) for v in r.velocity.split(dim, dim=1)]).mean()  # SYMNet has two


def _jacobian(r: Registration, target: Target, options: Options) -> Tensor:
    """SYMNet's orientation consistency: mean of max(0, -det J), both ways; 0 without folds."""
    return torch.stack([torch.relu(-jacobian_determinant(u)).mean() for u in (r.displacement, r.inverse)]).mean()


def _magnitude(r: Registration, target: Target, options: Options) -> Tensor:
    """SYMNet's balance: how much larger one direction's mean absolute displacement is than the other's, voxels."""
    return (r.displacement.abs().mean() - r.inverse.abs().mean()).abs()


def one_hot(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """(B, 1, *spatial) label map -> (B, len(ids), *spatial) float."""
    return torch.cat([labels == i for i in ids], 1).float()


def _shared_ids(fixed: Tensor, moving: Tensor) -> list[int]:
    shared = set(fixed.unique().tolist()) & set(moving.unique().tolist())
    return sorted(int(i) for i in shared if i > 0)


def _dice(r: Registration, target: Target, options: Options) -> Tensor:
    """1 - soft Dice of linearly warped one-hot labels, both ways, over the labels both images hold."""
    ids = options.label_ids or _shared_ids(target["fixed_label"], target["moving_label"])
    if not ids:
        return r.displacement.sum() * 0.0
    fixed, moving = (one_hot(target[key], ids) for key in ("fixed_label", "moving_label"))
    axes = list(range(2, fixed.ndim))
    held = (fixed.sum(axes) > 0) & (moving.sum(axes) > 0)
    if not held.any():
        return r.displacement.sum() * 0.0

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return (2 * (a * b).sum(axes) / (a.sum(axes) + b.sum(axes)).clamp(min=1e-5))[held].mean()

    warped_moving, warped_fixed = warp(torch.cat([moving, fixed]), torch.cat([r.displacement, r.inverse])).chunk(2)
    return 1 - (overlap(fixed, warped_moving) + overlap(moving, warped_fixed)) / 2


def _landmarks(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean distance of corresponding landmarks in voxels, both ways; NaN rows are missing points."""
    ends = (target["fixed_landmarks"], target["moving_landmarks"])
    valid = ~(ends[0].isnan() | ends[1].isnan()).any(-1)
    if not valid.any():
        return r.displacement.sum() * 0.0
    distances = []
    for u, (start, end) in ((r.displacement, ends), (r.inverse, ends[::-1])):
        moved = start + sample_at(u, start.nan_to_num())
        distances.append(((moved - end)[valid].square().sum(-1) + 1e-6).sqrt().mean())
    return torch.stack(distances).mean()


def _known_field(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean squared distance to the true displacement ``target["displacement"]``, voxels^2 (phantoms)."""
    if "displacement" not in target:
        raise InputError("loss term known_field: these pairs have no displacements/ to learn from; give it no weight")
    return (r.displacement - target["displacement"]).square().sum(1).mean()


TERMS: dict[str, Callable[[Registration, Target, Options], Tensor]] = {
    "lncc": _lncc,
    "mse": _mse,
    "mi": _mi,
    "midway": _midway,
    "diffusion": _diffusion,
    "bending": _bending,
    "jacobian": _jacobian,
    "magnitude": _magnitude,
    "dice": _dice,
    "landmarks": _landmarks,
    "known_field": _known_field,
}


class RegistrationLoss(nn.Module):
    """The weighted sum of named terms: ``loss(prediction, target) -> scalar``.

    ``loss.terms`` holds the last call's terms, unweighted, and their sum as ``loss``: what logs and the NaN guard read.

    Args:
        weights: term name -> weight; a weight of 0 leaves the term out.
        window: LNCC's window in voxels, odd.
        label_ids: the labels that ``dice`` sees; none given: all that a batch's images share.

    Raises:
        InputError: a term that does not exist, a negative or non-finite weight, no term at all, an even window.
    """

    def __init__(self, weights: Mapping[str, float], *, window: int = 9, label_ids: Sequence[int] = ()) -> None:
        super().__init__()
        unknown = sorted(set(weights) - set(TERMS))
        if unknown:
            raise InputError(f"unknown loss terms {unknown}: choose among {', '.join(TERMS)}")
        if any(not math.isfinite(w) or w < 0 for w in weights.values()):
            raise InputError(f"loss weights must be finite and not negative, got {dict(weights)}")
        self.weights = {name: float(w) for name, w in weights.items() if w > 0}
        if not self.weights:
            raise InputError("every loss weight is 0: give at least one term a weight")
        if window < 1 or window % 2 == 0:
            raise InputError(f"the window of lncc must be odd, got {window} voxels")
        self.options = Options(window, tuple(label_ids))
        self.terms: dict[str, float] = {}

    def forward(self, prediction: Mapping[str, Tensor], target: Target) -> Tensor:
        registration = Registration(**{name: prediction[name] for name in Registration._fields})
        with torch.autocast(registration.displacement.device.type, enabled=False):
            terms = {name: TERMS[name](registration, target, self.options) for name in self.weights}
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self.terms = {name: float(term.detach()) for name, term in {**terms, "loss": total}.items()}
        return total
