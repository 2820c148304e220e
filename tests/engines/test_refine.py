"""Refinement: known motion is found, pairs do not touch each other, the network stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regpipe import SymmetricNet, SymNet
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.pyramid import coarsen, coarser_shape, levels_of, shares
from regpipe.engines.refine import Refiner, make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import identity_grid, integrate, jacobian_determinant, register
from regpipe.losses.loss import RegistrationLoss
from regpipe.utils.errors import InputError

SHAPE = (40, 48)
WEIGHTS = {"lncc": 1.0, "diffusion": 0.5}


def blobs(shift: tuple[float, ...], shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Three Gaussian blobs of different brightness, moved by ``shift`` voxels: (1, 1, *shape)."""
    grid = identity_grid(shape)
    centre = torch.tensor([(n - 1) / 2 for n in shape]).view(1, -1, *[1] * len(shape))
    image = torch.zeros(1, *shape)
    for offset, height in ((-7.0, 1.0), (0.0, 0.6), (7.0, 0.8)):
        at = centre + offset + torch.tensor(shift).view_as(centre)
        image = image + height * torch.exp(-(grid - at).square().sum(1) / 30)
    return image[None]


def refiner(steps: int = 60) -> Refiner:
    return Refiner(RegistrationLoss(WEIGHTS, window=7), steps=steps)


def test_its_squarings_are_within_a_hundredth_of_a_voxel_of_the_final_integration() -> None:
    """A flow of 3 voxels that comes to rest on the rim; the limit of many squarings says where it leads."""
    x, y = (torch.sin(torch.pi * at / (n - 1)) for at, n in zip(identity_grid(SHAPE)[0], SHAPE, strict=True))
    v = torch.stack([3 * x * y, -2 * x * y * y])[None]
    found, limit = refiner().layers.dvf2ddf(v), integrate(v, squarings=12)
    assert limit.abs().max() > 2 and (found - integrate(v)).abs().max() < 0.01
    assert (found - limit).abs().max() < 0.02


@pytest.mark.parametrize("shape", [SHAPE, (32, 40, 36)])
def test_from_zero_it_finds_a_known_translation(shape: tuple[int, ...]) -> None:
    shift = (3.0, -2.0, 1.0)[: len(shape)]
    fixed, moving = blobs((0.0,) * len(shape), shape), blobs(shift, shape)

    velocity = refiner(100)(fixed, moving)
    found = register(fixed, moving, velocity)

    inside = (fixed > 0.4).expand(1, len(shape), *shape)
    truth = torch.tensor(shift).view(1, -1, *[1] * len(shape)).expand_as(found.displacement)
    assert (found.displacement - truth)[inside].abs().median() < 0.25  # warps moving onto fixed: u = +shift
    assert velocity.shape[2:] == coarser_shape(shape, 2)
    assert (jacobian_determinant(found.displacement) > 0).all()


def test_a_pair_gives_the_same_alone_after_another_and_in_a_batch() -> None:
    a = (blobs((0.0, 0.0)), blobs((2.0, 1.0)))
    b = (blobs((0.0, 0.0)), blobs((-3.0, 2.0)))
    refine = refiner(20)

    alone = refine(*a)
    refine(*b)
    again = refine(*a)
    together = refine(torch.cat([b[0], a[0]]), torch.cat([b[1], a[1]]))

    assert torch.equal(alone, again)
    assert torch.equal(alone, together[1:])


def test_swapping_the_images_flips_the_velocity() -> None:
    fixed, moving = blobs((0.0, 0.0)), blobs((2.0, 1.0))

    there, back = refiner(20)(fixed, moving), refiner(20)(moving, fixed)

    assert there.abs().max() > 0.5
    torch.testing.assert_close(there, -back, atol=0.05, rtol=0)  # rounding, which Adam makes larger


def test_from_the_networks_answer_the_loss_falls_and_the_network_stays() -> None:
    torch.manual_seed(0)
    net = SymmetricNet(2, "alexnet").eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pair = torch.cat([blobs((0.0, 0.0)), blobs((2.0, 1.0))], 1)
    loss, target = RegistrationLoss(WEIGHTS, window=7), {"fixed_image": pair[:, :1], "moving_image": pair[:, 1:]}

    with torch.no_grad():  # as in MONAI's evaluator
        plain = RegistrationInferer()(pair, net)
        refined = RegistrationInferer(refiner=refiner(20))(pair, net)

    assert loss(refined, target) < 0.9 * loss(plain, target)
    assert refined["velocity"].shape == plain["velocity"].shape
    assert not refined["velocity"].requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_lies_outside_the_masks_does_not_count() -> None:
    """A bright block beside the blobs moves; masked out, it pulls nothing along."""
    images = [blobs((0.0, 0.0)), blobs((0.0, 0.0))]
    for image, row in zip(images, (12, 18), strict=True):
        image[..., row : row + 10, 40:46] = 1.0
    mask = torch.ones_like(images[0])
    mask[..., 36:] = 0.0
    loss = RegistrationLoss({"mse": 10.0, "diffusion": 0.5})
    at_block = (0, 0, slice(14, 24), slice(41, 45))

    fixed, moving = images
    seen, masked = (
        register(fixed, moving, Refiner(loss, steps=60)(fixed, moving, masks=masks)).displacement[at_block]
        for masks in ((), (mask, mask))
    )

    assert seen.mean() > 3  # of the true 6
    assert masked.abs().mean() < 0.5


