"""Loss terms against closed forms; their symmetry; masks; and that they drive a registration."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.terms import WAYS, constant, example, fields_only, noise, smooth, term
from regpipe.fields.algebra import Registration, identity_grid, register, register_midway, resize, warp
from regpipe.losses.loss import RegistrationLoss, feature_encoder, weigh
from regpipe.losses.structures import signed_distances
from regpipe.losses.terms import TERMS, Options, overlaps, supervised
from regpipe.networks.encoders import Encoder
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils.errors import InputError

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)
COMPARING = {"auto", "lncc", "ncc", "mse", "mi", "mind", "features", "midway"}  # the terms that look at images
BOTH_WAYS = [name for name in TERMS if name != "known_field"]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_terms_are_the_same_to_the_bit_inside_an_autocast(name) -> None:
    r, target = example(SHAPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term(name, r, target)
    assert inside.dtype == torch.float32 and float(inside) == float(term(name, r, target))


@pytest.mark.parametrize(("name", "shape", "masks"), list(itertools.product(BOTH_WAYS, SHAPES, (False, True))))
def test_swapping_the_images_changes_no_term(name, shape, masks) -> None:
    r, target = example(shape, masks=masks)
    other = Registration(-r.velocity, r.inverse, r.displacement, r.warped_fixed, r.warped_moving)
    swapped = {f"{'moving' if k[0] == 'f' else 'fixed'}_{k.split('_')[1]}": v for k, v in target.items() if "_" in k}
    swapped |= {way: target[back] for way, back in zip(WAYS, WAYS[::-1], strict=True)}
    swapped["anatomy"] = torch.cat(target["anatomy"].chunk(2, dim=1)[::-1], 1)
    assert float(term(name, r, target)) == pytest.approx(float(term(name, other, swapped)), rel=1e-5, abs=1e-7)


@EACH
def test_a_linear_velocity_has_smoothness_in_closed_form_on_finer_grids_too(shape) -> None:
    dim = len(shape)
    matrix = torch.linspace(-0.3, 0.4, dim * dim).view(dim, dim)
    v = torch.einsum("ij,bj...->bi...", matrix, identity_grid(shape))
    for velocity in (v, resize(v, [2 * n - 1 for n in shape]), resize(v, [3 * n - 2 for n in shape])):
        r = fields_only(v, velocity=velocity)
        # the mean over axes and components of dv_i/dx_j squared
        assert float(term("diffusion", r, {})) == pytest.approx(float(matrix.square().mean()), rel=1e-3)
        assert float(term("bending", r, {})) == pytest.approx(0, abs=1e-7)
        strain = float((matrix + matrix.T).square().sum() / 4 + matrix.trace() ** 2 / 2)  # mu = lambda = 1
        assert float(term("elastic", r, {})) == pytest.approx(strain, rel=2e-3)
        assert float(term("divergence", r, {})) == pytest.approx(float(matrix.trace() ** 2), rel=2e-3)


@EACH
def test_the_jacobian_term_is_0_without_folds_and_1_for_a_reflection(shape) -> None:
    assert float(term("jacobian", example(shape)[0], {})) == 0
    x = identity_grid(shape)
    reflection = torch.cat([shape[0] - 1 - 2 * x[:, :1], torch.zeros_like(x[:, 1:])], 1)  # det J = -1, its own inverse
    assert float(term("jacobian", fields_only(reflection, reflection), {})) == pytest.approx(1, rel=1e-5)
    assert float(term("jacobian", fields_only(reflection, 0 * x), {})) == pytest.approx(0.5, rel=1e-5)


@EACH
def test_log_jacobian_counts_both_ways_and_a_scaling_as_much_as_its_inverse(shape) -> None:
    x, dim = identity_grid(shape), len(shape)
    for s in (2.0, 0.5):
        r = fields_only((s - 1) * x, (1 / s - 1) * x)
        assert float(term("log_jacobian", r, {})) == pytest.approx((dim * math.log(2)) ** 2, rel=2e-3)
    assert float(term("log_jacobian", fields_only(x, 0 * x), {})) == pytest.approx(
        (dim * math.log(2)) ** 2 / 2, rel=2e-3
    )


def test_magnitude_is_0_for_opposite_fields_and_else_their_difference() -> None:
    u = noise(1, 2, 8, 8) - 0.5
    assert float(term("magnitude", fields_only(u), {})) == 0
    assert float(term("magnitude", fields_only(constant((8, 8), 3.0, -3.0), u * 0 + 1), {})) == pytest.approx(2)


NO_NOISE = {f"{side}_noise": torch.zeros(1) for side in ("fixed", "moving")}  # so fine a texture is taken for it


def test_midway_sees_a_match_where_both_images_go_half_of_the_way() -> None:
    image, velocity = smooth(1, 1, (40, 40)), constant((40, 40), 4.0, 0.0)
    fixed, moving = image.roll(-2, 2), image.roll(2, 2)  # both are 2 voxels from the image in the middle
    target = {"fixed_image": fixed, "moving_image": moving} | NO_NOISE
    there, back = (float(term("midway", register(fixed, moving, v), target)) for v in (velocity, -velocity))
    assert there < 0.15 < 0.6 < back  # what rolled round at the rim remains


def test_two_opposite_velocities_of_symnet_count_like_the_one_they_stand_for() -> None:
    r, target = example((20, 18), half=False)
    half = r.velocity / 2  # moving to the middle; minus it fixed
    symnet = register_midway(target["fixed_image"], target["moving_image"], half, -half)
    assert float(term("midway", symnet, target)) == pytest.approx(float(term("midway", r, target)), rel=1e-5)
    for name in ("diffusion", "bending", "elastic"):
        assert float(term(name, symnet, target)) == pytest.approx(float(term(name, r, target)) / 4, rel=1e-5)


def rolled(*, masks: bool) -> tuple[Registration, dict[str, Tensor]]:
    """One scene from two places: 6 rows further on in moving, whose last 8 rows are garbage; registered truly."""
    scene, garbage = smooth(1, 1, (60, 20)), noise(1, 1, 8, 20, seed=7)
    fixed, moving = scene[:, :, 6:46], torch.cat([scene[:, :, :32], garbage], 2)
    target = {"fixed_image": fixed, "moving_image": moving} | NO_NOISE
    if masks:
        clean = (torch.arange(40) < 32).float().view(1, 1, 40, 1).expand(1, 1, 40, 20)
        rows = torch.arange(40).view(1, 1, 40, 1).expand_as(clean)
        # fixed row i is scene row i + 6, moving row j scene row j: rows beyond the other's end have no partner
        target |= {"moving_mask": clean * (rows >= 6), "fixed_mask": (rows < 26).float()}
    velocity = constant((40, 20), 6.0, 0.0).clone()
    return register(fixed, moving, velocity), target


@pytest.mark.parametrize("name", ["lncc", "ncc", "mse", "midway"])
def test_what_a_mask_leaves_out_does_not_count_wherever_it_is_warped_to(name) -> None:
    (r, target), (_, masked) = rolled(masks=False), rolled(masks=True)
    assert float(term(name, r, masked)) < 2e-3 < 2e-2 < float(term(name, r, target))


def test_the_masks_of_both_images_are_multiplied_on_the_grid_of_each() -> None:
    r, target = rolled(masks=True)
    on_fixed, on_moving = overlaps(r, target, Options())
    assert on_fixed is not None and on_moving is not None and not on_fixed.requires_grad
    fixed, moving = target["fixed_mask"], target["moving_mask"]
    torch.testing.assert_close(on_fixed, fixed * warp(moving, r.displacement), atol=1e-5, rtol=0)
    assert on_fixed[0, 0, :, 5].nonzero().flatten().tolist() == list(range(26))  # moving's rows 6 to 31
    assert on_moving[0, 0, :, 5].nonzero().flatten().tolist() == list(range(6, 32))


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_masks_of_ones_take_the_way_without_masks(name) -> None:
    r, target = example((20, 18))
    ones = {f"{side}_mask": torch.ones_like(target["fixed_image"]) for side in ("fixed", "moving")}
    assert overlaps(r, target | ones, Options()) == (None, None)
    assert float(term(name, r, target | ones)) == float(term(name, r, target))
    alone = {"fixed_mask": example((20, 18), masks=True)[1]["fixed_mask"]}
    assert float(term(name, r, target | alone)) != float(term(name, r, target))  # the other's are ones


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_with_nothing_in_sight_a_similarity_is_0_with_a_graph(name) -> None:
    _, target = example((20, 18))
    velocity = torch.zeros(2, 2, 20, 18, requires_grad=True)
    target |= {"fixed_mask": torch.zeros(2, 1, 20, 18), "moving_mask": torch.ones(2, 1, 20, 18)}
    loss = term(name, register(target["fixed_image"], target["moving_image"], velocity), target)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_only_terms_that_compare_images_look_at_images_and_masks() -> None:
    r, target = example((20, 18), masks=True)
    blank = {**target, "fixed_image": 0 * target["fixed_image"], "moving_image": 0 * target["moving_image"]}
    blind = r._replace(warped_moving=0 * r.warped_moving, warped_fixed=0 * r.warped_fixed)
    for name in TERMS:
        if name != "known_field":
            same = float(term(name, r, target)) == float(term(name, blind, blank))
            assert same == (name not in COMPARING), name


def test_a_loss_uses_a_frozen_copy_of_the_encoder_that_stays_in_evaluation_mode() -> None:
    encoder = Encoder("alexnet", 2)
    loss = RegistrationLoss({"features": 1.0}, encoder=encoder)
    assert not any(p.requires_grad for p in loss.parameters())
    assert all(p.requires_grad for p in encoder.parameters()) and encoder.training  # the caller's is left alone
    held = loss.train().encoder
    assert held is not None and held is not encoder and not held.training
    with pytest.raises(InputError, match=r"features: no encoder.*encoder=Encoder"):
        RegistrationLoss({"lncc": 1.0, "features": 1.0})


def test_an_encoder_is_made_only_for_features_and_only_from_transferred_weights(tmp_path: Path) -> None:
    assert feature_encoder({"lncc": 1.0, "features": 0.0}, "alexnet", 2, pretrained="none") is None
    with pytest.raises(InputError, match=r"features.*--pretrained"):
        feature_encoder({"features": 1.0}, "alexnet", 2, pretrained="none")
    torch.save(SymmetricNet(2, "alexnet").state_dict(), tmp_path / "model.pt")
    encoder = feature_encoder({"features": 1.0}, "alexnet", 2, pretrained=str(tmp_path / "model.pt"))
    assert encoder is not None and encoder.strides == (4, 8, 16)


def test_a_batch_without_supervision_at_all_has_none() -> None:
    r, target = example((20, 18))
    images = {key: value for key, value in target.items() if key.endswith("image")}
    u = r.displacement.clone().requires_grad_()
    for name in ("dice", "landmarks"):
        loss = term(name, r._replace(displacement=u), images)
        assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, u)[0].any()


class OnesOwn(nn.Module):
    """A loss of one's own."""

    def forward(self, prediction: dict, target: dict) -> Tensor:
        return torch.full((2,), 2.0)


