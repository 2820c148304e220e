"""Trainings, evaluations and single files carry what they were made of, and are held to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers.bundles import Command, evaluate
from helpers.folders import save
from helpers.inprocess import as_if_in_its_own_process
from helpers.manifests import content, rewrite
from regpipe import InputError
from regpipe.cli import main as cli
from regpipe.data import manifest
from regpipe.data.pairs import list_pairs
from regpipe.io.images import load_grid
from regpipe.provenance.rerun import rerun
from regpipe.provenance.verify import verify
from regpipe.transforms.displacement import write_displacement


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, trained: Path, cohort: Path, monai_bundle: Command) -> Path:
    """A trained bundle, evaluated. Do not write into it."""
    bundle = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "bundle")
    evaluate(monai_bundle, bundle, cohort)
    return bundle


@pytest.fixture
def bundle(judged: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return shutil.copytree(judged, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with as_if_in_its_own_process():
        yield


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def renewed(folder: Path, **settings: Any) -> None:
    """The manifest as somebody writes it anew who changed files or settings."""
    told = content(folder)
    told["files"] = {name: digest(folder / name) for name in told["files"]}
    told["settings"] |= settings
    rewrite(folder, told)


# ------------------------------------------------------------------------------------------ what is kept


def test_an_evaluation_names_its_tables_the_model_and_every_file_of_the_held_out_pairs(
    judged: Path, cohort: Path
) -> None:
    told = content(judged / "eval")
    assert told["kind"] == "evaluation" and told["seed"] == 0 and told["machine"]["threads"] >= 1
    assert told["files"] == {name: digest(judged / "eval" / name) for name in ("metrics.csv", "summary.json")}
    assert {item["file"]: item["sha256"] for item in told["model"]} == {
        name: digest(judged / "models" / name) for name in content(judged / "models")["files"]
    }
    held_out = list_pairs(cohort, split="validation", holdout=2)
    paths = {path for case in held_out for role, path in case.items() if role != "case"}
    assert {(s["file"], s["sha256"]) for s in told["inputs"]} == {(Path(p).name, digest(Path(p))) for p in paths}
    assert str(cohort.parent) not in (judged / "eval" / "manifest.json").read_text()


def test_a_training_names_the_pairs_that_chose_its_best_epoch_too(trained: Path, cohort: Path) -> None:
    told = content(trained / "models")
    for role in ("training", "validation"):
        cases = list_pairs(cohort, split=role, holdout=2)
        named = {(s["file"], s["sha256"]) for s in told["inputs"] if s["role"] == role}
        assert named == {(Path(p).name, digest(Path(p))) for c in cases for k, p in c.items() if k != "case"}
    assert told["settings"]["epochs"] == told["settings"]["max_epochs"] == 2
    grid = load_grid(trained / "models" / "working_grid.json")
    assert [tuple(told["settings"][name]) for name in ("grid_shape", "grid_spacing")] == [grid.shape, grid.spacing]


def test_an_evaluated_bundle_passes_whole_and_from_any_of_its_folders(judged: Path, cohort: Path) -> None:
    assert verify(judged, data=cohort) == (2, 6, {})
    assert verify(judged.parent).results == 2  # as of a comparison
    assert verify(judged / "eval").problems == {}  # its table names cases that have no folders
    assert verify(judged / "eval" / "manifest.json").results == 1


@pytest.mark.parametrize("name", ["metrics.csv", "summary.json"])
def test_a_byte_of_an_evaluations_table_that_changed_is_named(name: str, bundle: Path) -> None:
    file = bundle / "eval" / name
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    (problem,) = verify(bundle).problems.values()
    assert problem.startswith(f"{file}: changed since it was written")


def test_an_evaluation_of_weights_that_are_no_longer_there_is_named(bundle: Path) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, bundle / "models" / "model.pt")
    assert len(verify(bundle).problems) == 2  # the model is not what was trained, nor what was evaluated
    renewed(bundle / "models")  # trained anew
    (problem,) = verify(bundle).problems.values()
    assert problem.startswith(f"{bundle / 'eval'}: ") and "has another model.pt" in problem


def test_an_evaluation_without_a_manifest_is_named(bundle: Path) -> None:
    (bundle / "eval" / "manifest.json").unlink()
    (problem,) = verify(bundle).problems.values()
    assert problem.startswith(f"{bundle / 'eval' / 'manifest.json'}: missing")


def test_a_training_and_an_evaluation_are_their_own_commands_to_repeat(judged: Path, cohort: Path) -> None:
    with pytest.raises(InputError, match="evaluation, training; give registered cases"):
        rerun(judged, data=cohort)


# ------------------------------------------------------------------------------------------ single files


def regpipe(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_applied_and_chained_files_have_a_manifest_where_one_is_asked_for(tmp_path: Path) -> None:
    image, field, out = tmp_path / "in" / "a.nii.gz", tmp_path / "in" / "u.nii.gz", tmp_path / "out"
    save(image, np.arange(30, dtype=np.float32).reshape(5, 6))
    write_displacement(field, np.ones((2, 5, 6), np.float32), np.eye(3))
    kept = out / "applied.json"
    assert regpipe("apply", field, image, "-o", out, "--reference", image, "--manifest", kept).exit_code == 0
    told = json.loads(kept.read_text())
    assert {source["role"]: source["sha256"] for source in told["inputs"]} == {
        "transform": digest(field),
        "input": digest(image),
        "reference": digest(image),
    }
    assert told["files"] == {"a.nii.gz": digest(out / "a.nii.gz")} and told["settings"]["to"] == "fixed"
    assert regpipe("compose", field, field, "-o", out / "c.h5", "--manifest", out / "chain.json").exit_code == 0
    assert [source["sha256"] for source in json.loads((out / "chain.json").read_text())["inputs"]] == [
        digest(field)
    ] * 2
    for file in (kept, out / "chain.json"):
        assert verify(file, data=tmp_path / "in") == (1, 1, {})
    (out / "a.nii.gz").write_bytes((out / "a.nii.gz").read_bytes() + b"\0")
    (problem,) = verify(kept).problems.values()
    assert "a.nii.gz: changed" in problem
    with pytest.raises(InputError, match="application; give registered cases"):
        rerun(kept)


@pytest.mark.parametrize(
    ("name", "said"),
    [("out/a.txt", "ends in .json"), ("in/applied.json", "beside or below"), ("out/datalist.json", "damaged")],
)
def test_a_manifest_is_not_written_where_it_cannot_tell_of_the_files(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "datalist.json").write_text("{}")
    with pytest.raises(InputError, match=said):
        manifest.check_beside(tmp_path / name, tmp_path / "out" / "warped.nii.gz")
