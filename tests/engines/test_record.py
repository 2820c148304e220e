"""A model knows what it was trained on, and is not evaluated on that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.bundles import Command, evaluate
from helpers.folders import two_folders
from regpipe import InputError, list_pairs
from regpipe.engines import record
from regpipe.phantoms.cohort import write_cohort

CHOICES = {
    "dataset_dir": "data",
    "holdout": 0.2,
    "pairing": "all",
    "seed": 3,
    "landmark_channels": 1,
    "mask_rims": True,
    "cascades": 1,
    "affine": "centre",
    "affine_from": "images",
    "space": None,
    "to_fit_memory": ["checkpointing"],
    "own_grids": False,
    "channels": "0,2",
    "image_channels": 2,
}


def case(moving: str, fixed: str) -> dict[str, str]:
    return {"case": f"{moving}_to_{fixed}", "moving_image": moving, "fixed_image": fixed}


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record.write(str(tmp_path / "bundle" / "models"), [case("a", "b"), case("b", "a")], CHOICES)
    found = record.read("bundle/models")
    prints = {"dataset": record.fingerprint(tmp_path / "data"), "training_images": [*map(record.fingerprint, "ab")]}
    assert found == {**CHOICES, "dataset_dir": str(tmp_path / "data"), **prints}
    assert record.dataset_dir(found) == str(tmp_path / "data")


@pytest.mark.parametrize(
    "data, kept",
    [
        ("data", "../../data"),  # the names of the data themselves, however far up
        ("../data.json", "../../../data.json"),
        ("study/data", None),  # and of no folder above them
        ("bundle/data", "../data"),  # but in the folder that holds the model
        ("bundle/eval/phantoms/ultrasound_2d", "../eval/phantoms/ultrasound_2d"),  # which is handed on with them
    ],
)
def test_no_folder_above_the_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, kept: str | None
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    record.write("bundle/models", [case(f"{data}/a", f"{data}/b")], {**CHOICES, "dataset_dir": data})
    text = (tmp_path / "here" / "bundle" / "models" / record.NAME).read_text()
    assert json.loads(text)["dataset_dir"] == kept and str(tmp_path) not in text and "study" not in text
    found = record.read("bundle/models")
    assert record.default_split(data, found) == "validation"
    if kept is None:
        with pytest.raises(InputError, match="does not say where the data .* --dataset_dir"):
            record.dataset_dir(found)
    else:
        assert record.dataset_dir(found) == str((tmp_path / "here" / data).resolve())


def test_data_that_were_moved_with_their_model_are_found_and_known(tmp_path: Path) -> None:
    record.write(str(tmp_path / "old/models"), [case("a", "b")], {**CHOICES, "dataset_dir": tmp_path / "old/data"})
    (tmp_path / "old").rename(tmp_path / "new")
    found = record.read(str(tmp_path / "new/models"))
    assert record.dataset_dir(found) == str(tmp_path / "new/data")
    assert record.default_split(str(tmp_path / "new/data"), found) == "validation"


def test_weights_are_named_without_their_folders_and_told_apart_by_them(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.pt").touch()
    one, other = (record.named(str(tmp_path / folder / "w.pt")) for folder in "ab")
    assert one.startswith("w.pt ") and other.startswith("w.pt ") and one != other
    assert record.named("imagenet") == "imagenet"


def test_nothing_is_known_before_training_and_a_damaged_record_is_named(tmp_path: Path) -> None:
    assert record.read(str(tmp_path))["training_images"] == []
    (tmp_path / record.NAME).write_text("{")
    with pytest.raises(InputError, match=record.NAME):
        record.read(str(tmp_path))


@pytest.mark.parametrize("planted", [{"cascades": "2"}, {"landmark_channels": []}, {"dataset_dir": {}}, {"space": 1}])
def test_a_record_that_says_what_cannot_be_is_damaged(planted: dict[str, Any], tmp_path: Path) -> None:
    record.write(str(tmp_path), [case("a", "b")], CHOICES)
    (tmp_path / record.NAME).write_text(json.dumps(json.loads((tmp_path / record.NAME).read_text()) | planted))
    with pytest.raises(InputError, match=rf"training.json: damaged \({min(planted)}\)"):
        record.read(str(tmp_path))


def test_other_data_are_evaluated_whole_and_the_training_data_in_their_held_out_part(tmp_path: Path) -> None:
    record.write(str(tmp_path), [case("a", "b")], CHOICES)
    found = record.read(str(tmp_path))
    assert record.default_split("data", found) == "validation"
    assert record.default_split("other", found) == "all"


@pytest.mark.parametrize("kept", [str, record.fingerprint])  # as earlier versions kept them, and now
def test_pairs_whose_moving_image_was_trained_on_are_refused(kept: Callable[[str], str]) -> None:
    known = {"training_images": [kept("a"), kept("b")]}
    with pytest.raises(InputError, match="1 of 2 .* a_to_c"):
        record.refuse_training_images([case("a", "c"), case("c", "d")], known)
    record.refuse_training_images([case("c", "a")], known)  # a sequence's first frame


def channels(side: str, *paths: str) -> dict[str, str]:
    return {f"{side}_image{'' if i == 1 else f'_{i}'}": path for i, path in enumerate(paths, start=1)}


@pytest.mark.parametrize("chosen, trained", [("all", ["x.nii#0", "x.nii#1"]), ("1", ["x.nii#1"])])
@pytest.mark.parametrize("evaluated", [["x.nii"], ["x.nii#0"], ["x.nii#3"], ["y.nii", "x.nii"]])
def test_no_channel_of_a_file_that_was_trained_on_is_evaluated(
    chosen: str, trained: list[str], evaluated: list[str], tmp_path: Path
) -> None:
    pairs = [{"case": "x", **channels("moving", *trained), **channels("fixed", *(["f.nii"] * len(trained)))}]
    record.write(str(tmp_path), pairs, {**CHOICES, "channels": chosen})
    later = [{"case": "later", **channels("moving", *evaluated), **channels("fixed", *(["f.nii"] * len(evaluated)))}]
    with pytest.raises(InputError, match=r"1 of 1 .* later"):
        record.refuse_training_images(later, record.read(str(tmp_path)))


def test_the_second_images_of_a_datalist_were_trained_on(tmp_path: Path) -> None:
    pairs = [{"case": "p", **channels("moving", "m_t1", "m_t2"), **channels("fixed", "f_t1", "f_t2")}]
    record.write(str(tmp_path), pairs, {**CHOICES, "channels": None})
    with pytest.raises(InputError, match="m_t2_to_other"):
        record.refuse_training_images([case("m_t2", "other")], record.read(str(tmp_path)))


@pytest.mark.parametrize("films", [["film.nii"], ["size.nii", "phase.nii"]])
def test_later_frames_of_a_film_that_was_trained_on_are_evaluated(films: list[str], tmp_path: Path) -> None:
    def onto_the_first(frame: int) -> dict[str, str]:
        moving, fixed = ([f"{film}#{i}" for film in films] for i in (frame, 0))
        return {"case": str(frame), **channels("moving", *moving), **channels("fixed", *fixed)}

    record.write(str(tmp_path), [onto_the_first(i) for i in (1, 2)], {**CHOICES, "channels": None})
    known = record.read(str(tmp_path))
    record.refuse_training_images([onto_the_first(3)], known)
    with pytest.raises(InputError, match="1 of 2 .* 2"):
        record.refuse_training_images([onto_the_first(i) for i in (2, 3)], known)


def test_a_picture_in_mm_is_the_same_picture(tmp_path: Path) -> None:
    record.write(str(tmp_path), [case("a.png#mm", "b.png#mm")], CHOICES | {"channels": None})
    with pytest.raises(InputError, match="trained on"):
        record.refuse_training_images([case("a.png", "c.png")], record.read(str(tmp_path)))


def test_the_digest_tells_other_second_images_apart(tmp_path: Path) -> None:
    for name in ("f1", "f2", "m1", "m2"):
        (tmp_path / name).write_bytes(b"x")
    f1, f2, m1, m2 = (str(tmp_path / name) for name in ("f1", "f2", "m1", "m2"))
    pairs = [{"case": "p", **channels("fixed", f1, f2), **channels("moving", m1, m2)}]
    before = record.digest(pairs)
    (tmp_path / "m2").write_bytes(b"xx")
    assert record.digest(pairs) != before


def test_the_digest_of_one_channel_is_that_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "m").write_bytes(b"xx")
    pairs = [{"case": "p", "fixed_image": str(tmp_path / "f"), "moving_image": str(tmp_path / "m")}]
    assert record.digest(pairs) == hashlib.sha256(b'[["p", 1, 2]]').hexdigest()[:12]


def test_the_digest_tells_data_apart(tmp_path: Path) -> None:
    one, same = list_pairs(two_folders(tmp_path / "a")), list_pairs(two_folders(tmp_path / "a"))
    assert record.digest(one) == record.digest(same)
    assert record.digest(one) != record.digest(one[1:])


def test_evaluating_with_another_seed_is_refused_and_new_data_are_evaluated_whole(
    tmp_path: Path, trained: Path, cohort: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as failure:  # MONAI wraps it; as a process it ends in its line
        evaluate(monai_bundle, trained, cohort, "--output_dir", tmp_path, "--seed", 1, "--holdout", 4)
    assert "trained on" in str(failure.value.__cause__)
    new = write_cohort(tmp_path / "new", shape=(32, 32), n_pairs=3, seed=9)
    evaluate(monai_bundle, trained, new, "--output_dir", tmp_path / "out")
    assert "3 cases" in capsys.readouterr().out


def test_a_required_record_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training.json: missing"):
        record.read(str(tmp_path), required=True)


SPACE = {"shape": [4, 4], "affine": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}


@pytest.mark.parametrize(
    ("stage", "space", "of_others"),
    [("none", SPACE, "auto"), ("none", None, "none"), ("centre", None, "centre"), ("affine", None, "affine")],
)
def test_new_images_are_aligned_as_those_of_the_training(
    stage: str, space: dict[str, object] | None, of_others: str, tmp_path: Path
) -> None:
    record.write(str(tmp_path), [case("a", "b")], {**CHOICES, "affine": stage, "space": space})
    assert record.stage_for_others(record.read(str(tmp_path))) == of_others
