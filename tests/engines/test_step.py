"""Switches of the training step: gradients are means over batches, half precision stays in the network, less memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from regpipe.engines import step
from regpipe.engines.handlers import GradientClip, NanGuard, TrainingDiverged
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.engines.step import TrainingStep, check_amp, checkpointed, gradient_scaler, half_precision
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.peers import VoxelMorph
from regpipe.networks.symmetric import SymmetricNet
from regpipe.networks.symnet import SymNet
from regpipe.utils.errors import InputError

CPU = torch.device("cpu")
LOSS = {"lncc": 1.0, "diffusion": 0.7, "divergence": 0.1}


def network(backbone: str = "alexnet", dims: int = 2, **told: Any) -> SymmetricNet:
    """With flows of a voxel or two: at the start of training there is nothing to see."""
    torch.manual_seed(0)
    net = SymmetricNet(dims, backbone, **told)
    for level in net.levels:
        level.flow.weight.data *= 100  # type: ignore[union-attr, operator]
    return net


def batch(name: str, shape: tuple[int, ...] = (33, 33), *, flat: bool = False) -> dict[str, Any]:
    """A pair of smooth images, the moving one a shifted view of the other; or of constant ones."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    small = torch.rand(1, 1, *[9] * len(shape), generator=generator)
    field = nn.functional.interpolate(small, size=[n + 2 for n in shape], mode=mode)
    fixed, moving = field, field
    for axis, n in enumerate(shape, start=2):
        fixed, moving = fixed.narrow(axis, 0, n), moving.narrow(axis, 2, n)
    if flat:
        fixed, moving = torch.zeros_like(fixed), torch.ones_like(moving)
    return {"case": [name], "fixed_image": fixed, "moving_image": moving}


def trainer(net: nn.Module, data: list[dict[str, Any]], *handlers: Any, **told: Any) -> SupervisedTrainer:
    """MONAI's, with ours for its iteration; plain descent, of which a step is the gradient itself."""
    scaler = told.pop("scaler", gradient_scaler(CPU, amp=False))
    return SupervisedTrainer(
        CPU,
        1,
        data,
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        RegistrationLoss(LOSS, window=5),
        inferer=RegistrationInferer(cascades=told.pop("cascades", 1)),
        prepare_batch=prepare_batch,
        iteration_update=TrainingStep(scaler, **told),
        train_handlers=list(handlers),
        decollate=False,
    )


def gradient(net: nn.Module, items: dict[str, Any], *, cascades: int = 1) -> dict[str, Tensor]:
    """Of the loss of one batch, by autograd and nothing else."""
    net = copy.deepcopy(net).train()
    pair, target, *_ = prepare_batch(items)
    RegistrationLoss(LOSS, window=5)(RegistrationInferer(cascades=cascades)(pair, net), target).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def descended(net: nn.Module, data: list[dict[str, Any]], *handlers: Any, **told: Any) -> dict[str, Tensor]:
    """How far an epoch moved each parameter: the sum of what its steps took for gradients."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer(net, data, *handlers, **told).run()
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    x, y = (torch.cat([d[name].flatten() for name in a]) for d in (a, b))
    return float(nn.functional.cosine_similarity(x, y, dim=0))


# accumulation


class Still:
    """Notes the gradient of each step of the optimiser, and takes none: all batches see the same weights."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.seen = net, list[dict[str, Tensor]]()

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None})
        engine.optimizer.zero_grad()


@pytest.mark.parametrize(("accumulate", "groups"), [(1, ["a", "b", "c"]), (2, ["ab", "c"]), (3, ["abc"]), (9, ["abc"])])
def test_a_step_takes_the_mean_gradient_of_its_batches_and_the_last_group_of_an_epoch_too(accumulate, groups) -> None:
    net, still = network(), Still(net_ := network())
    each = {name: gradient(net, batch(name)) for name in "abc"}
    engine = trainer(net_, [batch(name) for name in "abc"], still, accumulate=accumulate)
    engine.state.max_epochs = 2  # the second epoch begins its groups anew
    engine.run()
    assert len(still.seen) == 2 * len(groups)
    for group, found in zip(groups * 2, still.seen, strict=True):
        for name, value in found.items():
            expected = torch.stack([each[x][name] for x in group]).mean(0)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # sums in another order
    assert cosine(each["a"], each["b"]) < 0.99  # one batch would not do


