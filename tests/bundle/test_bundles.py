"""The three bundles under MONAI's own commands, on cohorts small enough for seconds."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision
from monai.bundle import ConfigParser, ConfigWorkflow

from helpers.bundles import Command, deforming_bundle, evaluate, infer, train
from helpers.inprocess import as_if_in_its_own_process
from helpers.places import QUICK, ROOT
from regpipe.bundle.write import METADATA, write_all, write_bundle
from regpipe.io.images import Grid
from regpipe.losses.terms import needing
from regpipe.metrics.cases import read_rows
from regpipe.networks.encoders import TRANSFERRED
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort
from regpipe.utils.errors import InputError

COMMITTED = ROOT / "bundles"
SYMNET = ROOT / "configs" / "symnet_inference.yaml"  # over inference.yaml: tests/inference/test_symnet.py
CHECKED = ("configs", "docs", "LICENSE")  # models/ and eval/ come from use


def texts(bundle: Path) -> dict[str, str]:
    files = [f for part in CHECKED for f in (bundle / part, *(bundle / part).rglob("*")) if f.is_file()]
    return {str(f.relative_to(bundle)): f.read_text(encoding="utf-8") for f in files}


def edited(bundle: Path, target: Path, change: Any) -> Path:
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    change(meta)
    target.write_text(json.dumps(meta))
    return target


def test_the_committed_bundles_are_what_the_template_writes(tmp_path: Path) -> None:
    for backbone in TRANSFERRED:
        (target := tmp_path / f"symreg_{backbone}" / METADATA).parent.mkdir(parents=True)
        shutil.copy(COMMITTED / f"symreg_{backbone}" / METADATA, target)
    for bundle in write_all(tmp_path):  # what was measured of a model is the bundle's own, and stays
        assert texts(COMMITTED / bundle.name) == texts(bundle), "edit regpipe/bundle/template, then run `make bundles`"


def test_the_bundles_differ_in_the_backbones_id_only(tmp_path: Path) -> None:
    one, *others = [texts(bundle) for bundle in write_all(tmp_path)]
    name, *names = TRANSFERRED
    for other, its_name in zip(others, names, strict=True):
        assert other == {file: text.replace(name, its_name) for file, text in one.items()}
    assert {"configs/train.yaml", "configs/metadata.json", "docs/README.md", "LICENSE"} <= one.keys()


def test_an_unknown_backbone_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'resnet19'.*resnet18, vgg16, alexnet"):
        write_bundle("resnet19", tmp_path)


@pytest.mark.parametrize("backbone", TRANSFERRED)
def test_monais_properties_are_all_where_monai_looks_for_them(backbone: str, tmp_path: Path, cohort: Path) -> None:
    bundle = deforming_bundle(tmp_path, Grid((32, 32), (1.0, 1.0)), backbone=backbone)
    for config, kind in (("train", "train"), ("inference", "infer")):
        with as_if_in_its_own_process():
            workflow = ConfigWorkflow(
                str(bundle / "configs" / f"{config}.yaml"),
                workflow_type=kind,
                logging_file=False,
                bundle_root=str(bundle),
                dataset_dir=str(cohort),
            )
            workflow.initialize()
            assert workflow.check_properties() == []  # a required one that is missing raises KeyError
    assert workflow.version == "0.1.0"


def test_verify_metadata_passes_without_a_network(monai_bundle: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for backbone in TRANSFERRED:
        configs = COMMITTED / f"symreg_{backbone}" / "configs"
        schema = configs / "metadata_schema.json"
        monai_bundle("verify_metadata", "--meta_file", configs / "metadata.json", "--filepath", schema)
        jsonschema.Draft202012Validator.check_schema(json.loads(schema.read_text()))


BROKEN = {
    "no task": lambda meta: meta.pop("task"),
    "no network": lambda meta: meta.pop("network_data_format"),
    "old name for packages": lambda meta: meta.update(x_packages_version=meta.pop("required_packages_version")),
    "version as a number": lambda meta: meta.update(version=1.0),
    "references as text": lambda meta: meta.update(references="a paper"),
    "no outputs": lambda meta: meta["network_data_format"].pop("outputs"),
    "channels in words": lambda meta: meta["network_data_format"]["inputs"]["image"].update(num_channels="two"),
    "half a voxel": lambda meta: meta["network_data_format"]["inputs"]["image"].update(spatial_shape=[1.5, 2]),
    "no dtype": lambda meta: meta["network_data_format"]["outputs"]["pred"].pop("dtype"),
    "a second network, broken": lambda meta: meta.update(teacher_data_format={"inputs": {}}),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_verify_metadata_refuses(mistake: str, tmp_path: Path, monai_bundle: Command) -> None:
    bundle = COMMITTED / "symreg_resnet18"
    broken = edited(bundle, tmp_path / "metadata.json", BROKEN[mistake])
    with pytest.raises(ValueError, match="Failed validating"):
        schema = bundle / "configs" / "metadata_schema.json"
        monai_bundle("verify_metadata", "--meta_file", broken, "--filepath", schema)


def test_training_in_a_fresh_clone_leaves_a_model_its_grid_and_curves(trained: Path) -> None:
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    SymmetricNet(2, "resnet18").load_state_dict(state)
    grid = json.loads((trained / "models" / "working_grid.json").read_text())
    assert grid == {"shape": [32, 32], "spacing": [1.0, 1.0]}
    assert len(list((trained / "models").glob("checkpoint_*.pt"))) == 2
    assert list((trained / "eval" / "tensorboard").glob("events.out.*"))


def test_evaluating_writes_a_line_per_held_out_case_and_their_means(
    trained: Path, tmp_path: Path, cohort: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(monai_bundle, trained, cohort, "--output_dir", tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(rows) == summary["cases"] == 2
    for metric in ("dice", "tre", "ncc", "folds_percent"):
        mean, low, high = summary["metrics"][metric]
        assert mean == pytest.approx(sum(row[metric] for row in rows) / 2) and low <= mean <= high
    assert "| held out |" in capsys.readouterr().out
    evaluate(monai_bundle, trained, cohort, "--output_dir", tmp_path / "again", "--average", "3")  # as compare gives it
    assert [row["dice"] for row in read_rows(tmp_path / "again" / "metrics.csv")] == [row["dice"] for row in rows]


def test_a_3d_cohort_trains_evaluates_registers_and_verifies(tmp_path: Path, monai_bundle: Command) -> None:
    data = write_cohort(tmp_path / "data", kind="mr", shape=(24, 24, 24), n_pairs=3)
    bundle = write_bundle("vgg16", tmp_path / "bundle")
    options = ("--spatial_dims", "3", "--pairs_per_epoch", "1", "--max_epochs", "1")
    train(monai_bundle, bundle, data, *options)
    evaluate(monai_bundle, bundle, data, *options)
    infer(monai_bundle, bundle, data, tmp_path / "out")
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 3
    verify(monai_bundle, bundle, "--bundle_root", bundle)


def verify(command: Command, bundle: Path, *options: object) -> None:
    configs = bundle / "configs"
    files = ("--meta_file", configs / "metadata.json", "--config_file", configs / "inference.yaml")
    command("verify_net_in_out", "--net_id", "network_def", *files, *options)


def test_inside_the_bundle_no_root_is_needed_and_the_exported_model_is_the_network(
    tmp_path: Path, trained: Path, cohort: Path, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(trained, tmp_path / "bundle", ignore=shutil.ignore_patterns("checkpoint*", "eval")))
    monkeypatch.chdir(bundle)
    verify(monai_bundle, Path())
    monai_bundle("ckpt_export", "--config_file", "configs/inference.yaml", "--use_trace", "True")
    monai_bundle("run", "--config_file", "configs/inference.yaml", "--dataset_dir", cohort)
    assert (bundle / "eval" / "registered" / "case_000" / "metrics.json").is_file()
    net = SymmetricNet(2, "resnet18").eval()
    net.load_state_dict(torch.load("models/model.pt", weights_only=True))
    pair = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load("models/model.ts")(pair), net(pair), atol=1e-6, rtol=1e-5)


def test_the_documented_command_runs_as_a_process_of_its_own(tmp_path: Path, cohort: Path) -> None:
    write_bundle("alexnet", tmp_path / "bundle")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "training", "--config_file"]
    command += [f"['configs/train.yaml','{QUICK}']", "--dataset_dir", str(cohort), "--max_epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path / "bundle", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "models" / "model.pt").is_file()


def test_transferred_weights_stay_where_frozen_and_bring_their_layout_along(
    tmp_path: Path, cohort: Path, monai_bundle: Command
) -> None:
    torch.manual_seed(3)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    bundle = write_bundle("resnet18", tmp_path / "bundle")
    choice = ("--pretrained", tmp_path / "resnet18.pth", "--freeze", "2", "--max_epochs", "1")
    train(monai_bundle, bundle, cohort, *choice)
    net = SymmetricNet(2, "resnet18", pretrained=str(bundle / "models" / "model.pt"), transfer="encoder")
    net.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    norms = [module for module in net.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms  # an encoder without transferred weights has GroupNorm
    start = SymmetricNet(2, "resnet18", pretrained=str(tmp_path / "resnet18.pth")).encoder.stages
    for depth, (stage, before) in enumerate(zip(net.encoder.stages, start, strict=True)):
        pairs = zip(stage.parameters(), before.parameters(), strict=True)
        assert all(torch.equal(now, then) for now, then in pairs) == (depth < 2)
    evaluate(monai_bundle, bundle, cohort)
    infer(monai_bundle, bundle, cohort, tmp_path / "out")
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 5


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four 3D pairs whose label files hold a gland and two landmarks as channels."""
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    for side, i in itertools.product(("fixed", "moving"), range(4)):
        label = np.zeros((16, 16, 16, 3), np.uint8)
        label[4:12, 4:12, 4:12, 0] = label[5, 6, 7, 1] = label[10, 8, 8 + (side == "fixed"), 2] = 1
        for what, array in (("images", rng.random(label.shape[:3], np.float32)), ("labels", label)):
            path = root / f"{side}_{what}" / f"c{i}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return root