def test_the_networks_structures_can_be_matched() -> None:
    """Two flat images tell nothing: the motion comes from the structures that the network sees in them."""
    flat = torch.full((1, 1, *SHAPE), 0.5)
    logits = [torch.cat([0.5 - image, image - 0.5], 1) * 20 for image in (blobs((0.0, 0.0)), blobs((3.0, 0.0)))]
    loss = RegistrationLoss({"predicted_dice": 1.0, "diffusion": 0.02})

    velocity = Refiner(loss, steps=60)(flat, flat, anatomy=torch.cat(logits, 1))

    displacement = register(flat, flat, velocity).displacement
    inside = blobs((0.0, 0.0))[0, 0] > 0.5
    assert abs(float(displacement[0, 0][inside].median()) - 3) < 1


def test_without_a_network_the_inferer_never_calls_it() -> None:
    pair = torch.cat([blobs((0.0, 0.0)), blobs((1.0, 0.0))], 1)

    def network(_: Tensor) -> Tensor:
        raise AssertionError("asked")

    result = ZeroInferer(refiner(4))(pair, network)

    assert result["displacement"].shape == (1, 2, *SHAPE)


def test_a_constant_stays_when_coarsened_and_a_wave_too_short_for_the_grid_goes() -> None:
    assert torch.allclose(coarsen(torch.full((1, 1, 21, 17), 0.3), (6, 5)), torch.tensor(0.3))
    wave = (torch.arange(41) % 2).float().view(1, 1, 41, 1).expand(1, 1, 41, 9)
    assert (coarsen(wave, (11, 9)) - 0.5)[:, :, 1:-1].abs().max() < 0.02


def test_steps_are_dealt_out_to_the_levels() -> None:
    from regpipe.engines.pyramid import FROM_ZERO

    assert sum(shares(FROM_ZERO, 80)) == 80
    assert shares(FROM_ZERO, 1) == [1, 1, 1, 1]


def test_large_grids_are_compared_at_half_resolution_unless_told() -> None:
    assert levels_of((64, 64, 64), False, None)[-1].stride == 1
    assert levels_of((256, 256, 160), False, None)[-1].stride == 2
    assert levels_of((256, 256, 160), False, 1)[-1].stride == 1
    velocity = zero_refiner(steps=4, finest=2)(blobs((0.0, 0.0)), blobs((1.0, 0.0)))
    assert velocity.shape[2:] == coarser_shape((40, 48), 2)  # on the finer grid all the same


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="dice"):
        Refiner(RegistrationLoss({"dice": 1.0}))
    with pytest.raises(InputError, match="at least one step"):
        refiner(0)
    with pytest.raises(InputError, match="choose among auto, lncc, mind"):
        refinement_loss("corr")
    with pytest.raises(InputError, match="SYMNet"):
        RegistrationInferer(refiner=refiner(1))(torch.rand(1, 2, 16, 16), SymNet(2))
    assert make_refiner(0, {"lncc": 1.0}, window=7) is None


def test_slices_are_compared_in_wider_windows_and_held_less_stiffly_than_volumes() -> None:
    in_2d, in_3d = (zero_refiner().losses[dim] for dim in (2, 3))
    assert (in_2d.window, in_3d.window) == (7, 5)
    assert in_2d.weights == pytest.approx({"auto": 1.0, "diffusion": 0.28, "divergence": 0.07})
    assert in_3d.weights == pytest.approx({"auto": 1.0, "diffusion": 0.4, "divergence": 0.1})
    assert refinement_loss("lncc", smoothness=2, spatial_dims=2)["diffusion"] == pytest.approx(0.56)


def test_a_loss_that_is_no_number_ends_refinement_in_a_line() -> None:
    sound = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    broken = sound.clone()
    broken[0, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match="refinement: .*auto.* is not finite; look at these images"):
        zero_refiner(steps=2)(sound, broken)
