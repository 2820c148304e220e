"""Regularity of fields against closed forms: linear and quadratic fields, rotations, scalings, Navier's operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import monai
import pytest
import torch
from monai.losses import BendingEnergyLoss
from torch import Tensor
from torch.torch_version import TorchVersion

from regpipe.fields.algebra import identity_grid, resize
from regpipe.losses.regularity import bending, diffusion, elastic, jacobian, log_jacobian

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def linear(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """u(x) = matrix x."""
    return torch.einsum("ij,bj...->bi...", matrix, identity_grid(shape))


def scaling(shape: tuple[int, ...], *factors: float) -> Tensor:
    """x + u(x) = factors x."""
    return linear(torch.diag(torch.tensor(factors) - 1), shape)


def finer(u: Tensor) -> list[Tensor]:
    """The field on its own grid and on two finer ones of the same extent."""
    return [u, *(resize(u, [k * (n - 1) + 1 for n in u.shape[2:]]) for k in (2, 3))]


@EACH
def test_linear_fields_have_closed_forms_on_every_grid(shape) -> None:
    dim = len(shape)
    matrix = torch.linspace(-0.3, 0.4, dim * dim).view(dim, dim)
    strain, trace = (matrix + matrix.T) / 2, matrix.trace()
    for u in finer(linear(matrix, shape)):
        assert float(diffusion(u)) == pytest.approx(float(matrix.square().mean()), rel=1e-3)
        assert float(bending(u)) == pytest.approx(0, abs=1e-7)
        for mu, lam in ((1.0, 1.0), (2.0, 0.0), (0.0, 3.0)):
            expected = float(mu * strain.square().sum() + lam / 2 * trace**2)
            assert float(elastic(u, mu=mu, lam=lam)) == pytest.approx(expected, rel=2e-3)


@EACH
def test_a_small_rotation_costs_no_elastic_energy(shape) -> None:
    dim = len(shape)
    matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    u = linear(matrix - matrix.T, shape)
    assert float(elastic(u)) == pytest.approx(0, abs=1e-6) and float(diffusion(u)) > 0.1


@EACH
def test_the_gradient_of_the_elastic_energy_is_naviers_operator(shape) -> None:
    dim, (mu, lam) = len(shape), (0.7, 1.9)
    second = noise(dim, dim, dim)
    second = (second + second.transpose(1, 2)) / 10  # d2 u_i / dx_j dx_k, constant
    x = identity_grid(shape).double()
    u = (torch.einsum("ijk,bj...,bk...->bi...", second.double(), x, x) / 2).requires_grad_()
    energy = elastic(u, mu=mu, lam=lam) * math.prod(n - 1 for n in shape)  # the sum over voxels
    (gradient,) = torch.autograd.grad(energy, u)
    laplacian = torch.einsum("ijj->i", second)
    of_divergence = torch.einsum("jij->i", second)
    expected = -(mu * laplacian + (mu + lam) * of_divergence).double()
    inner = gradient[0][(slice(None), *[slice(2, -2)] * dim)].flatten(1)
    torch.testing.assert_close(inner, expected[:, None].expand_as(inner), atol=1e-5, rtol=1e-4)


def test_a_quadratic_field_has_bending_in_closed_form() -> None:
    x, y = identity_grid((9, 8))[0]
    u = torch.stack([0.1 * x * x + 0.2 * x * y, -0.15 * y * y])[None]
    # sum of squared second derivatives, the mixed one twice; mean over the two components
    assert float(bending(u)) == pytest.approx((0.2**2 + 2 * 0.2**2 + 0.3**2) / 2, rel=1e-4)


@pytest.mark.skipif(TorchVersion(monai.__version__) < "1.6", reason="takes its differences over 5 voxels")
@EACH
def test_bending_is_monais(shape) -> None:
    u = noise(2, len(shape), *shape)
    assert float(bending(u)) == pytest.approx(float(BendingEnergyLoss()(u)), rel=1e-5)


@pytest.mark.parametrize("measure", [diffusion, bending, elastic])
@EACH
def test_a_checkerboard_is_rough(measure: Callable[[Tensor], Tensor], shape) -> None:
    sign = 1 - 2 * (identity_grid(shape).sum(1, keepdim=True) % 2)
    assert float(measure(sign.expand(1, len(shape), *shape))) > 1


@EACH
def test_the_jacobian_term_is_the_share_that_is_turned_inside_out_times_how_far(shape) -> None:
    ones = [1.0] * (len(shape) - 1)
    assert float(jacobian(0.2 * noise(2, len(shape), *shape))) == 0
    for factor in (-1.0, -0.5):  # det J of a reflected and squeezed axis
        assert float(jacobian(scaling(shape, factor, *ones))) == pytest.approx(-factor, rel=1e-4)


@EACH
def test_log_jacobian_of_a_scaling_is_closed_and_the_same_for_its_inverse(shape) -> None:
    dim = len(shape)
    assert float(log_jacobian(torch.zeros(1, dim, *shape))) == 0
    for factor in (2.0, 1.1):
        for s in (factor, 1 / factor):
            expected = (dim * math.log(factor)) ** 2
            assert float(log_jacobian(scaling(shape, *[s] * dim))) == pytest.approx(expected, rel=2e-3)


@EACH
def test_log_jacobian_of_a_fold_is_finite_and_its_gradient_unfolds(shape) -> None:
    ones = [1.0] * (len(shape) - 1)
    values = []
    for det in (0.5, 0.1, 0.0, -1.0, -2.0):
        u = scaling(shape, det, *ones).requires_grad_()
        value = log_jacobian(u)
        (gradient,) = torch.autograd.grad(value, u)
        unfolded = float(log_jacobian((u - 1e-3 * gradient / gradient.abs().max()).detach()))
        assert math.isfinite(unfolded) and unfolded < float(value.detach())
        values.append(float(value.detach()))
    assert values == sorted(values)
    # the tangent at 0.1: log 0.1 + (det - 0.1) / 0.1
    assert values[3] == pytest.approx((math.log(0.1) - 11) ** 2, rel=1e-3)
