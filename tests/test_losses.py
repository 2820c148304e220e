"""Loss terms against closed forms, brute force, MONAI and scipy; their symmetry; and that they drive a registration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy.ndimage import uniform_filter
from torch import Tensor

from regpipe.errors import InputError
from regpipe.fields import Registration, identity_grid, register, register_midway, resize, resize_image
from regpipe.losses import TERMS, RegistrationLoss, box_sum, lncc

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)
BOTH_WAYS = ("lncc", "mse", "mi", "midway", "jacobian", "magnitude", "dice", "landmarks", "diffusion", "bending")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(batch: int, channels: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Random in [0, 1], on a grid four times coarser, then interpolated."""
    return resize_image(noise(batch, channels, *[n // 4 + 2 for n in shape], seed=seed), shape)


def term(name: str, r: Registration, target: dict[str, Tensor], **options: Any) -> Tensor:
    return RegistrationLoss({name: 1.0}, **options)(r._asdict(), target)


def fields_only(u: Tensor, inverse: Tensor | None = None, velocity: Tensor | None = None) -> Registration:
    image = torch.zeros(len(u), 1, *u.shape[2:])
    return Registration(u if velocity is None else velocity, u, -u if inverse is None else inverse, image, image)


def constant(shape: Sequence[int], *vector: float) -> Tensor:
    return torch.tensor(vector).view(1, -1, *[1] * len(shape)).expand(1, -1, *shape)


def example(shape: Sequence[int], *, half: bool = True) -> tuple[Registration, dict[str, Tensor]]:
    """A registration by a velocity of some voxels, with everything that the terms look at."""
    grid = [n // 2 + 1 for n in shape] if half else list(shape)
    velocity = 4 * smooth(2, len(shape), grid, seed=1) - 2
    fixed, moving = smooth(2, 1, shape, seed=2), smooth(2, 1, shape, seed=3)
    points = 1 + 7 * noise(2, 5, len(shape), seed=4)
    target = {"fixed_image": fixed, "moving_image": moving, "fixed_landmarks": points, "moving_landmarks": points + 0.5}
    target |= {"fixed_label": (3 * fixed).int(), "moving_label": (3 * moving).int()}
    return register(fixed, moving, velocity), target


def correlations(a: np.ndarray, b: np.ndarray, window: int) -> np.ndarray:
    """Squared correlation in each window, cut off at the rim: the definition, voxel by voxel."""
    half, out = window // 2, np.zeros(a.shape)
    for where in np.ndindex(a.shape):
        cut = tuple(slice(max(i - half, 0), i + half + 1) for i in where)
        out[where] = np.corrcoef(a[cut].ravel(), b[cut].ravel())[0, 1] ** 2
    return out


@pytest.mark.parametrize(("shape", "window"), list(itertools.product(SHAPES, (1, 3, 9, 25))))
def test_box_sums_are_those_of_scipy_also_where_the_window_exceeds_the_image(shape, window) -> None:
    x = noise(2, 3, *shape)
    expected = uniform_filter(x.double().numpy(), size=[1, 1] + [window] * len(shape), mode="constant")
    assert np.allclose(box_sum(x, window), expected * window ** len(shape), rtol=1e-4, atol=1e-4)


@EACH
def test_lncc_is_its_definition_and_inside_it_is_monais(shape) -> None:
    a = noise(1, 1, *shape)
    b = 0.5 * a + 0.5 * noise(1, 1, *shape, seed=1)
    squared = correlations(a[0, 0].numpy(), b[0, 0].numpy(), 5)
    # epsilon / variance = 1e-5 / 0.04 per image is what the two definitions may differ by
    assert float(lncc(a, b, window=5)) == pytest.approx(1 - squared.mean(), abs=1e-3)
    peer = LocalNormalizedCrossCorrelationLoss(len(shape), kernel_size=5, smooth_nr=0.0, reduction="none")
    inner = tuple(slice(2, -2) for _ in shape)
    assert np.allclose(-peer(a, b)[0, 0].numpy()[inner], squared[inner], atol=1e-3)


@EACH
def test_lncc_of_an_image_with_itself_is_0_whatever_the_gain_and_the_offset(shape) -> None:
    a = noise(2, 1, *shape)
    local = 1 + smooth(1, 1, shape) * 0.01  # hardly changes within a window
    for b in (a, -a, 0.3 * a + 0.2, local * a, a + 1000):
        assert float(lncc(a, b, window=5)) == pytest.approx(0, abs=5e-3)


def test_an_offset_of_1000_changes_neither_lncc_nor_its_gradient() -> None:
    a, b = noise(1, 1, 16, 16), noise(1, 1, 16, 16, seed=1)
    for left, right in ((0, 0), (1000, 1000), (0, 1000), (1000, 0)):
        x = (a + left).requires_grad_()
        loss = lncc(x, b + right, window=5)
        (gradient,) = torch.autograd.grad(loss, x)
        if left == right == 0:
            plain, plain_gradient = loss.detach(), gradient
        assert float(loss.detach()) == pytest.approx(float(plain), abs=2e-3)
        assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < 0.02


def test_flat_windows_count_as_uncorrelated_and_have_a_finite_gradient() -> None:
    flat, other = torch.full((1, 1, 12, 12), 0.3), noise(1, 1, 12, 12)
    for a, b in ((flat, other), (other, flat), (flat, flat), (torch.zeros_like(flat), flat)):
        x = a.clone().requires_grad_()
        loss = lncc(x, b)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(1, abs=1e-4)
        assert x.grad is not None and x.grad.isfinite().all()


def test_the_gradient_of_lncc_is_that_of_finite_differences() -> None:
    a, b = noise(1, 1, 14, 14).requires_grad_(), noise(1, 1, 14, 14, seed=1)
    (gradient,) = torch.autograd.grad(lncc(a, b, window=5), a)
    ahead, behind = (float(lncc(a + h * gradient / gradient.norm(), b, window=5)) for h in (0.05, -0.05))
    assert (ahead - behind) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.01)


@pytest.mark.parametrize("name", [name for name in TERMS if name != "known_field"])
def test_terms_are_the_same_to_the_bit_inside_an_autocast(name) -> None:
    r, target = example(SHAPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term(name, r, target)
    assert inside.dtype == torch.float32 and float(inside) == float(term(name, r, target))


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(BOTH_WAYS, SHAPES)))
def test_swapping_the_images_changes_no_term(name, shape) -> None:
    r, target = example(shape)
    other = Registration(-r.velocity, r.inverse, r.displacement, r.warped_fixed, r.warped_moving)
    swapped = {f"{'moving' if k[0] == 'f' else 'fixed'}_{k.split('_')[1]}": v for k, v in target.items()}
    assert float(term(name, r, target)) == pytest.approx(float(term(name, other, swapped)), rel=1e-5, abs=1e-7)


@EACH
def test_a_linear_velocity_has_diffusion_in_closed_form_on_finer_grids_too_and_does_not_bend(shape) -> None:
    dim = len(shape)
    matrix = torch.linspace(-0.3, 0.4, dim * dim).view(dim, dim)
    v = torch.einsum("ij,bj...->bi...", matrix, identity_grid(shape))
    for velocity in (v, resize(v, [2 * n - 1 for n in shape]), resize(v, [3 * n - 2 for n in shape])):
        r = fields_only(v, velocity=velocity)
        # the mean over axes and components of dv_i/dx_j squared
        assert float(term("diffusion", r, {})) == pytest.approx(float(matrix.square().mean()), rel=1e-3)
        assert float(term("bending", r, {})) == pytest.approx(0, abs=1e-7)


def test_a_quadratic_velocity_has_bending_in_closed_form() -> None:
    x, y = identity_grid((9, 8))[0]
    v = torch.stack([0.1 * x * x + 0.2 * x * y, -0.15 * y * y])[None]
    # sum of squared second derivatives, the mixed one twice; mean over the two components
    expected = (0.2**2 + 2 * 0.2**2 + 0.3**2) / 2
    assert float(term("bending", fields_only(v), {})) == pytest.approx(expected, rel=1e-4)


@EACH
def test_the_jacobian_term_is_0_without_folds_and_1_for_a_reflection(shape) -> None:
    assert float(term("jacobian", example(shape)[0], {})) == 0
    x = identity_grid(shape)
    reflection = torch.cat([shape[0] - 1 - 2 * x[:, :1], torch.zeros_like(x[:, 1:])], 1)  # det J = -1, its own inverse
    assert float(term("jacobian", fields_only(reflection, reflection), {})) == pytest.approx(1, rel=1e-5)
    assert float(term("jacobian", fields_only(reflection, 0 * x), {})) == pytest.approx(0.5, rel=1e-5)


def test_magnitude_is_0_for_opposite_fields_and_else_their_difference() -> None:
    u = noise(1, 2, 8, 8) - 0.5
    assert float(term("magnitude", fields_only(u), {})) == 0
    assert float(term("magnitude", fields_only(constant((8, 8), 3.0, -3.0), u * 0 + 1), {})) == pytest.approx(2)


def test_midway_sees_a_match_where_both_images_go_half_of_the_way() -> None:
    image, velocity = smooth(1, 1, (40, 40)), constant((40, 40), 4.0, 0.0)
    fixed, moving = image.roll(-2, 2), image.roll(2, 2)  # both are 2 voxels from the image in the middle
    target = {"fixed_image": fixed, "moving_image": moving}
    there, back = (float(term("midway", register(fixed, moving, v), target)) for v in (velocity, -velocity))
    assert there < 0.15 < 0.6 < back  # what rolled round at the rim remains


def test_two_opposite_velocities_of_symnet_count_like_the_one_they_stand_for() -> None:
    r, target = example((20, 18), half=False)
    both = torch.cat([-r.velocity, r.velocity], 1) / 2  # fixed to the middle, moving to the middle
    symnet = register_midway(target["fixed_image"], target["moving_image"], both)
    assert float(term("midway", symnet, target)) == pytest.approx(float(term("midway", r, target)), rel=1e-5)
    for name in ("diffusion", "bending"):
        assert float(term(name, symnet, target)) == pytest.approx(float(term(name, r, target)) / 4, rel=1e-5)


def boxes(shift: int, *, only: int = 0) -> Tensor:
    """Label 1, 8 x 10 voxels in 24 x 24, and label ``only`` elsewhere."""
    label = torch.zeros(1, 1, 24, 24, dtype=torch.int32)
    label[..., 4 + shift : 12 + shift, 5:15] = 1
    label[..., 20:, 18:] = only
    return label


def test_dice_is_0_for_equal_labels_and_in_closed_form_for_a_shifted_box() -> None:
    u = torch.zeros(1, 2, 24, 24)
    for shift, expected in ((0, 0.0), (2, 1 - 6 / 8), (8, 1.0)):  # of 8 rows, 8 - shift overlap
        target = {"fixed_label": boxes(0), "moving_label": boxes(shift)}
        assert float(term("dice", fields_only(u), target)) == pytest.approx(expected, abs=1e-6)
        moved = fields_only(constant((24, 24), float(shift), 0.0))
        assert float(term("dice", moved, target)) == pytest.approx(0, abs=1e-6)


def test_labels_that_one_image_lacks_do_not_count() -> None:
    u = fields_only(torch.zeros(1, 2, 24, 24))
    target = {"fixed_label": boxes(0, only=2), "moving_label": boxes(2, only=3)}
    for options in ({}, {"label_ids": (1, 2, 3)}):
        assert float(term("dice", u, target, **options)) == pytest.approx(0.25)
    # in a batch each pair has its own: the second pair shares only label 2
    second = boxes(0, only=2) * (boxes(0) != 1)
    batch = {"fixed_label": torch.cat([boxes(0), boxes(0, only=2)]), "moving_label": torch.cat([boxes(2), second])}
    assert float(term("dice", fields_only(torch.zeros(2, 2, 24, 24)), batch)) == pytest.approx(0.25 / 2)


def test_dice_has_a_gradient_that_lowers_it_and_without_labels_it_is_0() -> None:
    u = torch.zeros(1, 2, 24, 24, requires_grad=True)
    target = {"fixed_label": boxes(0), "moving_label": boxes(2)}
    term("dice", fields_only(u), target).backward()
    assert u.grad is not None and float(u.grad[:, 0].sum()) < 0  # further along axis 0, where the box is
    alone = {"fixed_label": boxes(0), "moving_label": 2 * boxes(0)}
    for labels, ids in itertools.product(({k: 0 * v for k, v in target.items()}, alone), ((), (7,))):
        nothing = term("dice", fields_only(u), labels, label_ids=ids)
        (gradient,) = torch.autograd.grad(nothing, u)
        assert float(nothing.detach()) == 0 and not gradient.any()


def test_landmarks_are_the_distance_left_and_missing_points_do_not_count() -> None:
    points = 2 + 10 * noise(1, 4, 3)
    target = {"fixed_landmarks": points.clone(), "moving_landmarks": points + torch.tensor([2.0, 3.0, -6.0])}
    u = torch.zeros(1, 3, 16, 16, 16, requires_grad=True)
    assert float(term("landmarks", fields_only(u), target)) == pytest.approx(7, rel=1e-5)  # |(2, 3, -6)|
    found = fields_only(constant((16, 16, 16), 2.0, 3.0, -6.0))
    assert float(term("landmarks", found, target)) == pytest.approx(0, abs=2e-3)
    target["fixed_landmarks"][0, 1] = target["moving_landmarks"][0, 2] = torch.nan
    loss = term("landmarks", fields_only(u), target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7, rel=1e-5) and u.grad is not None and u.grad.isfinite().all()
    for none in (points[:, :0], points * torch.nan):
        assert float(term("landmarks", fields_only(u), {"fixed_landmarks": none, "moving_landmarks": none})) == 0


def test_the_known_field_counts_squared_voxels_and_must_be_known() -> None:
    u = constant((8, 8), 3.0, -4.0)
    assert float(term("known_field", fields_only(u), {"displacement": 0 * u})) == pytest.approx(25)
    with pytest.raises(InputError, match="known_field.*displacements"):
        term("known_field", fields_only(u), {})


def test_the_loss_is_the_weighted_sum_of_its_terms_and_remembers_them() -> None:
    r, target = example(SHAPES[0])
    loss = RegistrationLoss({"mse": 0.5, "diffusion": 3, "lncc": 0})
    total = loss(r._asdict(), target)
    assert list(loss.terms) == ["mse", "diffusion", "loss"]
    mse = ((r.warped_moving - target["fixed_image"]) ** 2 + (r.warped_fixed - target["moving_image"]) ** 2).mean() / 2
    assert loss.terms["mse"] == pytest.approx(float(mse), rel=1e-5)
    expected = 0.5 * loss.terms["mse"] + 3 * loss.terms["diffusion"]
    assert float(total) == loss.terms["loss"] == pytest.approx(expected, rel=1e-6)


def test_terms_weights_and_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown loss terms \['lnc'\].*lncc, mse, mi.*known_field"):
        RegistrationLoss({"lnc": 1, "mse": 1})
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            RegistrationLoss({"lncc": weight})
    for weights in ({}, {"lncc": 0.0}):
        with pytest.raises(ValueError, match="give at least one term"):
            RegistrationLoss(weights)
    for window in (8, 0, -3):
        with pytest.raises(ValueError, match="window.*odd"):
            RegistrationLoss({"lncc": 1}, window=window)


@pytest.mark.parametrize("name", ["lncc", "mse", "mi"])
def test_the_loss_falls_on_two_discs(name) -> None:
    def disc(*centre: float) -> Tensor:
        x, y = identity_grid((32, 32))[0] - torch.tensor(centre).view(2, 1, 1)
        return torch.sigmoid(8 - (x * x + y * y).sqrt())[None, None]  # radius 8

    def dice(velocity: Tensor) -> float:
        labels = {"fixed_label": (fixed > 0.5).int(), "moving_label": (moving > 0.5).int()}
        return 1 - float(term("dice", register(fixed, moving, velocity), labels))

    fixed, moving = disc(15, 15), disc(18, 13)
    target = {"fixed_image": fixed, "moving_image": moving}
    velocity = torch.zeros(1, 2, 9, 9, requires_grad=True)
    optimizer = torch.optim.Adam([velocity], lr=0.05)
    loss, losses = RegistrationLoss({name: 1.0, "diffusion": 0.05}), []
    for _ in range(30):
        optimizer.zero_grad()
        loss(register(fixed, moving, velocity)._asdict(), target).backward()
        optimizer.step()
        losses.append(loss.terms["loss"])
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])
    assert dice(torch.zeros_like(velocity)) < 0.8 < 0.9 < dice(velocity.detach())
