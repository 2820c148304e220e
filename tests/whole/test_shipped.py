"""Models that come with regpipe: found by the dimension of the data, each pair on its own grid, and used by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.bundles import Command, deforming_bundle, infer
from helpers.commandline import regpipe
from helpers.folders import save, volume
from regpipe.cli import completion
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs
from regpipe.engines import record
from regpipe.engines.inferers import RegistrationInferer, dimensions_of, model_folder, trained_dimension
from regpipe.fields.algebra import Registration
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.metrics.measured import measure
from regpipe.networks import weights
from regpipe.networks.encoders import TRANSFERRED
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.weights import read_state_dict
from regpipe.phantoms.cohort import write_cohort
from regpipe.provenance.rerun import rerun
from regpipe.utils.errors import InputError

GRID = Grid((32, 32), (1.0, 1.0))
DATA = record.Data(".", 0.2, "all", 0, None, mask_rims=True, affine="affine", own_grids=True)._asdict()


def shipped_bundle(folder: Path, *, gain: float = 300.0, dim: int = 2) -> Path:
    """A fresh bundle with a model for images of ``dim`` dimensions, in half precision, that moves things by voxels."""
    bundle = deforming_bundle(folder, Grid((32,) * dim, (1.0,) * dim), gain=gain)
    models, target = bundle / "models", bundle / "models" / f"{dim}d"
    target.mkdir()
    state = {name: tensor.half() for name, tensor in read_state_dict(models / "model.pt").items()}
    torch.save(state, target / "model.pt")
    (models / "model.pt").unlink()
    (models / "working_grid.json").rename(target / "working_grid.json")
    record.write(str(target), [], {**DATA, "dataset_dir": str(folder)})
    return bundle


@pytest.fixture
def two_sizes(tmp_path: Path) -> Path:
    """Two pairs, of 32 x 32 and of 48 x 40 pixels."""
    small = write_cohort(tmp_path / "small", shape=(32, 32), n_pairs=1)
    large = write_cohort(tmp_path / "large", shape=(48, 40), n_pairs=1)
    for file in [*large.rglob("*.nii.gz"), *large.rglob("*.csv")]:
        file.rename(small / file.relative_to(large).parent / f"case_001{''.join(file.suffixes)}")
    return small


def test_a_fresh_bundle_registers_each_pair_on_its_own_grid(tmp_path, two_sizes, monai_bundle: Command) -> None:
    bundle = shipped_bundle(tmp_path / "bundle")
    infer(monai_bundle, bundle, two_sizes, tmp_path / "out")
    rows = [json.loads((tmp_path / "out" / f"case_00{i}" / "metrics.json").read_text()) for i in (0, 1)]
    assert all(row["sdlogj"] > 0 for row in rows)
    files = json.loads((tmp_path / "out" / "case_000" / "manifest.json").read_text())["model"]
    assert {"model.pt", "training.json", "inference.yaml"} <= {item["file"] for item in files}


def test_the_model_is_that_of_the_datas_dimension_and_ones_own_goes_first(tmp_path, two_sizes) -> None:
    bundle = shipped_bundle(tmp_path / "bundle")
    models, volumes = bundle / "models", tmp_path / "volumes"
    for side in ("fixed", "moving"):
        save(volumes / f"{side}_images" / "a.nii.gz", volume((8, 8, 8)))
    assert dimensions_of(str(two_sizes)) == {2} and dimensions_of(str(volumes)) == {3}
    assert model_folder(str(models), str(two_sizes)) == str(models / "2d")
    assert model_folder(str(models), str(volumes)) == str(models)  # whose own training would say what is missing
    own = deforming_bundle(tmp_path / "own", GRID) / "models"
    for file in own.iterdir():
        file.rename(models / file.name)
    assert model_folder(str(models), str(two_sizes)) == str(models)
    (models / "working_grid.json").write_text('{"shape": [32, 32, 32], "spacing": [1, 1, 1]}')
    assert model_folder(str(models), str(two_sizes)) == str(models / "2d")


def measured_alone(case: dict[str, str], folder: Path) -> float:
    """Dice of a case on the grid of the larger of the two images, by the network of ``folder``."""
    net = SymmetricNet(2, "alexnet", pretrained=str(folder / "model.pt"), transfer="network").eval()
    batch = collate_pairs([LoadPair(Grid((48, 40), (1.0, 1.0)), affine="affine")(case)])
    with torch.no_grad():
        found = RegistrationInferer()(torch.cat([batch["fixed_image"], batch["moving_image"]], 1), net)
    registration = Registration.of(found)
    return measure(registration, batch, (1.0, 1.0))["dice"]


def test_it_is_evaluated_on_the_grid_of_the_data(tmp_path, two_sizes, monai_bundle: Command) -> None:
    bundle = shipped_bundle(tmp_path / "bundle")
    folder = bundle / "models" / "2d"
    configs = [str(bundle / "configs" / f"{name}.yaml") for name in ("train", "evaluate")]
    told = ["--bundle_root", bundle, "--ckpt_dir", folder, "--output_dir", tmp_path / "out", "--dataset_dir", two_sizes]
    monai_bundle("run", "evaluating", "--config_file", str(configs), *told)
    rows = read_rows(tmp_path / "out" / "metrics.csv")
    truth = [measured_alone(case, folder) for case in list_pairs(two_sizes)]
    assert trained_dimension(str(folder)) == 2
    assert [row["dice"] for row in rows] == pytest.approx(truth, abs=1e-4)


def test_two_images_are_registered_by_what_came_with_regpipe(tmp_path, two_sizes, monkeypatch) -> None:
    shipped_bundle(tmp_path / "box" / "symreg_resnet18", gain=1.0)
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "nowhere", tmp_path / "box"))
    images = [two_sizes / f"{side}_images" / "case_000.nii.gz" for side in ("fixed", "moving")]
    assert regpipe(monkeypatch, "register", *images, "-o", tmp_path / "out", "--affine", "none") == 0
    row = json.loads((tmp_path / "out" / "case_000" / "metrics.json").read_text())
    assert row["start"] in ("network", "zero") and row["ncc"] > row["ncc_before"] + 0.01
    manifest = json.loads((tmp_path / "out" / "case_000" / "manifest.json").read_text())
    assert manifest["settings"]["refine"] == 25 and manifest["model"]
    assert not rerun(tmp_path / "out" / "case_000")[0].different  # which finds the model itself


def test_a_network_that_makes_it_worse_is_not_where_refinement_begins(tmp_path, two_sizes, monkeypatch, capsys) -> None:
    bundle = shipped_bundle(tmp_path / "bundle", gain=3000.0)
    command = ["register", two_sizes, "-o", tmp_path / "out", "--bundle", bundle, "--refine", 4, "--affine", "none"]
    assert regpipe(monkeypatch, *command) == 0
    row = json.loads((tmp_path / "out" / "case_000" / "metrics.json").read_text())
    assert row["start"] == "zero" and row["ncc"] > row["ncc_before"]
    assert "2 of them refined from zero" in capsys.readouterr().out


def test_without_a_network_or_a_model_for_the_dimension_a_pair_is_optimised_from_zero(
    tmp_path, two_sizes, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "nowhere",))
    for name, words in (("asked", ["--bundle", "none"]), ("nothing", ["--bundle", "vgg16"])):
        command = ["register", two_sizes, "-o", tmp_path / name, "--refine", 2, "--affine", "none", *words]
        assert regpipe(monkeypatch, *command) == 0
        manifest = json.loads((tmp_path / name / "case_000" / "manifest.json").read_text())
        assert manifest["settings"]["network"] == "none"
        assert ("without a model of vgg16 for 2D" in capsys.readouterr().out) == (name == "nothing")


def test_in_3d_the_network_is_there_by_its_name_and_from_zero_is_what_is_done_unasked(tmp_path, monkeypatch) -> None:
    shipped_bundle(tmp_path / "box" / "symreg_resnet18", gain=1.0, dim=3)
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "box",))
    volumes = write_cohort(tmp_path / "data", shape=(20, 18, 22), n_pairs=1)
    for name, words in (("unasked", []), ("asked", ["--bundle", "resnet18"])):
        command = ["register", volumes, "-o", tmp_path / name, "--refine", 2, "--affine", "none", *words]
        assert regpipe(monkeypatch, *command) == 0
        manifest = json.loads((tmp_path / name / "case_000" / "manifest.json").read_text())
        assert bool(manifest["model"]) == (name == "asked")


def test_the_names_of_what_is_shipped_are_the_backbones() -> None:
    assert (*TRANSFERRED, "none") == completion.SHIPPED


def test_a_bundle_that_is_not_there_is_named(tmp_path, two_sizes) -> None:
    with pytest.raises(InputError, match="no such file"):
        from regpipe.bundle.run import register_with_bundle

        register_with_bundle(tmp_path / "none", two_sizes, tmp_path / "out", {})


def test_training_begins_from_what_came_with_regpipe(tmp_path, monkeypatch) -> None:
    box = shipped_bundle(tmp_path / "box" / "symreg_alexnet")
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "box",))
    state = read_state_dict(box / "models" / "2d" / "model.pt")
    whole = SymmetricNet(2, "alexnet", pretrained="shipped", transfer="network").state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in whole.items())
    stem = "encoder.stages.0.0.weight"
    inflated = SymmetricNet(3, "alexnet", pretrained="shipped", transfer="encoder").state_dict()[
        stem
    ]  # there is none for 3D
    torch.testing.assert_close(inflated.sum(-1), state[stem].float(), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="its decoder is not 3D"):
        SymmetricNet(3, "alexnet", pretrained="shipped", transfer="network")
    with pytest.raises(InputError, match="came without a model of vgg16"):
        SymmetricNet(2, "vgg16", pretrained="shipped")


def test_ones_own_training_since_is_not_what_was_used(tmp_path, two_sizes, monkeypatch) -> None:
    box = shipped_bundle(tmp_path / "box" / "symreg_resnet18", gain=1.0)
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "box",))
    assert regpipe(monkeypatch, "register", two_sizes, "-o", tmp_path / "out", "--affine", "none", "--refine", 0) == 0
    for file in (deforming_bundle(tmp_path / "own", GRID) / "models").iterdir():
        file.rename(box / "models" / file.name)
    assert not rerun(tmp_path / "out" / "case_000")[0].different
    assert regpipe(monkeypatch, "register", two_sizes, "-o", tmp_path / "new", "--affine", "none", "--refine", 0) == 0
    used = [
        json.loads((tmp_path / name / "case_000" / "manifest.json").read_text())["model"] for name in ("out", "new")
    ]
    assert used[0] == used[1]


def test_images_of_both_dimensions_are_optimised_from_zero_and_it_is_said(
    tmp_path, two_sizes, monkeypatch, capsys
) -> None:
    shipped_bundle(tmp_path / "box" / "symreg_resnet18")
    monkeypatch.setattr(weights, "SHIPPED", (tmp_path / "box",))
    for side in ("fixed", "moving"):
        save(two_sizes / f"{side}_images" / "volume.nii.gz", volume((16, 16, 16)))
    command = ["register", two_sizes, "-o", tmp_path / "out", "--refine", 2, "--affine", "none"]
    assert regpipe(monkeypatch, *command) == 0
    assert "both 2D and 3D" in capsys.readouterr().out
