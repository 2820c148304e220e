"""Terms of labels, landmarks, true displacements and clean images against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helpers.terms import constant, example, fields_only, noise, term
from regpipe.utils.errors import InputError


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


def test_the_end_point_error_is_a_distance_in_voxels_both_ways_within_the_masks() -> None:
    shape = (12, 10)
    u, nothing = constant(shape, 3.0, 4.0), constant(shape, 0.0, 0.0)
    r = fields_only(u)  # its inverse is -u
    assert float(term("end_point", r, {"displacement": u, "inverse": -u})) == pytest.approx(0.01)  # smoothed at 0
    assert float(term("end_point", r, {"displacement": nothing, "inverse": -u})) == pytest.approx(2.505, abs=1e-3)
    assert float(term("end_point", r, {"displacement": nothing})) == pytest.approx(5, abs=1e-3)
    left = torch.zeros(1, 1, *shape)
    left[:, :, :6] = 1
    half = {"displacement": torch.cat([nothing[:, :, :6], u[:, :, 6:]], 2), "inverse": nothing}
    assert float(term("end_point", r, {**half, "fixed_mask": left})) == pytest.approx(5, abs=1e-3)
    assert float(term("end_point", r, {**half, "fixed_mask": 1 - left})) == pytest.approx(2.505, abs=1e-3)
    with pytest.raises(InputError, match="end_point.*displacements"):
        term("end_point", r, {})


def test_clean_images_count_and_not_what_they_look_like() -> None:
    r, target = example((20, 17))
    still = fields_only(torch.zeros_like(r.displacement))
    same = {**target, "moving_clean": 1 - target["fixed_clean"] / 2}  # of another gain
    found = float(term("clean", still, same))
    assert found < 0.3 * float(term("clean", still, target))
    assert float(term("clean", still, {**same, "fixed_image": target["moving_image"]})) == found
    with pytest.raises(InputError, match="clean.*configs/synthetic.yaml"):
        term("clean", still, {})


def test_the_known_field_counts_squared_voxels_and_must_be_known() -> None:
    u = constant((8, 8), 3.0, -4.0)
    assert float(term("known_field", fields_only(u), {"displacement": 0 * u})) == pytest.approx(25)
    with pytest.raises(InputError, match="known_field.*displacements"):
        term("known_field", fields_only(u), {})
