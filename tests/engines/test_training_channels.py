"""A network trained on several channels finds what none of them shows alone, and is used as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from helpers.commandline import regpipe
from helpers.stripes import write_stripes
from helpers.training import refusal, train, workflow
from regpipe.bundle.write import write_bundle
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs
from regpipe.engines.channels import of_all, options_of
from regpipe.engines.inferers import RegistrationInferer, midway_images, prepare_batch, trained_grid
from regpipe.inference import memory
from regpipe.inference.by_bundle import load_network
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.symmetric import SymmetricNet, prediction
from regpipe.utils.errors import InputError

HELD_OUT = 6
TOLD: dict[str, Any] = {
    "holdout": HELD_OUT,
    "pairs_per_epoch": 18,
    "batch_size": 2,
    "val_interval": 3,
    "max_val_pairs": 2,
    "learning_rate": 0.001,
    "affine": "none",
    "loss_weights": {"lncc": 1.0, "diffusion": 0.2},
}
pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes") / "pairs", count=18 + HELD_OUT)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> dict[str, Path]:
    """Bundles trained on both channels, and on each alone."""
    bundles = {}
    for which in ("all", "0", "1"):
        bundles[which] = write_bundle("alexnet", tmp_path_factory.mktemp("bundle") / "bundle")
        train(bundles[which], pairs, 3, channels=which, **TOLD)
    return bundles


def off(bundle: Path, pairs: Path, which: str) -> float:
    """Mean distance from the true motion of pairs held out, where that is more than a voxel."""
    models = str(bundle / "models")
    net, errors = load_network(models, "alexnet").eval(), []
    load = LoadPair(trained_grid(models), affine="none", image_channels=net.image_channels)
    for case in list_pairs(pairs, split="validation", holdout=HELD_OUT, channels=which):
        pair, target, _, told = prepare_batch(collate_pairs([load(case)]))
        with torch.no_grad():
            found = RegistrationInferer()(pair, net, **told)["displacement"]
        true = target["displacement"]
        errors.append((found - true).norm(dim=1)[true.norm(dim=1) > 1].mean())
    return float(torch.stack(errors).mean())


def test_two_channels_teach_what_neither_teaches_alone(seeing: dict[str, Path], pairs: Path) -> None:
    both, *alone = (off(bundle, pairs, which) for which, bundle in seeing.items())
    assert both < 0.65 * min(alone) and min(alone) > 1  # of 2.2; in vain along the other axis


def test_what_was_trained_on_both_registers_alike_by_every_command(
    seeing: dict[str, Path],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    monai_bundle: Callable[..., None],
) -> None:
    bundle, out = seeing["all"], {name: tmp_path / name for name in ("two", "list", "monai")}
    files = {side: pairs / f"{side}_images" / "case_00.nii.gz" for side in ("fixed", "moving")}
    told = ["--bundle", bundle, "--channels", "all", "--uncertainty", "-o", out["two"]]
    assert regpipe(monkeypatch, "register", *files.values(), *told) == 0
    entry = {f"{side}_image": [f"{file}#0", f"{file}#1"] for side, file in files.items()}
    (tmp_path / "pairs.json").write_text(json.dumps([entry | {"case": "case_00"}]))
    told = ["--bundle", bundle, "--refine", "0", "-o", out["list"]]
    assert regpipe(monkeypatch, "register", tmp_path / "pairs.json", *told) == 0
    config = bundle / "configs" / "inference.yaml"
    places = ["--bundle_root", bundle, "--dataset_dir", tmp_path / "pairs.json", "--output_dir", out["monai"]]
    monai_bundle("run", "--config_file", config, *places)
    fields = [(folder / "case_00" / "displacement.nii.gz").read_bytes() for folder in out.values()]
    assert fields[0] == fields[1] == fields[2]
    true = nib.Nifti1Image.from_filename(pairs / "displacements" / "case_00.nii.gz").get_fdata().squeeze()
    found = nib.Nifti1Image.from_filename(out["two"] / "case_00" / "displacement.nii.gz").get_fdata().squeeze()[..., :2]
    assert np.linalg.norm(found - true, axis=-1).mean() < 0.5 * np.linalg.norm(true, axis=-1).mean()
    assert (out["two"] / "case_00" / "warped_2.nii.gz").is_file()


def test_what_was_trained_on_both_is_evaluated_on_both(
    seeing: dict[str, Path], pairs: Path, monai_bundle: Callable[..., None]
) -> None:
    bundle = seeing["all"]
    configs = str([str(bundle / "configs" / name) for name in ("train.yaml", "evaluate.yaml")])
    monai_bundle("run", "evaluating", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", pairs)
    summary = json.loads((bundle / "eval" / "summary.json").read_text())
    assert summary["cases"] == HELD_OUT and summary["metrics"]["ncc"][0] > summary["metrics"]["ncc_before"][0]


def test_a_pair_of_other_channels_is_refused_in_a_line(
    seeing: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    told = ["--bundle", seeing["all"], "-o", tmp_path / "out"]
    assert regpipe(monkeypatch, "register", pairs, *told) == 1
    said = "case_00.nii.gz: 1 of the 2 channels that the network takes; give as many: --channels"
    assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="takes 2 channels of each image, these have 1"):
        RegistrationInferer()(torch.zeros(1, 2, 16, 16), SymmetricNet(2, "plain", image_channels=2))


def test_channels_and_how_each_compares_are_recorded(pairs: Path, tmp_path: Path) -> None:
    bundle = write_bundle("plain", tmp_path / "bundle")
    given: dict[str, Any] = {**TOLD, "channels": (1, 0), "similarity": "lncc,mse", "channel_weights": [3, 1]}
    flow = workflow(bundle, pairs, **given)  # a command line makes numbers of 1,0
    of = flow.parser.get_parsed_content
    of("training#1")
    of("training#2")
    told, record = of("described").recipe, json.loads((bundle / "models" / "training.json").read_text())
    assert (told["channels"], told["image_channels"]) == (record["channels"], record["image_channels"]) == ("1,0", 2)
    assert (told["loss"], told["loss_2"]) == ("lncc=0.75 diffusion=0.2", "mse=2.5")  # a quarter of mse's 10
    assert told["loss_weights"] == TOLD["loss_weights"] and told["similarity"] == ["lncc", "mse"]
    assert told["channel_weights"] == [0.75, 0.25]
    seen = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    assert seen["num_channels"] == 4 and seen["channel_def"]["2"] == "moving, channel 1"
    batch = next(iter(of("train#dataloader")))
    assert batch["fixed_channels"].shape == batch["fixed_image"].shape
    case = dict(zip(batch["case"], batch["fixed_image"], strict=True))
    (first, image) = next(iter(case.items()))
    stored = nib.Nifti1Image.from_filename(pairs / "fixed_images" / f"{first}.nii.gz").get_fdata().squeeze()
    like = [abs(np.corrcoef(image[0].flatten(), stored[..., i].flatten())[0, 1]) for i in (0, 1)]
    assert like[1] > 0.99 > like[0]  # channel 1 comes first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels": "red"}, "--channels red: give all, or which"),
        ({"channels": "all", "similarity": "lncc,mi,ncc"}, "--similarity: 3 of them, the images have 2 channels"),
        ({"channels": "all", "similarity": "lncc,looks"}, "--similarity looks: choose among"),
        ({"channels": "all", "channel_weights": 1}, "--channel-weights 1: give a number for each"),
        ({"channels": "1", "channel_weights": [1, 2]}, "--channel-weights: 2 of them, the images have 1 channels"),
    ],
)
def test_what_is_wrong_with_channels_of_a_training_is_said_in_a_line(pairs, bundle, given, message) -> None:
    assert message in refusal(bundle, pairs, 3, **{**TOLD, **given})


def test_pairs_of_unlike_channels_are_not_one_training(pairs: Path, bundle: Path, tmp_path: Path) -> None:
    files = {f"{side}_image": str(pairs / f"{side}_images" / "case_00.nii.gz") for side in ("fixed", "moving")}
    one = {key: f"{file}#0" for key, file in files.items()}
    two = {key: [f"{file}#0", f"{file}#1"] for key, file in files.items()}
    (tmp_path / "list.json").write_text(json.dumps([{"case": str(i), **(two if i else one)} for i in range(4)]))
    said = refusal(bundle, tmp_path / "list.json", 3, **TOLD | {"holdout": 1})
    assert "case_00.nii.gz#0: 1 channels" in said and "a network takes as many of each pair" in said


def test_all_channels_of_a_list_of_images_are_that_list_and_some_are_asked_for_otherwise(
    pairs: Path, tmp_path: Path
) -> None:
    files = {f"{side}_image": str(pairs / f"{side}_images" / "case_00.nii.gz") for side in ("fixed", "moving")}
    two = {key: [f"{file}#1", f"{file}#0"] for key, file in files.items()}
    (tmp_path / "list.json").write_text(json.dumps([{"case": "listed", **two}, {"case": "whole", **files}]))
    listed, whole = list_pairs(tmp_path / "list.json", channels="all")  # what a model of --channels all is evaluated on
    assert listed["moving_image_2"] == whole["moving_image"] == f"{files['moving_image']}#0"
    assert whole["moving_image_2"].endswith("#1")
    with pytest.raises(InputError, match="is one of several channels already; give --channels all"):
        list_pairs(tmp_path / "list.json", channels="0,1")


def test_each_cascade_sees_all_channels_halfway() -> None:
    torch.manual_seed(0)
    net = SymmetricNet(2, "plain", image_channels=2).eval()
    fixed, moving = torch.rand(2, 1, 2, 33, 40)
    with torch.no_grad():
        first = prediction(net(torch.cat([fixed, moving], 1))).velocity
        second = prediction(net(midway_images(fixed, moving, first))).velocity
        pair, beside = torch.cat([fixed[:, :1], moving[:, :1]], 1), (fixed[:, 1:], moving[:, 1:])
        found = RegistrationInferer(cascades=2)(pair, net, channels=beside)
    torch.testing.assert_close(found["velocity"], first + second)


def test_the_memory_of_training_counts_all_channels() -> None:
    loss, shape = RegistrationLoss({"lncc": 1.0, "diffusion": 0.7}), (256, 256)
    one, two = (
        memory.training(RegistrationInferer(), SymmetricNet(2, "pooled", image_channels=many), loss, shape)
        for many in (1, 2)
    )
    assert two - one >= 4 * 256 * 256 * 4  # an image more of each side, and all of them joined


def test_the_memory_of_training_counts_channels_that_the_loss_alone_sees() -> None:
    loss, shape, inferer = RegistrationLoss({"lncc": 1.0, "diffusion": 0.7}), (128, 128), RegistrationInferer()
    one, two = (memory.training(inferer, SymmetricNet(2, "pooled"), of_all(loss, many), shape) for many in (1, 2))
    assert two - one >= 3 * 128 * 128 * 4  # an image more of each side, and one of them warped


def weights_of(terms: dict[str, float], *, many: int = 2, **asked: Any) -> list[dict[str, float]]:
    loss = of_all(RegistrationLoss(terms), many, **asked)
    assert isinstance(loss, RegistrationLoss)
    return [one.weights for one in (loss, *loss.channels)]


def test_one_similarity_may_be_that_of_all_channels() -> None:
    weights = {"lncc": 1.0, "diffusion": 0.7}
    first, second = weights_of(weights, similarity="ncc")
    assert first == {"ncc": 0.5, "diffusion": 0.7} and second == {"ncc": 0.5}
    assert weights_of(weights, similarity="ncc,ncc") == [first, second]


def test_a_loss_without_similarity_sees_no_channel_unless_one_is_asked_for() -> None:
    weights = {"dice": 1.0, "diffusion": 0.7}
    assert weights_of(weights) == [weights]
    assert weights_of(weights, similarity="ncc", weights=[3, 1]) == [{"ncc": 0.75, **weights}, {"ncc": 0.25}]


@pytest.mark.parametrize(
    ("many", "asked", "told"),
    [
        (1, {}, {}),
        (3, {}, {}),
        (2, {"weights": [3, 1]}, {"channel_weights": [0.75, 0.25]}),
        (2, {"similarity": "lncc,mse"}, {"similarity": ["lncc", "mse"]}),
        (2, {"similarity": "ncc"}, {"loss_weights": {"ncc": 1.0, "diffusion": 0.7}}),
    ],
)
def test_a_loss_of_several_channels_tells_the_options_that_make_it(many: int, asked: Any, told: Any) -> None:
    given = {"lncc": 1.0, "diffusion": 0.7}
    found = options_of(of_all(RegistrationLoss(given), many, **asked))
    assert found == {"loss_weights": given, **told}
    again = {{"channel_weights": "weights"}.get(name, name): x for name, x in found.items() if name != "loss_weights"}
    same, loss = weights_of(found["loss_weights"], many=many, **again), weights_of(given, many=many, **asked)
    for one, other in zip(same, loss, strict=True):
        assert one == pytest.approx(other)


def test_features_that_nothing_gives_are_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match="give features a weight in loss_weights"):
        weights_of({"lncc": 1.0}, similarity="lncc,features")
