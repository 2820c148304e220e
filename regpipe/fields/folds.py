"""Removes the folds of a displacement and changes it as little as possible.

The measure is the digital one of ``metrics.measures.ndv_percent`` (Liu et al., IJCV 2024): every cell between voxel
centres is cut into simplices in both ways, and each of them must keep a positive volume. The central-difference
determinant at a voxel is the mean of its corner simplices (it is linear in each column), hence positive as well.

Method: a simplex with less than ``MARGIN`` of its volume at rest is moved to ``MARGIN`` along the shortest way, to
first order; a voxel in several of them moves by their mean (averaged projections onto constraints: Cimmino 1938).
Folds that remain are first smoothed a little, in a growing region.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regpipe.fields.algebra import determinant, window
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError

MARGIN = 0.02  # volume that a folded simplex is given, as a share of its volume at rest
FLOOR = 0.005  # less than this still counts as folded: a reserve for rounding, also in a file
REACH = 2  # voxels around a fold that may move at first
STEPS = 30  # of projection in a round
RELAXATION = 1.5  # steps longer than the mean: the usual 1 to 2
ROUNDS = 40
SLAB = 1 << 18  # voxels looked at together: they stay in the processor's cache

Corner = tuple[int, ...]
At = Callable[[Corner], Tensor]  # a corner of every cell -> its displacement (D, *cells)


class Repaired(NamedTuple):
    """A displacement without folds, and how far it was moved."""

    displacement: Tensor  # (B, D, *spatial), voxels, float32
    moved_mean: Tensor  # (B,) mean distance over all voxels, in voxels
    moved_max: Tensor  # (B,) largest distance, in voxels
    steps: int  # of projection, the most of the batch; 0 if nothing was folded


class Simplex(NamedTuple):
    """One simplex of the unit cell; ``volume`` is the determinant of its edges at rest, with its sign."""

    base: Corner
    others: tuple[Corner, ...]  # one per edge from the base
    volume: int


class Patch(NamedTuple):
    """The cells around folds, with their voxels numbered by themselves."""

    voxels: Tensor  # (V,) index into the flattened grid
    free: Tensor  # (V,) bool: may move
    cells: Tensor  # (C,) index into the flattened cells
    corners: dict[Corner, Tensor]  # corner -> (C,) number of the voxel there


def repair(u: Tensor, *, rounds: int = ROUNDS) -> Repaired:
    """A displacement (B, D, *spatial), voxels, without folds: ``ndv_percent`` and ``folds_percent`` are 0.

    A field without folds, and every voxel far from folds, is unchanged to the bit. The method always ends: a field
    that still folds after ``rounds`` is scaled down until it does not. There is no gradient.

    A displacement and its inverse are repaired independently; afterwards they are inverse only up to ``moved_max``:
    that of the outer field plus that of the inner one times the stretch of the outer.

    Args:
        u: convention of ``fields.algebra``.
        rounds: of smoothing and projection in a growing region; 0 only scales.

    Raises:
        InputError: the field holds NaN or infinite values.
    """
    if not torch.isfinite(u).all():
        raise InputError("displacement to repair: has NaN or infinite values")
    u = u.detach().float()
    fields, steps = zip(*[_repair_one(x, rounds) for x in u], strict=True)
    out = torch.stack(fields)
    moved = (out - u).square().sum(1).sqrt().flatten(1)
    return Repaired(out, moved.mean(1), moved.amax(1), max(steps))


def folded_cells(u: Tensor, *, floor: float = 0.0) -> Tensor:
    """Where a displacement (D, *spatial) folds: bool (*(spatial - 1)), one per cell, True if a simplex is <= floor."""
    sizes = u.shape[1:]
    thickness = max(1, SLAB // math.prod(sizes[1:]))
    slabs = [u[:, i : i + thickness + 1] for i in range(0, max(sizes[0] - 1, 1), thickness)]
    return torch.cat([_folded(_on_grid(slab), len(sizes), floor) for slab in slabs])


def _repair_one(u: Tensor, rounds: int) -> tuple[Tensor, int]:
    folded, steps = folded_cells(u), 0
    if not folded.any():
        return u, steps
    flat = u.flatten(1).clone()
    for turn in Progress(range(rounds), what="removing folds", unit="rounds at most"):
        patch = _patch(folded, REACH + turn)
        local = flat[:, patch.voxels]
        local = _smooth(local, patch, folded.flatten()[patch.cells], sweeps=turn)
        local, taken = _project(local, patch)
        flat[:, patch.voxels] = local
        steps += taken
        folded = torch.zeros_like(folded)  # no cell outside the patch has changed
        folded.view(-1)[patch.cells] = _folded(_in_patch(local, patch), len(u), FLOOR)
        if not folded.any():
            return flat.view(u.shape), steps
    return _scaled(flat.view(u.shape)), steps


def _scaled(u: Tensor) -> Tensor:
    # The end of it: a field with gradients below 1 / D has no fold, and halving gets there.
    while folded_cells(u, floor=FLOOR).any():
        u = u / 2
    return u


# ------------------------------------------------------------------------------------- simplices


def _simplices(dim: int) -> Iterator[Simplex]:
    """Both ways to cut a cell: a simplex at every corner and, in 3D, the two central tetrahedra."""
    for base in itertools.product((0, 1), repeat=dim):
        others = tuple(tuple(1 - c if i == k else c for i, c in enumerate(base)) for k in range(dim))
        yield Simplex(base, others, math.prod(1 - 2 * c for c in base))
    for apex in (0, 1) if dim == 3 else ():
        others = tuple(tuple(apex if i == k else 1 - apex for i in range(dim)) for k in range(dim))
        yield Simplex((apex,) * dim, others, 2 * (1 - 2 * apex))


def _edges(at: At, simplex: Simplex) -> Tensor:
    """Edges (D, D, *cells) after the motion: component, then which edge."""
    start = at(simplex.base)
    columns = []
    for other in simplex.others:
        rest = start.new_tensor([o - b for o, b in zip(other, simplex.base, strict=True)])
        columns.append(at(other) - start + rest.view(-1, *[1] * (start.ndim - 1)))
    return torch.stack(columns, dim=1)


def _volume(edges: Tensor, simplex: Simplex) -> Tensor:
    return determinant(edges.movedim((0, 1), (-2, -1))) / simplex.volume


def _volume_gradient(edges: Tensor, simplex: Simplex) -> Tensor:
    """Gradient (D, D, *cells) of the volume by the edges: their cofactors."""
    if len(edges) == 2:
        (ax, bx), (ay, by) = edges
        return torch.stack([torch.stack([by, -ay]), torch.stack([-bx, ax])]) / simplex.volume
    a, b, c = edges.unbind(1)
    cofactors = [torch.linalg.cross(p, q, dim=0) for p, q in ((b, c), (c, a), (a, b))]
    return torch.stack(cofactors, dim=1) / simplex.volume


def _folded(at: At, dim: int, floor: float) -> Tensor:
    bad = [_volume(_edges(at, simplex), simplex) <= floor for simplex in _simplices(dim)]
    return torch.stack(bad).any(0)


def _on_grid(u: Tensor) -> At:
    return lambda corner: _at_corner(u, corner)


def _in_patch(local: Tensor, patch: Patch) -> At:
    return {corner: local[:, numbers] for corner, numbers in patch.corners.items()}.__getitem__


def volumes(u: Tensor) -> Iterator[Tensor]:
    """Of each simplex D! times its volume in every cell of a displacement (D, *spatial); below 0 it is inside out."""
    return (abs(s.volume) * _volume(_edges(_on_grid(u), s), s) for s in _simplices(len(u)))


# --------------------------------------------------------------------------------- moving voxels


def _patch(folded: Tensor, reach: int) -> Patch:
    """What may move: the voxels up to ``reach`` from a folded cell (*(spatial - 1)), and every cell that they touch."""
    dim, shape = folded.ndim, [n + 1 for n in folded.shape]
    corners = list(itertools.product((0, 1), repeat=dim))
    free = torch.zeros(shape, dtype=torch.bool, device=folded.device)
    for corner in corners:
        _at_corner(free, corner).logical_or_(folded)
    for axis in range(dim):
        free = _dilated(free, axis, reach)
    touched = torch.zeros_like(folded)
    for corner in corners:
        touched |= _at_corner(free, corner)
    where = touched.nonzero()  # (C, D)
    strides = where.new_tensor([math.prod(shape[axis + 1 :]) for axis in range(dim)])
    grid = torch.stack([((where + where.new_tensor(corner)) * strides).sum(1) for corner in corners])
    voxels, numbers = grid.unique(return_inverse=True)
    cells = touched.flatten().nonzero()[:, 0]
    return Patch(voxels, free.flatten()[voxels], cells, dict(zip(corners, numbers, strict=True)))


def _at_corner(x: Tensor, corner: Corner) -> Tensor:
    return window(x, corner, [n - 1 for n in x.shape[-len(corner) :]])


def _dilated(mask: Tensor, axis: int, reach: int) -> Tensor:
    n = mask.shape[axis]
    for _ in range(reach):
        grown = mask.clone()
        grown.narrow(axis, 0, n - 1).logical_or_(mask.narrow(axis, 1, n - 1))
        grown.narrow(axis, 1, n - 1).logical_or_(mask.narrow(axis, 0, n - 1))
        mask = grown
    return mask


def _smooth(local: Tensor, patch: Patch, folded: Tensor, *, sweeps: int) -> Tensor:
    """Blend the field (D, V) with its binomial mean: fully at the folded cells (C,), softly beside them."""
    if not sweeps:
        return local
    seed = (_to_voxels(folded[None].to(local.dtype), patch) > 0).to(local.dtype)
    weight = _binomial(seed, patch) * patch.free
    for _ in range(sweeps):
        local = local + weight * (_binomial(local, patch) - local)
    return local


def _binomial(values: Tensor, patch: Patch) -> Tensor:
    """Mean (K, V) over neighbours with weights 1 2 1 along each axis."""
    return _to_voxels(torch.stack([values[:, n] for n in patch.corners.values()]).mean(0), patch)


def _to_voxels(values: Tensor, patch: Patch) -> Tensor:
    """Mean (K, V) of the values (K, C) of the cells around each voxel."""
    sums = values.new_zeros(len(values) + 1, len(patch.voxels))
    weighted = torch.cat([values, torch.ones_like(values[:1])])
    for numbers in patch.corners.values():
        sums.index_add_(1, numbers, weighted)
    return sums[:-1] / sums[-1:]


def _project(local: Tensor, patch: Patch) -> tuple[Tensor, int]:
    """Up to ``STEPS`` averaged projections of the field (D, V); stops as soon as nothing is folded."""
    for step in range(STEPS):
        motion = local.new_zeros(len(local) + 1, local.shape[1])  # the last row counts who pushes
        at = _in_patch(local, patch)
        worst = min(_push(motion, at, patch, simplex) for simplex in _simplices(len(local)))
        if worst > FLOOR:
            return local, step
        local = local + RELAXATION * patch.free * motion[:-1] / motion[-1:].clamp(min=1)
    return local, STEPS


def _push(motion: Tensor, at: At, patch: Patch, simplex: Simplex) -> float:
    """Add the shortest way that gives each small simplex ``MARGIN`` to ``motion``; the smallest volume."""
    edges = _edges(at, simplex)
    volume = _volume(edges, simplex)
    small = (volume < MARGIN).nonzero()[:, 0]
    gradient = _volume_gradient(edges[..., small], simplex)
    gradient = torch.cat([gradient, -gradient.sum(1, keepdim=True)], dim=1)  # the base moves against the others
    length = gradient.square().sum((0, 1)) + 1e-2  # a simplex squeezed to a point has no gradient
    way = gradient * ((MARGIN - volume[small]) / length)
    for k, corner in enumerate([*simplex.others, simplex.base]):
        pushed = torch.cat([way[:, k], torch.ones_like(way[:1, 0])])
        motion.index_add_(1, patch.corners[corner][small], pushed)
    return float(volume.min())
