"""BIDS data sets, made up: who is paired with whom, which label goes with which image, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.bids import VOLUME, describe, put
from helpers.folders import save, subjects
from regpipe.data.bids import write_datalist
from regpipe.data.checks import check_pairs
from regpipe.data.pairs import list_pairs
from regpipe.utils.errors import InputError


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five subjects: T1w in sessions 1, 2 and 10 (the last one only in session 2), T2w in session 1; their dseg."""
    root = describe(tmp_path_factory.mktemp("bids") / "a study")
    maps = describe(root / "derivatives" / "segmented", DatasetType="derivative", GeneratedBy=[{"Name": "segmented"}])
    for subject in ("01", "02", "03", "04"):
        for session in ("1", "2", "10"):
            put(root, subject, session, "T1w")
            put(maps, subject, session, "desc-aseg_dseg")
            put(maps, subject, session, "space-MNI152NLin6Asym_desc-aseg_dseg")  # on another grid
            put(maps, subject, session, "desc-preproc_T1w")
        put(root, subject, "1", "T2w")
    put(root, "05", "2", "T1w")
    return root


def written(root: Path, out: Path, **choices: Any) -> list[dict[str, str]]:
    """The cases of the datalist, by its own reader."""
    write_datalist(root, out, **choices)
    return list_pairs(out)


def names(cases: list[dict[str, str]], key: str) -> list[str]:
    return [Path(case[key]).name.partition(".")[0] for case in cases]


def test_each_session_is_paired_with_its_subjects_first(study: Path, tmp_path: Path) -> None:
    told = write_datalist(study, tmp_path / "d.json")
    cases = list_pairs(tmp_path / "d.json")
    assert len(cases) == 8 and told == {"training": 6, "validation": 2, "labels": 8}  # 05 has one session
    assert set(names(cases, "fixed_image")) == {f"sub-0{i}_ses-1_T1w" for i in range(1, 5)}
    pairs = zip(names(cases, "fixed_image"), names(cases, "moving_image"), strict=True)
    assert all(fixed[:6] == moving[:6] for fixed, moving in pairs)
    assert {name[7:] for name in names(cases, "moving_image")} == {"ses-2_T1w", "ses-10_T1w"}
    assert check_pairs(cases) == {}  # files, grids, labels: what training would ask


def test_labels_are_those_on_the_images_own_grid(study: Path, tmp_path: Path) -> None:
    for case in written(study, tmp_path / "d.json"):
        for side in ("fixed", "moving"):
            image, label = (Path(case[f"{side}_{kind}"]).name for kind in ("image", "label"))
            assert label == image.replace("T1w", "desc-aseg_dseg")


def test_no_subject_is_in_both_training_and_validation(study: Path, tmp_path: Path) -> None:
    for seed in range(3):
        write_datalist(study, tmp_path / "d.json", pairing="subjects", holdout=2, seed=seed)
        training, validation = (list_pairs(tmp_path / "d.json", split=split) for split in ("training", "validation"))
        assert not subjects(training) & subjects(validation)
        assert len(training) == 6 and len(validation) == 2  # ordered pairs of 3 and of 2


