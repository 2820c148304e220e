"""Where there is nothing to find nothing is found, and what is there is found as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from regpipe import SymmetricNet
from regpipe.engines import judge
from regpipe.engines.channels import Channels
from regpipe.engines.inferers import RegistrationInferer
from regpipe.engines.judge import Judge
from regpipe.engines.pyramid import pyramid_level
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import LAYERS, identity_grid, register, smooth, warp
from regpipe.losses.contrast import AS_IT_IS
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.measures import sdlogj

SHAPES = [(72, 80), (36, 40, 32)]


def head(shape: tuple[int, ...], *, turned: bool = False) -> Tensor:
    """An ellipsoid with a bright rim and soft spots in it, (1, 1, *shape) in [0, 1]; in ``turned`` the inside is turned
    round and the rim is dark: two modalities' contrasts, which no line relates."""
    middle = torch.tensor([(n - 1) / 2 for n in shape]).view(1, -1, *[1] * len(shape))
    radius = ((identity_grid(shape) - middle) / (0.85 * middle)).square().sum(1, keepdim=True).sqrt()
    spots = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(5))
    for axis in range(2, 2 + len(shape)):
        spots = smooth(spots, axis, 3.0, reach=3)
    inside = 0.4 + 0.12 * spots / spots.std()
    rim = 0.75
    if turned:
        inside, rim = 1.1 - inside, 0.15
    return torch.where(radius < 0.88, inside, torch.where(radius < 1, rim, 0.0)).clamp(0, 1)


def t2(image: Tensor) -> Tensor:
    """Of a T1 image: what is dark in it bright, what is bright dark; the background stays."""
    values = np.interp(image.numpy(), np.linspace(0, 1, 5), [0.0, 0.95, 0.6, 0.35, 0.25])
    return torch.from_numpy(values).float()


