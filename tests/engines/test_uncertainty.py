"""How far off a registration may be: nothing but the floor where it is always right, what a start leaves elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import zero_refiner
from regpipe.engines.uncertainty import FACTOR, FLOOR, MEMBERS, START, Ensemble, random_velocity
from regpipe.fields.algebra import compose, identity_grid, integrate, smooth, warp

SHAPES = [(40, 36), (20, 24, 18)]


class Answering:
    """An inferer that answers what a function makes of the call's number; keeps the images that it saw."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.seen: list[Tensor] = []

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **told: Any) -> dict[str, Any]:
        self.seen.append(inputs)
        return {"displacement": self.answer(len(self.seen) - 1, inputs), "start": ["zero"]}


def starts(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [integrate(random_velocity(shape, generator)) for _ in range(MEMBERS)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_found_from_every_start_is_sure_up_to_the_floor(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    inverses = [integrate(-random_velocity(shape, generator)) for _ in range(MEMBERS)]
    right = Answering(lambda i, pair: torch.zeros_like(inverses[0]) if i == 0 else inverses[i - 1])
    found = Ensemble(right)(torch.rand(1, 2, *shape), torch.nn.Identity())
    inner = (..., *[slice(8, -8)] * len(shape)) if len(shape) == 2 else (..., *[slice(6, -6)] * 3)
    expected = FLOOR / len(shape) ** 0.5
    assert found["start"] == ["zero"] and found["uncertainty"].shape == (1, len(shape), *shape)
    assert float((found["uncertainty"][inner] - expected).abs().max()) < 0.1  # interpolation of the inverse


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_never_found_is_as_unsure_as_the_starts_are_far(shape: tuple[int, ...]) -> None:
    found = Ensemble(Answering(lambda i, pair: torch.zeros(1, len(shape), *shape)))(
        torch.rand(1, 2, *shape), torch.nn.Identity()
    )
    expected = torch.stack(starts(shape)).square().mean(0)
    told = (found["uncertainty"].square() - FLOOR**2 / len(shape)) / FACTOR**2
    assert float(told.sum(1).mean()) == pytest.approx(float(expected.sum(1).mean()), rel=0.1)  # averaged over places
    assert float(expected.sum(1).mean().sqrt()) == pytest.approx(START, rel=0.3)


def test_each_member_sees_the_moving_image_from_its_own_start_and_the_fixed_one_as_it_is() -> None:
    shape, images = SHAPES[0], torch.rand(1, 2, *SHAPES[0])
    other = Answering(lambda i, pair: torch.zeros(1, 2, *shape))
    Ensemble(other)(images, torch.nn.Identity())
    assert len(other.seen) == 1 + MEMBERS
    for pair, start in zip(other.seen[1:], starts(shape), strict=True):
        assert torch.equal(pair[:, :1], images[:, :1])
        torch.testing.assert_close(pair[:, 1:], warp(images[:, 1:], start))


def test_masks_move_with_the_image_that_they_are_of_and_each_pair_of_a_batch_is_sure_by_itself() -> None:
    shape, told = SHAPES[0], []

    def zero(inputs: Tensor, network: Any, *, masks: Any) -> dict[str, Tensor]:
        told.append(masks)
        still = torch.zeros(2, 2, *shape)
        if len(told) > 1:  # the second pair comes out elsewhere each time
            still[1] = float(len(told))
        return {"displacement": still}

    fixed, moving = (torch.zeros(2, 1, *shape) for _ in range(2))
    moving[..., 10:30, 8:28] = 1
    found = Ensemble(zero)(torch.rand(2, 2, *shape), torch.nn.Identity(), masks=[fixed, moving])["uncertainty"]
    for (still, moved), start in zip(told[1:], starts(shape), strict=True):
        assert still is fixed and torch.equal(moved, (warp(moving, start.expand(2, -1, -1, -1)) > 0.5).float())
    assert float(found[1].mean()) > 1.5 * float(found[0].mean())


def test_the_motion_of_a_member_is_its_answer_after_its_start() -> None:
    """warp(warp(M, start), u) = warp(M, compose(start, u)): a constant answer adds to a constant start."""
    start = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    answer = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    torch.testing.assert_close(compose(start, answer), start + answer)


def test_a_flat_half_is_less_sure_than_a_textured_one() -> None:
    shape = (72, 80)
    noise = torch.randn(3, 1, 1, *shape, generator=torch.Generator().manual_seed(1))
    texture = smooth(smooth(noise[:1, 0], 2, 2.5, reach=3), 3, 2.5, reach=3)
    image = torch.where(identity_grid(shape)[:, 1:] < 40, 0.5 + 0.15 * texture / texture.std(), 0.5)
    pair = (torch.cat([image, image], 1) + 0.01 * noise[1:, 0, 0]).clamp(0, 1)
    with torch.no_grad():
        found = Ensemble(ZeroInferer(zero_refiner()))(pair, torch.nn.Identity())
    told = found["uncertainty"][0].norm(dim=0)
    assert float(told[8:-8, 52:-6].mean()) > 2 * float(told[8:-8, 6:32].mean())