def test_who_validates_is_drawn_among_subjects_that_have_a_pair(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    for subject in range(1, 9):
        put(root, str(subject), "1", "T1w")
    for subject in (1, 2):  # the others came once
        put(root, str(subject), "2", "T1w")
    for seed in range(4):
        told = write_datalist(root, tmp_path / "d.json", seed=seed)
        assert told["training"] == told["validation"] == 1


def test_a_lone_pair_cannot_be_split(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    for subject, session in (("1", "1"), ("1", "2"), ("2", "1")):
        put(root, subject, session, "T1w")
    with pytest.raises(InputError, match="holdout=0.2 of 1: .* give --holdout 0"):
        write_datalist(root, tmp_path / "d.json")
    assert write_datalist(root, tmp_path / "d.json", holdout=0)["training"] == 1


def test_subjects_are_paired_in_their_fixed_session(study: Path, tmp_path: Path) -> None:
    cases = written(study, tmp_path / "d.json", pairing="subjects", fixed_session="10", holdout=0)
    assert len(cases) == 4 * 3
    assert set(names(cases, "fixed_image")) == {f"sub-0{i}_ses-10_T1w" for i in range(1, 5)}


def test_modalities_are_paired_within_a_session(study: Path, tmp_path: Path) -> None:
    cases = written(study, tmp_path / "d.json", pairing="modalities", moving_suffix="T2w", holdout=0)
    pairs = zip(names(cases, "fixed_image"), names(cases, "moving_image"), strict=True)
    assert list(pairs) == [(f"sub-0{i}_ses-1_T1w", f"sub-0{i}_ses-1_T2w") for i in range(1, 5)]


def test_a_derivatives_images_are_taken_where_they_are_asked_for(study: Path, tmp_path: Path) -> None:
    cases = written(study, tmp_path / "d.json", desc="preproc", fixed_session="2")
    assert set(names(cases, "fixed_image")) == {f"sub-0{i}_ses-2_desc-preproc_T1w" for i in range(1, 5)}
    assert all("derivatives" in case["moving_image"] and "moving_label" in case for case in cases)


def test_a_data_set_without_sessions_or_derivatives_is_paired_across_subjects(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    for subject in ("9", "10"):
        put(root, subject, "", "run-1_T1w")
        put(root, subject, "", "run-2_T1w")
    cases = written(root, tmp_path / "d.json", pairing="subjects", holdout=0)
    assert names(cases, "fixed_image") == ["sub-9_run-1_T1w", "sub-10_run-1_T1w"]
    assert not [key for case in cases for key in case if "label" in key]


def test_two_label_maps_of_an_image_want_a_choice(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    maps = describe(root / "derivatives" / "s", DatasetType="derivative", GeneratedBy=[{"Name": "s"}])
    for session in ("1", "2"):
        put(root, "1", session, "T1w")
        for desc in ("aseg", "tissue"):
            put(maps, "1", session, f"desc-{desc}_dseg")
    with pytest.raises(InputError, match="has 2 label maps .*aseg.*tissue.*give --label-desc"):
        write_datalist(root, tmp_path / "d.json", holdout=0)
    (case,) = written(root, tmp_path / "d.json", holdout=0, label_desc="tissue")
    assert case["fixed_label"].endswith("desc-tissue_dseg.nii.gz")


def test_a_template_among_the_derivatives_belongs_to_no_subject(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    maps = describe(root / "derivatives" / "s", DatasetType="derivative", GeneratedBy=[{"Name": "s"}])
    for session in ("1", "2"):
        put(root, "1", session, "T1w")
        put(maps, "1", session, "dseg")
    save(maps / "tpl-MNI152" / "anat" / "tpl-MNI152_dseg.nii.gz", VOLUME.astype(np.uint8))
    (case,) = written(root, tmp_path / "d.json", holdout=0)
    assert case["fixed_label"].endswith("sub-1_ses-1_dseg.nii.gz")


def test_of_several_label_maps_the_one_of_the_images_own_acquisition_is_taken(tmp_path: Path) -> None:
    root = describe(tmp_path / "set")
    maps = describe(root / "derivatives" / "s", DatasetType="derivative", GeneratedBy=[{"Name": "s"}])
    for session in ("1", "2"):
        for acquisition in ("highres", "lowres"):
            put(root, "1", session, f"acq-{acquisition}_T1w")
            put(maps, "1", session, f"acq-{acquisition}_dseg")
    (case,) = written(root, tmp_path / "d.json", holdout=0)
    for side in ("fixed", "moving"):
        image, label = (Path(case[f"{side}_{kind}"]).name for kind in ("image", "label"))
        assert label == image.replace("T1w", "dseg")


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"suffix": "FLAIR"}, "no FLAIR image in its raw data; give another --suffix"),
        ({"desc": "denoised"}, "no T1w image in its derivatives with desc-denoised"),
        ({"pairing": "friends"}, "--pairing friends: choose among sessions, subjects, modalities"),
        ({"pairing": "modalities"}, "--moving-suffix T2w goes with --pairing modalities"),
        ({"moving_suffix": "T2w"}, "--moving-suffix T2w goes with --pairing modalities"),
        ({"holdout": 9}, "holdout=9 of 4: .* give --holdout 0"),
        ({"suffix": "T2w"}, "4 T2w images make no pair of sessions"),
    ],
)
def test_what_makes_no_pairs_is_refused_with_a_remedy(choices: dict, said: str, study: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        write_datalist(study, tmp_path / "d.json", **choices)
    assert not (tmp_path / "d.json").exists()


def test_a_folder_that_is_no_data_set_and_a_missing_package_are_said(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no BIDS data set, it has no dataset_description.json"):
        write_datalist(tmp_path, tmp_path / "d.json")
    monkeypatch.setitem(__import__("sys").modules, "bids", None)
    with pytest.raises(InputError, match=r'pip install "regpipe\[bids\]"'):
        write_datalist(study, tmp_path / "d.json")


def test_where_pairs_are_wanted_a_data_set_is_told_the_way(study: Path) -> None:
    with pytest.raises(InputError, match="is a BIDS data set; make a datalist of it: regpipe bids .*a study"):
        list_pairs(study)
