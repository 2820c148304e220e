"""No simplex is inside out afterwards, whoever counts, and nothing else has moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from regpipe.fields import folds as module
from regpipe.fields.algebra import integrate, resize
from regpipe.fields.folds import folded_cells, repair
from regpipe.metrics.measures import folds_percent, ndv_percent
from regpipe.utils.errors import InputError

SHAPES = ((40, 33), (14, 17, 12))
every_shape = pytest.mark.parametrize("shape", SHAPES)

# Liu et al., IJCV 2024: two ways to cut a cell, each simplex as its vertices (xy or xyz, 0 or 1)
TRIANGLES = ("00 10 01", "11 10 01", "00 10 11", "00 01 11")
TETRAHEDRA = (
    *("000 100 010 001", "110 100 010 111", "101 100 001 111", "011 010 001 111", "100 010 001 111"),
    *("100 000 110 101", "010 000 110 011", "001 000 101 011", "111 110 101 011", "000 110 101 011"),
)


def smallest_volume(u: Tensor) -> float:
    """Least relative volume of all simplices of a displacement (D, *S), by numpy, from the moved vertices."""
    field = u.double().numpy()
    sides = field.shape[1:]
    moved = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij")) + field
    worst = np.inf
    for simplex in TRIANGLES if len(sides) == 2 else TETRAHEDRA:
        vertices = np.array([[int(c) for c in vertex] for vertex in simplex.split()])
        rest = np.linalg.det((vertices[1:] - vertices[0]).astype(float))
        at = [moved[(slice(None), *[slice(c, n - 1 + c) for c, n in zip(v, sides, strict=True)])] for v in vertices]
        edges = np.stack([p - at[0] for p in at[1:]], -1)  # (D, *cells, D)
        worst = min(worst, float((np.linalg.det(np.moveaxis(edges, 0, -1)) / rest).min()))
    return worst


def noise(shape: tuple[int, ...], *, smooth: float, rms: float, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    u = np.stack([gaussian_filter(rng.normal(size=shape), smooth) for _ in shape])
    return torch.tensor(rms * u / u.std(), dtype=torch.float32)[None]


def band(shape: tuple[int, ...], *, half: float = 4.0) -> Tensor:
    """u = -1.5 x along axis 0 for abs(x) < half: there phi(x) = -x / 2 turns space inside out."""
    x = torch.arange(shape[0]) - shape[0] // 2 + 0.3
    u = torch.zeros(1, len(shape), *shape)
    u[0, 0] = (-1.5 * x.clamp(-half, half)).view(-1, *[1] * (len(shape) - 1))
    return u


def assert_unfolded(u: Tensor) -> None:
    for field in u:
        assert ndv_percent(field) == 0
        assert folds_percent(field) == 0
        assert smallest_volume(field) > 0.004


@every_shape
@pytest.mark.parametrize(("smooth", "rms"), [(0.1, 1.0), (1.0, 1.0), (2.0, 2.0)])
def test_random_noise_is_unfolded(shape: tuple[int, ...], smooth: float, rms: float) -> None:
    u = noise(shape, smooth=smooth, rms=rms)
    assert ndv_percent(u[0]) > 1 and smallest_volume(u[0]) < -0.5
    repaired = repair(u)
    assert_unfolded(repaired.displacement)
    assert repaired.steps > 0
    moved = (repaired.displacement - u).norm(dim=1)
    torch.testing.assert_close(repaired.moved_mean, moved.mean()[None])
    torch.testing.assert_close(repaired.moved_max, moved.max()[None])


@every_shape
def test_a_folded_band_moves_no_more_than_it_must(shape: tuple[int, ...]) -> None:
    # A line that falls by d between two of its points cannot be made to rise without moving one of them by d / 2.
    u = band(shape)
    phi = u[0, 0].flatten(1)[:, 0] + torch.arange(shape[0])
    drop = (phi.cummax(0).values - phi).max().item()
    assert drop > 3
    repaired = repair(u)
    assert_unfolded(repaired.displacement)
    assert drop / 2 <= repaired.moved_max.item() < 1.25 * drop / 2


@every_shape
def test_a_field_without_a_fold_comes_back_bit_for_bit(shape: tuple[int, ...]) -> None:
    u = integrate(noise(shape, smooth=3, rms=1.0))
    assert_unfolded(u)
    repaired = repair(u)
    assert torch.equal(repaired.displacement, u)
    assert (repaired.moved_mean.item(), repaired.moved_max.item(), repaired.steps) == (0, 0, 0)


def test_a_thin_simplex_is_no_fold() -> None:
    u = torch.zeros(1, 2, 12, 12)
    u[:, 0, 6:] = -0.999  # leaves 0.001 of the volume, less than the floor
    assert torch.equal(repair(u).displacement, u)


@every_shape
def test_cells_that_are_squeezed_flat_are_folded(shape: tuple[int, ...]) -> None:
    u = torch.zeros(1, len(shape), *shape)
    u[:, 0, 6:] = -1  # planes 5 and 6 fall onto each other
    folded = folded_cells(u[0])
    assert folded[5].all() and folded.sum() == folded[5].numel()
    assert_unfolded(repair(u).displacement)


@every_shape
def test_voxels_far_from_a_fold_do_not_move_at_all(shape: tuple[int, ...]) -> None:
    shape = tuple(2 * n for n in shape)
    u = integrate(noise(shape, smooth=4, rms=1.0))
    u[(0, 0, *[n // 4 for n in shape])] += 2.5  # one voxel beyond its neighbour
    near = (slice(None), slice(None), *[slice(max(0, n // 4 - 6), n // 4 + 7) for n in shape])
    repaired = repair(u)
    assert_unfolded(repaired.displacement)
    moved = repaired.displacement != u
    assert moved[near].any()
    moved[near] = False
    assert not moved.any()


def test_each_field_of_a_batch_is_repaired_by_itself() -> None:
    shape = (24, 20)
    whole = integrate(noise(shape, smooth=3, rms=1.0))
    fields = [noise(shape, smooth=1, rms=1.0), whole, noise(shape, smooth=2, rms=2.0, seed=1)]
    together = repair(torch.cat(fields))
    assert torch.equal(together.displacement[1], whole[0])
    for i, u in enumerate(fields):
        alone = repair(u)
        assert torch.equal(together.displacement[i], alone.displacement[0])
        assert together.moved_max[i] == alone.moved_max[0]
    assert together.moved_max[1] == 0


def test_a_coarse_field_scaled_up_too_far_is_unfolded() -> None:
    # as a network's half-resolution field where it fails: trilinear between knots, folded along faces
    u = resize(noise((8, 9, 7), smooth=0.5, rms=0.8), (22, 25, 19))
    assert ndv_percent(u[0]) > 0.1
    repaired = repair(u)
    assert_unfolded(repaired.displacement)
    assert repaired.moved_mean.item() < 0.5 * u.norm(dim=1).mean().item()


@every_shape
def test_what_resists_is_halved_until_it_is_unfolded(shape: tuple[int, ...]) -> None:
    u = noise(shape, smooth=1, rms=1.0)
    scaled = repair(u, rounds=0).displacement
    assert_unfolded(scaled)
    ratio = (scaled[u != 0] / u[u != 0]).unique()
    assert len(ratio) == 1 and ratio.log2().item() == round(ratio.log2().item()) < 0


@every_shape
def test_it_ends_on_a_field_that_is_wild(shape: tuple[int, ...]) -> None:
    assert_unfolded(repair(noise(shape, smooth=0.1, rms=50.0), rounds=6).displacement)


@every_shape
def test_folded_cells_are_those_of_the_moved_vertices(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.zeros(len(shape), *shape)
    at = (5,) * len(shape)
    u[(0, *at)] = 1.5  # past its neighbour at 6: the cells on both sides of that edge fold, and none else
    folded = folded_cells(u)
    for slab in (1, 1 << 30):  # however it is cut
        monkeypatch.setattr(module, "SLAB", slab)
        assert torch.equal(folded_cells(u), folded)
    where = folded.nonzero()
    assert where.min(0).values.tolist() == [5] + [4] * (len(shape) - 1)
    assert where.max(0).values.tolist() == [5] + [5] * (len(shape) - 1)
    assert len(where) == 2 ** (len(shape) - 1)


def test_no_gradient_flows_and_the_input_stays() -> None:
    u = noise((20, 20), smooth=1, rms=1.0).requires_grad_()
    before = u.detach().clone()
    repaired = repair(u)
    assert not repaired.displacement.requires_grad and not repaired.moved_mean.requires_grad
    assert torch.equal(u.detach(), before)


def test_what_cannot_be_repaired_says_so() -> None:
    u = torch.zeros(1, 2, 8, 8)
    u[0, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        repair(u)
