"""What a user types, and what comes back: help, results, one line for a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.bundles import deforming_bundle
from helpers.commandline import regpipe
from helpers.places import ROOT
from regpipe.cli import main as cli
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.phantoms.cohort import write_cohort
from regpipe.transforms.displacement import read_displacement


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((32, 32), (1.0, 1.0)))


HELP = {
    "register": (
        "FIXED MOVING",
        "--bundle",
        "--out",
        "--fixed-label",
        "--pairing",
        "trained bundle",
        "--landmarks",
        "--refine",
    ),
    "compare": ("phantoms", "--backbones", "resnet18,vgg16,alexnet", "--set", "ID=VALUE", "regpipe dashboard OUT"),
    "dashboard": ("127.0.0.1", "--port", "6006", "docs/dashboard.md"),
    "figures": ("comparison.csv", "study.csv", "nothing is trained"),
    "phantom": ("ultrasound, mr or synthetic", "--motion", "--shape", "--pairs", "--seed", "true displacement"),
    "study": ("--overlay", "--pretrain", "--only", "AXIS=VALUE", "--jobs", "docs/study.md"),
    "jacobian": ("CASE | TRANSFORM", "--log", "--labels", "twice as large"),
    "doctor": ("versions", "ITK", "PASS or FAIL", "bug report"),
    "verify": ("--data", "--bundle", "manifest"),
    "rerun": ("--data", "--bundle", "--out", "--tolerance", "mm"),
}


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_a_newcomer_needs(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", shown.output))
    assert shown.exit_code == 0
    for words in HELP[command]:
        assert words in text, words


def test_the_overview_lists_every_command_of_the_documentation() -> None:
    page = (ROOT / "docs" / "commandline.md").read_text(encoding="utf-8").partition("\n## ")[0]
    documented = {name for row in re.findall(r"^\| (`.+?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    shown = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).output
    listed = re.findall(r"^│ (\w+) ", shown.partition(" Commands ")[2], re.M)
    assert len(listed) == len(documented) > len(HELP) and {*listed} == documented > HELP.keys()


def test_a_folder_is_registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cohort: Path, bundle: Path) -> None:
    assert regpipe(monkeypatch, "register", cohort, "--bundle", bundle, "-o", tmp_path / "out") == 0
    assert [row["case"] for row in read_rows(tmp_path / "out" / "metrics.csv")] == [f"case_00{i}" for i in range(5)]


def test_two_files_are_registered_with_their_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cohort: Path, bundle: Path
) -> None:
    monkeypatch.chdir(cohort)  # relative paths, as people type them
    files = ["fixed_images/case_000.nii.gz", "moving_images/case_001.nii.gz"]
    labels = ["--fixed-label", "fixed_labels/case_000.nii.gz", "--moving-label", "moving_labels/case_001.nii.gz"]
    assert regpipe(monkeypatch, "register", *files, "--bundle", bundle, "--out", tmp_path, *labels) == 0
    (row,) = read_rows(tmp_path / "metrics.csv")
    assert row["case"] == "case_001_to_case_000" and 0 < row["dice"] < 1
    assert (tmp_path / "case_001_to_case_000" / "warped_label.nii.gz").is_file()


def test_without_a_bundle_each_pair_is_optimised_from_zero_even_over_a_large_motion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, out = write_cohort(tmp_path / "data", kind="mr", shape=(64, 64), n_pairs=2, motion=22), tmp_path / "out"
    assert regpipe(monkeypatch, "register", data, "-o", out, "--bundle", "none", "--affine", "none") == 0
    for row in read_rows(out / "metrics.csv"):
        assert row["tre_before"] > 10 and row["tre"] < 1.5  # voxels of 1 mm
        assert row["ndv_percent"] == 0 and row["repaired"] >= 0


def test_without_a_bundle_a_bad_file_is_reported_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=3)
    (data / "moving_images" / "case_001.nii.gz").write_bytes(b"no image")
    command = ["register", data, "-o", tmp_path / "out", "--bundle", "none", "--refine", 4]
    assert regpipe(monkeypatch, *command) == 1
    assert [row["case"] for row in read_rows(tmp_path / "out" / "metrics.csv")] == ["case_000", "case_002"]
    assert "moving_images/case_001.nii.gz" in capsys.readouterr().out
    for path in (data / "moving_images").iterdir():
        path.write_bytes(b"no image")
    assert regpipe(monkeypatch, *command) == 1
    assert "0 of 3 pairs registered" in (told := capsys.readouterr().out) and "case_000.nii.gz" in told


def test_refinement_starts_from_the_bundle_and_other_steps_are_another_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cohort: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["register", cohort, "--bundle", bundle, "-o", tmp_path]
    assert regpipe(monkeypatch, *command) == 0
    plain = read_rows(tmp_path / "metrics.csv")
    assert regpipe(monkeypatch, *command, "--refine", 15) == 0
    refined = read_rows(tmp_path / "metrics.csv")
    assert "finished already" not in capsys.readouterr().out
    assert all(after["ncc"] > before["ncc"] for after, before in zip(refined, plain, strict=True))
    assert regpipe(monkeypatch, *command, "--refine", 15) == 0
    assert "5 of 5 cases are finished already" in capsys.readouterr().out
    assert regpipe(monkeypatch, *command, "--refine", 15, "--smoothness", 0.1) == 0
    rougher = read_rows(tmp_path / "metrics.csv")
    assert all(after["sdlogj"] > before["sdlogj"] for after, before in zip(rougher, refined, strict=True))


def test_each_pair_has_its_own_grid_and_one_that_cannot_be_done_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=2)
    coarse, plane = np.diag([8.0, 8.0, 1.0, 1.0]), np.random.default_rng(0).random((24, 24, 1))
    for side in ("fixed", "moving"):
        folder = data / f"{side}_images"
        (data / f"{side}_labels" / "case_001.nii.gz").unlink()
        (data / f"{side}_landmarks" / "case_001.csv").unlink()
        nib.save(nib.Nifti1Image(np.zeros_like(plane), coarse), folder / "empty.nii.gz")
        nib.save(nib.Nifti1Image(plane, coarse), folder / "case_001.nii.gz")
    for file in (data / "displacements").glob("*"):
        file.unlink()
    command = ["register", data, "-o", tmp_path / "out", "--bundle", "none", "--refine", 4, "--affine", "none"]
    assert regpipe(monkeypatch, *command) == 1
    assert "empty.nii.gz: " in capsys.readouterr().out
    assert [row["case"] for row in read_rows(tmp_path / "out" / "metrics.csv")] == ["case_000", "case_001"]
    shapes = [read_displacement(tmp_path / "out" / f"case_00{i}" / "displacement.nii.gz")[0].shape for i in (0, 1)]
    assert shapes == [(2, 32, 32), (3, 24, 24, 1)]  # stored as the images are: a slice in space
    assert regpipe(monkeypatch, *command) == 1 and "2 of 3 cases are finished already" in capsys.readouterr().out


def test_images_far_apart_are_refused_where_nothing_aligns_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = np.random.default_rng(0).random((16, 16, 16))
    for name, shift in (("a", 0.0), ("b", 1000.0)):
        affine = np.eye(4)
        affine[0, 3] = shift
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    files = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    assert regpipe(monkeypatch, "register", *files, "-o", tmp_path / "out", "--affine", "none") == 1
    assert "b.nii.gz: nothing of it lies where the fixed image does" in capsys.readouterr().out
    assert regpipe(monkeypatch, "register", files[0], "-o", tmp_path / "out") == 1
    assert "a.nii.gz: is one image; give FIXED and MOVING" in capsys.readouterr().err


def test_a_registration_done_anew_leaves_nothing_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, case = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=1), tmp_path / "out" / "case_000"
    command = ["register", data, "-o", tmp_path / "out", "--bundle", "none", "--refine", 4, "--affine", "none"]
    assert regpipe(monkeypatch, *command, "--formats", "itk,ants") == 0
    (case / "notes.txt").write_text("mine")
    assert regpipe(monkeypatch, *command, "--formats", "displacement") == 0
    names = {path.name for path in case.iterdir()}
    assert {"notes.txt", "displacement.nii.gz", "transform.json"} <= names
    assert not [name for name in names if name.endswith((".h5", ".mat", "Warp.nii.gz"))]


def test_register_without_arguments_wanted_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert regpipe(monkeypatch, "register") == 2


def test_phantoms_of_one_seed_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--kind", "mr", "--shape", "32,32", "--pairs", "2")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert regpipe(monkeypatch, "phantom", tmp_path / name, *options, "--seed", seed) == 0
    a, b, c = (
        {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()}
        for name in "abc"
    )
    assert len(a) > 10 and a == b and a.keys() == c.keys()
    assert all(a[file] != c[file] for file in a if file.endswith((".gz", ".csv")))
