"""The checks of MONAI's model zoo (its ``ci/verify_bundle.py``), of every model that came with regpipe, in 2D and 3D.

TorchScript is an exclusion, as in the zoo's own list: the symmetric network scripts as little as MONAI's ``Warp`` does.
It is traced.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, create_workflow, verify_metadata, verify_net_in_out

from helpers.bundles import Command, deforming_bundle, train
from helpers.inprocess import as_if_in_its_own_process
from helpers.places import ROOT
from regpipe.bundle.write import METADATA, all_shipped, write_bundle
from regpipe.bundle.zoo import state_format, write_for_zoo
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort
from regpipe.utils.errors import InputError

LARGEST = 25e6  # bytes: what the zoo takes without large_files.yml
SHIPPED = [(b.name, dim) for b in all_shipped() for dim in (2, 3) if (b / "models" / f"{dim}d" / "model.pt").is_file()]


def made(backbone: str, dim: int, folder: Path, *, own_grids: bool = True) -> Path:
    """A bundle that came with a model of random weights: what is not shipped yet is checked, too."""
    grid = Grid((20, 24, 28)[:dim], (1.0,) * dim)
    bundle = deforming_bundle(folder, grid, backbone=backbone, gain=1.0)
    (inner := bundle / "models" / f"{dim}d").mkdir()
    for name in ("model.pt", "working_grid.json"):
        (bundle / "models" / name).rename(inner / name)
    state = torch.load(inner / "model.pt", weights_only=True)
    torch.save({key: value.half() for key, value in state.items()}, inner / "model.pt")  # as what is shipped
    record = json.loads((ROOT / "bundles" / "symreg_resnet18" / "models" / "2d" / "training.json").read_text())
    (inner / "training.json").write_text(json.dumps(record | {"own_grids": own_grids}))
    return bundle


MADE = [("alexnet", dim) for dim in (2, 3) if dim not in {known for _, known in SHIPPED}]


@pytest.fixture(scope="module", params=[*SHIPPED, *MADE], ids=lambda param: f"{param[0]}-{param[1]}d")
def entry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A bundle in the zoo's form."""
    name, dim = request.param
    folder = tmp_path_factory.mktemp("zoo")
    source = ROOT / "bundles" / name if name.startswith("symreg") else made(name, dim, folder / "made")
    return write_for_zoo(source, dim, folder / "zoo"), dim


def test_its_files_are_there_and_none_is_large(entry: tuple[Path, int]) -> None:
    bundle, _ = entry
    for name in (METADATA, "LICENSE", "models/model.pt", "configs/inference.yaml", "docs/data_license.txt"):
        assert (bundle / name).is_file(), name
    assert all(path.stat().st_size < LARGEST for path in bundle.rglob("*") if path.is_file())
    assert "Apache License" in (bundle / "LICENSE").read_text()
    assert not list(bundle.rglob("*.py"))  # nothing of a bundle's own is imported


def test_its_metadata_hold_by_the_schema_and_know_their_version(entry: tuple[Path, int]) -> None:
    bundle, dim = entry
    metadata = json.loads((bundle / METADATA).read_text())
    verify_metadata(meta_file=str(bundle / METADATA), filepath=str(bundle / "configs" / "metadata_schema.json"))
    assert metadata["version"] in metadata["changelog"]
    assert metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == dim


def test_its_network_takes_and_gives_what_they_say(entry: tuple[Path, int]) -> None:
    bundle, _ = entry
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / METADATA),
        config_file=str(bundle / "configs" / "inference.yaml"),
        bundle_root=str(bundle),
        n=2,
    )


def test_it_is_exported_without_a_shape_being_given(entry: tuple[Path, int], tmp_path: Path) -> None:
    bundle, dim = entry
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / METADATA),
        config_file=str(bundle / "configs" / "inference.yaml"),
        bundle_root=str(bundle),
        use_trace=True,
    )
    velocity = torch.jit.load(str(tmp_path / "model.ts"))(torch.rand(1, 2, *[16] * dim))
    assert velocity.shape == (1, dim, *[9] * dim)


def test_its_properties_are_where_monai_looks(entry: tuple[Path, int], tmp_path: Path) -> None:
    bundle, dim = entry
    data = write_cohort(tmp_path / "data", kind="synthetic", shape=(16,) * dim, n_pairs=1)
    with as_if_in_its_own_process():
        flow = create_workflow(
            config_file=str(bundle / "configs" / "inference.yaml"),
            meta_file=str(bundle / METADATA),
            logging_file=str(bundle / "configs" / "logging.conf"),
            workflow_type="inference",
            bundle_root=str(bundle),
            dataset_dir=str(data),
        )
        assert flow.check_properties() == []


