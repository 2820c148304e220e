"""Subjects of several images each: known growth within each, another size of each; nobody's time point is the mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from helpers.registered import lps_place, simpleitk
from regpipe.group.run import make_template
from regpipe.group.subjects import Subject, by_subject
from regpipe.io.images import normalise, read_image
from regpipe.io.labels import read_label
from regpipe.provenance.verify import verify
from regpipe.transforms.displacement import write_image
from regpipe.utils.errors import InputError

SIDE = 40
WIDTHS = {"sub1": [7.0, 8.0, 9.0], "sub2": [10.0, 12.0]}  # half axes of a subject's images
QUICK: dict[str, Any] = {"bundle": "none", "affine": "none", "refine": 32, "rounds": 2}


def write_scans(folder: Path, names: dict[tuple[str, int], str]) -> Path:
    """A blob with a bar, of a width for each subject and time point; what is bright is the label."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    x, y = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    for (subject, i), name in names.items():
        wide = WIDTHS[subject][i]
        shape = 1 / (1 + np.exp(((x / wide) ** 2 + (y / 12) ** 2 - 1) * 4))
        bar = np.exp(-(((x - wide / 5) / 1.5) ** 2)) * (np.abs(y) < 6)
        noise = 0.01 * np.random.default_rng([len(subject), i]).standard_normal(x.shape)
        affine = np.diag([-1.0, -1.0, 1.0])
        write_image(folder / "images" / f"{name}.nii.gz", (100 * (shape + bar + noise)).astype(np.float32), affine)
        write_image(folder / "labels" / f"{name}.nii.gz", (shape > 0.5).astype(np.int32), affine)
    return folder


NAMES = {(subject, i): f"{subject}_t{i + 1}" for subject, widths in WIDTHS.items() for i in range(len(widths))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans") / "data", NAMES)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A template, and what is told of it. Do not write into it."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, make_template(data, out, within="subject", **QUICK)


def wide(path: Path) -> int:
    return int((read_label(path)[0].array[:, SIDE // 2] > 0).sum())


def test_each_subjects_mean_has_its_mean_width_and_the_template_that_of_the_means(
    made: tuple[Path, dict[str, Any]],
) -> None:
    out, about = made
    assert sorted(about["subjects"]) == ["sub1", "sub2"]
    assert about["log_sums"]["velocities_voxels"] < 1e-6
    middles = {name: np.mean(widths) for name, widths in WIDTHS.items()}
    for name, middle in middles.items():
        assert abs(wide(out / "within" / name / "template_label.nii.gz") - 2 * middle) <= 1, name
    # of the subjects' means, 8 and 11, and not of the images, 9.2
    assert abs(wide(out / "template_label.nii.gz") - 19) <= 1
    assert about["labels"]["1"] > 0.95


def test_the_way_to_each_image_is_one_transform_both_ways(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    at = read_image(out / "template.nii.gz").affine
    middle = (SIDE - 1) / 2
    for (subject, i), name in NAMES.items():
        ways = (f"subjects/{name}/{way}.h5" for way in ("moving_to_fixed", "fixed_to_moving"))
        there, back = (sitk.ReadTransform(str(out / way)) for way in ways)
        for side in (-1, 1):
            rim = tuple(lps_place(at, np.array([middle + side * 9.5, middle])))
            its = tuple(lps_place(at, np.array([middle + side * WIDTHS[subject][i], middle])))
            assert np.linalg.norm(np.subtract(there.TransformPoint(rim), its)) < 1, name
            assert np.linalg.norm(np.subtract(back.TransformPoint(there.TransformPoint(rim)), rim)) < 0.1, name


def test_the_template_is_the_mean_over_subjects_of_their_images_each_pulled_once(
    made: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, _ = made
    means = []
    for subject, widths in WIDTHS.items():
        seen = []
        for i in range(len(widths)):
            name = NAMES[subject, i]
            image = read_image(data / "images" / f"{name}.nii.gz")
            write_image(out.parent / "scaled.nii.gz", normalise(image.array), image.affine)
            transform = out / "subjects" / name / "moving_to_fixed.h5"
            seen.append(simpleitk(out.parent / "scaled.nii.gz", out / "template.nii.gz", transform, sitk.sitkLinear))
        means.append(np.mean(seen, axis=0))
    inner = (slice(4, -4),) * 2
    template = read_image(out / "template.nii.gz").array
    assert np.abs(np.mean(means, axis=0) - template)[inner].max() < 0.02


def test_the_order_of_time_points_does_not_count(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    turned = {(s, i): f"other-{s}_{'zyx'[i]}" for (s, i) in reversed(NAMES)}
    write_scans(tmp_path / "data", turned)
    make_template(tmp_path / "data", tmp_path / "out", within=r"(sub\d+)_", **QUICK)
    for name in ("template.nii.gz", "within/sub1/template.nii.gz", "template_label.nii.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_the_manifests_hold_and_a_subjects_own_mean_that_was_exchanged_is_found(
    made: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    for folder in (made[0], made[0] / "within" / "sub1"):
        assert verify(folder, data=data).problems == {}
    copy = shutil.copytree(made[0], tmp_path / "copy")
    mean = copy / "within" / "sub1" / "template.nii.gz"
    mean.write_bytes(mean.read_bytes() + b"0")
    assert list(verify(copy).problems) == [str(mean)]


def one(name: str) -> Subject:
    return Subject(name, f"{name}.nii.gz", "", {})


def test_subjects_are_told_by_table_by_bids_by_the_last_word_or_by_an_expression(tmp_path: Path) -> None:
    def found(names: list[str], within: str = "subject") -> dict[str, list[str]]:
        groups = by_subject([one(name) for name in names], within, tmp_path)
        return {name: [scan.name for scan in scans] for name, scans in groups.items()}

    bids = ["sub-1_ses-1_T1w", "sub-1_ses-2_T1w", "sub-2_ses-1_T1w"]
    assert found(bids) == {"sub-1": bids[:2], "sub-2": bids[2:]}
    plain = ["a_b_t1", "a_b_t2", "a_c_t1"]
    assert found(plain) == {"a_b": plain[:2], "a_c": plain[2:]}
    assert found(["1x7", "2x7", "3y7"], r"[xy]") == {"x": ["1x7", "2x7"], "y": ["3y7"]}
    (tmp_path / "groups.csv").write_text("case,group\na_b_t1,m\na_b_t2,n\na_c_t1,n\n")
    assert found(plain) == {"m": plain[:1], "n": plain[1:]}


@pytest.mark.parametrize(
    ("names", "within", "told"),
    [
        (["a_1", "a_2"], "subject", "one subject's"),
        (["a_1", "b_1"], "subject", "no subject has two"),
        (["a_1", "a_2", "b_1"], "(", "no regular expression"),
        (["a_1", "a_2", "b_1"], "a", "in the name b_1"),
        (["a_1", "a_2", "b.._1"], r"a|b(\.\.)", "name a folder"),
    ],
)
def test_what_tells_no_subjects_is_refused(names: list[str], within: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        by_subject([one(name) for name in names], within, tmp_path)


def test_a_film_has_no_subjects(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--within and --sequence"):
        make_template(data, tmp_path / "out", within="subject", sequence=True)
