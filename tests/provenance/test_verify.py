"""Results carry what they were made of, whatever is changed afterwards is found, and they come out again."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.bundles import Command, deforming_bundle, infer
from helpers.manifests import RUNS, content, rewrite
from regpipe import InputError
from regpipe.data import manifest
from regpipe.inference.from_zero import register_from_zero
from regpipe.io.images import Grid
from regpipe.provenance import rerun
from regpipe.provenance.verify import verify
from regpipe.transforms.displacement import read_displacement, write_displacement
from regpipe.utils.files import sha256

FEW = {"steps": 4, "affine": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """Two cases of the cohort."""
    root = tmp_path_factory.mktemp("some") / "data"
    for folder in (path for path in cohort.iterdir() if path.is_dir()):
        (root / folder.name).mkdir(parents=True)
        for file in folder.glob("case_00[01].*"):
            shutil.copy(file, root / folder.name)
    return root


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Them registered from zero. Do not write into it."""
    out = tmp_path_factory.mktemp("registered") / "out"
    register_from_zero(str(data), str(out), **FEW)  # type: ignore[arg-type]
    return out


@pytest.fixture
def out(tmp_path: Path, done: Path) -> Path:
    """A copy, to be spoilt."""
    return shutil.copytree(done, tmp_path / "out")


def test_a_manifest_names_every_input_and_every_file_of_the_result_by_its_hash(done: Path, data: Path) -> None:
    told = content(done / "case_001")
    files = {path.relative_to(done / "case_001").as_posix(): path for path in (done / "case_001").rglob("*.*")}
    del files["manifest.json"]
    assert told["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    for source in told["inputs"]:
        kind = source["role"] + "s" * (source["role"][-1] != "s")
        path = next(data.glob(f"{kind}/{source['file']}"))
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    roles = {source["role"] for source in told["inputs"]}
    assert {"fixed_image", "moving_image", "fixed_label", "moving_landmarks"} <= roles
    assert told["settings"]["refine"] == 4 and told["model"] == [] and told["machine"]["threads"] >= 1
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_no_folder_and_no_absolute_path_is_in_a_manifest(done: Path, data: Path) -> None:
    text = (done / "case_000" / "manifest.json").read_text()
    assert str(data.parent) not in text and str(done.parent) not in text and data.parent.name not in text


def flip_a_bit(case: Path) -> None:
    file = case / "warped.nii.gz"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def better_numbers(case: Path) -> None:
    row = json.loads((case / "metrics.json").read_text())
    (case / "metrics.json").write_text(json.dumps({**row, "dice": 1.0}))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip_a_bit, "warped.nii.gz: changed since it was written"),
    "a number": (better_numbers, "metrics.json: changed since it was written"),
    "a file less": (lambda case: (case / "1Warp.nii.gz").unlink(), "1Warp.nii.gz: missing"),
    "no manifest": (lambda case: (case / "manifest.json").unlink(), "manifest.json: missing; the case is unfinished"),
    "half a manifest": (lambda case: (case / "manifest.json").write_text('{"format"'), "manifest.json: damaged"),
}


def test_what_is_as_written_passes(done: Path, data: Path) -> None:
    checked = verify(done, data=data)
    assert checked.problems == {} and checked.results == 2
    assert checked.files == sum(len(content(done / case)["files"]) for case in ("case_000", "case_001"))
    assert verify(done / "case_000").results == 1


@pytest.mark.parametrize("what", SPOILT)
def test_one_spoilt_file_is_one_line_that_names_it(what: str, out: Path) -> None:
    spoil, said = SPOILT[what]
    spoil(out / "case_001")
    (problem,) = verify(out).problems.values()
    assert said in problem and str(out / "case_001") in problem and "\n" not in problem


def test_a_manifest_that_points_out_of_its_folder_is_not_followed(out: Path) -> None:
    told = content(out / "case_000")
    secret = out.parent / "secret"
    secret.write_text("x")
    told["files"]["../../secret"] = hashlib.sha256(b"x").hexdigest()
    (out / "case_000" / "manifest.json").write_text(json.dumps(told))
    (problem,) = verify(out).problems.values()
    assert "outside its folder" in problem


