"""What other programs of MONAI's world make of a bundle: load, create_workflow, MLflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.bundle import create_workflow, load, run
from monai.handlers import MLFlowHandler
from packaging.requirements import Requirement

import regpipe
from helpers.bundles import deforming_bundle
from helpers.inprocess import as_if_in_its_own_process
from helpers.places import QUICK, ROOT
from regpipe.bundle.write import write_bundle
from regpipe.engines.options import refuse_unknown
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.networks.symmetric import SymmetricNet
from regpipe.report.mlflow import adapt
from regpipe.utils.errors import InputError


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-D bundle: what a configuration that only knew the default, 2-D, would get wrong."""
    return deforming_bundle(tmp_path_factory.mktemp("zoo") / "mine", Grid((16, 16, 16), (1.0, 1.0, 1.0)))


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models" / "model.pt", weights_only=True)


def test_load_gives_the_trained_network_from_any_folder(solid: Path) -> None:
    place = {"ckpt_dir": str(solid / "models")}
    with as_if_in_its_own_process():
        net: Any = load(solid.name, bundle_dir=solid.parent, workflow_type="infer", net_override=place, device="cpu")
    assert isinstance(net, SymmetricNet)
    kept, found = weights(solid), net.state_dict()
    assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)


def test_load_without_a_configuration_gives_the_weights(solid: Path) -> None:
    with pytest.warns(UserWarning, match="return state dict"):  # train.yaml, and MONAI looks for train.json
        found: Any = load(solid.name, bundle_dir=solid.parent, device="cpu")
    kept = weights(solid)
    assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)


def test_load_of_a_bundle_that_was_not_trained_says_so(tmp_path: Path, solid: Path) -> None:
    with pytest.raises(RuntimeError) as caught, as_if_in_its_own_process():
        place = {"ckpt_dir": str(tmp_path)}
        load(solid.name, bundle_dir=solid.parent, workflow_type="infer", net_override=place, device="cpu")
    assert isinstance(caught.value.__cause__, InputError) and "no trained model" in str(caught.value.__cause__)


def test_create_workflow_trains_and_registers(tmp_path: Path, cohort: Path) -> None:
    bundle = write_bundle("alexnet", tmp_path / "mine")
    place: dict[str, Any] = {"bundle_root": str(bundle), "dataset_dir": str(cohort)}
    configs = [str(bundle / "configs" / "train.yaml"), str(QUICK)]
    with as_if_in_its_own_process():
        training = create_workflow(
            config_file=configs, workflow_type="train", run_id="training", max_epochs=1, pairs_per_epoch=1, **place
        )
        assert training.check_properties() == [] and training.max_epochs == 1 and training.version == "0.1.0"
        training.run()
        training.finalize()
        registering = create_workflow(
            config_file=str(bundle / "configs" / "inference.yaml"),
            workflow_type="infer",
            output_dir=str(tmp_path / "out"),
            **place,
        )
        registering.run()
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 5


class Handler(MLFlowHandler):
    """MONAI's, that opens no store."""

    def __init__(self, artifacts: str | None = None, run_name: str | None = None) -> None:
        self.run_name, self.artifacts, self.close_on_complete = run_name, (artifacts,), False
        self.output_transform = lambda _: None
        self.experiment_param = None


def test_one_training_is_one_run_whatever_unfinished_runs_there_are(tmp_path: Path) -> None:
    settings = {"backbone": "vgg16", "seed": 0}
    handlers = [Handler(), object(), Handler()]
    adapt(handlers, settings, str(tmp_path))
    again, other, elsewhere, named = Handler(), Handler(), Handler(), Handler(run_name="mine")
    adapt([again], dict(settings), str(tmp_path))
    adapt([other], {**settings, "seed": 1}, str(tmp_path))
    adapt([elsewhere], settings, str(tmp_path / "b"))
    adapt([named], settings, str(tmp_path))
    names = [h.run_name for h in (*handlers, again, other, elsewhere) if isinstance(h, Handler)]
    assert names[0] == names[1] == names[2] and len(set(names)) == 3 and str(names[0]).startswith("vgg16 ")
    assert named.run_name == "mine" and again.experiment_param == settings and not again.close_on_complete


def test_the_loss_terms_are_logged() -> None:
    handler = Handler()
    adapt([handler], {"backbone": "vgg16"}, "")
    output = {"terms": {"mse": 0.25, "loss": 0.25}}
    assert handler.output_transform(output) == {"training/mse": 0.25, "training/loss": 0.25}