def test_the_loss_is_the_weighted_sum_of_its_terms_and_gives_them_too() -> None:
    r, target = example(SHAPES[0])
    loss = RegistrationLoss({"mse": 0.5, "diffusion": 3, "lncc": 0})
    total, terms = loss.weigh(r._asdict(), target)
    assert list(terms) == ["mse", "diffusion", "loss"]
    mse = ((r.warped_moving - target["fixed_image"]) ** 2 + (r.warped_fixed - target["moving_image"]) ** 2).mean() / 2
    assert terms["mse"] == pytest.approx(float(mse), rel=1e-5)
    expected = 0.5 * terms["mse"] + 3 * terms["diffusion"]
    assert float(total) == terms["loss"] == pytest.approx(expected, rel=1e-6)
    assert weigh(OnesOwn(), r._asdict(), target).terms == {"loss": 2.0}  # any other loss is the one term


def test_terms_weights_and_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown loss terms \['lnc'\].*lncc, mind, mi, ncc, mse.*known_field"):
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


@pytest.mark.parametrize("name", ["lncc", "ncc", "mse", "mi", "mind"])
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
        value = loss(register(fixed, moving, velocity)._asdict(), target)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])
    assert dice(torch.zeros_like(velocity)) < 0.8 < 0.9 < dice(velocity.detach())