def test_images_that_were_changed_or_taken_away_are_named_by_their_role(done: Path, data: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(data, tmp_path / "mine")
    file = mine / "moving_labels" / "case_001.nii.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1] + b"\7"))
    (problem,) = verify(done, data=mine).problems.values()
    assert "case_001.nii.gz: moving_label, changed since" in problem
    (mine / "fixed_landmarks" / "case_000.csv").unlink()
    (mine / "moving_landmarks" / "case_000.csv").unlink()
    missing = [text for text in verify(done, data=mine).problems.values() if "case_000.csv" in text]
    assert missing and all("not in" in text for text in missing)


@pytest.mark.parametrize("given", ["nothing", "empty"])
def test_where_there_is_no_result_one_line_says_so(given: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no such folder" if given == "nothing" else "holds no result"):
        verify(tmp_path / given)


def test_a_trained_bundle_is_held_to_its_manifest_and_so_is_what_it_was_trained_on(
    trained: Path, cohort: Path, tmp_path: Path
) -> None:
    told = content(trained / "models")
    assert told["kind"] == "training" and told["settings"]["backbone"] == "resnet18" and told["seconds"] > 0
    names = {"model.pt", "working_grid.json", "training.json"}
    assert names <= told["files"].keys() and len({source["sha256"] for source in told["inputs"]}) > 3
    assert verify(trained, data=cohort).problems == {}
    mine = shutil.copytree(trained, tmp_path / "comparison" / "resnet18")
    state = torch.load(mine / "models" / "model.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, mine / "models" / "model.pt")
    (problem,) = verify(tmp_path / "comparison").problems.values()
    assert "model.pt: changed" in problem


def test_a_case_is_held_to_the_weights_of_the_bundle_it_was_registered_with(
    tmp_path: Path, data: Path, monai_bundle: Command
) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)))
    other = deforming_bundle(tmp_path / "other", Grid((32, 32), (1.0, 1.0)), gain=200)
    infer(monai_bundle, bundle, data, tmp_path / "out", "--formats", "[displacement]")
    assert verify(tmp_path / "out", bundle=bundle).problems == {}
    assert all("has another model.pt" in text for text in verify(tmp_path / "out", bundle=other).problems.values())
    (first, second) = rerun.rerun(tmp_path / "out", data=data, bundle=bundle)
    assert first.different == second.different == []
    with pytest.raises(InputError, match=r"has another model\.pt"):
        rerun.rerun(tmp_path / "out", data=data, bundle=other)
    with pytest.raises(InputError, match="give it with --bundle"):
        rerun.rerun(tmp_path / "out", data=data)


def test_a_registration_comes_out_again_to_the_bit(done: Path, data: Path, tmp_path: Path) -> None:
    found = rerun.rerun(done, tmp_path / "new", data=data)
    assert [again.case for again in found] == ["case_000", "case_001"]
    for again in found:
        assert again.different == [] and again.conditions == {} and again.files > 10
    assert verify(tmp_path / "new", data=data).problems == {}


def test_what_does_not_come_out_again_is_said_in_mm_with_the_versions_that_differ(out: Path, data: Path) -> None:
    case = out / "case_000"
    field, affine = read_displacement(case / "displacement.nii.gz")
    shifted = field.copy()
    shifted[:, 3, 4] += [3.0, 4.0]  # 5 mm at one of 32 x 32 pixels
    write_displacement(case / "displacement.nii.gz", shifted, affine)
    told = content(case)
    told["versions"]["torch"] = "1.0"
    told["files"]["displacement.nii.gz"] = manifest.hashes(case, ["displacement.nii.gz"])["displacement.nii.gz"]
    (case / "manifest.json").write_text(json.dumps(told))
    (again,) = rerun.rerun(case / "manifest.json", data=data)
    assert again.different == ["displacement.nii.gz"] and again.conditions["torch"][0] == "1.0"
    assert again.off == pytest.approx((5 / 32**2, 5.0), rel=1e-5)


def test_what_a_file_of_features_compared_is_not_repeated_without_it(out: Path, data: Path) -> None:
    told = content(out / "case_000")
    told["settings"] |= {"similarity": "features", "features": "edges.ts=1,0.5", "features_sha256": "0" * 64}
    rewrite(out / "case_000", told)
    with pytest.raises(InputError, match=r"by --features edges.ts=1,0.5; do so again with it"):
        rerun.rerun(out / "case_000", data=data)


