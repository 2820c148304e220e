"""What is recorded of a run is what its objects are, whichever id changed them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import torchvision
from monai.utils import get_seed

from helpers.training import refusal, workflow
from regpipe.bundle.write import rendered
from regpipe.data.load import LoadPair
from regpipe.engines.describe import registrations, same
from regpipe.engines.inferers import RegistrationInferer
from regpipe.engines.refine import Refinement
from regpipe.fields import algebra
from regpipe.fields.layers import DVF2DDF, Warp


@pytest.mark.usefixtures("restored")
def test_nested_overrides_are_recorded_too(bundle, cohort) -> None:
    nested: dict[str, Any] = {
        "network_def#backbone": "plain",
        "train#trainer#max_epochs": 7,
        "train#dataloader#batch_size": 3,
        "loss#window": 5,
        "loss#weights": {"ncc": 1.0, "diffusion": 0.5},
        "train#step#accumulate": 2,
        "typical": False,
        "augment": 0.02,
        "augment_intensity": 0.5,
        "mirror": [0],
    }
    flow = workflow(bundle, cohort, **nested)
    told = flow.parser.get_parsed_content("described").recipe
    assert (told["backbone"], told["batch_size"], told["accumulate"]) == ("plain", 3, 2)
    assert (told["max_epochs"], told["lncc_window"], told["loss"]) == (7, 5, "ncc=1 diffusion=0.5")
    assert told["loss_weights"] == {"ncc": 1.0, "diffusion": 0.5} and told["learning_rate"] == 0.02
    assert (told["augment"], told["augment_intensity"], told["mirror"]) == (0.02, 0.5, [0])
    scheduler = flow.parser.get_parsed_content("lr_scheduler")
    assert [scheduler.lr_lambdas[0](epoch) for epoch in (0, 3, 7)] == [1.0, 1.0, 0.01]  # of seven epochs
    assert len(flow.parser.get_parsed_content("validate#handlers")) == 3  # without what is typical


GIVEN: dict[str, tuple[Any, str | None]] = {  # id -> what is given; the part's id that overrides the same thing
    "spatial_dims": (2, None),
    "dataset_dir": (None, None),
    "pairing": ("first", "cohort#pairing"),
    "holdout": (1, "cohort#holdout"),
    "landmark_channels": (3, "load#landmark_channels"),
    "affine": ("centre", "load#affine"),
    "affine_from": ("landmarks", "load#affine_from"),
    "mask_rims": (False, "load#mask_rims"),
    "grid_shape": ([24, 28], None),
    "grid_spacing": ([1.5, 1.25], None),
    "own_grids": (True, None),
    "pretrained": ("A FILE", "network_def#pretrained"),
    "freeze": (1, "network_def#freeze"),
    "max_stride": (8, "network_def#max_stride"),
    "transfer": ("encoder", "network_def#transfer"),
    "cascades": (2, "train#inferer#cascades"),
    "encoder_factor": (0.5, None),
    "loss_weights": ({"mine": 0.5, "diffusion": 0.25, "anatomy": 1.0}, "loss#weights"),
    "loss_terms": ({"mine": {"_target_": "torch.nn.SmoothL1Loss", "beta": 0.125}}, "loss#terms"),
    "lncc_window": (5, "loss#window"),
    "label_ids": ([1, 2], "loss#label_ids"),
    "max_epochs": (3, "train#trainer#max_epochs"),
    "structures_first": (0.25, "structures_stage#share"),
    "budget_seconds": (500, "budget#seconds"),
    "pairs_per_epoch": (2, "train#sampler#size"),
    "supervised_share": (0.75, "train#sampler#share"),
    "val_interval": (2, "train#handlers#6#interval"),
    "max_val_pairs": (1, "cohort#max_val_pairs"),
    "batch_size": (2, "train#dataloader#batch_size"),
    "accumulate": (3, "train#step#accumulate"),
    "amp": (True, "train#step#amp"),
    "augment": (0.02, "train#preprocessing#amount"),
    "augment_intensity": (0.5, "load_changed#amount"),
    "mirror": ([0], "train#preprocessing#mirror"),
    "num_workers": (1, "train#dataloader#num_workers"),
    "learning_rate": (0.125, None),
    "average": (20, "weight_average#batches"),
    "key_metric": ("ncc", "validate#key_metric#key_metric#key"),
    "patience": (4, "stopper#patience"),
    "seed": (3, None),
}
OF_SEVERAL = {"channels", "similarity", "channel_weights"}  # tests/engines/test_training_channels.py
# they change no number of the model: speed, memory, what is logged beside it
NOT_RECORDED = {"checkpointing", "memory_gib", "cache", "cache_dir", "typical", "resume"}


def head() -> list[str]:
    """The ids that the head of train.yaml invites to give."""
    text = rendered("configs/train.yaml", "alexnet")
    return re.findall(r"^(\w+):", text[text.index("\n# the data:") : text.index("\nckpt_dir:")], re.MULTILINE)


def test_the_table_has_every_id_of_the_head() -> None:
    assert {*head()} == {*GIVEN} | NOT_RECORDED | OF_SEVERAL and not {*GIVEN} & (NOT_RECORDED | OF_SEVERAL)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("nested", [False, True], ids=["at the top", "at the part"])
def test_every_id_of_the_head_is_recorded_as_its_object_has_it(bundle, cohort, tmp_path, nested) -> None:
    start = tmp_path / "start.pth"
    torch.save(torchvision.models.alexnet().state_dict(), start)
    given = {name: value for name, (value, _) in GIVEN.items()} | {"pretrained": str(start)}
    del given["dataset_dir"]
    parts = {name: part for name, (_, part) in GIVEN.items() if part and nested}
    flow = workflow(bundle, cohort, **{parts.get(name, name): value for name, value in given.items()})
    of = flow.parser.get_parsed_content
    of("training#1")  # keeps what a run keeps beside its model
    trainer, net, load, loss = of("train#trainer"), of("network_def"), of("load"), of("loss")
    described, record = of("described"), json.loads((bundle / "models" / "training.json").read_text())
    told, loader = described.recipe, trainer.data_loader

    assert (load.grid.shape, load.grid.spacing) == ((24, 28), (1.5, 1.25)) and told["spatial_dims"] == 2
    assert (told["grid_shape"], told["grid_spacing"]) == ([24, 28], [1.5, 1.25])
    options = {"landmark_channels": load.landmark_channels, "mask_rims": load.mask_rims} | vars(load.alignment)
    for name in ("landmark_channels", "mask_rims", "affine", "affine_from"):
        assert told[name] == record[name] == options[name] == given[name], name
    for name in ("pairing", "holdout"):
        assert told[name] == record[name] == getattr(of("cohort"), name) == given[name], name
    assert record["own_grids"] and told["max_val_pairs"] == len(of("validate#pairs")) == 1
    assert told["seed"] == record["seed"] == get_seed() == 3
    assert told["pretrained"].startswith("start.pth ") and net.pretrained == str(start)
    assert (
        (told["freeze"], told["max_stride"], told["transfer"])
        == (net.freeze, net.max_stride, net.transfer)
        == (1, 8, "encoder")
    )
    assert told["cascades"] == record["cascades"] == trainer.inferer.cascades == 2
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.0625, 0.125] and (told["learning_rate"], told["encoder_factor"]) == (0.125, 0.5)
    assert (
        told["loss_weights"] == loss.weights == given["loss_weights"]
        and told["loss"] == "mine=0.5 diffusion=0.25 anatomy=1"
    )
    assert told["loss_mine"] == "SmoothL1Loss(beta=0.125, reduction=mean)" and loss.terms["mine"].module.beta == 0.125
    assert (told["lncc_window"], told["label_ids"]) == (loss.window, list(loss.label_ids)) == (5, [1, 2])
    assert told["max_epochs"] == trainer.state.max_epochs == 3
    assert told["structures_first"] == of("structures_stage").share == 0.25
    assert told["budget_seconds"] == of("budget").seconds == 500
    assert told["pairs_per_epoch"] == len(loader.sampler) == 2 and told["supervised_share"] == loader.sampler.share
    assert told["val_interval"] == of("train#handlers#6").interval == 2
    assert (told["batch_size"], told["num_workers"]) == (loader.batch_size, loader.num_workers) == (2, 1)
    assert (told["accumulate"], told["amp"]) == (of("train#step").accumulate, of("train#step").amp) == (3, True)
    moves = of("train#preprocessing")
    assert (told["augment"], told["mirror"], told["augment_intensity"]) == (moves.amount, moves.mirror, 0.5)
    assert moves.load.amount == 0.5 and told["average"] == of("weight_average").batches == 20
    assert told["key_metric"] == of("validate#key_metric#key_metric").key == "ncc"
    assert told["patience"] == of("training_run").stopper.patience == 4
    assert [of("lr_scheduler").lr_lambdas[0](epoch) for epoch in (0, 3)] == [1.0, 0.01]  # of three epochs


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("given", "said"),
    [({"optimizer#lr": 0.5}, "give --learning_rate"), ({"begin#seed": 9}, "two seeds, 9 and of the split 0")],
)
def test_a_part_that_would_not_do_what_it_says_is_refused(bundle, cohort, given, said) -> None:
    assert said in refusal(bundle, cohort, 1, **given)


def own_warp(image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return image


def test_layers_are_recorded_by_name_where_they_are_not_regpipes_own() -> None:
    def told(layers: algebra.Layers) -> dict[str, Any]:
        inferer, load = RegistrationInferer(layers=layers), LoadPair(None, affine="none")
        return registrations(torch.nn.Identity(), load, refinement=Refinement(0, {}), inferer=inferer)

    assert "warp" not in told(algebra.Layers(algebra.warp, algebra.Integration()))
    assert "warp" not in told(algebra.Layers(Warp(), DVF2DDF()))
    assert told(algebra.Layers(own_warp, algebra.Integration()))["warp"] == f"{__name__}.own_warp()"


def test_a_term_of_no_weight_makes_no_difference_and_another_weight_does() -> None:
    old = {"loss": "lncc=1 dice=0 diffusion=0.7", "seed": 0, "gone": 1}
    assert same(old, {"loss": "lncc=1 diffusion=0.7", "seed": 0, "new": 2}) == []
    assert same(old, {"loss": "lncc=1", "seed": 1}) == ["loss: lncc=1 diffusion=0.7 -> lncc=1", "seed: 0 -> 1"]