def test_pairs_with_labels_or_landmarks_of_both_images_are_supervised() -> None:
    labels = {"fixed_label": "a", "moving_label": "b"}
    points = {"fixed_landmarks": "a", "moving_landmarks": "b"}
    pairs = [labels, points, {"fixed_label": "a"}, {"fixed_label": "a", "moving_landmarks": "b"}, {}]
    every = {"dice": 1.0, "landmarks": 0.1, "lncc": 1.0}
    assert supervised(pairs, every).tolist() == [True, True, False, False, False]
    assert supervised(pairs, {"anatomy": 1.0}).tolist() == [True, False, False, False, False]
    assert supervised(pairs, {"landmarks": 1.0}).tolist() == [False, True, False, False, False]
    assert supervised(pairs, {"landmarks": 1.0}, landmark_channels=1).tolist() == [True, False, False, False, False]
    assert not supervised(pairs, {"lncc": 1.0, "dice": 0.0}).any()  # labels that the loss does not see change nothing


def test_distance_maps_are_those_of_a_ball_and_pull_structures_that_lie_apart() -> None:
    """Of a disc of radius 5 at distance d of its middle: d - 5, by 12 voxels; apart, soft Dice pulls nothing."""
    x = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")).float()
    far = [
        (x - middle.view(2, 1, 1)).norm(dim=0) for middle in (torch.tensor([12.0, 20.0]), torch.tensor([28.0, 20.0]))
    ]
    fixed, moving = ((d <= 5).int()[None, None] * 3 for d in far)
    found = signed_distances(fixed, [3])[0, 0]
    expected = ((far[0] - 5) / 12).clamp(-1, 1)
    assert (found - expected).abs().max() < 1.2 / 12  # voxels
    for name, pulls in (("dice", False), ("distance", True)):
        velocity = torch.zeros(1, 2, 40, 40, requires_grad=True)
        images = torch.rand(1, 1, 40, 40)
        target = {"fixed_image": images, "moving_image": images, "fixed_label": fixed, "moving_label": moving}
        term(name, register(images, images, velocity), target).backward()
        assert velocity.grad is not None
        assert (float(-velocity.grad[0, 0].sum()) > 1e-3) is pulls  # fixed(p) = moving(p + u): u along +x
