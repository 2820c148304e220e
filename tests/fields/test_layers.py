"""The layers are MONAI's, and what takes them takes MONAI's own: the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from monai.networks import blocks
from torch import Tensor

from helpers.terms import example, smooth
from regpipe.engines.inferers import RegistrationInferer
from regpipe.engines.refine import Refiner
from regpipe.fields.algebra import Layers, Registration, integrate, warp
from regpipe.fields.layers import DVF2DDF, Warp
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.measures import inverse_consistency
from regpipe.networks.symmetric import Prediction

MONAI = Layers(blocks.Warp(), blocks.DVF2DDF(7, padding_mode="border"))
SHAPES = [(33, 26), (21, 16, 19)]


def waves(shape: tuple[int, ...], channels: int, amplitude: float, seed: int = 0) -> Tensor:
    return amplitude * (2 * smooth(1, channels, shape, seed) - 1)


def test_the_layers_are_monais_and_take_what_they_take() -> None:
    assert isinstance(Warp(), blocks.Warp) and isinstance(DVF2DDF(), blocks.DVF2DDF)
    with pytest.raises(ValueError, match="num_steps"):
        DVF2DDF(num_steps=0)
    with pytest.raises(ValueError, match="cubic"):
        Warp(mode="cubic")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
def test_the_layers_give_monais_values_for_every_padding(shape: tuple[int, ...], padding: str) -> None:
    image, u = waves(shape, 2, 1.0), waves(shape, len(shape), 3.0, seed=1)
    assert torch.allclose(Warp(padding_mode=padding)(image, u), blocks.Warp(padding_mode=padding)(image, u), atol=1e-5)
    ours, theirs = (layer(6, padding_mode=padding)(u) for layer in (DVF2DDF, blocks.DVF2DDF))
    assert torch.allclose(ours, theirs, atol=1e-4)  # voxels


def test_nearest_neighbour_keeps_labels() -> None:
    labels, u = waves((20, 14), 1, 3.0).round(), waves((20, 14), 2, 3.0, seed=1)
    assert torch.equal(Warp("nearest")(labels, u), warp(labels, u, mode="nearest"))


@pytest.mark.skipif(version("monai") < "1.6", reason="MONAI 1.5 adds its jitter to integers, which torch refuses")
def test_jitter_is_monais() -> None:
    labels, u = waves((20, 14), 1, 3.0).round(), waves((20, 14), 2, 3.0, seed=1)
    assert torch.equal(Warp(jitter=True)(labels, u), blocks.Warp(jitter=True)(labels, u))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("midway", [False, True])
def test_an_inferer_and_a_loss_with_monais_layers_give_the_same_displacement_and_gradient(
    shape: tuple[int, ...], midway: bool
) -> None:
    pair, velocity = waves(shape, 2, 0.5) + 0.5, waves(shape, len(shape) * (1 + midway), 3.0, seed=1)
    target = {"fixed_image": pair[:, :1], "moving_image": pair[:, 1:]}
    target |= {"fixed_mask": (pair[:, :1] > 0.2).float(), "moving_mask": (pair[:, 1:] > 0.2).float()}
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for layers in (Layers(Warp(), DVF2DDF()), MONAI):
        loss = RegistrationLoss({"lncc": 1.0, "midway": 1.0, "jacobian": 1.0, "diffusion": 0.1}, layers=layers)
        given = velocity.clone().requires_grad_()
        both = Prediction(*given.chunk(2, 1)) if midway else given
        result = RegistrationInferer(layers=layers)(pair, lambda _, both=both: both)
        (gradient,) = torch.autograd.grad(loss(result, target), given)
        found.append((result, gradient))
    (ours, our_gradient), (theirs, their_gradient) = found
    for name in ("displacement", "inverse"):
        assert (ours[name] - theirs[name]).abs().max() < 1e-4, name  # voxels
    # a place on a voxel to the last digit may fall to either side of it
    assert (our_gradient - their_gradient).abs().mean() < 1e-3 * their_gradient.abs().mean()


def constant(velocity: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda pair: velocity


class Listening(torch.nn.Module):
    """A layer that knows whether it was asked."""

    def __init__(self, layer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.asked, self.num_steps = layer, False, 0

    def forward(self, *given: Tensor) -> Tensor:
        self.asked = True
        return self.layer(*given)


@pytest.mark.parametrize("name", ["lncc", "midway", "dice", "predicted_dice", "clean"])
def test_every_term_that_warps_goes_through_the_layers_it_is_given(name: str) -> None:
    layers = Layers(Listening(warp), Listening(integrate))
    result, target = example((24, 32), masks=True)
    RegistrationLoss({name: 1.0}, layers=layers)(result._asdict(), target)
    assert layers.warp.asked and (name != "midway" or layers.dvf2ddf.asked)  # type: ignore[attr-defined]


def test_cascades_refinement_and_repair_go_through_the_layers_too() -> None:
    layers = Layers(Listening(warp), Listening(integrate))
    refiner = Refiner(RegistrationLoss({"mse": 1.0, "diffusion": 0.1}, layers=layers), steps=2)
    pair = waves((32, 24), 2, 0.5) + 0.5
    refiner(pair[:, :1], pair[:, 1:])
    assert layers.warp.asked and layers.dvf2ddf.asked  # type: ignore[attr-defined]
    for told in ({"cascades": 2}, {"repair": True}, {"refiner": refiner}):
        layers = Layers(Listening(warp), Listening(integrate))
        found = RegistrationInferer(layers=layers, **told)(pair, constant(waves((16, 12), 2, 1.0)))
        assert layers.warp.asked and layers.dvf2ddf.asked  # type: ignore[attr-defined]
        assert found.keys() >= set(Registration._fields) - {"back"}


def test_inverse_consistency_composes_by_the_layer_it_is_given() -> None:
    u = waves((20, 18), 2, 1.0)[0]
    assert inverse_consistency(u, -u, (1, 1), layers=MONAI) == pytest.approx(inverse_consistency(u, -u, (1, 1)), 1e-4)


def test_fewer_steps_change_a_copy_of_the_layer_only() -> None:
    for layer in (DVF2DDF(7), blocks.DVF2DDF(7)):
        layers = Layers(Warp(), layer)
        assert layers.in_steps(4).dvf2ddf.num_steps == 4 and layer.num_steps == 7  # type: ignore[attr-defined]
        assert layers.in_steps(9).dvf2ddf.num_steps == 7  # type: ignore[attr-defined]