def test_the_saved_configuration_is_found_where_monai_wrote_an_expression_as_text() -> None:
    handler = Handler("/a folder/out + '/config_20260101_000000.json'")
    plain = Handler("/a folder/out/config_1.json")
    adapt([handler, plain], {"backbone": "vgg16"}, "")
    assert handler.artifacts == ("/a folder/out/config_20260101_000000.json",)
    assert plain.artifacts == ("/a folder/out/config_1.json",)


def test_the_options_of_tracking_are_known_with_tracking_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpipe.engines.options.find_spec", lambda name: object())
    config = str(ROOT / "bundles" / "symreg_vgg16" / "configs" / "train.yaml")
    command = ["monai/bundle/__main__.py", "run", "training", "--config_file", config, "--experiment_name", "mine"]
    refuse_unknown([*command, "--tracking", "mlflow", "--run_name", "a"])
    with pytest.raises(InputError, match="experiment_name: no such option"):
        refuse_unknown(command)
    monkeypatch.setattr("regpipe.engines.options.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install \"regpipe\[mlflow\]\""):
        refuse_unknown([*command, "--tracking", "mlflow"])


@pytest.mark.slow  # a new database alone takes MLflow ten seconds
def test_mlflow_gets_settings_terms_metrics_and_the_configuration(tmp_path: Path, cohort: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    bundle, store = write_bundle("alexnet", tmp_path / "mine"), f"sqlite:///{tmp_path}/mlruns.db"
    configs = [str(bundle / "configs" / "train.yaml"), str(QUICK)]
    place: dict[str, Any] = {"bundle_root": str(bundle), "dataset_dir": str(cohort), "logging_file": False}
    place |= {"tracking": "mlflow", "tracking_uri": store, "experiment_name": "mine", "holdout": 2}
    with as_if_in_its_own_process():
        run("training", config_file=configs, max_epochs=2, pairs_per_epoch=3, **place)
        evaluating = [*configs, str(bundle / "configs" / "evaluate.yaml")]
        run("evaluating", config_file=evaluating, output_dir=str(tmp_path / "eval"), **place)
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("mine")
    evaluated, trained = client.search_runs(experiment.experiment_id)  # the newest first
    assert {trained.info.status, evaluated.info.status} == {"FINISHED"}
    assert trained.data.params["backbone"] == "alexnet" and trained.data.params["max_epochs"] == "2"
    terms = client.get_metric_history(trained.info.run_id, "training/lncc")
    assert sorted(point.step for point in terms) == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in client.get_metric_history(trained.info.run_id, "dice")] == [1, 2]
    assert [file.path for file in client.list_artifacts(trained.info.run_id)][0].startswith("config_")
    rows = read_rows(tmp_path / "eval" / "metrics.csv")
    assert evaluated.data.metrics["dice"] == pytest.approx(sum(row["dice"] for row in rows) / 2)
    assert evaluated.data.params["evaluated"] == cohort.name


# ------------------------------------------------------------------------------------- what the project says of itself


def test_citation_and_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == regpipe.__version__ and cited["license"] == "Apache-2.0"
    assert regpipe.__version__ in (ROOT / "docs" / "changelog.md").read_text()


def test_the_lock_holds_what_the_project_asks_for_each_by_hash() -> None:
    lock = (ROOT / "docs" / "examples" / "requirements.lock").read_text()
    locked = [(m[1], m[2], m[3]) for m in re.finditer(r"^([\w.-]+)==(\S+)(.*(?:\n .*)*)", lock, re.M)]
    assert len(locked) > 80 and all("--hash=sha256:" in rest for *_, rest in locked)
    project = (ROOT / "pyproject.toml").read_text()
    for text in project.partition("\ndependencies = [")[2].partition("\n]")[0].splitlines():
        wanted = re.search(r'"(.+?)"', text)
        if wanted:
            asked = Requirement(wanted[1])
            found = [version for name, version, _ in locked if name == asked.name]
            assert found and all(version in asked.specifier for version in found), asked


def test_the_container_builds_from_files_that_are_there_and_runs_the_command() -> None:
    lines = (ROOT / "docs" / "examples" / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert "docs/examples/requirements.lock" in copied and all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["regpipe"]' in lines and "USER regpipe" in lines
