"""One image in the other's contrast: a curve that is known is found, and none is made of a line or of nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regpipe.losses.contrast import AS_IT_IS, FIXED, MOVING, in_one


def ramp(seed: int = 0) -> Tensor:
    """(1, 1, 60, 70): grey values spread evenly over [0, 1], in no order."""
    return torch.rand(1, 1, 60, 70, generator=torch.Generator().manual_seed(seed))


def tent(x: Tensor) -> Tensor:
    return 1 - (2 * x - 1).abs()


def correlated(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_an_image_whose_grey_values_a_curve_makes_of_the_others_is_mapped_by_that_curve() -> None:
    moving = ramp()
    found = in_one(tent(moving), moving, moving)  # fixed is a function of moving, and not the other way round
    assert found.how == MOVING and found.fixed is not moving
    assert (found.moving - tent(moving)).abs().max() < 0.07  # the tent's top is cut by half a bin and the smoothing
    turned_round = in_one(moving, tent(moving), tent(moving))
    assert turned_round.how == FIXED and (turned_round.fixed - tent(moving)).abs().max() < 0.07


@pytest.mark.parametrize("line", [lambda x: x, lambda x: 1 - 0.6 * x, lambda x: x**1.3])
def test_a_line_is_left_as_it_is(line: object) -> None:
    moving = ramp()
    fixed = line(moving) + 0.05 * (ramp(1) - 0.5)  # type: ignore[operator]
    found = in_one(fixed, moving, moving)
    assert found.how == AS_IT_IS and found.fixed is fixed and found.moving is moving


@pytest.mark.parametrize(
    ("fixed", "moving"),
    [(ramp(1), ramp(2)), (torch.zeros(1, 1, 9, 9), torch.ones(1, 1, 9, 9)), (ramp(), torch.full_like(ramp(), 0.3))],
    ids=["unrelated", "flat", "one flat"],
)
def test_of_images_that_tell_nothing_of_each_other_none_is_mapped(fixed: Tensor, moving: Tensor) -> None:
    assert in_one(fixed, moving, moving).how == AS_IT_IS


def test_what_a_mask_leaves_out_does_not_tell() -> None:
    moving = ramp()
    fixed, seen = tent(moving), torch.zeros_like(moving)
    fixed[..., 35:], seen[..., :35] = ramp(3)[..., 35:], 1
    inside = in_one(fixed, moving, moving, seen)
    assert inside.how == MOVING and (inside.moving - tent(moving)).abs().max() < 0.07
    assert in_one(fixed, moving, moving, 0 * seen).how == AS_IT_IS


def test_the_relation_is_read_where_the_images_are_aligned_by_now() -> None:
    image = ramp()
    moving = image.roll(1, 3)
    assert in_one(tent(image), moving, moving).how == AS_IT_IS
    found = in_one(tent(image), moving, image)
    assert found.how == MOVING and correlated(found.moving.roll(-1, 3), tent(image)) > 0.999
