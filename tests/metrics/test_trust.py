"""Each failure that is planted is named, what is as usual is not, and the warning is where a user sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.alike import SHAPE, pairs, smooth
from helpers.bundles import deforming_bundle
from helpers.commandline import regpipe as run
from helpers.folders import save
from helpers.reported import write_case
from regpipe.io.images import Grid, Image, read_image
from regpipe.metrics import trust, typical
from regpipe.metrics.cases import read_rows
from regpipe.metrics.thresholds import thresholds
from regpipe.report.qc_page import write_report

METRICS = {"folds_percent": 0.0, "ndv_percent": 0.0, "sdlogj": 0.1, "inverse_consistency": 0.1, "affine_overlap": 0.9}
NUMBERS = {"ncc": 0.9, "mi_before": 0.5, "mi": 0.8, "moved": 4.0, "sdlogj": 0.1, "covered": 0.95, "shared": 0.3}
PAIRS = {"count": 20, **{name: [[0.9 * value], [1.1 * value]] for name, value in NUMBERS.items()}}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ten images that are alike but for a tenth."""
    folder = tmp_path_factory.mktemp("training")
    cases = pairs(folder, 10)
    for case in cases:
        save(Path(case["fixed_image"]), read_image(case["fixed_image"]).array)  # all of 1 mm
    typical.write_images(folder, cases)
    return {"images": {"fixed": typical.read(folder)["images"]["fixed"]}}


def kinds(lines: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def of_image(array: np.ndarray, known: dict[str, Any], spacing: float = 1.0) -> set[str]:
    image = Image(np.ascontiguousarray(array), np.diag([spacing] * 3 + [1.0]))
    return kinds(trust.warnings({"fixed": image, "moving": image}, known, NUMBERS, METRICS))


GOOD = smooth(SHAPE, 0) + 0.1 * smooth(SHAPE, 77)


def test_another_image_of_the_kind_raises_nothing(known: dict[str, Any]) -> None:
    assert of_image(GOOD, known) == set()
    assert of_image(3 * GOOD + 100, known) == set()


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (GOOD[::-1], "content"),
        (-GOOD, "content"),
        (smooth(SHAPE, 1234), "content"),
        (GOOD[:12], "extent"),
        (GOOD**8, "brightness"),
        (GOOD + 0.1 * np.random.default_rng(0).random(SHAPE).astype(np.float32), "texture"),
    ],
    ids=["flipped", "inverted", "another organ", "half", "dark", "noise"],
)
def test_a_planted_image_is_named_by_its_kind(planted: np.ndarray, kind: str, known: dict[str, Any]) -> None:
    assert kind in of_image(planted, known)


def test_other_voxels_are_named_and_the_line_has_both_numbers(known: dict[str, Any]) -> None:
    image = Image(GOOD, np.diag([3.0, 1.0, 1.0, 1.0]))
    lines = trust.warnings({"fixed": image, "moving": image}, known, NUMBERS, METRICS)
    assert "spacing: that of the fixed image is 3, 1, 1 mm, in the training 1, 1, 1 to 1, 1, 1" in lines


def of_pair(pairs: dict[str, Any] | None = None, **changed: float) -> set[str]:
    metrics = METRICS | {name: value for name, value in changed.items() if name in METRICS}
    numbers = NUMBERS | {name: value for name, value in changed.items() if name in NUMBERS}
    return kinds(trust.warnings({}, {"pairs": pairs} if pairs else {}, numbers, metrics))


def test_a_range_of_n_is_widened_by_a_quarter_and_five_nths_of_its_width() -> None:
    # of 20 pairs 0.25 + 5 / 20 of [1, 2]: down to 0.5
    known = {**PAIRS, "ncc": [[1.0], [2.0]]}
    assert of_pair(known, ncc=0.51) == set() and of_pair(known, ncc=0.49) == {"similarity"}
    wide = {**PAIRS, "moved": [[1.0], [16.0]]}  # a scale: up to 16 * 16 ** 0.5
    assert of_pair(wide, moved=63.0) == set() and of_pair(wide, moved=65.0) == {"motion"}


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"ncc": 0.5}, "similarity"),
        ({"mi": 0.6}, "similarity"),
        ({"moved": 9.0}, "motion"),
        ({"sdlogj": 0.3}, "volume"),
        ({"covered": 0.5}, "overlap"),
    ],
)
def test_a_registration_unlike_those_of_validation_is_named(changed: dict[str, float], kind: str) -> None:
    assert of_pair(PAIRS, **changed) == {kind}
    assert of_pair(PAIRS) == set()


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"mi": 0.48}, "similarity"),
        ({"shared": 0.09}, "similarity"),
        ({"covered": 0.6}, "overlap"),
        ({"folds_percent": 0.01}, "folds"),
        ({"ndv_percent": 0.02}, "NDV"),
        ({"inverse_consistency": 1.5}, "inverse error"),
        ({"affine_overlap": 0.4}, "aligned overlap"),
    ],
)
def test_without_a_model_a_registration_is_still_held_to_itself(changed: dict[str, float], kind: str) -> None:
    assert of_pair(None, **changed) == {kind}
    assert of_pair() == set() and of_pair(mi=0.495, covered=0.7) == set()