def noisy(image: Tensor, seed: int, sigma: float = 0.03) -> Tensor:
    return (image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_an_image_against_itself_with_other_noise_stays_where_it_is(shape: tuple[int, ...], turned: bool) -> None:
    fixed, moving = noisy(head(shape), 1), noisy(head(shape, turned=turned), 2)
    assert not zero_refiner()(fixed, moving).any()


@pytest.mark.parametrize("similarity", ["mi", "mind"])
def test_no_other_similarity_moves_it_by_a_tenth_of_a_voxel(similarity: str) -> None:
    fixed, moving = noisy(head(SHAPES[0]), 1), noisy(head(SHAPES[0]), 2)
    found = register(fixed, moving, zero_refiner(similarity, steps=40)(fixed, moving)).displacement
    assert float(found.norm(dim=1)[fixed[:, 0] > 0.1].mean()) < 0.1


def test_a_neighbourhoods_mean_is_over_what_of_it_lies_in_the_mask_a_quarter_of_it_at_least() -> None:
    """Fifteen rows each: 8 of them in the mask at its edge, 3 of them five rows beyond, which count as a quarter."""
    mask = (torch.arange(60) < 30).float().view(1, 1, 60, 1).expand(1, 1, 60, 40)
    found = judge._mean(0.6 * mask, mask)[0, 0, :, 20]
    assert found[[10, 29, 34, 50]].tolist() == pytest.approx([0.6, 0.6, 0.6 * 3 / 15 / 0.25, 0], abs=1e-5)
    assert judge._mean(mask)[0, 0, [10, 29], 20].tolist() == pytest.approx([1, 8 / 15])


@pytest.mark.parametrize(("times", "counts"), [(1.0, 1.0), (0.5, 1.0), (1.8, 0.0), (-1.0, 0.0)])
def test_a_step_counts_as_one_where_it_does_not_go_too_far(times: float, counts: float) -> None:
    """A blob 4 voxels further on; half of a step of 1.8 times that is nearer to it than the whole."""
    shift = torch.tensor((4.0, 0.0)).view(1, 2, 1, 1)
    centre = torch.tensor((20.0, 20.0)).view(1, 2, 1, 1)
    fixed, moving = (
        torch.exp(-(identity_grid((44, 40)) - at).square().sum(1, keepdim=True) / 50) for at in (centre, centre + shift)
    )
    images, still = {"fixed_image": fixed, "moving_image": moving}, torch.zeros(1, 2, 22, 20)
    step = still + times * shift / 2  # voxels of half resolution
    judged = Judge(RegistrationLoss({"mse": 1.0}), LAYERS).share(still, step, images)
    assert (judged == counts).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_motion_is_found_beneath_the_same_noise(shape: tuple[int, ...]) -> None:
    shift = torch.tensor((2.0, -1.5, 1.0)[: len(shape)]).view(1, -1, *[1] * len(shape)).expand(1, -1, *shape)
    fixed, moving = noisy(head(shape), 1), noisy(warp(head(shape), -shift), 2)
    found = register(fixed, moving, zero_refiner()(fixed, moving)).displacement
    error = (found - shift).norm(dim=1)[head(shape)[:, 0] > 0.1]
    assert float(error.median()) < 0.6  # of 2.5 and 2.7


def test_a_motion_beneath_a_contrast_that_no_line_explains_is_found_and_said() -> None:
    shape = SHAPES[0]
    shift = torch.tensor((2.0, -1.5)).view(1, 2, 1, 1).expand(1, -1, *shape)
    fixed = noisy(head(shape), 1, 0.02)
    moving = noisy(t2(warp(head(shape), -shift)), 2, 0.02)
    tissue = head(shape)[:, 0] > 0.1
    left = {}
    for similarity in ("auto", "lncc"):
        found = zero_refiner(similarity).refine(fixed, moving)
        u = register(fixed, moving, found.velocity).displacement
        left[similarity] = float((u - shift).norm(dim=1)[tissue].mean())
        assert (found.contrasts[0] in (None, AS_IT_IS)) == (similarity == "lncc")
    assert left["auto"] < 0.7 < left["lncc"] / 2, left  # of 2.5 voxels


def test_what_a_network_got_wrong_does_not_hide_the_contrast() -> None:
    shape = SHAPES[0]
    shift = torch.tensor((2.0, -1.5)).view(1, 2, 1, 1).expand(1, -1, *shape)
    fixed, moving = head(shape), t2(warp(head(shape), -shift))
    wrong = torch.full((1, 2, 36, 40), 6.0)
    found = zero_refiner().refine(noisy(fixed, 1, 0.02), noisy(moving, 2, 0.02), wrong, better=True)
    assert found.starts == ("zero",) and found.contrasts[0] not in (None, AS_IT_IS)


def test_pairs_of_a_batch_have_contrasts_of_their_own_and_other_similarities_none() -> None:
    shape = SHAPES[0]
    shifted = warp(t2(head(shape)), torch.tensor((-2.0, 1.5)).view(1, 2, 1, 1).expand(1, -1, *shape))
    fixed = torch.cat([noisy(head(shape), 1, 0.02)] * 2)
    moving = torch.cat([noisy(shifted, 2, 0.02), noisy(head(shape), 3, 0.02)])
    contrasts = zero_refiner().refine(fixed, moving).contrasts
    assert contrasts[0] != AS_IT_IS and contrasts[1] == AS_IT_IS
    assert zero_refiner("mind", steps=4).refine(fixed[:1], moving[:1]).contrasts == (None,)


def test_a_network_that_deforms_noise_is_not_followed() -> None:
    class Wild(SymmetricNet):
        def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
            generator = torch.Generator().manual_seed(3)
            return torch.nn.functional.interpolate(
                2 * torch.randn(1, 2, 9, 10, generator=generator), size=(36, 40), mode="bilinear"
            )

    fixed, moving = noisy(head((72, 80)), 1), noisy(head((72, 80)), 2)
    refiner = make_refiner(10, refinement_loss("lncc", spatial_dims=2), window=7)
    result = RegistrationInferer(refiner=refiner)(torch.cat([fixed, moving], 1), Wild(2, "alexnet", pretrained="none"))
    assert result["start"] == ("zero",) and not result["displacement"].any()


@pytest.mark.parametrize("radius", [12, 17])
def test_a_motion_within_a_drawn_mask_is_found_whatever_lies_outside(radius: int) -> None:
    shape = (44, 48, 40)
    shift = torch.tensor((2.0, 0.0, 0.0)).view(1, 3, 1, 1, 1).expand(1, 3, *shape)
    fixed, moving = noisy(head(shape), 1, 0.01), noisy(warp(head(shape), -shift), 2, 0.01)
    middle = torch.tensor([(n - 1) / 2 for n in shape]).view(1, 3, 1, 1, 1)
    ball = ((identity_grid(shape) - middle).norm(dim=1, keepdim=True) < radius).float()
    found = register(fixed, moving, zero_refiner(steps=60)(fixed, moving, masks=(ball, ball))).displacement
    inner = (identity_grid(shape) - middle).norm(dim=1) < radius - 3
    assert float((found - shift).norm(dim=1)[inner].median()) < 1.0


@pytest.mark.parametrize("shape", [(64, 64), (50, 61)])
def test_refinement_goes_on_from_a_velocity_that_pays(shape: tuple[int, ...]) -> None:
    shift = torch.tensor((3.0, -2.0)).view(1, 2, 1, 1).expand(1, 2, *shape)
    fixed, moving = noisy(head(shape), 1), noisy(warp(head(shape), -shift), 2)
    half = torch.tensor((1.2, -0.8)).view(1, 2, 1, 1).expand(1, 2, *[n // 2 + 1 for n in shape]).clone()
    refiner = make_refiner(24, refinement_loss("lncc", spatial_dims=2), window=7)
    assert refiner is not None
    velocity, starts, _ = refiner.refine(fixed, moving, half, better=True)
    found = register(fixed, moving, velocity).displacement
    assert starts == ("network",) and velocity.shape == half.shape
    assert float((found - shift).norm(dim=1)[head(shape)[:, 0] > 0.1].median()) < 1.0


def _two_planes(side: int) -> list[Tensor]:
    """A bright bar that moves by 4 pixels under speckle whose grains of 4 pixels are others in each image."""
    rng, tissue = np.random.default_rng(3), np.full((side, side), 0.3) * np.linspace(0.2, 1.5, side)
    grains = [1 + 0.7 * ndimage.gaussian_filter(rng.standard_normal((side, side)), 1.5) for _ in range(2)]
    bar = np.zeros((side, side))
    bar[side // 2 - 8 : side // 2 + 8] = 0.3
    images = [(tissue + moved) * grain for moved, grain in zip((bar, np.roll(bar, 4, 0)), grains, strict=True)]
    return [torch.from_numpy(image.clip(0, 1)).float()[None, None] for image in images]


def test_grains_of_two_planes_are_not_laid_upon_each_other_and_a_bar_between_them_is() -> None:
    fixed, moving = _two_planes(192)
    u = register(fixed, moving, zero_refiner("lncc")(fixed, moving)).displacement[0]
    assert float(u[0, 90:102, 16:176].mean()) == pytest.approx(4, abs=1)
    assert max(sdlogj(u[:, :48]), sdlogj(u[:, 144:])) < 0.25  # 0.41 and 0.47 where every grain is followed


def test_what_counts_does_not_hang_on_which_channel_comes_first() -> None:
    speckle = dict(zip(("fixed_image", "moving_image"), _two_planes(96), strict=True))
    flat = {key: noisy(torch.full_like(image, 0.5), i) for i, (key, image) in enumerate(speckle.items())}
    pairs, shares = {"lncc": speckle, "mi": flat}, []
    refiner = zero_refiner("lncc")
    refiner.judged = False  # grain is laid upon grain
    after = refiner(*speckle.values())
    for names in (("lncc", "mi"), ("mi", "lncc")):
        loss = Channels(names).loss(RegistrationLoss(refinement_loss(names[0], spatial_dims=2), window=9), 2)
        halves = judge.halves_of(pairs[names[0]] | {"channels": [pairs[names[1]]]})
        unseen = pyramid_level(halves[1], (96, 96))
        own, asked = (Judge(loss, LAYERS).share(0 * after, after, unseen, stride=stride) for stride in (None, 1))
        shares.append(asked)
        assert float(asked.mean()) < 0.5 * float(own.mean())
    assert torch.allclose(shares[0], shares[1], atol=1e-5)


def test_grains_that_both_images_show_lead() -> None:
    grains = ndimage.gaussian_filter(np.random.default_rng(4).standard_normal((96, 96)), 1.5)
    fixed, moving = (torch.from_numpy(0.5 + 0.4 * np.roll(grains, k, 0)).float()[None, None] for k in (0, 2))
    u = register(fixed, moving, zero_refiner("lncc")(fixed, moving)).displacement[0]
    assert float(u[0, 16:80, 16:80].mean()) == pytest.approx(2, abs=0.05)