def test_images_are_found_beside_the_results_and_changed_ones_are_refused(data: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(data, tmp_path / "study" / "images")
    for file in mine.glob("*/case_001.*"):
        file.unlink()
    register_from_zero(str(mine), str(tmp_path / "study" / "out"), **FEW)  # type: ignore[arg-type]
    (again,) = rerun.rerun(tmp_path / "study" / "out")
    assert again.different == []
    file = mine / "fixed_images" / "case_000.nii.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1))
    with pytest.raises(InputError, match=r"case_000\.nii\.gz: fixed_image, changed since"):
        rerun.rerun(tmp_path / "study" / "out")


def test_cases_of_different_settings_are_refused_in_a_line(out: Path, trained: Path, data: Path) -> None:
    told = content(out / "case_000")
    told["settings"]["refine"] = 5
    rewrite(out / "case_000", told)
    with pytest.raises(InputError, match="different settings; give them one at a time"):
        rerun.rerun(out, data=data)
    with pytest.raises(InputError, match="leave out --bundle"):
        rerun.rerun(out / "case_001", data=data, bundle=trained)


@pytest.mark.parametrize(
    "planted",
    [
        {"refine_loss": {"lncc": "$__import__('os').system('touch owned')"}},
        {"refine_loss": {"lncc": "@refine"}},
        {"affine": "%other.yaml::x"},
        {"refine_loss": RUNS},
        {"refine": {"_target_": "os.system", "command": "touch owned"}},
        {"formats": [{"_target_": "os.system", "command": "touch owned"}]},
        {"refine_window": {"_mode_": "debug", "a": {"_TARGET_": "os.abort"}}},
    ],
    ids=str,
)
def test_what_monai_would_run_is_refused_in_a_manifest(planted: dict[str, Any], registered: Path, data: Path) -> None:
    before = (registered / "out" / "case_000" / "manifest.json").read_text()
    told = json.loads(before)
    told["settings"] |= planted
    try:
        rewrite(registered / "out" / "case_000", told)
        with pytest.raises(InputError, match="hold an expression"):
            rerun.rerun(registered / "out" / "case_000", data=data, bundle=registered / "bundle")
    finally:
        (registered / "out" / "case_000" / "manifest.json").write_text(before)


def test_what_was_warped_by_a_bundles_own_layer_is_not_repeated_by_regpipes(registered: Path, tmp_path: Path) -> None:
    case = shutil.copytree(registered / "out" / "case_000", tmp_path / "case_000")
    told = content(case)
    told["settings"]["warp"] = "monai.networks.blocks.warp.Warp(_padding_mode=zeros)"
    rewrite(case, told)
    with pytest.raises(InputError, match="with a warp and a dvf2ddf of its own"):
        rerun.rerun(case, bundle=registered / "bundle")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, data: Path, monai_bundle: Command) -> Path:
    """A bundle, and what was registered with it."""
    root = tmp_path_factory.mktemp("by a network")
    infer(monai_bundle, deforming_bundle(root / "bundle", Grid((32, 32), (1.0, 1.0))), data, root / "out")
    return root


def test_a_changed_configuration_of_the_bundle_is_named(registered: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(registered / "bundle", tmp_path / "bundle")
    assert verify(registered / "out", bundle=bundle).problems == {}
    with (bundle / "configs" / "inference.yaml").open("a") as file:
        file.write("# a line more\n")
    problems = verify(registered / "out", bundle=bundle).problems
    assert len(problems) == 2 and all("has another inference.yaml" in problem for problem in problems.values())


def test_a_case_that_was_taken_away_or_copied_is_named(out: Path) -> None:
    shutil.move(out / "case_001", out / "case_002")
    assert [problem.partition(",")[0] for problem in verify(out).problems.values()] == [f"{out / 'case_001'}: missing"]
    shutil.copytree(out / "case_000", out / "case_001")
    (problem,) = verify(out).problems.values()
    assert problem.startswith(f"{out / 'case_001' / 'manifest.json'}: is of case_000, as {out / 'case_000'}")


def test_an_unfinished_subject_of_a_template_is_named_and_a_file_beside_them_is_none(out: Path) -> None:
    (out / "within" / "sub1").mkdir(parents=True)
    (out / "within" / ".DS_Store").touch()
    assert list(verify(out).problems) == [str(out / "within" / "sub1")]


def test_settings_that_were_edited_are_named(out: Path) -> None:
    told = content(out / "case_001")
    told["settings"]["smoothness"] = 0.5
    (out / "case_001" / "manifest.json").write_text(json.dumps(told))
    assert list(verify(out).problems) == [str(out / "case_001" / "manifest.json")]
    assert "settings were edited" in next(iter(verify(out).problems.values()))


EMPTY = {"settings": {}, "versions": {}, "configuration": hashlib.sha256(b"{}").hexdigest()}
HALF = {"inputs": [{"role": "fixed_image", "file": 3, "sha256": "0"}], "files": {}, **EMPTY}
NAMELESS = {"inputs": [], "files": {}, "model": [], **EMPTY}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "null",
        '"x"',
        json.dumps({"format": manifest.FORMAT, "kind": "registration", **HALF, "case": "a", "model": []}),
        json.dumps({"format": manifest.FORMAT, "kind": "registration", **NAMELESS}),
        json.dumps({"format": manifest.FORMAT, "kind": "registration", **NAMELESS, "case": "a", "model": [{}]}),
    ],
    ids=["deep", "list", "null", "text", "numbers for names", "no case", "no name of a model's file"],
)
def test_what_is_no_manifest_is_a_line_and_no_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    (problem,) = verify(tmp_path).problems.values()
    assert "manifest.json: damaged" in problem and "\n" not in problem


def test_the_hash_of_a_series_is_that_of_all_its_files_in_order(tmp_path: Path) -> None:

    parts = [tmp_path / name for name in "ab"]
    for part, data in zip(parts, (b"x" * (1 << 20), b"y" * 3), strict=True):
        part.write_bytes(data)
    assert sha256(parts) == hashlib.sha256(b"x" * (1 << 20) + b"yyy").hexdigest()
    assert np.unique([sha256(parts), sha256(parts[::-1])]).size == 2
