"""Random affine motion moves image, label and landmarks together."""

from __future__ import annotations

import pytest
import torch

from regpipe.data.augment import (
    RandomAffine,
    RandomIntensity,
    affine_displacement,
    change_intensity,
    draw_affine,
    move_points,
)
from regpipe.fields.algebra import identity_grid, warp
from regpipe.utils.errors import InputError


def blob(shape: tuple[int, ...], centre: torch.Tensor) -> torch.Tensor:
    distance = (identity_grid(shape)[0] - centre.view(-1, *[1] * len(shape))).square().sum(0)
    return torch.exp(-distance / 8)[None]


def centroid(image: torch.Tensor) -> torch.Tensor:
    weights = image[0] / image.sum()
    return (identity_grid(image.shape[1:])[0] * weights).flatten(1).sum(1)


def item(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    points = {side: torch.tensor([s // 2 + 2.0 for s in shape]) for side in ("fixed", "moving")}
    made: dict[str, torch.Tensor] = {"displacement": torch.zeros(len(shape), *shape)}
    for side, point in points.items():
        made |= {f"{side}_image": blob(shape, point), f"{side}_landmarks": point[None]}
        made[f"{side}_label"] = (made[f"{side}_image"] > 0.5).int()
    return made


@pytest.mark.parametrize("shape", [(30, 40), (24, 28, 26)])
def test_a_landmark_goes_where_its_blob_goes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    before = item(shape)
    after = RandomAffine(lambda case: dict(before), amount=0.08)({"case": "a"})
    for side in ("fixed", "moving"):
        assert torch.allclose(centroid(after[f"{side}_image"]), after[f"{side}_landmarks"][0], atol=0.15)
        assert torch.allclose(centroid(after[f"{side}_label"].float()), after[f"{side}_landmarks"][0], atol=0.5)
        assert (after[f"{side}_landmarks"] - before[f"{side}_landmarks"]).norm() > 0.5
    assert "displacement" not in after and after["fixed_label"].dtype == torch.int32
    assert not torch.equal(after["fixed_landmarks"], after["moving_landmarks"])  # each its own motion


def test_further_channels_move_with_their_image_and_look_as_they_will() -> None:
    torch.manual_seed(0)
    before = item((30, 40))
    before |= {f"{side}_channels": before[f"{side}_image"].repeat(2, 1, 1) for side in ("fixed", "moving")}
    looks = RandomIntensity(lambda case: dict(before), amount=1.0)({})
    moved = RandomAffine(lambda case: dict(before), amount=0.1)({})
    for side in ("fixed", "moving"):
        assert torch.equal(moved[f"{side}_channels"], moved[f"{side}_image"].repeat(2, 1, 1))
        one, other = looks[f"{side}_channels"]
        assert not torch.equal(one, other) and not torch.equal(one, looks[f"{side}_image"][0])
        assert looks[f"{side}_channels"].shape == before[f"{side}_channels"].shape


def test_no_amount_changes_nothing_and_the_same_seed_the_same() -> None:
    before = item((20, 22))
    assert RandomAffine(lambda case: before, amount=0.0)({}) is before
    twice = []
    for _ in range(2):
        torch.manual_seed(3)
        twice.append(RandomAffine(lambda case: dict(before), amount=0.1)({})["fixed_image"])
    assert torch.equal(*twice)


@pytest.mark.parametrize(("shape", "axis"), [((12, 10), 0), ((8, 9, 10), 2)])
def test_both_sides_are_mirrored_alike_or_not_at_all(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    before, seen = item(shape), set()
    for _ in range(20):
        after = RandomAffine(lambda case: dict(before), amount=0.0, mirror=[axis])({})
        mirrored = not torch.equal(after["fixed_landmarks"], before["fixed_landmarks"])
        for side in ("fixed", "moving"):
            image, label = before[f"{side}_image"], before[f"{side}_label"]
            expected = (image.flip(1 + axis), label.flip(1 + axis)) if mirrored else (image, label)
            torch.testing.assert_close(after[f"{side}_image"], expected[0], atol=1e-5, rtol=0)
            assert torch.equal(after[f"{side}_label"], expected[1])
            points = before[f"{side}_landmarks"].clone()
            points[:, axis] = shape[axis] - 1 - points[:, axis] if mirrored else points[:, axis]
            torch.testing.assert_close(after[f"{side}_landmarks"], points)
        seen.add(mirrored)
    assert seen == {True, False}


def test_an_axis_that_the_images_do_not_have_is_not_mirrored() -> None:
    with pytest.raises(InputError, match="--mirror .2.: the images have the axes 0 to 1"):
        RandomAffine(lambda case: item((8, 8)), amount=0.0, mirror=[2])({})


def test_the_looks_of_both_images_change_and_what_lies_where_does_not() -> None:
    before = item((12, 10))
    assert RandomIntensity(lambda case: before, amount=0.0)({}) is before
    torch.manual_seed(0)
    after = RandomIntensity(lambda case: before, amount=1.0)({})
    changes = {side: after[f"{side}_image"] - before[f"{side}_image"] for side in ("fixed", "moving")}
    assert all(change.abs().max() > 0.05 for change in changes.values())
    assert not torch.equal(changes["fixed"], changes["moving"])
    assert all(after[key] is before[key] for key in before if not key.endswith("image"))
    torch.manual_seed(0)
    assert torch.equal(RandomIntensity(lambda case: before, amount=1.0)({})["fixed_image"], after["fixed_image"])


@pytest.mark.parametrize("dims", [2, 3])
def test_contrast_shading_and_noise_have_the_sizes_they_are_said_to_have(dims: int) -> None:
    torch.manual_seed(0)
    shape = (1, *[12] * dims)
    black, white, grey = (
        torch.stack([change_intensity(torch.full(shape, value), 0.5) for _ in range(300)]) for value in (0.0, 1.0, 0.5)
    )
    assert black.abs().mean() < 0.03 and black.std() == pytest.approx(0.05 / 3**0.5, rel=0.1)  # n: up to 0.05
    corner = white.flatten(1)[:, 0]  # where a control point lies
    assert corner.log().std() == pytest.approx((0.15**2 + 0.05**2 / 3) ** 0.5, rel=0.15)  # ln s and n
    exponents = -grey.flatten(1).log().mean(1) / torch.tensor(2.0).log()  # but for the mean of ln s
    assert exponents.log().std() == pytest.approx(0.35 / 3**0.5, rel=0.25) and exponents.max() < 1.7


def test_missing_landmarks_stay_missing() -> None:
    matrix, shift = draw_affine(torch.Size((9, 9)), 0.1)
    points = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    assert move_points(points, matrix, shift, torch.Size((9, 9))).isnan().tolist() == [[False] * 2, [True] * 2]


def test_a_translation_in_closed_form() -> None:
    shape = torch.Size((12, 10))
    u = affine_displacement(torch.eye(2), torch.tensor([2.0, -1.0]), shape)
    image = torch.rand(1, 1, *shape)
    assert torch.allclose(warp(image, u)[0, 0, :-2, 1:], image[0, 0, 2:, :-1], atol=1e-5)
    moved = move_points(torch.tensor([[5.0, 5.0]]), torch.eye(2), torch.tensor([2.0, -1.0]), shape)
    assert torch.allclose(moved, torch.tensor([[3.0, 6.0]]))