def test_a_unit_test_of_the_zoo_passes(entry: tuple[Path, int], tmp_path: Path) -> None:
    """Its form: a ``ConfigWorkflow`` with overrides, initialised, its properties looked at, run, finalised."""
    bundle, dim = entry
    data = write_cohort(tmp_path / "data", kind="synthetic", shape=(20,) * dim, n_pairs=1)
    override = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    with as_if_in_its_own_process():
        inferer = ConfigWorkflow(
            workflow_type="infer",
            config_file=str(bundle / "configs" / "inference.yaml"),
            logging_file=str(bundle / "configs" / "logging.conf"),
            meta_file=str(bundle / METADATA),
            **override,
        )
        inferer.initialize()
        assert not inferer.check_properties()
        inferer.run()
        inferer.finalize()
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 1


def test_the_template_states_2d_and_a_statement_of_it_changes_nothing(tmp_path: Path) -> None:
    bundle = write_bundle("plain", tmp_path)
    text = (bundle / METADATA).read_text()
    state_format(bundle, (48, 48), any_size=True)
    assert (bundle / METADATA).read_text() == text


@pytest.mark.parametrize("shape", [(33, 48), (20, 17, 32)])
def test_a_stated_velocity_is_of_the_size_that_the_network_gives(shape: tuple[int, ...], tmp_path: Path) -> None:
    state_format(write_bundle("plain", tmp_path), shape, any_size=False)
    about = json.loads((tmp_path / METADATA).read_text())["network_data_format"]
    with torch.no_grad():
        velocity = SymmetricNet(len(shape), "plain")(torch.zeros(1, 2, *about["inputs"]["image"]["spatial_shape"]))
    assert isinstance(velocity, torch.Tensor)
    assert [*velocity.shape[1:]] == [about["outputs"]["pred"][key] for key in ("num_channels",)] + about["outputs"][
        "pred"
    ]["spatial_shape"]


def test_after_a_training_in_3d_the_metadata_say_so(tmp_path: Path, monai_bundle: Command) -> None:
    data = write_cohort(tmp_path / "data", kind="mr", shape=(20, 24, 22), n_pairs=2)
    bundle = write_bundle("plain", tmp_path / "bundle")
    train(monai_bundle, bundle, data, "--pairs_per_epoch", "1", "--max_epochs", "1", "--holdout", "1")
    about = json.loads((bundle / METADATA).read_text())["network_data_format"]
    shape = json.loads((bundle / "models" / "working_grid.json").read_text())["shape"]
    assert about["inputs"]["image"]["spatial_shape"] == shape and len(shape) == 3
    files = ("--meta_file", bundle / METADATA, "--config_file", bundle / "configs" / "inference.yaml")
    where = (*files, "--bundle_root", bundle)
    monai_bundle("verify_net_in_out", "--net_id", "network_def", *where)
    monai_bundle("ckpt_export", "--net_id", "network_def", *where, "--use_trace", "True")
    traced = torch.jit.load(str(bundle / "models" / "model.ts"))
    assert traced(torch.rand(1, 2, *shape)).shape == (1, 3, *about["outputs"]["pred"]["spatial_shape"])


def test_a_training_whose_model_lies_elsewhere_leaves_the_bundle_alone(
    tmp_path: Path, cohort: Path, monai_bundle: Command
) -> None:
    bundle = write_bundle("plain", tmp_path / "bundle")
    text = (bundle / METADATA).read_text()
    train(monai_bundle, bundle, cohort, "--max_epochs", "1", "--holdout", "2", "--ckpt_dir", tmp_path / "elsewhere")
    assert (bundle / METADATA).read_text() == text


def test_what_cannot_be_an_entry_is_refused(tmp_path: Path) -> None:
    bundle = made("plain", 2, tmp_path / "made")
    with pytest.raises(InputError, match="without a model for 3D"):
        write_for_zoo(bundle, 3, tmp_path / "zoo")
    with pytest.raises(InputError, match="already"):
        write_for_zoo(bundle, 2, bundle)


def test_the_packages_of_the_metadata_are_within_what_regpipe_needs() -> None:
    """That they can be had together is looked up by ``.ci/run``."""
    metadata = json.loads((ROOT / "bundles" / "symreg_resnet18" / METADATA).read_text())
    stated = {key.removesuffix("_version"): v for key, v in metadata.items() if key.endswith("_version")}
    stated |= {**stated.pop("required_packages"), "torch": stated.pop("pytorch")}
    needed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    for name, version in stated.items():
        if name in needed:
            assert [*map(int, version.split("."))] >= [*map(int, needed[name].split("."))], name
    assert shutil.which("pip") is None or stated["regpipe"] == metadata["version"]