def test_two_batches_of_one_are_a_step_of_a_batch_of_two() -> None:
    first, second = batch("a"), batch("b")
    both = {key: first[key] + second[key] if key == "case" else torch.cat([first[key], second[key]]) for key in first}
    together, apart = descended(network(), [both]), descended(network(), [first, second], accumulate=2)
    for name, moved in together.items():
        torch.testing.assert_close(apart[name], moved, rtol=1e-4, atol=1e-6)


def test_the_norm_that_is_clipped_is_that_of_the_whole_group() -> None:
    net = network()
    moved = descended(net, [batch("a"), batch("b")], GradientClip(net, max_norm=1e-3), accumulate=2)
    assert float(torch.cat([x.flatten() for x in moved.values()]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_loss_that_is_no_number_in_the_middle_of_a_group_spares_the_weights() -> None:
    net, bad = network(), batch("b")
    bad["fixed_image"][:] = torch.nan
    before = copy.deepcopy(net.state_dict())
    engine: Any = trainer(net, [batch("a"), bad], accumulate=2)
    NanGuard().attach(engine)
    with pytest.raises(TrainingDiverged, match="iteration 2, case b"):
        engine.run()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# half precision


class Dtypes:
    """What a network's convolutions and the loss saw."""

    def __init__(self, net: nn.Module, engine: SupervisedTrainer) -> None:
        self.convolved, self.loss = set[torch.dtype](), set[torch.dtype]()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_hook(lambda _m, _i, out: self.convolved.add(out.dtype))
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._note)

    def _note(self, engine: Any) -> None:
        output = engine.state.output
        self.loss |= {output["loss"].dtype, *(value.dtype for value in output["pred"].values())}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cascades", [1, 2])
@pytest.mark.parametrize(("backbone", "dims"), [("resnet18", 2), ("vgg16", 2), ("alexnet", 3)])
def test_in_half_precision_the_network_alone_is_and_the_gradient_is_nearly_the_same(
    backbone, dims, cascades, checkpointing
) -> None:
    items = batch("a", (33,) * 2 if dims == 2 else (18,) * 3)
    net = network(backbone, dims)
    expected = gradient(net, items, cascades=cascades)
    checkpointed(net, checkpointing)
    engine = trainer(net, [items], still := Still(net), amp=True, cascades=cascades)
    dtypes = Dtypes(net, engine)
    engine.run()
    assert dtypes.convolved == {torch.bfloat16} and dtypes.loss == {torch.float32}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in still.seen[0].values())
    assert cosine(expected, still.seen[0]) > 0.9


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16", "alexnet"])
def test_displacements_of_half_precision_are_within_a_tenth_of_a_voxel_but_for_one_in_a_hundred(backbone: str) -> None:
    pair, *_ = prepare_batch(batch("a", (65, 65)))
    net = network(backbone).eval()
    with torch.no_grad():
        full = RegistrationInferer()(pair, net)["displacement"]
        with torch.autocast("cpu", torch.bfloat16):
            half = RegistrationInferer()(pair, net)["displacement"]
    apart = (half - full).abs()  # the largest of all depends on the kernels: 0.102 in torch 2.8, which has others
    assert full.abs().max() > 0.5 and 0 < apart.flatten().quantile(0.99) < 0.1 and apart.max() < 0.2


def test_thin_volumes_are_refused_in_half_precision_on_the_cpu() -> None:
    for amp, shape in ((False, (17, 64, 64)), (True, (18, 64, 64)), (True, (16, 16))):
        check_amp(amp, CPU, shape)
    check_amp(True, torch.device("cuda"), (17, 64, 64))
    with pytest.raises(InputError, match=r"--amp True: .* \(64, 64, 17\); leave it out"):
        check_amp(True, CPU, (64, 64, 17))


@pytest.mark.parametrize("amp", [False, True])
def test_flat_images_have_finite_losses_and_gradients(amp: bool) -> None:
    net = network()
    engine = trainer(net, [batch("flat", flat=True)], GradientClip(net), amp=amp)
    engine.run()  # the clip would stop what is not finite
    assert engine.state.output["loss"].isfinite()
    assert all(p.isfinite().all() for p in net.parameters())


