"""Measures of a registration, as functions on one case: ``metrics.measured`` runs them, ``metrics.cases`` on many.

They take torch tensors or numpy arrays **without a batch axis** and give Python numbers.
Displacements are in voxels (convention: ``fields.algebra``); lengths come out in mm by ``spacing``,
the mm per voxel of the working grid. Labels are warped by **nearest neighbour** everywhere: linear
interpolation would raise Dice by about 0.008.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree
from torch import Tensor

from regpipe.fields.algebra import LAYERS, Layers, compose, jacobian_determinant, sample_at
from regpipe.fields.folds import volumes
from regpipe.io.geometry import carry
from regpipe.transforms.likeness import correlation

Array = np.ndarray | Tensor

# ----------------------------------------------------------------------------- overlap and distance


def shared_labels(fixed_label: Array, moving_label: Array) -> list[int]:
    """Labels (> 0) that both original images hold, ascending: only these can match."""
    fixed, moving = (set(torch.as_tensor(x).unique().tolist()) for x in (fixed_label, moving_label))
    return sorted(int(i) for i in fixed & moving if i > 0)


def dice(fixed_label: Array, warped_label: Array, ids: Sequence[int]) -> dict[int, float]:
    """Dice overlap 2|A & B| / (|A| + |B|) per label of ``ids``; NaN where neither map holds it.

    Args:
        fixed_label, warped_label: integer maps of one shape. Warp labels by nearest neighbour: the
            interpolation moves Dice by 0.007 to 0.009, so numbers compare only under the same one.
    """
    fixed, warped = torch.as_tensor(fixed_label), torch.as_tensor(warped_label)
    scores = {}
    for i in ids:
        a, b = fixed == i, warped == i
        total = int(a.sum()) + int(b.sum())
        scores[i] = 2 * int((a & b).sum()) / total if total else math.nan
    return scores


def hd95(fixed_label: Array, warped_label: Array, ids: Sequence[int], spacing: Sequence[float]) -> dict[int, float]:
    """95 % Hausdorff distance in mm per label: the larger directed 95th percentile, between surface voxels.

    NaN where a label is missing from either map, so read it beside Dice, which is 0 for a label
    that vanished.
    """
    shape = torch.as_tensor(fixed_label).shape[-len(spacing) :]
    fixed, warped = (torch.as_tensor(x).cpu().reshape(*shape).numpy() for x in (fixed_label, warped_label))
    scores = {}
    boxes = [find_objects(x) for x in (fixed, warped)]
    for i in ids:
        held = [found[i - 1] for found in boxes if i <= len(found) and found[i - 1] is not None]
        box = tuple(_around(held))
        scores[i] = math.nan if len(held) < 2 else _hausdorff(warped[box] == i, fixed[box] == i, spacing)
    return scores


def _around(boxes: Sequence[tuple[slice, ...]]) -> list[slice]:
    """The box that holds them all and a voxel more: of 98 structures each fills a small part of a head."""
    return [
        slice(max(0, min(s.start for s in sides) - 1), max(s.stop for s in sides) + 1)
        for sides in zip(*boxes, strict=True)
    ]


def _hausdorff(a: np.ndarray, b: np.ndarray, spacing: Sequence[float]) -> float:
    """As ``monai.metrics.compute_hausdorff_distance`` has it, which brings seconds of imports for it."""
    edges = [np.argwhere(mask ^ binary_erosion(mask)) * np.asarray(spacing, np.float64) for mask in (a, b)]
    ways = (KDTree(there, leafsize=32).query(here)[0] for here, there in (edges, edges[::-1]))
    return max(torch.quantile(torch.from_numpy(mm.astype(np.float32)), 0.95).item() for mm in ways)


def tre(
    fixed_points: Array,
    moving_points: Array,
    displacement: Array,
    spacing: Sequence[float] | Array,
    *,
    bend: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Target registration error |p + u(p) - q| in mm, one per landmark known in both images.

    Args:
        fixed_points, moving_points: p and q, (K, D) in voxels; rows with a NaN are dropped.
        displacement: u (D, *spatial), interpolated linearly at p.
        spacing: mm per voxel of the moving points, (D,); or the matrix (D, D) that makes mm of their voxels.
        bend: of points (K, D) in voxels, where the moving image was seen through more than its frame: ``bend_of``.
    """
    u = _batched(displacement)
    p, q = in_both(*(torch.as_tensor(x).to(u) for x in (fixed_points, moving_points)))
    if not len(p):
        return np.empty(0)
    mm = torch.as_tensor(spacing).to(u)
    found = p + sample_at(u, p[None])[0]
    if bend is not None:
        found, q = bend(found), bend(q)
    error = (found - q) @ (mm.diag() if mm.ndim == 1 else mm.T)
    return error.norm(dim=1).double().cpu().numpy()


