"""Behind MONAI's transforms a landmark is where its blob is, and both are where they were in the patient."""

from __future__ import annotations

from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch

from helpers.training import refusal, workflow
from regpipe.data.augment import MonaiTransforms
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import SIDES, list_pairs
from regpipe.fields.algebra import Registration, identity_grid
from regpipe.metrics.measured import measure
from regpipe.utils.errors import InputError

KEYS = [f"{side}_{kind}" for kind in ("image", "label", "mask") for side in SIDES]
MODES = ["bilinear"] * 2 + ["nearest"] * 4


OVERLAY: dict[str, Any] = {
    "train#preprocessing": {
        "_target_": "regpipe.MonaiTransforms",
        "load": "@load",
        "transforms": [
            {"_target_": "RandGaussianNoised", "keys": KEYS[:2], "std": 0.05},
            {"_target_": "Flipd", "keys": KEYS, "spatial_axis": 0},
        ],
    }
}


def item(dim: int) -> dict[str, Any]:
    """A blob at a landmark, off the middle, on a turned and unequally sampled grid."""
    shape = (24, 30, 26)[:dim]
    made: dict[str, Any] = {"case": "a"}
    for i, side in enumerate(SIDES):
        point = torch.tensor([s / 2 + 2.0 + i for s in shape])
        distance = (identity_grid(shape)[0] - point.view(-1, *[1] * dim)).square().sum(0)
        image = torch.exp(-distance / 10)[None]
        affine = torch.eye(dim + 1, dtype=torch.float64)
        affine[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]]) @ torch.diag(torch.tensor([-1.0, 1.5]))
        affine[:dim, -1] = 5.0 + i
        made |= {f"{side}_image": image, f"{side}_label": (image > 0.4).int(), f"{side}_mask": torch.ones_like(image)}
        made |= {f"{side}_landmarks": point[None], f"{side}_affine": affine}
    return made


def centroid(image: torch.Tensor) -> torch.Tensor:
    return (identity_grid(image.shape[1:])[0] * image[0] / image.sum()).flatten(1).sum(1)


def in_mm(found: dict[str, Any], side: str) -> torch.Tensor:
    affine = found[f"{side}_affine"]
    return affine[:-1, :-1] @ found[f"{side}_landmarks"][0].double() + affine[:-1, -1]


def moves(dim: int) -> list[tuple[Any, float]]:
    """Transforms, and how far a sampled blob may be off in voxels."""
    turn: dict[str, Any] = {
        "prob": 1.0,
        "rotate_range": 0.3,
        "translate_range": 2,
        "mode": MODES,
        "padding_mode": "border",
    }
    return [
        (mt.Flipd(KEYS, 0), 1e-3),
        (mt.Rotate90d(KEYS, 1, (0, 1)), 1e-3),
        (mt.SpatialCropd(KEYS, roi_start=[3] * dim, roi_end=[22, 28, 24][:dim]), 0.05),
        (mt.RandAffined(KEYS, **turn), 0.1),
        (mt.Spacingd(KEYS, [1.3] * dim, mode=MODES), 0.1),
        (mt.Compose([mt.RandFlipd(KEYS, 1.0, 1), mt.Zoomd(KEYS, 0.8, mode=["area"] * 2 + ["nearest"] * 4)]), 0.15),
    ]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("which", range(6))
def test_a_landmark_stays_at_its_blob_and_in_its_place_of_the_patient(dim: int, which: int) -> None:
    transform, near = moves(dim)[which]
    before = item(dim)
    kept = {key: value.clone() for key, value in before.items() if isinstance(value, torch.Tensor)}
    moved_by = MonaiTransforms(lambda case: before, [transform])
    moved_by.transform.set_random_state(seed=0)
    found = moved_by({"case": "a"})
    assert all(torch.equal(before[key], value) for key, value in kept.items())  # what the cache holds
    for side in SIDES:
        assert type(found[f"{side}_image"]) is torch.Tensor and found[f"{side}_label"].dtype == torch.int32
        assert torch.allclose(centroid(found[f"{side}_image"]), found[f"{side}_landmarks"][0], atol=near)
        assert torch.allclose(in_mm(found, side), in_mm(before, side), atol=1e-4)
        moved = found[f"{side}_landmarks"] - before[f"{side}_landmarks"]
        assert moved.abs().max() > 0.3


