"""Noise is measured as it was made, and an image is split into two whose noise is independent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regpipe.losses.noise import SHARE, noise_level, noise_variance, split_noise

SIGMA = 0.03


def scene(shape: tuple[int, ...]) -> Tensor:
    """A slope with a step along an axis, within (0.2, 0.8): (1, 1, *shape)."""
    line = torch.linspace(0.2, 0.6, shape[0]) + 0.2 * (torch.arange(shape[0]) > shape[0] // 2)
    return line.view(1, 1, -1, *[1] * (len(shape) - 1)).expand(1, 1, *shape)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return SIGMA * torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(150, 120), (40, 50, 30)])
def test_white_noise_is_measured_whatever_slope_and_step_are_below_it(shape: tuple[int, ...]) -> None:
    noisy = scene(shape) + draw(shape)
    assert float(noise_variance(noisy)) == pytest.approx(SIGMA**2, rel=0.05)
    noisy[:, :, : shape[0] // 2] = 0  # a background that was set
    assert float(noise_variance(noisy)) == pytest.approx(SIGMA**2, rel=0.08)


def test_each_image_of_a_batch_has_its_own_noise_and_a_clean_or_tiny_one_has_none() -> None:
    clean, noisy = scene((60, 60)), scene((60, 60)) + draw((60, 60))
    assert noise_variance(torch.cat([clean, noisy])).tolist() == pytest.approx([0, SIGMA**2], rel=0.1, abs=1e-10)
    assert noise_variance(torch.rand(1, 1, 1, 9)).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(200, 160), (50, 60, 40)])
def test_speckle_is_measured_at_each_grey_value_and_white_noise_by_one_number(shape: tuple[int, ...]) -> None:
    clean = torch.linspace(0.05, 0.9, shape[0]).view(1, 1, -1, *[1] * (len(shape) - 1)).expand(1, 1, *shape)
    white = draw(shape)
    speckled = clean * (1 + 5 * white)
    level = noise_level(speckled)
    assert float((level / (5 * SIGMA * clean) - 1).abs().mean()) < 0.05
    assert noise_level(clean + white).tolist() == noise_variance(clean + white).sqrt().tolist()
    rician = ((clean + white).square() + draw(shape, 1).square()).sqrt()
    assert noise_level(rician).numel() == 1
    quiet = torch.cat([0.1 + 0.1 * white, 0.6 + white], dim=3)  # air, and tissue with white noise
    told = float(noise_level(quiet)[:, :, :, -10:].mean())
    assert 2 * float(noise_variance(quiet).sqrt()) < 0.5 * SIGMA < told < 1.5 * SIGMA
    noise, part = split_noise(speckled).noise[0, 0], shape[0] // 4
    ratio = clean[0, 0, -part:].square().mean().sqrt() / clean[0, 0, :part].square().mean().sqrt()
    assert float(noise[-part:].std() / noise[:part].std()) == pytest.approx(float(ratio), rel=0.05)


def test_the_halves_hold_independent_noise_of_known_variance_and_the_same_bytes_each_time() -> None:
    clean, noise = scene((300, 300)), draw((300, 300))
    halves = split_noise(clean + noise)
    seen, unseen = (half - clean for half in (halves.seen, halves.unseen))
    assert float(seen.var()) == pytest.approx(SIGMA**2 * (1 + SHARE**2), rel=0.05)
    assert float(unseen.var()) == pytest.approx(SIGMA**2 * (1 + 1 / SHARE**2), rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([seen.flatten(), unseen.flatten()]))[0, 1])) < 0.02
    assert torch.equal(split_noise(clean + noise).seen, halves.seen)


def test_what_was_set_to_the_ends_of_the_range_gets_no_noise() -> None:
    image = (scene((60, 60)) + draw((60, 60))).clone()
    image[:, :, :20], image[:, :, 40:] = 0, 1
    assert not split_noise(image).noise[:, :, :20].any() and not split_noise(image).noise[:, :, 40:].any()
    assert split_noise(image).noise[:, :, 20:40].all()