def in_both(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The landmarks (K, D) that are known in both images."""
    there = ~(p.isnan().any(1) | q.isnan().any(1))
    return p[there], q[there]


def bend_of(item: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Of a batch of size 1, what its moving image was seen through, as a map of points; None: its frame alone.

    See ``transforms.homography`` and ``transforms.initial``.
    """
    if "moving_bend" in item:
        matrix = item["moving_bend"][0]
        return lambda points: carry(matrix.to(points), points)
    if "moving_field" in item:
        field = item["moving_field"][:1]
        return lambda points: points + sample_at(field.to(points), points[None])[0]
    return None


def ncc(a: Array, b: Array) -> float:
    """Global normalised cross-correlation in [-1, 1]; 0 if an image is constant."""
    return correlation(*(torch.as_tensor(image).detach().cpu().numpy() for image in (a, b)))


# --------------------------------------------------------------------------------------- regularity


def determinant_of(displacement: Array, known: Tensor | None = None) -> Tensor:
    """det(I + grad u) by central differences, (*S), of u (D, *S): ``known``, where it was computed before."""
    return jacobian_determinant(_batched(displacement))[0] if known is None else known


def folds_percent(displacement: Array, determinant: Tensor | None = None) -> float:
    """% of voxels with det(I + grad u) <= 0 by central differences, unclipped. u (D, *spatial).

    Central differences skip the voxel itself and miss folds (the checkerboard problem): see
    ``ndv_percent``.
    """
    det = determinant_of(displacement, determinant)
    safe = det > 0  # NaN is not safe
    return 100 * (~safe).double().mean().item()


def ndv_percent(displacement: Array) -> float:
    """Non-diffeomorphic volume of u (D, *spatial) in % of the volume spanned by the voxel centres.

    Each cell between voxel centres can be cut into simplices in two ways: into 2 triangles (D = 2),
    or into 4 corner tetrahedra and a central one (D = 3). The map is linear on each simplex; those
    it turns inside out add the volume they cover, averaged over the two ways. 0 if and only if no
    simplex flips (a digital diffeomorphism).

    Source: Liu, Chen, Wei, Carass, Prince, 'On finite difference Jacobian computation in deformable
    image registration', IJCV 2024. Only whole cells count: nothing is assumed beyond the rim.
    """
    u = torch.as_tensor(displacement).float()
    flipped = sum(float((-part).clamp(min=0).sum(dtype=torch.float64)) for part in volumes(u))
    cells = math.prod(n - 1 for n in u.shape[1:])
    return 100 * flipped / (2 * math.factorial(len(u)) * cells)


def sdlogj(displacement: Array, determinant: Tensor | None = None) -> float:
    """Standard deviation of log det(I + grad u) over all voxels; folds count as log(1e-9)."""
    det = determinant_of(displacement, determinant)
    return det.double().clamp(min=1e-9).log().std(correction=0).item()


def sdlogj_l2r(displacement: Array, determinant: Tensor | None = None) -> float:
    """Learn2Reg's 'SDlogJ': std of log(clip(det + 3, 1e-9, 1e9)) without the 2 outer voxels.

    The + 3 makes it far smaller than ``sdlogj``: only this one compares with numbers published by
    the challenge. NaN if no voxel is left. Source: ``evaluation.py`` of the Learn2Reg challenge.
    """
    det = determinant_of(displacement, determinant)
    inner = det.double()[(slice(2, -2),) * det.ndim]
    return (inner + 3).clamp(1e-9, 1e9).log().std(correction=0).item() if inner.numel() else math.nan


def inverse_consistency(
    displacement: Array, inverse: Array, spacing: Sequence[float], *, layers: Layers = LAYERS
) -> float:
    """Mean length in mm of compose(u, u_inv) and compose(u_inv, u). Both (D, *spatial)."""
    u, u_inv = _batched(displacement), _batched(inverse)
    mm = u.new_tensor(list(spacing)).view(1, -1, *[1] * (u.ndim - 2))
    residuals = [compose(a, b, layers=layers) * mm for a, b in ((u, u_inv), (u_inv, u))]
    return sum(r.norm(dim=1).double().mean().item() for r in residuals) / 2


def _batched(displacement: Array) -> Tensor:
    return torch.as_tensor(displacement).float()[None]


# ---------------------------------------------------------------------------------------- many cases


def bootstrap_interval(values: Array | Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean with its 95 % percentile bootstrap interval of 2000 draws. NaNs are dropped.

    One value: low = high = mean. None: three NaNs.
    """
    numbers = known(np.asarray(values, dtype=float))
    mean = float(numbers.mean()) if len(numbers) else math.nan
    if len(numbers) < 2:
        return mean, mean, mean
    from scipy.stats import bootstrap  # a third of a second

    found = bootstrap((numbers,), np.mean, n_resamples=2000, method="percentile", rng=seed).confidence_interval
    return mean, float(found.low), float(found.high)


def mean_ratios(cases: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, float, float, float]]:
    """Of ``volumes`` of rows of ``metrics.json``: label -> number of cases, mean ratio, and its 95 % interval.

    The mean is that of the logarithms, so that twice and half are 1; ``bootstrap_interval`` over the cases. A region
    that folds as a whole has no logarithm.
    """
    found: dict[str, list[float]] = {}
    for case in cases:
        for label, told in case.get("volumes", {}).items():
            ratio = float(told["ratio"])
            found.setdefault(label, []).append(math.log(ratio) if ratio > 0 else math.nan)
    means = {}
    for label in sorted(found, key=int):
        mean, low, high = map(math.exp, bootstrap_interval(found[label]))
        means[label] = len(known(found[label])), mean, low, high
    return means


def known(values: Iterable[float]) -> np.ndarray:
    """The values that are not NaN."""
    array = np.asarray(list(values), dtype=float)
    return array[~np.isnan(array)]


def mean_of(values: Iterable[float]) -> float:
    """Mean without NaNs; NaN if nothing is left."""
    numbers = known(values)
    return float(numbers.mean()) if len(numbers) else math.nan
