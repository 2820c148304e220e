"""How rough, stretched or folded a field (B, D, *spatial) in voxels is: plain functions -> scalar, 0 for no motion.

Derivatives are forward differences, in voxels per voxel, so that a value means the same on a coarser grid of the
same extent; central ones do not see a checkerboard. Determinants are the exception: ``fields.jacobian_determinant``.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regpipe.fields.algebra import differences, jacobian_determinant, window


def diffusion(u: Tensor) -> Tensor:
    """Mean squared gradient, over axes and components."""
    return torch.stack([differences(u, axis).square().mean() for axis in range(u.ndim - 2)]).mean()


def bending(u: Tensor) -> Tensor:
    """Bending energy (Rueckert et al. 1999): squared second derivatives, mean over components.

    Axes have 3 voxels and more. As MONAI 1.6's, by differences over 3 voxels; those of 1.5, over 5, do not see a
    checkerboard.
    """
    axes, inner = range(u.ndim - 2), [n - 2 for n in u.shape[2:]]
    energy = torch.zeros((), device=u.device)
    for i, j in itertools.combinations_with_replacement(axes, 2):
        step = differences if i == j else _central
        second = window(step(step(u, i), j), [int(axis not in (i, j)) for axis in axes], inner)
        energy = energy + (1 + (i != j)) * second.square()
    return energy.mean()


def _central(u: Tensor, axis: int) -> Tensor:
    steps = differences(u, axis)
    n = steps.shape[2 + axis] - 1
    return (steps.narrow(2 + axis, 0, n) + steps.narrow(2 + axis, 1, n)) / 2


def elastic(u: Tensor, *, mu: float = 1.0, lam: float = 1.0) -> Tensor:
    """Mean linear elastic energy ``mu |e|^2 + lam / 2 (div u)^2``, ``e = (grad u + grad u^T) / 2`` (Navier's).

    That is ``mu / 4 |grad u + grad u^T|^2 + lam / 2 (div u)^2`` (Modersitzki 2004): nothing for a small rotation,
    which costs ``diffusion``. Summed over components, where ``diffusion`` takes their mean.
    """
    dim = u.shape[1]
    gradient = torch.stack([_cut(differences(u, axis), axis) for axis in range(dim)], 2)  # (B, i, j, *): du_i / dx_j
    strain = (gradient + gradient.transpose(1, 2)) / 2
    divergence = torch.einsum("bii...->b...", strain)
    return mu * strain.square().sum((1, 2)).mean() + lam / 2 * divergence.square().mean()


def divergence(u: Tensor) -> Tensor:
    """Mean squared divergence: where a velocity has none, its flow keeps volumes (Mansi et al. 2011)."""
    parts = [_cut(differences(u[:, i : i + 1], i), i) for i in range(u.shape[1])]
    return torch.stack(parts).sum(0).square().mean()


def _cut(x: Tensor, but: int) -> Tensor:
    """Without the last voxel along every spatial axis but one: forward differences along all axes, on one grid."""
    return window(x, [0] * (x.ndim - 2), [n - (axis != but) for axis, n in enumerate(x.shape[2:])])


def jacobian(u: Tensor) -> Tensor:
    """SYMNet's orientation consistency: mean of max(0, -det J); 0 without folds."""
    return torch.relu(-jacobian_determinant(u)).mean()


def log_jacobian(u: Tensor, *, floor: float = 0.1) -> Tensor:
    """Mean of (log det J)^2: shrinking by a factor costs as much as growing by it.

    Below ``floor`` the logarithm goes on as its tangent: finite and with a gradient also where the field folds.
    """
    det = jacobian_determinant(u)
    tangent = math.log(floor) + (det - floor) / floor
    return torch.where(det < floor, tangent, det.clamp(min=floor).log()).square().mean()