def test_what_changes_no_place_leaves_places_alone() -> None:
    before = item(2) | {"displacement": torch.zeros(2, 24, 30)}
    found = MonaiTransforms(lambda case: before, [mt.RandGaussianNoised(KEYS[:2], 1.0)])({})
    assert not torch.equal(found["fixed_image"], before["fixed_image"]) and "displacement" in found
    assert torch.equal(found["fixed_affine"], before["fixed_affine"])


@pytest.mark.parametrize(
    ("transforms", "more", "words"),
    [
        ([mt.Rand2DElasticd(KEYS, (4, 4), (1, 2))], {}, "Rand2DElasticd: no affine"),
        ([mt.Compose([mt.RandGridDistortiond(KEYS)])], {}, "RandGridDistortiond: no affine"),
        ([mt.Flipd(KEYS[:2], 0)], {}, "Flipd: fixed_label was not moved with fixed_image; name both"),
        ([mt.Flipd(KEYS, 0)], {"moving_bend": torch.eye(3)}, "a homography or an initial field does not follow"),
        ([mt.Rotate90d(KEYS[::2], 1)], {}, "a grid of one shape"),
    ],
)
def test_what_cannot_be_right_is_refused(transforms: list[Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MonaiTransforms(lambda case: item(2) | more, transforms)({})


def test_behind_plain_pairs_a_motion_is_refused_with_the_remedy(cohort) -> None:
    load = LoadPair(None)
    case = list_pairs(cohort)[0]
    noisy = mt.Compose([load, mt.RandGaussianNoised(KEYS[:2], 1.0)])(case)
    assert collate_pairs([noisy])["fixed_image"].shape == (1, 1, 32, 32)
    with pytest.raises(InputError, match=r"Flip moved fixed_image.*regpipe.MonaiTransforms"):
        collate_pairs([mt.Compose([load, mt.Flipd(KEYS, 0)])(case)])
    batch = collate_pairs([MonaiTransforms(load, [mt.Flipd(KEYS, 0)])(case)])
    assert batch["fixed_image"].shape == (1, 1, 32, 32) and "displacement" not in batch


def test_a_batch_that_monai_loaded_is_measured(cohort) -> None:
    files = {key: value for key, value in list_pairs(cohort)[0].items() if key in KEYS}
    read = mt.Compose([mt.LoadImaged([*files]), mt.EnsureChannelFirstd([*files], channel_dim="no_channel")])
    batch = {key: value[None] for key, value in read(files).items() if key in KEYS}
    fixed, moving = (batch[f"{side}_image"].as_tensor() for side in SIDES)
    still = torch.zeros(1, 2, 32, 32)
    found = measure(Registration(still, still, still, moving, fixed), batch, (1.0, 1.0))
    assert found["dice"] == found["dice_before"] > 0 and np.isnan(found["tre"])
    del batch["fixed_image"]
    with pytest.raises(InputError, match="name its images fixed_image and moving_image"):
        measure(Registration(still, still, still, moving, fixed), batch, (1.0, 1.0))


@pytest.mark.usefixtures("restored")
def test_a_bundle_trains_behind_them_and_its_record_names_them(cohort, bundle) -> None:
    flow = workflow(bundle, cohort, max_epochs=1, **OVERLAY)
    described = flow.parser.get_parsed_content("described")
    assert described.settings["transforms"] == "RandGaussianNoised Flipd" and described.moved_by_monai
    said = refusal(bundle, cohort, 1, loss_weights={"known_field": 1.0}, **OVERLAY)
    assert "known_field" in said and "MONAI's spatial transforms" in said
