"""Pairs become tensors on the working grid, and batches."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from helpers.folders import frames, save, two_folders, volume
from helpers.places import real
from regpipe.data.checks import check_pairs
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs, working_grid
from regpipe.io.images import Grid, InputError
from regpipe.phantoms.cohort import write_cohort
from regpipe.phantoms.scenes import make_pair
from regpipe.transforms.displacement import write_displacement


def test_landmarks_point_at_the_same_spot_of_the_working_image(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1.5, 4], [-1.0, 0, 0, 9], [0, 1.2, 0, -3], [0, 0, 0, 1]])
    array = np.zeros((12, 13, 14), np.float32)
    spots = [(3, 4, 5), (8, 9, 2)]
    label = np.zeros((*array.shape, 3), np.uint8)
    for i, spot in enumerate(spots):
        array[spot] = 1 + i
        label[(*spot, i + 1)] = 1
    lps = apply_affine(affine, spots) * [-1, -1, 1]
    rows = "".join(f"{x},{y},{z}\n" for x, y, z in lps)
    case = {"case": "a"}
    for side in ("fixed", "moving"):
        case[f"{side}_image"] = str(save(tmp_path / f"{side}.nii.gz", array, affine))
        case[f"{side}_label"] = str(save(tmp_path / f"{side}_l.nii.gz", label, affine))
        case[f"{side}_landmarks"] = str(tmp_path / f"{side}.csv")
        (tmp_path / f"{side}.csv").write_text("x,y,z\n" + rows + ",,\n")
    item = LoadPair(working_grid([case]), landmark_channels=1)(case)
    points = item["fixed_landmarks"]
    assert points.shape == (5, 3) and points.dtype == torch.float32
    torch.testing.assert_close(points[:2], points[2:4])  # channels, then file
    assert points[4].isnan().all()
    for value, point in zip((1, 2), points[:2], strict=True):
        at = tuple(point.round().long().tolist())
        torch.testing.assert_close(point, torch.tensor(at).float(), atol=1e-4, rtol=0)
        assert item["fixed_image"][0][at] == pytest.approx(1 if value == 2 else 0.5, abs=1e-3)
        ras = apply_affine(item["fixed_affine"].numpy(), at)
        np.testing.assert_allclose(ras, apply_affine(affine, spots[value - 1]), atol=1e-4)


def test_a_loaded_pair_is_plain_tensors_and_a_batch_pads_landmarks_with_nan(tmp_path: Path) -> None:
    cases = list_pairs(two_folders(tmp_path, 2))
    (tmp_path / "fixed_landmarks" / "c1.csv").write_text("x,y,z\n1,2,3\n")
    (tmp_path / "moving_landmarks" / "c1.csv").write_text("x,y,z\n1,2,3\n")
    load = LoadPair(working_grid(cases))
    bare = {k: v for k, v in cases[0].items() if "image" in k or k == "case"}
    items = [load(cases[0]), load(cases[1]), load(bare)]
    batch = collate_pairs(items)
    assert batch["case"] == ["c0", "c1", "c0"]
    assert batch["fixed_image"].shape == batch["moving_label"].shape == (3, 1, 8, 8, 8)
    assert batch["fixed_image"].dtype == torch.float32 and batch["fixed_label"].dtype == torch.int32
    assert batch["fixed_image"].min() >= 0 and batch["fixed_image"].max() <= 1
    assert type(batch["fixed_image"]) is torch.Tensor
    assert batch["fixed_label"][:, 0].flatten(1).sum(1).tolist() == [336, 336, 0]  # 6 * 7 * 8
    assert batch["fixed_affine"].shape == (3, 4, 4) and batch["fixed_affine"].dtype == torch.float64
    known = ~batch["fixed_landmarks"].isnan().any(-1)
    assert known.tolist() == [[True, True], [True, False], [False, False]]


def test_the_cache_keeps_files_not_pairs_and_changes_nothing(tmp_path: Path) -> None:
    cases = list_pairs(frames(tmp_path, 4))
    grid = working_grid(cases)
    cached, plain = LoadPair(grid), LoadPair(grid, cache=False)
    for _ in range(2):
        for case in cases:
            one, other = cached(case), plain(case)
            for key in one.keys() - {"case"}:
                assert torch.equal(one[key], other[key])
    assert cached.cache is not None and len(cached.cache) == 4
    start = time.perf_counter()
    for case in cases:
        cached(case)
    assert (time.perf_counter() - start) / len(cases) < 1e-3


def test_landmarks_that_cannot_correspond_and_a_wrong_grid_are_refused(tmp_path: Path) -> None:
    case = list_pairs(two_folders(tmp_path, 1))[0]
    with pytest.raises(InputError, match="c0.nii.gz.*working grid"):
        LoadPair(Grid((8, 8), (1.0, 1.0)))(case)
    Path(case["moving_landmarks"]).write_text("x,y,z\n1,2,3\n")
    with pytest.raises(InputError, match="c0.csv: holds 1 landmarks, the fixed side 2"):
        LoadPair(Grid((8, 8, 8), (1.0, 1.0, 1.0)))(case)


def test_real_prostates_keep_groups_together_and_yield_landmarks() -> None:
    root = real("prostate_mrus")
    lines = (root / "groups.csv").read_text().split()[1:]
    groups = dict(line.split(",") for line in lines)
    sides = [list_pairs(root, split=s) for s in ("training", "validation")]
    found = [{groups[c["case"]] for c in cases} for cases in sides]
    assert not found[0] & found[1] and len(sides[0]) + len(sides[1]) == 86
    few = sides[1][:4]
    assert check_pairs(few, landmark_channels=1) == {}
    load = LoadPair(working_grid(few), landmark_channels=1)
    for case in few:
        item = load(case)
        points, gland = item["fixed_landmarks"], item["fixed_label"]
        channels = nib.load(case["fixed_label"]).shape[3]  # type: ignore[attr-defined]
        assert points.shape == item["moving_landmarks"].shape == (channels - 1, 3)
        assert gland.max() == 1
        inside = points[~points.isnan().any(1)]
        assert ((inside >= 0) & (inside < torch.tensor(gland.shape[1:]))).all()


def test_real_2d_brains_and_real_ultrasound_frames_load() -> None:
    brains = list_pairs(real("brain_mr_2d"), split="validation")
    assert len({c["fixed_image"] for c in brains}) == 3 and check_pairs(brains) == {}
    item = LoadPair(working_grid(brains))(brains[0])
    assert item["fixed_image"].shape == (1, 216, 292) and item["fixed_label"].max() > 1000
    liver = real("ultrasound_2d/liver")
    held = list_pairs(liver, pairing="first", split="validation", holdout=0.2)
    names = sorted(f.stem for f in liver.glob("*.png"))
    assert [c["case"] for c in held] == [f"{n}_to_{names[0]}" for n in names[-20:]]
    frame = LoadPair(working_grid(held))(held[0])["moving_image"]
    assert frame.ndim == 3 and frame.max() == 1 and frame.min() == 0


def test_the_mask_is_1_where_the_grid_lies_in_the_image(tmp_path: Path) -> None:
    turned = np.array([[0, 0, 1.5, 4], [-1.0, 0, 0, 9], [0, 1.2, 0, -3], [0, 0, 0, 1]])
    for name, affine, grid in (
        ("same", np.eye(4), Grid((8, 8, 8), (1.0, 1.0, 1.0))),
        ("coarse", np.diag([1.0, 1.0, 2.0, 1.0]), Grid((5, 6, 7), (2.0, 2.0, 2.5))),
        ("fine", turned, Grid((30, 24, 30), (0.7, 0.5, 0.4))),
    ):
        file = save(tmp_path / f"{name}.nii.gz", volume(), affine)  # 6 x 7 x 8 voxels
        case = {"case": name, "fixed_image": str(file), "moving_image": str(file)}
        item = LoadPair(grid)(case)
        mask = item["fixed_mask"]
        assert mask.shape == (1, *grid.shape) and mask.dtype == torch.float32
        at = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
        voxel = apply_affine(np.linalg.inv(affine) @ item["fixed_affine"].numpy(), at)
        # half a voxel to each side of the outer centres belongs to the image; a tie may fall to either side
        far = np.maximum(-0.5 - voxel, voxel - (np.array([6, 7, 8]) - 0.5)).max(-1)
        clear = np.abs(far) > 1e-3
        np.testing.assert_array_equal(mask[0].numpy()[clear], (far < 0)[clear])
        assert 0 < mask.mean() < 1


def test_where_the_image_fills_the_grid_the_mask_is_1_and_takes_no_memory(tmp_path: Path) -> None:
    cases = list_pairs(write_cohort(tmp_path / "cohort", shape=(32, 40), n_pairs=1))
    item = LoadPair(working_grid(cases))(cases[0])
    for side in ("fixed", "moving"):
        assert item[f"{side}_mask"].shape == (1, 32, 40) and item[f"{side}_mask"].min() == 1
        assert item[f"{side}_mask"].untyped_storage().nbytes() == 4
    batch = collate_pairs([item, item])
    assert batch["moving_mask"].shape == (2, 1, 32, 40) and batch["moving_mask"].dtype == torch.float32


def test_a_pair_of_which_nothing_counts_is_refused_before_anything_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (case,) = list_pairs(two_folders(tmp_path, 1))
    image = nib.Nifti1Image.from_filename(case["fixed_image"])
    case["fixed_ignore"] = str(save(tmp_path / "all.nii.gz", np.ones(image.shape, np.uint8), image.affine))
    assert "all.nii.gz: leaves nothing of" in check_pairs([case])[case["case"]]
    LoadPair(working_grid([case]))(case)
    assert "nothing of what counts by" in caplog.text


def test_a_displacement_of_another_dimension_is_named(tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "flat", shape=(32, 32), n_pairs=1)
    (case,) = list_pairs(str(data))
    case["displacement"] = str(tmp_path / "d.nii.gz")
    write_displacement(case["displacement"], np.zeros((3, 8, 8, 8), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"d\.nii\.gz: is 3-D, the images are not"):
        LoadPair(working_grid([case]))(case)


def test_a_mask_file_marks_with_any_number_and_lies_where_its_image_lies(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1.5, 4], [-1.0, 0, 0, 9], [0, 1.2, 0, -3], [0, 0, 0, 1]])
    array, drawn = volume((10, 11, 12)), np.zeros((10, 11, 12), np.int16)
    drawn[2:7, 3:9, 1:5], drawn[2, 3, 1] = 255, -1
    array[drawn != 0] += 1  # so that the image itself shows where the mask should be
    case = {"case": "a"}
    for side in ("fixed", "moving"):
        case[f"{side}_image"] = str(save(tmp_path / f"{side}.nii.gz", array, affine))
    case["fixed_mask"] = str(save(tmp_path / "mask.nii.gz", drawn, affine))
    grid = working_grid([case])
    assert check_pairs([case]) == {}
    for load in (LoadPair(grid), LoadPair(grid, cache=False)):
        for _ in range(2):  # the second time from the cache
            item = load(case)
            image, inside = item["fixed_image"], item["fixed_mask"] > 0
            assert inside.sum() == 5 * 6 * 4 and image[inside].min() > image[~inside].max()
            assert item["moving_mask"].sum() == 10 * 11 * 12
    one = {**case, "moving_image": case["fixed_image"]}
    item = LoadPair(grid)(one)
    assert item["fixed_mask"].sum() == 120 and item["moving_mask"].sum() == 1320


def test_landmarks_of_one_side_alone_are_left_out(tmp_path: Path) -> None:
    case = list_pairs(two_folders(tmp_path, 1))[0]
    load = LoadPair(Grid((8, 8, 8), (1.0, 1.0, 1.0)))
    for side in ("fixed", "moving"):
        item = load({k: v for k, v in case.items() if k != f"{side}_landmarks"})
        assert item["fixed_landmarks"].shape == item["moving_landmarks"].shape == (0, 3)
    assert len(load(case)["fixed_landmarks"]) == 2  # what is kept of each image is not touched


def test_a_true_displacement_arrives_as_it_was_made(tmp_path: Path) -> None:
    root = write_cohort(tmp_path / "cohort", shape=(32, 40), n_pairs=1, seed=3)
    case = list_pairs(root)[0]
    item = LoadPair(working_grid([case]))(case)
    truth = make_pair("ultrasound", (32, 40), seed=(3, 0)).displacement  # 1 mm voxels: the grid is the image's
    assert item["displacement"].dtype == torch.float32
    np.testing.assert_allclose(item["displacement"], truth, atol=1e-4)


def test_a_batch_holds_only_what_every_case_has(tmp_path: Path) -> None:
    cases = list_pairs(write_cohort(tmp_path / "cohort", shape=(32, 32), n_pairs=3))
    load = LoadPair(working_grid(cases))
    assert collate_pairs([load(c) for c in cases])["displacement"].shape == (3, 2, 32, 32)
    for without in range(3):
        items = [load({k: v for k, v in c.items() if k != "displacement" or i != without}) for i, c in enumerate(cases)]
        batch = collate_pairs(items)
        assert "displacement" not in batch and batch["fixed_image"].shape == (3, 1, 32, 32)
