"""Numbers inside stated bounds: slices of the benchmarks that say how far what is computed may be off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.places import BENCHMARKS
from regpipe import integrate
from regpipe.io.images import make_grid
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort

sys.path.insert(0, str(BENCHMARKS))

import fields_bounds
import long_run
import precision


def test_random_fields_are_integrated_inverted_composed_written_and_read_inside_the_bounds() -> None:
    dims = []
    for dim, errors in fields_bounds.measure(60, seed=1):
        dims.append(dim)
        assert errors.keys() == fields_bounds.BOUNDS.keys()
        for name, values in errors.items():
            assert len(values) == 30 and float(values.max()) <= fields_bounds.BOUNDS[name], (name, dim)
    assert dims == [2, 3]


def test_the_bounds_notice_an_integration_in_one_step_only(monkeypatch) -> None:
    def coarse(v: Tensor) -> tuple[Tensor, Tensor]:
        return integrate(v, squarings=0), integrate(-v, squarings=0)

    v = fields_bounds.velocities(torch.Generator().manual_seed(0), 20, 2)
    monkeypatch.setattr(fields_bounds, "integrate_both", coarse)
    errors = fields_bounds.field_errors(v, v[:, :1])
    assert float(errors["integrate"].max()) > fields_bounds.BOUNDS["integrate"]
    assert float(errors["invert"].max()) > fields_bounds.BOUNDS["invert"]


def test_the_reference_flow_is_the_exponential_of_a_rotation() -> None:
    """Of v(x) = A (x - c), A antisymmetric, exp(v) turns about c by the angle; interpolation of it is exact."""
    angle, centre = 0.2, 11.5
    x = fields_bounds.places(torch.zeros(1, 2, 24, 24, dtype=torch.float64))
    away = x - centre
    v = angle * torch.stack([-away[:, 1], away[:, 0]], 1)
    turned = torch.stack(
        [
            torch.cos(torch.tensor(angle)) * away[:, 0] - torch.sin(torch.tensor(angle)) * away[:, 1],
            torch.sin(torch.tensor(angle)) * away[:, 0] + torch.cos(torch.tensor(angle)) * away[:, 1],
        ],
        1,
    )
    error = (fields_bounds.flow(v) - (turned - away))[..., 6:-6, 6:-6]  # nothing leaves the grid from there
    assert float(error.abs().max()) < 1e-6


@pytest.mark.parametrize("dim", [2, 3])
def test_half_and_single_precision_move_a_displacement_by_less_than_the_bounds(dim, tmp_path) -> None:
    shape = {2: (32, 32), 3: (20, 20, 20)}[dim]
    pairs = precision.pairs_of(write_cohort(tmp_path, shape=shape, n_pairs=2), make_grid(shape, [1.0] * dim))
    torch.manual_seed(0)
    network = SymmetricNet(dim, "alexnet").eval()
    for level in network.levels:
        level.flow.weight.data *= 100  # type: ignore[union-attr, operator]
    longest = max(float(precision.displacement(network, pair, "float32").norm(dim=1).max()) for pair in pairs)
    found = precision.differences(network, pairs)
    assert longest > 0.5 and found["bfloat16"][1] > 100 * found["float32"][1] > 0
    for name, (mean, most) in found.items():
        assert mean <= precision.MEAN_BOUNDS[name] and most <= precision.BOUNDS[name], name


def test_a_training_that_grows_is_told_from_one_that_does_not() -> None:
    rows = [{"epoch": i, "rss_mib": 100.0 + 2 * i, "open_files": 8, "threads": 3, "seconds": 0.0} for i in range(50)]
    assert long_run.growth(rows) == {"rss_mib": 60.0, "open_files": 0.0, "threads": 0.0}
    _, files, threads = long_run.standing()
    with Path(__file__).open():
        assert long_run.standing()[1:] == (files + 1, threads)
