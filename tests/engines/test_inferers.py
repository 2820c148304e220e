"""The adapters to MONAI's engines: batch in, named registration out; learning rates; what a trained folder holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from monai.engines import SupervisedEvaluator
from torch import Tensor, nn

from regpipe.engines.inferers import (
    RegistrationInferer,
    metric_input,
    parameter_groups,
    prepare_batch,
    require_model,
    trained_dimension,
    trained_grid,
    trained_weights,
)
from regpipe.fields.algebra import Layers, Registration, integrate, register, register_midway, warp
from regpipe.fields.layers import DVF2DDF, Warp
from regpipe.io.images import make_grid, save_grid
from regpipe.metrics.cases import CaseMetrics
from regpipe.metrics.measures import ndv_percent
from regpipe.networks.symmetric import Prediction, SymmetricNet
from regpipe.utils.errors import InputError


def batch(names: list[str]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    fixed, moving = torch.rand(2, len(names), 1, 16, 12, generator=generator)
    points = torch.zeros(len(names), 0, 2)
    items = {"fixed_image": fixed, "moving_image": moving, "fixed_landmarks": points, "moving_landmarks": points}
    return {"case": names, "fixed_label": (fixed > 0.5).int(), "moving_label": (moving > 0.5).int(), **items}


def net(channels: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(2, channels, 3, padding=1)


def test_the_networks_input_is_fixed_then_moving_and_the_target_is_the_whole_batch() -> None:
    items = batch(["a", "b"])
    pair, target, arguments, told = prepare_batch(items, "cpu")
    assert torch.equal(pair[:, :1], items["fixed_image"]) and torch.equal(pair[:, 1:], items["moving_image"])
    assert target.keys() == items.keys() and target["case"] == ["a", "b"] and arguments == ()
    assert told == {"masks": ()}  # this batch has none
    masks = {"fixed_mask": items["fixed_image"], "moving_mask": items["moving_image"]}
    assert prepare_batch({**items, **masks})[3]["masks"] == tuple(masks.values())
    _, moved, *_ = prepare_batch(items, "meta")
    assert all(value.device.type == "meta" for value in moved.values() if isinstance(value, Tensor))


def test_the_inferer_integrates_and_warps_what_the_network_says() -> None:
    pair, *_ = prepare_batch(batch(["a", "b"]))
    fixed, moving = pair.chunk(2, 1)
    found = RegistrationInferer(layers=Layers(Warp(), DVF2DDF(5)))(pair, net())
    expected = register(fixed, moving, net()(pair), layers=Layers(warp, partial(integrate, squarings=5)))
    assert tuple(found) == Registration._fields[:-1]
    for name, value in expected.tensors().items():
        assert torch.equal(found[name], value), name


def test_midway_takes_symnets_two_velocities() -> None:
    pair, *_ = prepare_batch(batch(["a"]))
    both = net(4)(pair).chunk(2, 1)
    found = RegistrationInferer()(pair, lambda _: Prediction(*both))
    expected = register_midway(pair[:, :1], pair[:, 1:], *both)
    for name, value in expected._asdict().items():
        assert torch.equal(found[name], value), name


def test_fields_are_float32_also_inside_an_autocast_and_have_a_gradient() -> None:
    pair, *_ = prepare_batch(batch(["a"]))
    network = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RegistrationInferer()(pair, network)
    assert all(value.dtype == torch.float32 for value in found.values())
    found["warped_moving"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_evaluator_hands_each_case_to_the_metric() -> None:
    metric = CaseMetrics((1.0, 1.0), output_transform=metric_input)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        [batch(["a", "b"]), batch(["c"])],
        net(),
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        key_val_metric={"key_metric": metric},
        decollate=False,
    )
    evaluator.run()
    assert [row["case"] for row in evaluator.state.metric_details["cases"]] == ["a", "b", "c"]
    assert evaluator.state.metrics["key_metric"] == evaluator.state.metrics["dice"] > 0


def test_the_encoder_learns_at_its_own_rate_and_frozen_weights_not_at_all() -> None:
    network = SymmetricNet(2, "alexnet", freeze=1)
    encoder, rest = parameter_groups(network, 1e-3, encoder_factor=0.1)
    assert (encoder["lr"], rest["lr"]) == (pytest.approx(1e-4), 1e-3)
    named = dict(network.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert 0 < len(trained) < len(named)
    for group, inside in ((encoder, True), (rest, False)):
        expected = {id(named[name]) for name in trained if name.startswith("encoder.") == inside}
        assert {id(p) for p in group["params"]} == expected


def test_a_network_without_encoder_or_with_a_frozen_one_has_one_group() -> None:
    (group,) = parameter_groups(net(), 0.5, encoder_factor=0.1)
    assert group["lr"] == 0.5 and len(group["params"]) == 2


def test_a_trained_folder_gives_its_grid_and_weights_and_an_empty_one_says_so(tmp_path) -> None:
    folder = str(tmp_path)
    assert trained_grid(folder) is None and trained_dimension(folder) == 2 and trained_weights(folder) == "none"
    with pytest.raises(InputError, match=r"model\.pt: no trained model; run training first"):
        require_model(folder)
    grid = make_grid((20, 24, 8), (1.0, 1.5, 3.0))
    save_grid(tmp_path / "working_grid.json", grid)
    torch.save({}, tmp_path / "model.pt")
    assert trained_grid(folder) == grid and trained_dimension(folder) == 3
    assert trained_weights(folder) == require_model(folder) == str(tmp_path / "model.pt")


def test_folds_are_removed_where_asked_and_the_inferer_says_how_far_that_moved_the_field() -> None:
    pair, *_ = prepare_batch(batch(["a"]))
    velocity = 12 * torch.rand(1, 2, *pair.shape[2:], generator=torch.Generator().manual_seed(0)) - 6

    def network(_: Tensor) -> Tensor:
        return velocity

    folded = RegistrationInferer()(pair, network)
    mended = RegistrationInferer(repair=True)(pair, network)

    assert ndv_percent(folded["displacement"][0]) > 0
    assert ndv_percent(mended["displacement"][0]) == ndv_percent(mended["inverse"][0]) == 0
    moved = [(mended[key] - folded[key]).square().sum(1).sqrt().max() for key in ("displacement", "inverse")]
    assert float(mended["repaired"]) == pytest.approx(float(max(moved)))
    torch.testing.assert_close(mended["warped_moving"], warp(pair[:, 1:], mended["displacement"]))


def test_what_a_network_says_beyond_the_velocity_is_the_anatomy() -> None:
    pair, *_ = prepare_batch(batch(["a"]))
    velocity, logits = torch.rand(1, 2, 5, 6), torch.rand(1, 6, 9, 11)
    found = RegistrationInferer()(pair, lambda _: Prediction(velocity, structures=logits))
    assert torch.equal(found["velocity"], velocity) and torch.equal(found["anatomy"], logits)


def test_a_cascade_finds_what_one_pass_leaves_and_stays_antisymmetric() -> None:
    """A network that sees a third of the motion along axis 0, by the images' centres of mass."""

    def network(pair: Tensor) -> Tensor:
        rows = torch.arange(pair.shape[2], dtype=torch.float32).view(1, 1, -1, 1)
        fixed, moving = ((rows * pair).sum((2, 3)) / pair.sum((2, 3))).unbind(1)
        velocity = torch.zeros(len(pair), 2, *pair.shape[2:])
        velocity[:, 0] = ((moving - fixed) / 3).view(-1, 1, 1)
        return velocity

    fixed, moving = torch.zeros(2, 1, 1, 32, 16)
    fixed[:, :, 10:14, 6:10] = moving[:, :, 16:20, 6:10] = 1.0
    pair, swapped = torch.cat([fixed, moving], 1), torch.cat([moving, fixed], 1)
    for cascades, found in ((1, 2.0), (2, 6 * (1 - (2 / 3) ** 2)), (3, 6 * (1 - (2 / 3) ** 3))):
        inferer = RegistrationInferer(cascades=cascades)
        velocity = inferer(pair, network)["velocity"]
        assert float(velocity[0, 0].mean()) == pytest.approx(found, abs=0.02)
        assert torch.allclose(inferer(swapped, network)["velocity"], -velocity, atol=1e-4)
    with pytest.raises(InputError, match="once at least"):
        RegistrationInferer(cascades=0)
