"""What images and registrations look like in numbers: closed forms, independence of storage, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine

from helpers.alike import SHAPE, pairs, smooth
from regpipe.fields.algebra import Registration, register
from regpipe.io.images import Image
from regpipe.metrics import typical
from regpipe.metrics.measured import Measured
from regpipe.metrics.typical import TypicalPairs, look, numbers
from regpipe.utils.errors import InputError


def image(seed: int = 0, spacing: tuple[float, ...] = (1.0, 1.5, 2.0)) -> Image:
    return Image(smooth(SHAPE, seed), np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_an_image_looks_the_same_however_it_is_stored(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    plain = image()
    turn = np.c_[axes, flips].astype(float)
    array = nib.orientations.apply_orientation(plain.array, turn)
    affine = plain.affine @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    for one, other in zip(look(plain), look(Image(array, affine)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_spacing_and_extent_are_in_mm_and_windowing_changes_nothing() -> None:
    plain = image()
    seen, louder = look(plain), look(plain._replace(array=1000 * plain.array - 7))
    assert seen.spacing.tolist() == [1.0, 1.5, 2.0] and seen.extent.tolist() == [24.0, 45.0, 40.0]
    for one, other in zip(seen, louder, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_negative_has_the_quantiles_of_the_rest_and_the_opposite_content() -> None:
    plain = image()
    seen, negative = look(plain), look(plain._replace(array=-plain.array))
    np.testing.assert_allclose(negative.brightness, 1 - seen.brightness[::-1], atol=1e-4)
    np.testing.assert_allclose(negative.thumbnail, 1 - seen.thumbnail, atol=1e-4)
    assert typical.content(negative.thumbnail, seen.thumbnail) == pytest.approx(-1)
    assert typical.content(seen.thumbnail, seen.thumbnail) == pytest.approx(1)


def test_the_thumbnail_is_the_means_of_blocks_and_noise_has_more_texture() -> None:
    array = np.kron(np.arange(16.0 * 16).reshape(16, 16), np.ones((3, 2))).astype(np.float32)
    small = look(Image(array, np.diag([-1.0, -1.0, 1.0]))).thumbnail
    assert np.corrcoef(small.ravel(), np.arange(256))[0, 1] > 0.9999
    noisy = Image(np.random.default_rng(0).random(SHAPE).astype(np.float32), np.eye(4))
    assert look(noisy).texture > 3 * look(image()).texture


def batch(mask: torch.Tensor | None = None) -> dict[str, Any]:
    fixed, moving = (torch.from_numpy(smooth((40, 40), seed))[None, None] for seed in (1, 2))
    masks = {} if mask is None else {"fixed_mask": torch.ones_like(mask), "moving_mask": mask}
    return {"case": ["a"], "fixed_image": fixed, "moving_image": moving, **masks}


def moved(item: dict[str, Any], by: tuple[float, float]) -> Registration:
    velocity = torch.tensor(by).view(1, 2, 1, 1).expand(1, 2, 40, 40)
    return register(item["fixed_image"], item["moving_image"], velocity)


def seen(item: dict[str, Any], registration: Registration, spacing: tuple[float, float]) -> dict[str, float]:
    return numbers(item, Measured.of(registration, item, spacing))


def test_without_motion_nothing_changes_and_a_translation_has_its_length_in_mm() -> None:
    item = batch()
    still = seen(item, moved(item, (0, 0)), (1.0, 2.0))
    assert still["mi"] == pytest.approx(still["mi_before"]) and still["moved"] == 0 and still["sdlogj"] == 0
    assert seen(item, moved(item, (3, 2)), (1.0, 2.0))["moved"] == pytest.approx(5, rel=1e-4)  # 3 mm and 4 mm


def test_mutual_information_of_an_image_with_itself_is_its_entropy_and_with_its_negative_too() -> None:
    item = batch()
    image = item["fixed_image"]
    item["fixed_image"] = (image - image.min()) / (image.max() - image.min())
    item["moving_image"] = 1 - item["fixed_image"]
    counts = np.bincount(np.minimum((item["fixed_image"].numpy() * 32).astype(int), 31).ravel()) / 1600
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    assert seen(item, moved(item, (0, 0)), (1, 1))["mi"] == pytest.approx(entropy, rel=0.02)
    assert seen(item, moved(item, (0, 0)), (1, 1))["ncc"] == pytest.approx(-1)


def test_an_image_and_its_negative_share_all_there_is_to_know_and_noise_shares_nothing() -> None:
    item = batch()
    item["fixed_image"] = 0.2 + 0.8 * torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    shared = {}
    for name, other in (
        ("itself", item["fixed_image"]),
        ("negative", 1 - item["fixed_image"]),
        ("noise", torch.rand(1, 1, 40, 40)),
    ):
        item["moving_image"] = other
        shared[name] = seen(item, moved(item, (0, 0)), (1, 1))["shared"]
    assert shared["itself"] == pytest.approx(1) and shared["negative"] > 0.9 and shared["noise"] < 0.2


def test_what_lies_outside_the_moving_image_is_not_covered_and_does_not_count() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[:, :, :10] = 1
    item = batch(mask)
    item["moving_image"] = torch.where(mask > 0, item["fixed_image"], torch.rand(1, 1, 40, 40))
    found = seen(item, moved(item, (0, 0)), (1, 1))
    assert found["covered"] == pytest.approx(0.25)
    inside = {**item, "fixed_image": item["fixed_image"][:, :, :10], "moving_image": item["fixed_image"][:, :, :10]}
    del inside["fixed_mask"], inside["moving_mask"]
    registration = Registration(*(part[:, :, :10] for part in moved(item, (0, 0)).tensors().values()))
    assert found["mi_before"] == pytest.approx(seen(inside, registration, (1, 1))["mi_before"])


SIZES = {"spacing": 2, "extent": 2, "brightness": 5, "texture": 1, "content": 1}
RANGES = {name: [[0.0] * size, [1.0] * size] for name, size in SIZES.items()}
SIDE: dict[str, Any] = {"count": 5, "thumbnail": [[0.0] * 16] * 16, **RANGES}
PAIR: dict[str, Any] = {"count": 5, **{name: [[0.0], [1.0]] for name in typical.ASKED}}


def test_ranges_of_the_training_images_are_kept_of_each_side_and_pairs_stay(tmp_path: Path) -> None:
    (tmp_path / typical.NAME).write_text(json.dumps({"format": typical.FORMAT, "pairs": PAIR, "images": {}}))
    typical.write_images(tmp_path, pairs(tmp_path, 6))
    found = typical.read(tmp_path)
    assert found["pairs"] == PAIR and found["images"]["fixed"]["count"] == 6
    assert found["images"]["fixed"]["spacing"] == [[1, 1, 2], [1, 1, 7]]
    assert found["images"]["moving"]["extent"] == [[24, 30, 20], [24, 30, 20]]
    low, high = (edge[0] for edge in found["images"]["fixed"]["content"])
    assert 0.9 < low <= high <= 1
    apart = typical.content(*(np.array(found["images"][side]["thumbnail"]) for side in ("fixed", "moving")))
    assert abs(apart) < 0.5  # another modality has a mean of its own


def test_of_few_images_nothing_is_kept_for_their_mean_would_show_them(tmp_path: Path) -> None:
    typical.write_images(tmp_path, pairs(tmp_path, typical.FEWEST - 1))
    assert typical.read(tmp_path)["images"] == {} and len((tmp_path / typical.NAME).read_text()) < 100


DAMAGED: dict[str, dict[str, Any]] = {
    "no side's name": {"images": {"left": SIDE}},
    "no ranges": {"images": {"fixed": {}}},
    "a list": {"images": []},
    "small thumbnail": {"images": {"fixed": {**SIDE, "thumbnail": [[0.0] * 3]}}},
    "one value for two": {"images": {"fixed": {**SIDE, "content": [[0.5]]}}},
    "two textures": {"images": {"fixed": {**SIDE, "texture": [[0.0, 0.0], [1.0, 1.0]]}}},
    "another number of axes": {"images": {"fixed": {**SIDE, "extent": [[0.0] * 3, [1.0] * 3]}}},
    "no number": {"images": {"fixed": {**SIDE, "thumbnail": [["a"] * 16] * 16}}},
    "texts": {"images": {"fixed": {**SIDE, "texture": [["a"], ["b"]]}}},
    "none counted": {"pairs": {**PAIR, "count": 0}},
    "the wrong way round": {"pairs": {**PAIR, "ncc": [[1.0], [0.0]]}},
}
UNREAD = {name: json.dumps({"format": typical.FORMAT, "images": {}, "pairs": {}, **d}) for name, d in DAMAGED.items()}


@pytest.mark.parametrize("text", ["", "[]", '{"format": "another"}', "{", *UNREAD.values()])
def test_a_damaged_record_is_named_and_not_taken_for_none_which_would_silence_the_warnings(
    text: str, tmp_path: Path
) -> None:
    assert typical.read(tmp_path) == {}
    sound = {"format": typical.FORMAT, "images": {"fixed": SIDE}, "pairs": PAIR}
    (tmp_path / typical.NAME).write_text(json.dumps(sound))
    assert typical.read(tmp_path) == sound
    (tmp_path / typical.NAME).write_text(text)
    with pytest.raises(InputError, match="typical.json: damaged .*delete it"):
        typical.read(tmp_path)


def test_a_record_of_another_dimension_than_the_grid_is_named(tmp_path: Path) -> None:
    (tmp_path / typical.NAME).write_text(
        json.dumps({"format": typical.FORMAT, "images": {"fixed": SIDE}, "pairs": PAIR})
    )
    assert typical.read(tmp_path, 2)["images"]["fixed"] == SIDE
    with pytest.raises(
        InputError, match=r"typical\.json: damaged .*of 2D images, the working grid is 3D.*copy it again"
    ):
        typical.read(tmp_path, 3)


def test_validation_is_kept_where_it_is_the_best_so_far(tmp_path: Path) -> None:
    items = [{**batch(), "case": [f"c{i}"]} for i in range(6)]

    def step(engine: Engine, item: dict[str, Any]) -> dict[str, Any]:
        by = float(item["case"][0][1]) + engine.state.epoch  # 1 to 6 voxels in the first epoch
        return {"label": item, "pred": moved(item, (by, 0.0))._asdict()}

    engine = Engine(step)
    state: Any = engine.state
    state.best_metric_epoch = 1
    TypicalPairs(str(tmp_path), (2.0, 1.0)).attach(engine)
    engine.run(items, max_epochs=1)
    found = typical.read(tmp_path)["pairs"]
    assert found["count"] == 6 and found["moved"] == [[pytest.approx(2, rel=1e-3)], [pytest.approx(12, rel=1e-3)]]
    engine.run(items, max_epochs=2)  # no better
    assert typical.read(tmp_path)["pairs"] == found