@pytest.mark.parametrize("overlay", sorted(set(QUICK.parent.glob("*.yaml")) - {SYMNET}), ids=lambda path: path.stem)
def test_an_overlay_trains_and_sets_only_ids_that_the_bundles_have(
    overlay: Path, tmp_path: Path, cohort: Path, volumes: Path, monai_bundle: Command
) -> None:
    ids = ConfigParser.load_config_file(COMMITTED / "symreg_resnet18" / "configs" / "train.yaml")
    changes = ConfigParser.load_config_file(overlay)
    text = overlay.read_text()
    new = {key.lstrip("+").partition("::")[0] for key in changes} - ids.keys()
    assert all(f"@{key}" in text for key in new)  # its own, not a misspelt one
    data = volumes if changes.get("spatial_dims") == 3 else cohort / "fixed_images"
    if needing(changes.get("loss_weights", {}), "displacement"):
        data = cohort
    few = (
        "--max_epochs",
        "1",
        "--val_interval",
        "1",
        "--pairs_per_epoch",
        "1",
        "--max_val_pairs",
        "1",
        "--holdout",
        "2",
    )
    bundle = write_bundle("alexnet", tmp_path)
    train(monai_bundle, bundle, data, *few, overlay=overlay)
    evaluate(monai_bundle, bundle, data, *few, overlay=overlay)
