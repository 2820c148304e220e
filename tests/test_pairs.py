"""Listing, splitting, checking and loading pairs: small files, and real ones where they are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from PIL import Image as Picture

from regpipe.checks import check_pairs
from regpipe.images import Grid, Image, InputError, read_image
from regpipe.loading import LoadPair, collate_pairs
from regpipe.pairs import list_pairs, working_grid

DATA = Path(os.environ.get("REGPIPE_DATA", Path(__file__).parents[2] / "shared" / "data"))
RNG = np.random.default_rng(1)


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set REGPIPE_DATA to the folder of real images")
    return DATA / name


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def volume(shape: tuple[int, ...] = (6, 7, 8)) -> np.ndarray:
    return RNG.random(shape).astype(np.float32)


def two_folders(root: Path, n: int = 4) -> Path:
    for i in range(n):
        for side in ("fixed", "moving"):
            save(root / f"{side}_images" / f"c{i}.nii.gz", volume())
            save(root / f"{side}_labels" / f"c{i}.nii.gz", np.ones((6, 7, 8), np.uint8))
            (root / f"{side}_landmarks").mkdir(exist_ok=True)
            (root / f"{side}_landmarks" / f"c{i}.csv").write_text("x,y,z\n-1,-2,3\n-2,-2,1\n")
    return root


def frames(root: Path, n: int = 12) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Picture.fromarray(RNG.integers(0, 255, (8, 9), dtype=np.uint8)).save(root / f"f{i}.png")
    return root


def subjects(cases: list[dict[str, str]]) -> set[str]:
    return {c[f"{side}_image"] for c in cases for side in ("fixed", "moving")}


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


def test_check_pairs_names_the_file_of_each_planted_problem(tmp_path: Path) -> None:
    root = two_folders(tmp_path, 9)
    assert check_pairs(list_pairs(root)) == {}
    nan = volume()
    nan[0] = np.nan
    save(root / "fixed_images" / "c0.nii.gz", nan)
    save(root / "moving_images" / "c1.nii.gz", np.zeros((6, 7, 8), np.uint8))
    save(root / "fixed_labels" / "c2.nii.gz", np.ones((6, 7, 9), np.uint8))
    save(root / "moving_labels" / "c3.nii.gz", np.ones((6, 7, 8), np.uint8), np.diag([1, 1, 1.01, 1]))
    (root / "fixed_landmarks" / "c4.csv").write_text("x,y,z\n1,2,3\n")
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


def test_check_pairs_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(path: str) -> Image:
        seen.append(path)
        return read_image(path)

    monkeypatch.setattr("regpipe.images.read_image", counted)
    assert check_pairs(list_pairs(frames(tmp_path, 5))) == {}
    assert len(seen) == len(set(seen)) == 5


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
