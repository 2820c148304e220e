"""The forms in which MONAI's model zoo and its users run a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.bundles import Command, deforming_bundle, infer
from helpers.inprocess import as_if_in_its_own_process
from helpers.places import QUICK
from helpers.training import refusal
from regpipe.bundle.write import overlay, write_bundle
from regpipe.data.pairs import list_pairs
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.networks.symmetric import SymmetricNet

FEW = {"max_epochs": 1, "pairs_per_epoch": 1, "max_val_pairs": 1, "holdout": 2}


def workflow(bundle: Path, cohort: Path, *configs: str, **given: Any) -> ConfigWorkflow:
    """As the zoo's unit tests make one: no run_id."""
    files = [str(bundle / "configs" / configs[0]), str(QUICK), *(str(bundle / "configs" / c) for c in configs[1:])]
    place: dict[str, Any] = {"bundle_root": str(bundle), "dataset_dir": str(cohort), "logging_file": False}
    return ConfigWorkflow(files, **place, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A bundle trained in the zoo's form."""
    bundle = write_bundle("plain", tmp_path_factory.mktemp("zoo") / "bundle")
    with as_if_in_its_own_process():
        flow = workflow(bundle, cohort, "train.yaml", workflow_type="train", **FEW)
        flow.initialize()
        flow.run()
        flow.finalize()
    return bundle


def test_training_and_evaluating_run_where_no_run_is_named(ran: Path, cohort: Path, tmp_path: Path) -> None:
    assert (ran / "models" / "model.pt").is_file() and (ran / "models" / "manifest.json").is_file()
    with as_if_in_its_own_process():
        flow = workflow(ran, cohort, "train.yaml", "evaluate.yaml", output_dir=str(tmp_path))
        flow.initialize()
        flow.run()
    assert len(read_rows(tmp_path / "metrics.csv")) == 2


def test_nothing_is_deleted_or_written_before_a_run_has_begun(ran: Path, cohort: Path) -> None:
    before = contents(ran / "models")
    with as_if_in_its_own_process():
        flow = workflow(ran, cohort, "train.yaml", run_id="trainin", resume=False, seed=5, **FEW)
        flow.initialize()
        with pytest.raises(ValueError, match="run ID 'trainin' doesn't exist"):
            flow.run()
    assert contents(ran / "models") == before


def test_a_run_begun_anew_keeps_its_own_curves_and_no_others(tmp_path: Path, cohort: Path) -> None:
    bundle = write_bundle("plain", tmp_path / "bundle")
    for resume in (True, False):
        with as_if_in_its_own_process():
            flow = workflow(bundle, cohort, "train.yaml", resume=resume, **FEW)
            flow.initialize()
            flow.run()
    (file,) = (bundle / "eval" / "tensorboard").glob("events.out.*")
    curves = EventAccumulator(str(file))
    curves.Reload()
    assert [point.step for point in curves.Scalars("training/lncc")] == [1]


def test_inference_without_weights_is_the_zoos_trick(tmp_path: Path, cohort: Path, monai_bundle: Command) -> None:
    bundle = write_bundle("plain", tmp_path / "bundle")
    infer(monai_bundle, bundle, cohort, tmp_path / "out", "--handlers#0#_disabled_", "True")
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 5
    with pytest.raises(RuntimeError):
        infer(monai_bundle, bundle, cohort, tmp_path / "none")


@pytest.mark.usefixtures("restored")
def test_a_sliding_window_is_refused_with_the_remedy(bundle: Path, cohort: Path) -> None:
    window = {"_target_": "monai.inferers.SlidingWindowInferer", "roi_size": [16, 16]}
    said = refusal(bundle, cohort, 1, **{"train#inferer": window})
    assert "SlidingWindowInferer as inferer" in said and "--grid_shape" in said


def test_load_finds_the_network_of_the_file_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = deforming_bundle(tmp_path / "mine", Grid((16, 16, 16), (1.0, 1.0, 1.0)))
    (bundle / "models" / "3d").mkdir()
    for name in ("model.pt", "working_grid.json"):
        (bundle / "models" / name).rename(bundle / "models" / "3d" / name)
    monkeypatch.chdir(tmp_path)
    with as_if_in_its_own_process():
        net: Any = load("mine", bundle_dir=".", model_file="models/3d/model.pt", workflow_type="infer", device="cpu")
    kept = torch.load(bundle / "models" / "3d" / "model.pt", weights_only=True)
    assert isinstance(net, SymmetricNet) and all(torch.equal(net.state_dict()[name], kept[name]) for name in kept)


def test_a_list_is_a_datalist(cohort: Path, tmp_path: Path) -> None:
    cases = [{k: str(v) for k, v in case.items()} for case in list_pairs(cohort)]
    (tmp_path / "list.json").write_text(json.dumps(cases))
    assert [case["case"] for case in list_pairs(tmp_path / "list.json")] == [case["case"] for case in cases]
    assert len(list_pairs(tmp_path / "list.json", split="validation", holdout=2)) == 2


def test_an_overlay_is_found_by_its_name_and_a_file_by_its_path(tmp_path: Path) -> None:
    (mine := tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert overlay("quick") == overlay("quick.yaml") == QUICK and overlay(mine) == mine
    assert (
        overlay(tmp_path / "quick.yaml") == tmp_path / "quick.yaml"
    )  # a path that is not there: refused by its reader