def test_what_covers_little_is_as_usual_where_the_training_was_so() -> None:
    assert of_pair({**PAIRS, "covered": [[0.4], [0.6]]}, covered=0.45) == set()


def test_two_modalities_that_share_little_are_as_usual_where_validation_was_so() -> None:
    assert of_pair(PAIRS, shared=0.05) == set()


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A good pair, and one whose moving image is the half of it."""
    root = tmp_path_factory.mktemp("halved")
    for side in ("fixed", "moving"):
        (root / f"{side}_images").mkdir()
        for name in ("good", "half"):
            shutil.copy(cohort / f"{side}_images" / "case_000.nii.gz", root / f"{side}_images" / f"{name}.nii.gz")
    file = root / "moving_images" / "half.nii.gz"
    image = read_image(file)
    save(file, image.array[:16], np.diag([-1.0, -1.0, 1.0, 1.0]))
    return root


def test_a_warning_is_on_stderr_in_the_files_in_the_report_and_strictly_in_the_exit_status(
    halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("register", halved, "-o", tmp_path / "out", "--bundle", "none", "--affine", "none", "--refine", 5)
    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: half: ") and "covers only 50 % of the fixed one" in line
    assert "1 with warnings" in printed.out
    rows = {name: json.loads((tmp_path / "out" / name / "metrics.json").read_text()) for name in ("good", "half")}
    assert rows["good"]["warnings"] == [] and kinds(rows["half"]["warnings"]) >= {"overlap"}
    counts = {row["case"]: row["warnings"] for row in read_rows(tmp_path / "out" / "metrics.csv")}
    assert counts == {"good": 0, "half": len(rows["half"]["warnings"])}
    assert run(monkeypatch, *command, "--strict") == 1  # though all are finished
    _, cases = write_report(tmp_path / "out", {"dice": thresholds()["dice"]})
    assert {case.name: case.verdict.status for case in cases} == {"good": "pass", "half": "warn"}


def test_a_bundle_knows_its_training_and_is_strict_where_told(
    halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)), gain=20)
    side = {"count": 20, "thumbnail": np.eye(16).tolist(), "content": [[0.9], [1.0]], "spacing": [[1, 1], [1, 1]]}
    side |= {"extent": [[32, 32], [32, 32]], "brightness": [[0] * 5, [1] * 5], "texture": [[0.001], [9]]}
    about = {"format": typical.FORMAT, "images": {"fixed": side}, "pairs": {}}
    (bundle / "models" / typical.NAME).write_text(json.dumps(about))
    assert run(monkeypatch, "register", halved, "--bundle", bundle, "-o", tmp_path / "out", "--strict") == 1
    row = json.loads((tmp_path / "out" / "good" / "metrics.json").read_text())
    assert any(line.startswith("content: the fixed image as a whole is unlike") for line in row["warnings"])


def test_the_report_says_why_as_text_and_a_failing_case_stays_failing(tmp_path: Path) -> None:
    hostile = "content: <script>alert(1)</script>"
    write_case(tmp_path / "r" / "a", "a", {"dice": 0.9})
    write_case(tmp_path / "r" / "b", "b", {"dice": 0.1})
    for name in "ab":
        file = tmp_path / "r" / name / "metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "warnings": [hostile]}))
    page, cases = write_report(tmp_path / "r", thresholds())
    assert [(case.name, case.verdict.status) for case in cases] == [("b", "fail"), ("a", "warn")]
    text = page.read_text()
    assert "alert(1)" in text and hostile not in text