def test_float16_gradients_are_scaled_and_arrive_in_their_own_scale() -> None:
    net = network()
    expected = gradient(net, batch("a"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer(net, [batch("a")], still := Still(net), scaler=scaler, amp=True, dtype=torch.float16).run()
    assert cosine(expected, still.seen[0]) > 0.99  # 0.9977 to 0.9999: processors add up float16 in their own ways
    norms = [torch.cat([x.flatten() for x in g.values()]).norm() for g in (expected, still.seen[0])]
    assert float(norms[1] / norms[0]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_that_is_too_large_is_halved_and_its_step_left_out(fused: bool) -> None:
    net, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = copy.deepcopy(net.state_dict())
    clip = GradientClip(net, scaler=scaler)
    engine = trainer(net, [batch("a")], clip, scaler=scaler, amp=True, dtype=torch.float16)
    engine.optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    engine.run()
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_gradient_that_is_no_number_at_any_scale_ends_the_training() -> None:
    net, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0)
    items = batch("a")
    items["fixed_image"][:] = torch.nan
    engine = trainer(net, [items] * 9, GradientClip(net, scaler=scaler), scaler=scaler, amp=True, dtype=torch.float16)
    with pytest.raises(TrainingDiverged, match="iteration 3"):  # 2, 1, then a half
        engine.run()


@pytest.mark.parametrize("units", [False, True])
def test_half_precision_on_a_cpu_without_its_units_is_warned_of_and_no_overlay_takes_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, units: bool
) -> None:
    monkeypatch.setattr(step, "half_pays", lambda _: units)
    step.check_amp(True, CPU, (64, 64))
    assert ("no bfloat16 units" in caplog.text) is not units
    overlay = (Path(__file__).parents[2] / "configs" / "synthetic.yaml").read_text()
    assert "amp: $regpipe.engines.step.half_pays(@device)" in overlay


def test_float16_is_for_gpus_without_bfloat16_and_alone_is_scaled(monkeypatch) -> None:
    gpu = torch.device("cuda")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert half_precision(gpu) == dtype and half_precision(CPU) == torch.bfloat16
    for amp in (False, True):
        assert not gradient_scaler(CPU, amp=amp).is_enabled()


# checkpointing


@pytest.mark.parametrize("structures", [0, 2])
@pytest.mark.parametrize(("backbone", "dims"), [("resnet18", 2), ("vgg16", 2), ("alexnet", 3)])
def test_checkpointing_changes_no_gradient(backbone, dims, structures) -> None:
    items = batch("a", (33,) * 2 if dims == 2 else (17,) * 3)
    net = network(backbone, dims, structures=structures)
    plain = gradient(net, items)
    found = gradient(checkpointed(net, True), items)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], value) for name, value in plain.items())


def test_checkpointing_lets_go_of_most_activations() -> None:
    def kept(net: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(prepare_batch(batch("a", (65, 65)))[0])
        return sum(sizes.values()) - sum(p.nbytes for p in net.parameters())

    assert kept(checkpointed(network(), True)) < 0.25 * kept(network())


@pytest.mark.parametrize("other", [SymNet(2), VoxelMorph(2)])
def test_a_network_that_cannot_checkpoint_is_refused_by_name(other: nn.Module) -> None:
    assert checkpointed(other, False) is other
    with pytest.raises(InputError, match=f"--checkpointing True: {type(other).__name__}"):
        checkpointed(other, True)


# the optimiser


def test_the_fused_optimiser_takes_the_steps_of_the_plain_one() -> None:
    start, plain, fused = (network() for _ in range(3))
    optimisers = [torch.optim.AdamW(net.parameters(), lr=1e-3, fused=f) for net, f in ((plain, False), (fused, True))]
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for ours, theirs in zip(plain.parameters(), fused.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for old, ours, theirs in zip(start.parameters(), plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
        assert (ours - old).abs().max() > 1e-3


def test_all_events_of_monais_iteration_come_in_its_order_with_its_outputs() -> None:
    def told(engine: SupervisedTrainer) -> tuple[list[str], dict[str, Tensor], Tensor]:
        seen: list[str] = []
        for event in IterationEvents:
            if event in engine._allowed_events:
                engine.add_event_handler(event, lambda _, name=event.name: seen.append(name))
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("end"))
        engine.run()
        return seen, engine.state.output["pred"], engine.state.output["loss"]

    theirs: Any = trainer(first := network(), [batch("a"), batch("b")])
    theirs._process_function = theirs._iteration
    ours = trainer(second := network(), [batch("a"), batch("b")])
    (events, pred, loss), (expected, their_pred, their_loss) = told(ours), told(theirs)
    assert events == expected and torch.equal(loss, their_loss)
    assert all(torch.equal(pred[name], value) for name, value in their_pred.items())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
