"""What can be wrong with pairs is found before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.folders import frames, save, two_folders, volume
from helpers.opens import opens
from regpipe.data.checks import check_pairs
from regpipe.data.pairs import list_pairs


def test_check_pairs_names_the_file_of_each_planted_problem(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 9)
    assert check_pairs(list_pairs(root)) == {}
    save(root / "fixed_images" / "c0.nii.gz", volume() * np.float32(np.nan))
    save(root / "moving_images" / "c1.nii.gz", np.zeros((6, 7, 8), np.uint8))
    save(root / "fixed_labels" / "c2.nii.gz", np.ones((6, 7, 9), np.uint8))
    save(root / "moving_labels" / "c3.nii.gz", np.ones((6, 7, 8), np.uint8), np.diag([1, 1, 1.01, 1]))
    (root / "fixed_landmarks" / "c4.csv").write_text("x,y,z\n-1,-2,3\n")
    (root / "moving_landmarks" / "c5.csv").write_text("x,y\n1,2\n1,3\n")
    save(root / "moving_images" / "c6.nii.gz", volume((6, 7)))
    whole = (root / "fixed_labels" / "c7.nii.gz").read_bytes()
    (root / "fixed_labels" / "c7.nii.gz").write_bytes(whole[: len(whole) // 2])
    problems = check_pairs(list_pairs(root))
    expected = {
        "c0": ("fixed_images", "NaN"),
        "c1": ("moving_images", "constant"),
        "c2": ("fixed_labels", "grid"),
        "c3": ("moving_labels", "grid"),
        "c4": ("moving_landmarks", "holds 2 landmarks, the fixed side 1"),
        "c5": ("moving_landmarks", "dimension"),
        "c6": ("moving_images", "2-D with 3-D"),
        "c7": ("fixed_labels", "truncated"),
    }
    assert problems.keys() == expected.keys()
    for case, (folder, word) in expected.items():
        message = problems[case]
        assert folder in message and f"{case}." in message and word in message, message
        assert "\n" not in message


def test_check_pairs_opens_each_file_once_whatever_pairs_it_is_in(tmp_path: Path) -> None:
    cases = list_pairs(frames(tmp_path, 5))
    with opens(tmp_path) as opened:
        assert check_pairs(cases) == {}
    assert len(opened) == 5 and {*opened.values()} == {1}


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 6)
    good = np.zeros((6, 7, 8), np.uint8)
    good[1:4, 2:5, 3:6] = 255
    for i in range(6):
        save(root / "fixed_masks" / f"c{i}.nii.gz", good)
    assert check_pairs(list_pairs(root), landmark_channels=1) == {}
    between = np.diag([1.0, 1, 1, 1])
    between[2, 3] = 0.5  # voxels; a part of the image's own lattice would do
    save(root / "fixed_masks" / "c1.nii.gz", good[:, :, :7], between)
    save(root / "fixed_masks" / "c2.nii.gz", good, np.diag([1, 1, 1.01, 1]))
    save(root / "fixed_masks" / "c3.nii.gz", 0 * good)
    save(root / "fixed_masks" / "c4.nii.gz", volume())
    (root / "fixed_masks" / "c5.nii.gz").write_bytes(b"")
    problems = check_pairs(list_pairs(root))
    words = {"c1": "grid", "c2": "grid", "c3": "0 everywhere", "c4": "whole numbers", "c5": "truncated"}
    assert problems.keys() == words.keys()
    for case, word in words.items():
        assert f"fixed_masks/{case}." in problems[case] and word in problems[case], problems[case]


def test_one_side_without_landmarks_is_no_mistake(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 2)
    (root / "moving_landmarks" / "c0.csv").unlink()
    assert check_pairs(list_pairs(root)) == {}


def test_landmarks_of_another_dimension_than_the_image_are_named(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 1)
    for side in ("fixed", "moving"):
        (root / f"{side}_landmarks" / "c0.csv").write_text("x,y\n1,2\n")
    problem = check_pairs(list_pairs(root))["c0"]
    assert "c0.csv" in problem and "dimension" in problem


def test_landmark_channels_that_do_not_correspond_are_named_with_their_file(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 1)
    for side, channels in (("fixed", 3), ("moving", 4)):
        (root / f"{side}_landmarks" / "c0.csv").unlink()
        save(root / f"{side}_labels" / "c0.nii.gz", np.ones((6, 7, 8, channels), np.uint8))
    assert check_pairs(list_pairs(root)) == {}  # all of them labels
    problem = check_pairs(list_pairs(root), landmark_channels=1)["c0"]
    assert "moving_labels/c0.nii.gz: holds 3 landmarks, the fixed side 2" in problem


def test_one_bad_file_spoils_every_pair_it_is_in_and_no_other(tmp_path: Path) -> None:
    frames(tmp_path, 4)
    (tmp_path / "f2.png").write_bytes(b"")
    problems = check_pairs(list_pairs(tmp_path))
    assert problems.keys() == {f"f{a}_to_f{b}" for a in range(4) for b in range(4) if a != b and 2 in (a, b)}
    assert all("f2.png" in problem for problem in problems.values())


def test_a_label_drawn_on_a_sheared_image_fits_it_and_one_on_another_grid_does_not(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 2)
    sheared = np.array([[1, 0.3, 0, 5], [0, 1, 0, 0], [0, 0, 1.5, 0], [0, 0, 0, 1]])
    for i in range(2):
        save(root / "fixed_images" / f"c{i}.nii.gz", volume(), sheared)
        save(root / "fixed_masks" / f"c{i}.nii.gz", np.ones((6, 7, 8), np.uint8), sheared)
        (root / "fixed_landmarks" / f"c{i}.csv").write_text("x,y,z\n-7,-2,3\n-8,-2,1\n")
    save(root / "fixed_labels" / "c0.nii.gz", np.ones((6, 7, 8), np.uint8), sheared)
    problems = check_pairs(list_pairs(root))
    assert problems.keys() == {"c1"} and "fixed_labels/c1.nii.gz: not on its image's grid" in problems["c1"]


def test_points_far_off_their_image_are_named_and_a_few_outside_are_not(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 2)
    (root / "fixed_landmarks" / "c0.csv").write_text("x,y,z\n1,2,3\n2,2,1\n")  # RAS
    (root / "fixed_landmarks" / "c1.csv").write_text("x,y,z\n-1,-2,3\n2,2,1\n")
    problems = check_pairs(list_pairs(root))
    assert problems.keys() == {"c0"} and "fixed_landmarks/c0.csv: most points lie outside" in problems["c0"]
