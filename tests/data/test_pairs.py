"""Listing and splitting pairs, and their working grid: small files, and real ones where they are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.folders import frames, save, subjects, two_folders, volume
from helpers.places import real
from helpers.series import write_series
from regpipe.data import pairs
from regpipe.data.checks import check_pairs
from regpipe.data.load import LoadPair
from regpipe.data.pairs import list_pairs, natural, working_grid
from regpipe.io.images import Grid, InputError


def test_files_of_one_stem_are_a_case_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    cases = list_pairs(two_folders(tmp_path))
    assert [c["case"] for c in cases] == ["c0", "c1", "c2", "c3"]
    assert len(cases[0]) == 7
    for key, path in cases[1].items():
        if key != "case":
            assert Path(path).is_absolute() and Path(path).is_file()
            assert key.split("_")[0] in Path(path).parent.name and "c1" in Path(path).name


def test_all_ordered_pairs_of_a_folder_name_moving_then_fixed(tmp_path: Path) -> None:
    cases = list_pairs(frames(tmp_path, 4))
    assert len(cases) == 12 and len({c["case"] for c in cases}) == 12
    one = next(c for c in cases if c["case"] == "f1_to_f3")
    assert one["moving_image"].endswith("f1.png") and one["fixed_image"].endswith("f3.png")


def test_a_sequence_is_registered_onto_its_first_frame_and_its_end_is_held_out(
    tmp_path: Path,
) -> None:
    root = frames(tmp_path / "images").parent
    held = list_pairs(root, pairing="first", split="validation", holdout=3)
    assert [c["case"] for c in held] == ["f9_to_f0", "f10_to_f0", "f11_to_f0"]  # 9 before 10
    kept = list_pairs(root, pairing="first", split="training", holdout=3)
    assert [c["case"] for c in kept] == [f"f{i}_to_f0" for i in range(1, 9)]


def test_no_subject_is_on_both_sides_and_none_is_lost(tmp_path: Path) -> None:
    frames(tmp_path)
    for holdout, n in ((0.25, 3), (4, 4), (0.01, 2)):
        sides = [list_pairs(tmp_path, split=s, holdout=holdout) for s in ("training", "validation")]
        training, validation = map(subjects, sides)
        assert not training & validation and len(training | validation) == 12
        assert len(validation) == n and len(sides[1]) == n * (n - 1)
    other = subjects(list_pairs(tmp_path, split="validation", holdout=4, seed=1))
    again = subjects(list_pairs(tmp_path, split="validation", holdout=4, seed=1))
    assert other == again != subjects(list_pairs(tmp_path, split="validation", holdout=4))


def test_groups_are_never_split(tmp_path: Path) -> None:
    two_folders(tmp_path, 8)
    rows = "".join(f"c{i},{i // 3}\n" for i in range(8))
    (tmp_path / "groups.csv").write_text("case,group\n" + rows)
    for seed in range(5):
        sides = [list_pairs(tmp_path, split=s, holdout=1, seed=seed) for s in ("training", "validation")]
        groups = [{int(c["case"][1:]) // 3 for c in cases} for cases in sides]
        assert len(groups[1]) == 1 and len(groups[0]) == 2 and not groups[0] & groups[1]
    (tmp_path / "groups.csv").write_text("case,group\nc0,1\n")
    with pytest.raises(InputError, match="groups.csv.*c1"):
        list_pairs(tmp_path, split="training")


def test_max_pairs_keeps_a_seeded_subset_in_order(tmp_path: Path) -> None:
    everything = [c["case"] for c in list_pairs(frames(tmp_path))]
    few = [c["case"] for c in list_pairs(tmp_path, max_pairs=9, seed=3)]
    assert few == [c["case"] for c in list_pairs(tmp_path, max_pairs=9, seed=3)]
    assert len(few) == 9 and few == [c for c in everything if c in few]


def test_a_datalist_is_relative_to_its_file_and_keeps_its_own_split(tmp_path: Path) -> None:
    two_folders(tmp_path)
    entries = [{k: os.path.relpath(v, tmp_path) for k, v in c.items() if k != "case"} for c in list_pairs(tmp_path)]
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"training": entries[:3], "validation": entries[3:]}))
    assert [c["case"] for c in list_pairs(file, split="validation")] == ["c3"]
    assert [c["case"] for c in list_pairs(file, split="training")] == ["c0", "c1", "c2"]
    assert list_pairs(file) == [{k: c[k] for k in ["case", *sorted(c.keys() - {"case"})]} for c in list_pairs(tmp_path)]
    file.write_text(json.dumps({"training": entries}))
    sides = [list_pairs(file, split=s, holdout=1) for s in ("training", "validation")]
    assert [len(s) for s in sides] == [3, 1] and not subjects(sides[0]) & subjects(sides[1])
    entries[0]["moving_label"] = "moving_labels/none.nii.gz"
    file.write_text(json.dumps({"training": entries}))
    with pytest.raises(InputError, match="none.nii.gz.*no such file"):
        list_pairs(file)


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"training": ["a"]}', '{"training": 3}'])
def test_a_wrong_datalist_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match="data.json"):
        list_pairs(tmp_path / "data.json")


def test_masks_are_found_in_every_layout(tmp_path: Path) -> None:
    drawn = np.ones((6, 7, 8), np.uint8)
    root = two_folders(tmp_path / "two", 2)
    save(root / "moving_masks" / "c1.nii.gz", drawn)
    assert [c.get("moving_mask") for c in list_pairs(root)] == [None, str(root / "moving_masks" / "c1.nii.gz")]
    for layout in ("images", "."):
        one = tmp_path / f"one_{layout}"
        for name in "ab":
            save(one / layout / f"{name}.nii.gz", volume())
        save(one / "masks" / "a.nii.gz", drawn)
        to_a, to_b = ({c["case"]: c for c in list_pairs(one)}[name] for name in ("b_to_a", "a_to_b"))
        assert to_a["fixed_mask"] == to_b["moving_mask"] == str(one / "masks" / "a.nii.gz")
        assert "moving_mask" not in to_a and "fixed_mask" not in to_b
    entry = {f"{side}_image": f"{side}_images/c1.nii.gz" for side in ("fixed", "moving")}
    (root / "list.json").write_text(json.dumps({"test": [{**entry, "moving_mask": "moving_masks/c1.nii.gz"}]}))
    assert list_pairs(root / "list.json")[0]["moving_mask"] == str(root / "moving_masks" / "c1.nii.gz")
    (root / "list.json").write_text(json.dumps({"test": [{**entry, "fixed_mask": "fixed_masks/c1.nii.gz"}]}))
    with pytest.raises(InputError, match="fixed_masks/c1.nii.gz: no such file.*fixed_mask"):
        list_pairs(root / "list.json")
    save(root / "fixed_masks" / "c7.nii.gz", drawn)
    with pytest.raises(InputError, match="fixed_masks/c7.nii.gz: no image of this stem"):
        list_pairs(root)


def test_every_mistake_in_a_folder_is_named(tmp_path: Path) -> None:
    def expect(match: str, root: Path, **options: object) -> None:
        with pytest.raises(InputError, match=match):
            list_pairs(root, **options)  # type: ignore[arg-type]

    expect("nowhere", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    expect("empty: holds no image.*layouts: fixed_images/", tmp_path / "empty")
    expect("f0.png: is the only image", frames(tmp_path / "one", 1))
    root = two_folders(tmp_path / "two")
    (root / "moving_images" / "c2.nii.gz").rename(root / "c2.nii.gz")
    expect("moving_labels/c2.nii.gz: no image", root)
    (root / "moving_labels" / "c2.nii.gz").unlink()
    (root / "moving_landmarks" / "c2.csv").unlink()
    expect("fixed_images/c2.nii.gz: no partner in moving_images", root)
    frames(root / "moving_images", 1)
    (root / "moving_images" / "f0.png").rename(root / "moving_images" / "c1.png")
    expect("c1.png.*same stem|c1.nii.gz.*same stem", root)
    pictures = frames(tmp_path / "pictures", 4)
    expect("'half' is not one of all", pictures, split="half")
    expect("'some' is not one of all, first", pictures, pairing="some")
    for holdout in (3, 4, -1, 1):
        expect("holdout=", pictures, split="training", holdout=holdout)
    expect("nothing for validation", pictures, split="validation", holdout=0)
    assert len(list_pairs(pictures, split="training", holdout=0)) == 12


def test_the_working_grid_has_the_median_spacing_and_holds_the_largest_image(
    tmp_path: Path,
) -> None:
    turned = np.array([[0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    for name, shape, affine in (
        ("a", (10, 21, 8), np.diag([3.0, 1.0, 2.0, 1])),
        ("b", (11, 8, 9), np.diag([3.0, 1.0, 2.0, 1])),
        ("c", (30, 6, 9), turned),  # canonical: 9 x 30 x 6 voxels of 3 x 1 x 2 mm
    ):
        save(tmp_path / f"{name}.nii.gz", volume(shape), affine)
    cases = list_pairs(tmp_path)
    assert working_grid(cases) == Grid((12, 32, 12), (3.0, 1.0, 2.0))
    assert working_grid(cases, spacing=(3, 2, 2)) == Grid((12, 16, 12), (3.0, 2.0, 2.0))
    assert working_grid(cases, shape=(5, 6, 7)).shape == (5, 6, 7)
    with pytest.raises(InputError, match="spacing"):
        working_grid(cases, spacing=(1, 1))
    save(tmp_path / "flat.nii.gz", volume((6, 7)))
    with pytest.raises(InputError, match="flat.nii.gz"):
        working_grid(list_pairs(tmp_path))


def test_real_hippocampi_split_by_subject_and_pass_the_checks_in_seconds() -> None:
    root = real("hippocampus_mr")
    start = time.perf_counter()
    assert len(list_pairs(root)) == 200 * 199
    listing = time.perf_counter() - start
    sides = [list_pairs(root, split=s, holdout=40) for s in ("training", "validation")]
    training, validation = map(subjects, sides)
    assert (len(training), len(validation)) == (160, 40) and not training & validation
    start = time.perf_counter()
    assert check_pairs(sides[1] + sides[0]) == {}
    checking = time.perf_counter() - start
    grid = working_grid(sides[0])
    assert grid.spacing == (1, 1, 1) and all(n % 4 == 0 for n in grid.shape)
    item = LoadPair(grid)(sides[1][0])
    assert set(item["fixed_label"].unique().tolist()) == {0, 1, 2}
    native = nib.load(sides[1][0]["fixed_label"]).get_fdata()  # type: ignore[attr-defined]
    assert (item["fixed_label"] > 0).sum() == (native > 0).sum()  # 1 mm onto 1 mm: nothing lost
    assert listing < 3 and checking < 30, (listing, checking)  # generous: machines are shared


def test_with_a_place_for_problems_the_sound_cases_are_listed_all_the_same(tmp_path: Path) -> None:
    root = two_folders(tmp_path)
    (root / "moving_images" / "c2.nii.gz").unlink()  # its label and landmarks stay behind
    problems: dict[str, str] = {}
    assert [c["case"] for c in list_pairs(root, problems=problems)] == ["c0", "c1", "c3"]
    assert list(problems) == ["c2"] and "fixed_images/c2.nii.gz: no partner" in problems["c2"]
    (root / "list.json").write_text(json.dumps({"test": [{"case": "a", "fixed_image": "x", "moving_image": "y"}]}))
    problems.clear()
    assert list_pairs(root / "list.json", problems=problems) == []
    assert problems.keys() == {"a"} and "x: no such file" in problems["a"]


def slices(folder: Path, n: int = 4) -> None:
    """A DICOM series of n slices."""
    stack = np.random.default_rng(n).integers(0, 900, (6, 7, n)).astype(np.int16)
    write_series(folder, stack, np.diag([-1.0, -1.0, 2.0, 1.0]))


def test_a_sub_folder_of_dicom_slices_is_a_subject_of_its_name(tmp_path: Path) -> None:
    for name in ("1.2.840.1", "1.2.840.2"):
        slices(tmp_path / "one" / "images" / name)
    save(tmp_path / "one" / "images" / "c.nii.gz", volume((6, 7, 4)))
    (tmp_path / "one" / "images" / "thumbnails").mkdir()
    save(tmp_path / "one" / "labels" / "1.2.840.1.nii.gz", np.ones((6, 7, 4), np.uint8), np.diag([-1, -1, 2, 1]))
    cases = list_pairs(tmp_path / "one")
    assert len(cases) == 6 and cases[0]["case"] == "1.2.840.2_to_1.2.840.1" and "fixed_label" in cases[0]
    assert check_pairs(cases) == {}
    assert working_grid(cases[:1]) == Grid((8, 8, 4), (1.0, 1.0, 2.0))
    assert len(list_pairs(tmp_path / "one" / "images")) == 6  # a plain folder of images
    for side in ("fixed", "moving"):
        slices(tmp_path / "two" / f"{side}_images" / "case")
    assert [c["case"] for c in list_pairs(tmp_path / "two")] == ["case"]
    save(tmp_path / "two" / "fixed_images" / "case.nii.gz", volume())
    with pytest.raises(InputError, match="case.*same stem"):
        list_pairs(tmp_path / "two")
    with pytest.raises(InputError, match="1.2.840.1: DICOM slices are one image"):
        list_pairs(tmp_path / "one" / "images" / "1.2.840.1")


def test_a_datalist_names_series_and_frames(tmp_path: Path) -> None:
    slices(tmp_path / "ct")
    save(tmp_path / "tee.nii.gz", volume((6, 7, 4, 3)))
    entry = {"fixed_image": "ct", "moving_image": "tee.nii.gz#2"}
    (tmp_path / "list.json").write_text(json.dumps({"test": [entry]}))
    cases = list_pairs(tmp_path / "list.json")
    assert cases[0]["case"] == "tee_2_to_ct" and check_pairs(cases) == {}
    for wrong in ("tea.nii.gz#2", "."):
        (tmp_path / "list.json").write_text(json.dumps({"test": [entry | {"moving_image": wrong}]}))
        with pytest.raises(InputError, match="no such file"):
            list_pairs(tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps({"test": [entry | {"moving_image": "tee.nii.gz"}]}))
    assert "holds 3 frames; ask for one" in check_pairs(list_pairs(tmp_path / "list.json"))["tee_to_ct"]


def test_one_pair_alone_is_worked_on_on_the_fixed_image_s_grid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).random((24, 22, 10)).astype(np.float32)
    case = {"case": "a"}
    for side, mm in (("fixed", [0.25, 0.25, 1.0]), ("moving", [2.0, 2.0, 2.0])):
        case[f"{side}_image"] = str(tmp_path / f"{side}.nii.gz")
        nib.save(nib.Nifti1Image(array, np.diag([*mm, 1.0])), case[f"{side}_image"])
    assert pairs.fixed_grid(case) == Grid((24, 24, 12), (0.25, 0.25, 1.0))
    monkeypatch.setattr(pairs, "LARGEST_GRID", 1000)
    grid = pairs.fixed_grid(case)
    assert np.prod(grid.shape) <= 2 * 1000 and "fixed.nii.gz: 24x22x10 voxels are more" in caplog.text
    extent = np.array(grid.shape) * grid.spacing
    assert (extent >= [6, 5.5, 10]).all() and max(grid.spacing) == 1.0  # the coarse axis is left as it is


def test_numbers_in_names_are_ordered_by_value_however_long_they_are() -> None:
    names = ["f", "f2", "f010", "f10_a", "f11", f"f1{'0' * 5000}"]
    assert sorted(reversed(names), key=natural) == names
