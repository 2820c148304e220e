"""Evaluations and trainings carry what they were made of, and come out again from that alone."""

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
from helpers.manifests import RUNS, content, rewrite
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


# ------------------------------------------------------------------------------------------ once more


def test_an_evaluation_comes_out_again_where_the_data_have_moved(judged: Path, cohort: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(cohort, tmp_path / "elsewhere")
    (again,) = rerun(judged / "eval" / "manifest.json", tmp_path / "new", data=moved)
    assert again == ("evaluation", 2, [], {}, (0.0, 0.0), "number")
    assert (tmp_path / "new" / "metrics.csv").read_bytes() == (judged / "eval" / "metrics.csv").read_bytes()
    assert verify(tmp_path / "new", data=moved, bundle=judged).problems == {}


def test_a_number_that_does_not_come_out_again_is_said_by_how_much(
    bundle: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bundle / "eval" / "metrics.csv"
    head, first, *rest = table.read_text().split("\n")
    values = first.split(",")
    place = head.strip().split(",").index("ncc")
    values[place] = repr(float(values[place]) + 0.25)
    table.write_text("\n".join([head, ",".join(values), *rest]))
    renewed(bundle / "eval")
    monkeypatch.chdir(bundle / "eval")
    (again,) = rerun(Path("manifest.json"), data=cohort)
    numbers = 2 * (len(values) - 1)  # of two held-out pairs
    assert again.different == ["metrics.csv"] and again.off == pytest.approx((0.25 / numbers, 0.25))


def test_a_training_comes_out_again_to_the_bit(trained: Path, cohort: Path, tmp_path: Path) -> None:
    (again,) = rerun(trained / "models", tmp_path / "new", data=cohort)
    assert again == ("training", 3, [], {}, (0.0, 0.0), "weight")
    assert digest(tmp_path / "new" / "models" / "model.pt") == digest(trained / "models" / "model.pt")
    assert verify(tmp_path / "new", data=cohort).problems == {}


def test_after_a_budget_as_many_epochs_are_trained_and_how_far_the_weights_are_off_is_said(
    bundle: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    name = next(name for name, value in state.items() if value.is_floating_point() and value.numel() > 1)
    state[name].view(-1)[1] += 64.0
    torch.save(state, bundle / "models" / "model.pt")
    renewed(bundle / "models", max_epochs=9, epochs=2, budget_seconds=5.0)
    (again,) = rerun(bundle / "models", data=cohort)
    assert "went by the clock (budget_seconds 5.0); the same 2 epochs are trained" in capsys.readouterr().err
    total = sum(value.numel() for value in state.values())
    assert again.different == ["model.pt"] and again.off == pytest.approx((64 / total, 64.0), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": "VoxelMorph"}, "is of a VoxelMorph, which an overlay brought"),
        ({"pretrained": "a.pt 0123456789abcdef"}, "began from a.pt 0123456789abcdef, which it does not hold"),
        ({"learning_rate": "$__import__('os').abort()"}, "hold an expression"),
        ({"loss_weights": RUNS}, "hold an expression"),
        ({"max_epochs": {"_target_": "os.abort"}}, "hold an expression"),
        ({"epochs": "@learning_rate"}, "hold an expression"),
        ({"holdout": "all"}, "holdout is no number"),
        ({"backbone": "plane"}, "unknown backbone"),
    ],
    ids=str,
)
def test_what_no_manifest_of_a_training_can_bring_is_refused_before_anything_is_trained(
    settings: dict[str, Any], said: str, bundle: Path, cohort: Path, tmp_path: Path
) -> None:
    renewed(bundle / "models", **settings)
    with pytest.raises(InputError, match=said):
        rerun(bundle / "models", tmp_path / "new", data=cohort)
    assert not (tmp_path / "new").exists()


def test_other_data_other_weights_and_what_cannot_be_repeated_are_a_line(
    bundle: Path, judged: Path, cohort: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(cohort, tmp_path / "other")
    cases = list_pairs(other, split="validation", holdout=2)
    save(Path(cases[0]["fixed_image"]), np.zeros((32, 32), np.float32))
    for part in ("models", "eval"):
        with pytest.raises(InputError, match=r"case_00\d\.nii\.gz \((validation|evaluated)\) is not what it was"):
            rerun(bundle / part, data=other)
    with pytest.raises(InputError, match="evaluation, training; give the manifest.json of one"):
        rerun(bundle, data=cohort)
    with pytest.raises(InputError, match="leave out --bundle"):
        rerun(bundle / "models", data=cohort, bundle=judged)
    told = json.loads((bundle / "models" / "training.json").read_text())
    (bundle / "models" / "training.json").write_text(json.dumps({**told, "dataset_dir": None}))
    with pytest.raises(InputError, match=r"training\.json: does not say where the data are; give them with --data"):
        rerun(bundle / "models")
    old = content(bundle / "models")
    del old["settings"]["loss_weights"]
    rewrite(bundle / "models", old)
    with pytest.raises(InputError, match="does not say 'loss_weights'; an older version's"):
        rerun(bundle / "models", data=cohort)
    (bundle / "models" / "working_grid.json").write_text("{}")
    with pytest.raises(InputError, match=r"has another working_grid\.json, training\.json"):
        rerun(bundle / "eval", data=cohort)


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
    with pytest.raises(InputError, match="application; give the manifest"):
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
