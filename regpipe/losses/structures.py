"""Label maps as losses compare them: structures one by one, their overlap, how far from each a voxel is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

REACH = 12.0  # voxels; what is farther off counts as that far. Of a coarse level's voxels it is a long way
MOST = 4_000_000  # values of all structures' maps: more are not made, coarser levels have led by then


def one_hot(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """(B, 1, *spatial) label map -> (B, len(ids), *spatial) float."""
    return torch.cat([labels == i for i in ids], 1).float()


def shared_ids(fixed: Tensor, moving: Tensor) -> list[int]:
    """The labels that both maps hold."""
    shared = set(fixed.unique().tolist()) & set(moving.unique().tolist())
    return sorted(int(i) for i in shared if i > 0)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft Dice of two (B, K, *spatial) in [0, 1] -> (B, K)."""
    a, b = a.flatten(2), b.flatten(2)
    return 2 * (a * b).sum(2) / (a.sum(2) + b.sum(2)).clamp(min=1e-5)


def signed_distances(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """(B, 1, *spatial) label map -> (B, len(ids), *spatial) in [-1, 1]: distances to each structure's surface, by
    ``REACH``, below 0 within it; no structure at all where the maps would hold more than ``MOST`` values."""
    ids = list(ids) if labels[0].numel() * len(ids) <= MOST else []
    found = np.zeros((len(labels), len(ids), *labels.shape[2:]), np.float32)
    for of_pair, label in zip(found, labels.cpu().numpy(), strict=True):
        for i, structure in enumerate(ids):
            inside = label[0] == structure
            within, beyond = (ndimage.distance_transform_edt(mask) for mask in (inside, ~inside))
            of_pair[i] = np.clip((beyond - within) / REACH, -1, 1) if inside.any() else 1
    return torch.from_numpy(found).to(labels.device)
