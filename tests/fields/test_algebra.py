"""Field algebra held against closed forms: translations, matrix exponentials, known determinants; and scipy."""

from __future__ import annotations

from collections.abc import Callable

import monai
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import DVF2DDF, Warp
from scipy.ndimage import gaussian_filter1d, map_coordinates
from torch import Tensor
from torch.torch_version import TorchVersion

from regpipe.fields import algebra
from regpipe.fields.algebra import (
    compose,
    identity_grid,
    integrate,
    jacobian_determinant,
    register,
    resize,
    sample_at,
    warp,
)

SHAPES = [(37, 29), (21, 17, 25)]  # not cubic, so that swapped axes show
MATRICES = {2: [[0.1, -0.3], [0.25, -0.05]], 3: [[0.1, -0.3, 0.05], [0.2, -0.05, 0.1], [-0.1, 0.15, 0.08]]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(shape: tuple[int, ...], channels: int, amplitude: float, seed: int = 0, batch: int = 1) -> Tensor:
    """Random cosine series of five terms an axis, (batch, channels, *shape), of the given largest magnitude."""
    field = torch.rand(batch, channels, *[5] * len(shape), generator=generator(seed)) * 2 - 1
    for n in shape:
        basis = torch.cos(torch.arange(5.0)[:, None] * torch.linspace(0, torch.pi, n))
        field = torch.tensordot(field, basis, dims=([2], [0]))  # the axis goes to the end: all come round in order
    return amplitude * field / field.abs().max()


def at_rest_on_the_rim(u: Tensor) -> Tensor:
    """The field times a bump that vanishes at the border, so that nothing leaves the grid."""
    for axis, n in enumerate(u.shape[2:]):
        bump = torch.sin(torch.linspace(0, torch.pi, n)) ** 2
        u = u * bump.view([-1 if i == axis + 2 else 1 for i in range(u.ndim)])
    return u


def linear_field(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """u(x) = matrix (x - centre)."""
    centre = torch.tensor([(n - 1) / 2 for n in shape]).view(1, -1, *[1] * len(shape))
    return torch.einsum("ij,bj...->bi...", matrix, identity_grid(shape) - centre)


def inner(u: Tensor, margin: int) -> Tensor:
    for axis, n in enumerate(u.shape[2:]):
        u = u.narrow(axis + 2, margin, n - 2 * margin)
    return u


@pytest.mark.parametrize("shape", SHAPES)
def test_warping_by_a_whole_translation_shifts_the_voxels(shape: tuple[int, ...]) -> None:
    image = torch.rand(1, 2, *shape, generator=generator())
    u = torch.zeros(1, len(shape), *shape)
    u[:, 0], u[:, 1] = 3, -2
    # pull: warped(x) = image(x + u), and the border goes on for ever
    expected = image.roll((-3, 2), (2, 3))
    expected[:, :, -3:] = expected[:, :, -4:-3]
    expected[:, :, :, :2] = expected[:, :, :, 2:3]
    assert torch.allclose(warp(image, u), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_warp_and_sample_at_agree_with_scipy(shape: tuple[int, ...]) -> None:
    image, u = torch.rand(1, 1, *shape, generator=generator()), smooth(shape, len(shape), 6.0)
    where = (identity_grid(shape) + u)[0]
    expected = map_coordinates(image[0, 0].numpy(), where.numpy(), order=1, mode="nearest")
    assert torch.allclose(warp(image, u)[0, 0], torch.from_numpy(expected), atol=2e-5)
    points = where.flatten(1).T[None, ::7]  # (1, K, D), some of them outside
    assert torch.allclose(sample_at(image, points)[0, :, 0], torch.from_numpy(expected).flatten()[::7], atol=2e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (19, 1), (14, 9, 1)])
def test_warping_and_integrating_are_monais_and_so_are_their_gradients(shape: tuple[int, ...]) -> None:
    if 1 in shape and TorchVersion(monai.__version__) < "1.6":
        pytest.skip("MONAI's Warp divides by 0 there, and torch 2.8 ends in a segmentation fault")
    image, u = smooth(shape, 2, 1.0, batch=2), smooth(shape, len(shape), 4.0, seed=1, batch=2)
    blocks: list[Callable[..., Tensor]] = [Warp(padding_mode="border"), DVF2DDF(7, padding_mode="border")]
    own: list[Callable[..., Tensor]] = [warp, integrate]
    for ours, theirs, arguments in zip(own, blocks, ((image, u), (u,)), strict=True):
        given = [x.clone().requires_grad_() for x in arguments]
        result, expected = ours(*given), theirs(*given)
        assert torch.allclose(result, expected, atol=2e-5)
        gradients = [torch.autograd.grad(x.square().sum(), given) for x in (result, expected)]
        for a, b in zip(*gradients, strict=True):  # a place on a voxel to the last digit may fall to either side of it
            assert (a - b).abs().mean() < 1e-4 * b.abs().mean()


def test_labels_warped_by_nearest_neighbour_keep_their_type_and_values() -> None:
    labels = torch.randint(0, 4, (1, 1, 20, 14), generator=generator(), dtype=torch.int16)
    u = smooth((20, 14), 2, 3.0)
    where = (identity_grid((20, 14)) + u)[0].numpy()
    expected = map_coordinates(labels[0, 0].numpy(), where, order=0, mode="nearest")
    warped = warp(labels, u, mode="nearest")
    assert warped.dtype == torch.int16 and (warped[0, 0].numpy() == expected).mean() > 0.99  # ties round either way


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_that_float32_cannot_hold_are_warped_like_small_ones(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 3, 2**24 + 1, 2**31 - 1, 2**24 + 2], dtype=dtype)
    places, u = torch.randint(0, 5, (1, 1, 20, 14), generator=generator()), smooth((20, 14), 2, 3.0)
    warped = warp(ids[places], u, mode="nearest")
    assert warped.dtype == dtype and torch.equal(warped, ids[warp(places, u, mode="nearest")])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_velocity_is_its_own_exponential_up_to_the_rim(shape: tuple[int, ...]) -> None:
    v = torch.tensor([2.5, -1.25, 0.75][: len(shape)]).view(1, -1, *[1] * len(shape)).expand(1, -1, *shape)
    assert torch.allclose(integrate(v), v, atol=1e-5)  # zero padding would bend it at the border


@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_velocity_integrates_to_the_matrix_exponential(shape: tuple[int, ...]) -> None:
    matrix = torch.tensor(MATRICES[len(shape)])
    # linear interpolation is exact on linear fields; n squarings give (I + A / 2^n)^(2^n), off by |A|^2 / 2^(n + 1)
    expected = linear_field(torch.linalg.matrix_exp(matrix) - torch.eye(len(shape)), shape)
    error = inner(integrate(linear_field(matrix, shape), squarings=12) - expected, 5).abs().max()
    assert error < 1e-3
    coarse = inner(integrate(linear_field(matrix, shape)) - expected, 5).abs().max()
    assert coarse < 0.01


def test_a_rotating_velocity_integrates_to_the_rotation() -> None:
    angle = torch.tensor(0.5)
    turn = torch.tensor([[0, -1.0], [1.0, 0]])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    expected = linear_field(rotation - torch.eye(2), (41, 41))
    disc = (identity_grid((41, 41)) - 20).norm(dim=1) < 19  # orbits that stay inside
    error = (integrate(linear_field(angle * turn, (41, 41)), squarings=12) - expected).norm(dim=1)
    assert error[disc].max() < 2e-3


@pytest.mark.parametrize(("shape", "amplitude"), [((65, 49), 4.0), ((33, 41, 37), 6.0)])
def test_exp_of_minus_v_inverts_exp_of_v(shape: tuple[int, ...], amplitude: float) -> None:
    v = at_rest_on_the_rim(smooth(shape, len(shape), amplitude))
    forward, backward = algebra.integrate_both(v)
    assert forward.abs().max() > 2
    for round_trip in (compose(forward, backward), compose(backward, forward)):
        assert round_trip.abs().max() < 0.15 and round_trip.abs().mean() < 0.01  # voxels
    assert torch.equal(forward, integrate(v)) and torch.equal(backward, integrate(-v))
    assert jacobian_determinant(forward).min() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_warping_twice_is_warping_by_the_composition(shape: tuple[int, ...]) -> None:
    ramp = identity_grid(shape)  # a linear image: interpolation is exact, so the law holds to rounding
    u, v = (at_rest_on_the_rim(smooth(shape, len(shape), 2.0, seed)) for seed in (0, 1))
    assert torch.allclose(inner(warp(warp(ramp, u), v), 3), inner(warp(ramp, compose(u, v)), 3), atol=1e-4)
    image = smooth(shape, 1, 1.0, seed=2)
    assert (warp(warp(image, u), v) - warp(image, compose(u, v))).abs().max() < 0.05
    # and the order matters: the other one is wrong by far more
    assert (compose(u, v) - compose(v, u)).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_determinant_of_a_linear_map_is_that_of_its_matrix(shape: tuple[int, ...]) -> None:
    dim = len(shape)
    matrix = torch.tensor(MATRICES[dim])
    expected = torch.linalg.det(torch.eye(dim) + matrix)
    det = jacobian_determinant(linear_field(matrix, shape))
    assert det.shape == (1, *shape) and torch.allclose(det, expected.expand_as(det), atol=1e-4)
    many = torch.randn(50, dim, dim, generator=generator())
    assert torch.allclose(algebra.determinant(many), torch.linalg.det(many), atol=1e-5)


def test_central_differences_are_exact_on_quadratics_and_one_sided_at_the_rim() -> None:
    # u = (a x^2 y, b y^2): det = (1 + 2 a x y)(1 + 2 b y), as du_y/dx = 0; forward ones give 2x + 1 for x^2
    a, b = 0.004, 0.01
    x, y = identity_grid((12, 9))[0]
    u = torch.stack([a * x * x * y, b * y * y])[None]
    det = jacobian_determinant(u)[0]
    expected = (1 + a * 2 * x * y) * (1 + b * 2 * y)
    assert torch.allclose(det[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-4)
    assert torch.allclose(det[0, 1:-1], ((1 + a * (2 * x + 1) * y) * (1 + b * 2 * y))[0, 1:-1], atol=1e-4)
    assert jacobian_determinant(-2 * linear_field(torch.tensor([[1.0, 0], [0, 0]]), (6, 6))).max() < 0  # a mirror folds


@pytest.mark.parametrize(("coarse", "fine"), [((19, 15), (37, 29)), ((11, 9, 13), (21, 17, 25)), ((8, 9), (20, 31))])
def test_resizing_scales_the_vectors_with_the_grid(coarse: tuple[int, ...], fine: tuple[int, ...]) -> None:
    # the same physical map on two grids: a voxel of axis i is (fine_i - 1) / (coarse_i - 1) times shorter
    ratio = torch.tensor([(f - 1) / (c - 1) for f, c in zip(fine, coarse, strict=True)])
    matrix = torch.tensor(MATRICES[len(fine)])
    u = linear_field(matrix, coarse)
    expected = linear_field(ratio.diag() @ matrix @ (1 / ratio).diag(), fine)
    assert torch.allclose(resize(u, fine), expected, atol=1e-4)
    assert torch.allclose(resize(resize(u, fine), coarse), u, atol=1e-4)
    assert resize(u, coarse) is u
    assert torch.allclose(algebra.resize_image(identity_grid(coarse), fine)[0, 0, -1], torch.tensor(coarse[0] - 1.0))


def test_integrating_at_half_resolution_differs_by_less_than_a_twentieth_of_a_voxel() -> None:
    half = at_rest_on_the_rim(smooth((33, 41), 2, 2.0))
    full = resize(half, (65, 81))
    difference = (resize(integrate(half), (65, 81)) - integrate(full)).abs()
    assert full.abs().max() > 2 and difference.max() < 0.05


def test_fields_are_computed_in_float32_whatever_the_autocast() -> None:
    v, image = smooth((40, 31), 2, 5.0), smooth((40, 31), 1, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [integrate(v), warp(image, v), compose(v, v), resize(v, (79, 61)), jacobian_determinant(v)]
        points = sample_at(v, identity_grid((40, 31)).flatten(2).transpose(1, 2))
    outside = [integrate(v), warp(image, v), compose(v, v), resize(v, (79, 61)), jacobian_determinant(v)]
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.allclose(points[0].T.reshape(v.shape[1:]), v[0], atol=1e-4)


def test_a_half_precision_field_is_raised_to_float32_before_anything_is_computed() -> None:
    v = smooth((40, 31), 2, 5.0).bfloat16()
    assert torch.equal(integrate(v), integrate(v.float()))
    assert torch.equal(resize(v, (64, 64)), resize(v.float(), (64, 64)))
    assert torch.equal(compose(v, v), compose(v.float(), v.float()))


@pytest.mark.parametrize("shape", SHAPES)
def test_swapping_the_images_and_the_sign_swaps_the_registration(shape: tuple[int, ...]) -> None:
    fixed, moving = smooth(shape, 1, 1.0, 1), smooth(shape, 1, 1.0, 2)
    v = smooth(tuple((n + 1) // 2 for n in shape), len(shape), 1.5, 3)
    there, back = register(fixed, moving, v), register(moving, fixed, -v)
    assert torch.equal(there.displacement, back.inverse) and torch.equal(there.inverse, back.displacement)
    assert torch.equal(there.warped_moving, back.warped_fixed) and torch.equal(there.warped_fixed, back.warped_moving)
    assert torch.equal(there.warped_moving, warp(moving, there.displacement))
    assert torch.allclose(there.displacement, resize(integrate(v), shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_midway_registration_composes_half_ways(shape: tuple[int, ...]) -> None:
    fixed, moving, v = smooth(shape, 1, 1.0, 1), smooth(shape, 1, 1.0, 2), smooth(shape, len(shape), 1.5, 3)
    w = smooth(shape, len(shape), 1.0, 4)
    got = algebra.register_midway(fixed, moving, w, v)
    assert torch.allclose(got.displacement, compose(integrate(w), integrate(-v)), atol=1e-5)
    assert torch.allclose(got.inverse, compose(integrate(v), integrate(-w)), atol=1e-5)
    # a flow split in halves, v = -w: exp(w) after exp(w) is exp(2 w), the plain registration
    halves, whole = algebra.register_midway(fixed, moving, w, -w), register(fixed, moving, 2 * w)
    assert (inner(halves.displacement - whole.displacement, 3)).abs().max() < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_two_equals_two_batches_of_one(shape: tuple[int, ...]) -> None:
    v, images = smooth(shape, len(shape), 2.0, batch=2), smooth(shape, 2, 1.0, batch=2)
    both = register(images[:, :1], images[:, 1:], v)
    for i in range(2):
        one = register(images[i : i + 1, :1], images[i : i + 1, 1:], v[i : i + 1]).tensors()
        assert all(torch.allclose(a[i : i + 1], one[name], atol=1e-6) for name, a in both.tensors().items())


def test_the_cached_places_are_not_confused_by_shapes_or_inference() -> None:
    cases = [(smooth(s, 1, 1.0, batch=b), smooth(s, len(s), 2.0, batch=b)) for s in SHAPES for b in (1, 3)]
    algebra._places.cache_clear()
    with torch.inference_mode():
        first = [warp(i, u) for i, u in cases]
    again = [warp(i, u.clone().requires_grad_()) for i, u in reversed(cases)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    again[0].sum().backward()  # the grid cached under inference_mode is in this graph


def test_a_metatensor_leaves_nothing_behind_for_plain_tensors() -> None:
    image, u = smooth((15, 12), 1, 1.0), smooth((15, 12), 2, 2.0)
    algebra._places.cache_clear()
    warp(MetaTensor(image), MetaTensor(u))
    integrate(MetaTensor(u))
    assert type(warp(image, u)) is Tensor and type(integrate(u)) is Tensor


def test_an_image_on_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="not on the grid"):
        warp(torch.zeros(1, 1, 8, 9), torch.zeros(1, 2, 9, 8))


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_smoothing_is_scipys_gaussian_with_the_rim_repeated(axis: int) -> None:
    image = torch.rand(1, 2, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter1d(image.double().numpy(), 1.2, axis=axis, mode="nearest", radius=3)
    found = algebra.smooth(image, axis, 1.2)  # 2.5 sigmas: 3 voxels
    assert torch.allclose(found.double(), torch.from_numpy(expected), atol=1e-6)
