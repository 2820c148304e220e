"""Losses of MONAI and of one's own as terms: what they compute, what is refused, and a training with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.losses import (
    BendingEnergyLoss,
    DiceLoss,
    DiffusionLoss,
    GlobalMutualInformationLoss,
    LocalNormalizedCrossCorrelationLoss,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from helpers.bundles import Command, train
from helpers.docpages import blocks
from helpers.places import ROOT
from helpers.terms import example
from helpers.training import refusal
from regpipe import InputError, RegistrationLoss
from regpipe.bundle.write import write_bundle
from regpipe.losses import term_of
from regpipe.losses.terms import Options, one_hot

SHAPES = [(20, 17), (12, 10, 11)]
EACH = pytest.mark.parametrize("shape", SHAPES)


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.value * (pred - target).square().mean()


@EACH
def test_image_losses_are_the_mean_of_monais_own_both_ways(shape) -> None:
    r, target = example(shape)
    for module in (
        LocalNormalizedCrossCorrelationLoss(spatial_dims=len(shape), kernel_size=5),
        GlobalMutualInformationLoss(num_bins=8),
    ):
        ways = (module(r.warped_moving, target["fixed_image"]), module(r.warped_fixed, target["moving_image"]))
        found = RegistrationLoss({"mine": 2.0}, terms={"mine": module}).weigh(r._asdict(), target)
        assert float(found.value) == pytest.approx(float(sum(ways)), rel=1e-5)  # 2 x their mean
        assert found.terms["mine"] == pytest.approx(float(sum(ways)) / 2, rel=1e-5)


@EACH
def test_what_lies_outside_the_masks_makes_no_difference(shape) -> None:
    r, target = example(shape, masks=True)
    loss = RegistrationLoss({"mine": 1.0}, terms={"mine": Constant(1.0)})
    other = {**target, "fixed_image": torch.where(target["fixed_mask"] > 0, target["fixed_image"], 9.0)}
    assert float(loss(r._asdict(), target)) == pytest.approx(float(loss(r._asdict(), other)), rel=1e-6)


@EACH
def test_measures_of_fields_see_both_displacements_or_the_velocity(shape) -> None:
    r, target = example(shape)
    for module in (BendingEnergyLoss(), DiffusionLoss()):
        both = (module(r.displacement) + module(r.inverse)) / 2
        assert float(term_of(module).function(r, target, Options())) == pytest.approx(float(both), rel=1e-5)
        alone = term_of(module, "velocity").function(r, target, Options())
        assert float(alone) == pytest.approx(float(module(r.velocity)), rel=1e-5)


@EACH
def test_dice_sees_the_labels_that_both_images_hold(shape) -> None:
    r, target = example(shape)
    still = r._replace(displacement=0 * r.displacement, inverse=0 * r.inverse)  # nothing is warped: MONAI's own value
    pairs = zip(target["fixed_label"][:, None], target["moving_label"][:, None], strict=True)
    wanted = [float(DiceLoss()(one_hot(a, (1, 2)), one_hot(b, (1, 2)))) for a, b in pairs]
    found = float(term_of(DiceLoss()).function(still, target, Options()))
    assert found == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert float(term_of(DiceLoss()).function(r, {}, Options())) == 0  # pairs without labels


def test_the_gradient_reaches_the_displacement_and_no_weight_of_the_module() -> None:
    r, target = example(SHAPES[0])
    u = r.displacement.clone().requires_grad_(True)
    term_of(BendingEnergyLoss()).function(r._replace(displacement=u), target, Options()).backward()
    assert u.grad is not None and u.grad.abs().sum() > 0

    class Weighed(nn.Conv2d):
        def forward(self, pred: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(pred - target).square()

    module = Weighed(1, 1, 3)
    assert term_of(module).module is module and not any(p.requires_grad for p in module.parameters())


def test_what_cannot_be_a_term_is_refused_with_the_reason() -> None:
    r, target = example(SHAPES[0])
    refused = {
        "is a term already": {"lncc": Constant(1.0)},
        "is no torch.nn.Module": {"mine": abs},
        "takes 0 arguments": {"mine": nn.ReLU.__mro__[1]()},
    }
    for message, terms in refused.items():
        with pytest.raises(InputError, match=message):
            RegistrationLoss({"mse": 1.0}, terms=terms)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="images, displacement, velocity, labels, not 'sound'"):
        term_of(Constant(1.0), "sound")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Loss cannot take \(2, 1, 20, 17\) and"):  # 3D, its default, of 2D images
        term_of(LocalNormalizedCrossCorrelationLoss()).function(r, target, Options())


def test_the_documented_overlay_trains_with_curves_and_stands_in_the_record(
    tmp_path: Path, cohort: Path, monai_bundle: Command
) -> None:
    (block,) = [b for b in blocks((ROOT / "docs/training.md").read_text(), "yaml") if "loss_terms" in b.text]
    (tmp_path / "mine.yaml").write_text(block.text)
    bundle = write_bundle("plain", tmp_path / "bundle")
    few = ("--max_epochs", "1", "--pairs_per_epoch", "2", "--holdout", "2")
    train(monai_bundle, bundle, cohort, *few, overlay=tmp_path / "mine.yaml")
    curves = EventAccumulator(str(bundle / "eval" / "tensorboard"))
    curves.Reload()
    names = ("monai_lncc", "monai_mi", "monai_bending", "overlap", "diffusion")
    assert {f"training/{name}" for name in names} <= set(curves.Tags()["scalars"])
    told = json.dumps(json.loads((bundle / "models" / "manifest.json").read_text()))
    assert "LocalNormalizedCrossCorrelationLoss(" in told and "kernel_size=7" in told and '"overlap": 0.5' in told


@pytest.mark.usefixtures("restored")
def test_a_term_that_is_no_number_stops_the_training_by_name(bundle: Path, cohort: Path) -> None:
    own = {"loss_terms": {"mine": {"_target_": "losses.test_modules.Constant", "value": float("nan")}}}
    said = refusal(bundle, cohort, 1, loss_weights={"mine": 1.0}, **own)
    assert "loss term mine is not finite at iteration 1" in said


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("place", ["train#trainer#loss_function", "loss"])
def test_a_loss_beside_the_terms_is_refused_with_the_remedy(place: str, bundle: Path, cohort: Path) -> None:
    own = {"_target_": "torch.nn.MSELoss"}
    assert "MSELoss as loss_function or loss" in (said := refusal(bundle, cohort, 1, **{place: own}))
    assert "list it by name in loss_terms" in said and not list((bundle / "models").iterdir())
