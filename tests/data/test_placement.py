"""Where the working grid lies: the alignment is in the moving image's frame and nowhere else."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from regpipe.data import placement
from regpipe.data.load import LoadPair
from regpipe.data.placement import Frames, common_space, training_stage
from regpipe.io.images import Grid, Image
from regpipe.io.source import Source
from regpipe.metrics.measures import tre
from regpipe.transforms.affine import Alignment
from regpipe.utils.errors import InputError
from regpipe.utils.settings import AffineOptions

GRID = Grid((24, 24, 24), (1.0, 1.0, 1.0))


def head(shape: tuple[int, ...] = (22, 20, 24), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape)
    return (ndimage.gaussian_filter(noise, 2) + ndimage.gaussian_filter(noise, 1)).astype(np.float32)


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def turn(degrees: float, shift: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = shift
    return matrix


def pair(tmp_path: Path, fixed: np.ndarray, moving: np.ndarray) -> dict[str, str]:
    """One array at two places."""
    files = {side: write(tmp_path / f"{side}.nii.gz", head(), a) for side, a in (("fixed", fixed), ("moving", moving))}
    return {"case": "a", **{f"{side}_image": path for side, path in files.items()}}


def answer(monkeypatch: pytest.MonkeyPatch, matrix: np.ndarray) -> list[str]:
    """In place of any search ``matrix``; the stages asked for."""
    asked: list[str] = []

    def align(self: Frames, case: dict[str, str], read: object, stage: str) -> Alignment:
        asked.append(stage)
        return Alignment(matrix, 1.0, 0.5, 0.9)

    monkeypatch.setattr(Frames, "_align", align)
    return asked


def test_none_leaves_the_files_in_their_places_and_centre_lays_the_middles_on_each_other(tmp_path: Path) -> None:
    case = pair(tmp_path, np.eye(4), turn(0, (35, -4, 2)))
    fixed, moving = Frames(GRID, AffineOptions("none"))(case, Source())[:2]
    np.testing.assert_array_equal(fixed, moving)
    fixed, moving = Frames(GRID, AffineOptions("centre"))(case, Source())[:2]
    np.testing.assert_allclose(moving @ np.linalg.inv(fixed), turn(0, (35, -4, 2)), atol=1e-9)


def test_centre_keeps_the_angle_between_oblique_images(tmp_path: Path) -> None:
    """The middles of both agree; what the headers say of the angle is left for the registration to see."""
    case = pair(tmp_path, np.eye(4), turn(30))
    fixed, moving = Frames(GRID, AffineOptions("centre"))(case, Source())[:2]
    np.testing.assert_allclose(moving[:3, :3], fixed[:3, :3], atol=1e-9)
    middle = (np.array(GRID.shape) - 1) / 2
    image_middle = apply_affine(turn(30), (np.array(head().shape) - 1) / 2)
    assert np.abs(apply_affine(moving, middle) - image_middle).max() <= 0.8  # whole voxels


def test_an_alignment_makes_both_images_look_alike_on_the_grid(tmp_path: Path) -> None:
    case = pair(tmp_path, np.eye(4), turn(12, (30, 5, -3)))
    item = LoadPair(GRID, affine="rigid", cache=False)(case)
    both = (item["fixed_mask"] * item["moving_mask"])[0] > 0
    fixed, moving = (item[f"{side}_image"][0][both] for side in ("fixed", "moving"))
    assert float(np.corrcoef(fixed, moving)[0, 1]) > 0.98
    found = item["moving_affine"].numpy() @ np.linalg.inv(item["fixed_affine"].numpy())
    inside = np.array(list(itertools.product((2, 18), repeat=3)))
    error = np.linalg.norm(apply_affine(found, inside) - apply_affine(turn(12, (30, 5, -3)), inside), axis=1)
    assert error.max() < 0.5


def test_auto_aligns_what_is_not_in_the_training_s_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = pair(tmp_path, np.eye(4), np.eye(4))
    space = common_space([case])
    assert space == {"shape": [22, 20, 24], "affine": np.eye(4).tolist()}
    assert training_stage("auto", [case]) == "none" and training_stage("rigid", [case]) == "rigid"
    asked = answer(monkeypatch, turn(0, (1, 0, 0)))
    there, here = Frames(GRID, AffineOptions("auto"), space=space)(case, Source())[:2]
    np.testing.assert_array_equal(there, here)
    other = pair(tmp_path, np.eye(4), turn(0, (2, 0, 0)))
    first, moving = Frames(GRID, AffineOptions("auto"), space=space)(other, Source())[:2]
    np.testing.assert_allclose(moving, turn(0, (1, 0, 0)) @ first)
    Frames(GRID, AffineOptions("auto"))(case, Source())  # of a training that kept no space
    assert asked == ["affine", "affine"]
    assert common_space([other]) is None and training_stage("auto", [other]) == "centre"


def test_each_alignment_is_found_once_and_only_fixed_images_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = pair(tmp_path, np.eye(4), turn(0, (2, 0, 0)))
    answer(monkeypatch, turn(5, (2, 0, 0)))
    load = LoadPair(GRID, affine="affine")
    first = load(case)
    answer(monkeypatch, turn(25))
    assert np.array_equal(load(case)["moving_affine"], first["moving_affine"])  # what was found is not looked for again
    assert load.cache is not None and len(load.cache) == 1


def test_pairs_that_differ_in_what_is_to_be_ignored_are_aligned_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, frames = pair(tmp_path, np.eye(4), turn(0, (2, 0, 0))), Frames(GRID, AffineOptions("affine"))
    for i, more in enumerate(({}, {"fixed_ignore": "a.nii.gz"}, {"fixed_mask": "a.nii.gz"})):
        answer(monkeypatch, turn(0, (i, 0, 0)))
        fixed, moving = frames({**case, **more}, Source())[:2]
        np.testing.assert_allclose(moving @ np.linalg.inv(fixed), turn(0, (i, 0, 0)), atol=1e-9)


def test_an_image_counts_in_its_mask_without_what_is_to_be_ignored_and_where_it_holds_data(tmp_path: Path) -> None:
    image, mask, ignore = head((8, 7, 6)), np.zeros((8, 7, 6), np.uint8), np.zeros((8, 7, 6), np.uint8)
    image[0], mask[:6], ignore[4:] = np.nan, 1, 3
    arrays = {"image": image, "mask": mask, "ignore": ignore}
    case = {f"fixed_{kind}": write(tmp_path / f"{kind}.nii.gz", a, np.eye(4)) for kind, a in arrays.items()}
    found = placement.counted({"case": "a", **case}, "fixed", Source())
    assert found is not None and found[1:4].all() and found.sum() == 3 * 42


def test_with_oblique_images_the_cache_grows_with_images_and_not_with_pairs(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.nii.gz", head(), turn(2.0 * i)) for i in range(4)]
    cases = [{"case": "", "fixed_image": a, "moving_image": b} for a, b in itertools.permutations(files, 2)]
    for stage in ("none", "centre"):
        load = LoadPair(GRID, affine=stage)
        for case in cases:
            load(case)
        assert load.cache is not None and len(load.cache) == 4


def test_landmarks_alone_align_exactly_and_errors_are_mm_of_the_moving_image(tmp_path: Path) -> None:
    case = pair(tmp_path, np.eye(4), np.diag([2.0, 2.0, 2.0, 1.0]))
    points = np.random.default_rng(0).uniform(2, 18, (6, 3))  # RAS mm of fixed; moving is twice as large
    for side, factor in (("fixed", 1), ("moving", 2)):
        rows = "\n".join(",".join(map(str, row)) for row in factor * points * [-1, -1, 1])
        (tmp_path / f"{side}.csv").write_text(f"x,y,z\n{rows}\n")
        case[f"{side}_landmarks"] = str(tmp_path / f"{side}.csv")
    item = LoadPair(GRID, affine="similarity", affine_from="landmarks")(case)
    found = item["moving_affine"].numpy() @ np.linalg.inv(item["fixed_affine"].numpy())
    np.testing.assert_allclose(found, np.diag([2.0, 2.0, 2.0, 1.0]), atol=1e-6)
    off = item["moving_landmarks"] + 1.0  # a working voxel along each axis: 2 mm of the moving image
    errors = tre(item["fixed_landmarks"], off, np.zeros((3, 24, 24, 24)), item["moving_affine"][:3, :3])
    np.testing.assert_allclose(errors, 2 * np.sqrt(3), atol=1e-4)


def test_a_grid_smaller_than_the_image_lies_around_its_content() -> None:
    array = np.zeros((64, 40), np.float32)
    array[40:56, 4:16] = 1
    placed = np.diag([-1.0, -1.0, 1.0])
    frame = placement.frame_of(Image(array, placed), Grid((24, 40), (1.0, 1.0)))
    at = apply_affine(np.linalg.inv(frame) @ placed, [40, 4])
    np.testing.assert_allclose(at, [4, 4], atol=1)  # 16 of 24 voxels, in the middle; the other axis as it was
    whole = placement.frame_of(Image(array, placed), Grid((64, 40), (1.0, 1.0)))
    np.testing.assert_allclose(whole, placed, atol=1e-9)


def test_content_is_what_is_a_tenth_as_bright_as_the_brightest() -> None:
    array = np.zeros((64, 40), np.float32)
    array[8:20] = 0.05  # a haze
    array[40:56, 10:30] = 0.25
    array[40:44, 10:30] = 1
    frame = placement.frame_of(Image(array, np.eye(3)), Grid((24, 40), (1.0, 1.0)))
    np.testing.assert_allclose(apply_affine(np.linalg.inv(frame), [47.5, 19.5]), [11.5, 19.5], atol=0.5)


def test_what_is_asked_for_wrongly_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--affine elastic: choose among auto, none, centre"):
        Frames(GRID, AffineOptions("elastic"))
    with pytest.raises(InputError, match="--affine_from points: choose among images, landmarks, both"):
        Frames(GRID, AffineOptions(affine_from="points"))
    with pytest.raises(InputError, match="--affine_metric corr: choose among mi, ncc"):
        Frames(GRID, AffineOptions(affine_metric="corr"))
    case = pair(tmp_path, np.eye(4), np.eye(4))
    with pytest.raises(InputError, match="moving.nii.gz: --affine_from landmarks needs landmarks of both"):
        Frames(GRID, AffineOptions("affine", "landmarks"))(case, Source())
