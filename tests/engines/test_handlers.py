"""Handlers on a real trainer: nothing that is no number reaches the weights, errors surface, the best model is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from regpipe.engines.handlers import (
    BestModel,
    Budget,
    GradientClip,
    NanGuard,
    Progress,
    StructuresFirst,
    TrainingDiverged,
    Validation,
    WeightAverage,
)
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.engines.step import TrainingStep, gradient_scaler
from regpipe.fields.algebra import LAYERS
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils.errors import InputError

CPU = torch.device("cpu")


def batch(*names: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(map(ord, "".join(names))))
    fixed, moving = torch.rand(2, len(names), 1, 12, 12, generator=generator)
    return {"case": list(names), "fixed_image": fixed, "moving_image": moving}


def trainer(
    network: nn.Module, data: list[dict], loss: nn.Module, *handlers: Any, epochs: int = 1, rate: float = 0.01
) -> SupervisedTrainer:
    return SupervisedTrainer(
        CPU,
        epochs,
        data,
        network,
        torch.optim.SGD(network.parameters(), lr=rate),
        loss,
        inferer=RegistrationInferer(layers=LAYERS.in_steps(3)),
        prepare_batch=prepare_batch,
        iteration_update=TrainingStep(gradient_scaler(CPU, amp=False)),
        train_handlers=list(handlers),
        decollate=False,
    )


def evaluator(network: nn.Module, scores: list[float], *handlers: Any) -> SupervisedEvaluator:
    """An evaluator whose key metric at epoch n is ``scores[n - 1]``, whatever the network does."""
    engine = SupervisedEvaluator(
        CPU,
        [batch("a")],
        network,
        inferer=RegistrationInferer(layers=LAYERS.in_steps(1)),
        prepare_batch=prepare_batch,
        key_val_metric={"key_metric": _Score(scores)},  # type: ignore[dict-item]
        val_handlers=list(handlers),
        decollate=False,
    )
    return engine


class _Score:
    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def attach(self, engine: Any, name: str) -> None:
        def note(engine: Any) -> None:
            engine.state.metrics[name] = self.scores[engine.state.epoch - 1]

        engine.add_event_handler(Events.EPOCH_COMPLETED, note)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(2, 2, 3, padding=1)


def states(network: nn.Module, data: list[dict], loss: nn.Module, *handlers: Any) -> tuple[list[dict], Exception]:
    """The weights before each iteration, and the error that ends the training."""
    engine, seen = trainer(network, data, loss, *handlers), []
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: seen.append(copy.deepcopy(network.state_dict())))
    with pytest.raises(TrainingDiverged) as caught:
        engine.run()
    return seen, caught.value


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_term_that_is_no_number_stops_the_training_names_itself_and_its_case_and_spares_the_weights(value) -> None:
    network, loss = net(), RegistrationLoss({"diffusion": 1, "mse": 1}, window=5)
    bad = batch("case_17", "case_18")
    bad["fixed_image"][1, 0, 3, 3] = value
    # the network must not see it: then every term would be none
    seen, error = states(_Blind(network), [batch("a"), bad, batch("b")], loss, NanGuard())
    assert "loss term mse is not finite at iteration 2" in str(error)
    assert "case case_17, case_18" in str(error) and "diffusion" not in str(error)
    assert len(seen) == 2 and not same(seen[0], seen[1])
    assert same(seen[1], _Blind(network).state_dict())


class _Blind(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        return self.inner(pair.nan_to_num(posinf=0))


def test_a_sum_that_overflows_is_named_as_the_loss() -> None:
    network, loss = net(), RegistrationLoss({"mse": 1e40})  # beyond float32
    _, error = states(network, [batch("a")], loss, NanGuard())
    assert "loss term loss is not finite at iteration 1, case a" in str(error)


def test_finite_losses_pass_the_guard() -> None:
    loss = RegistrationLoss({"mse": 1})
    engine = trainer(net(), [batch("a"), batch("b")], loss, NanGuard(), epochs=2)
    engine.run()
    assert engine.state.iteration == 4


@pytest.mark.parametrize(("weight", "expected"), [(1e4, 0.25), (1e-4, None)])
def test_large_gradients_are_scaled_to_the_norm_and_small_ones_left_alone(weight, expected) -> None:
    network, loss, norms = net(), RegistrationLoss({"mse": weight}), []

    def norm(*_: Any) -> None:
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        norms.append(float(torch.cat(grads).norm()))

    engine = trainer(network, [batch("a")], loss)
    engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, norm)
    GradientClip(network, max_norm=0.25).attach(engine)
    engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, norm)
    engine.run()
    assert norms[1] == pytest.approx(expected or norms[0], rel=1e-4)
    assert (norms[0] > 0.25) == (expected is not None)


def test_a_gradient_that_is_no_number_spares_the_weights() -> None:
    class Root(nn.Module):
        """The square root of nothing: a finite value with an infinite gradient."""

        def forward(self, prediction: dict, target: dict) -> torch.Tensor:
            scale = 0.0 if "bad" in target["case"] else 1.0
            return (prediction["velocity"] * scale).square().sum().sqrt()

    network = net()
    seen, error = states(network, [batch("a"), batch("bad")], Root(), GradientClip(network))
    assert "the gradient is not finite at iteration 2, case bad" in str(error)
    assert same(seen[1], network.state_dict())


def test_the_bar_counts_all_iterations_shows_terms_and_best_and_closes(capsys, monkeypatch) -> None:
    monkeypatch.setattr("regpipe.utils.console.DELAY", 0.0)
    monkeypatch.setattr("regpipe.utils.console.LINE_EVERY", 0.0)
    loss = RegistrationLoss({"mse": 1})
    validator = evaluator(net(), [0.5])
    validator.run(1)
    progress = Progress(validator)
    engine = trainer(net(), [batch("a"), batch("b")], loss, progress, epochs=3)
    engine.run()
    assert progress.bar.n == progress.bar.total == 6
    shown = capsys.readouterr().err
    assert "epoch=3" in shown and f"mse={engine.state.output['terms']['mse']:.4f}" in shown and "best=0.5" in shown


@pytest.mark.parametrize("error", [ValueError("in the loss"), KeyboardInterrupt()])
def test_the_bar_swallows_no_error(error) -> None:
    loss = RegistrationLoss({"mse": 1})
    engine = trainer(net(), [batch("a"), batch("b")], loss, Progress(evaluator(net(), [])))

    def stop() -> None:
        raise error

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    with pytest.raises(type(error)) as caught:
        engine.run()
    assert caught.value is error


def saved(path: Path) -> Callable[[nn.Module], bool]:
    return lambda network: same(torch.load(path, weights_only=True), network.state_dict())


def change(network: nn.Module, epoch: int) -> None:
    nn.init.constant_(network.bias, epoch)  # type: ignore[arg-type]


def test_the_best_model_is_that_of_the_best_epoch(tmp_path) -> None:
    network, path = net(), tmp_path / "new" / "model.pt"
    engine = evaluator(network, [0.3, 0.7, 0.6, 0.7], BestModel(network, str(path)))
    kept = []
    for epoch in range(1, 5):
        change(network, epoch)
        engine.run(epoch)
        kept.append(float(torch.load(path, weights_only=True)["bias"][0]))
    assert kept == [1, 2, 2, 2]  # a tie is no improvement
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]  # nothing half-written beside it


def test_after_a_resume_a_worse_model_does_not_replace_a_better_one(tmp_path) -> None:
    network, path = net(), tmp_path / "model.pt"
    engine = evaluator(network, [0.8], BestModel(network, str(path)))
    engine.run(1)
    best = copy.deepcopy(network)
    later = evaluator(network, [0.8, 0.5, 0.9], BestModel(network, str(path)))
    later.state.best_metric, later.state.best_metric_epoch = 0.8, 1  # as runs.Progress brings it back
    change(network, 2)
    later.run(2)
    assert saved(path)(best)
    change(network, 3)
    later.run(3)
    assert saved(path)(network)


def test_the_best_weights_come_back_with_the_run_where_the_file_is_of_a_lost_epoch(tmp_path) -> None:
    network, path = net(), tmp_path / "model.pt"
    kept = BestModel(network, str(path))
    evaluator(network, [0.8], kept).run(1)
    best, state = copy.deepcopy(network), copy.deepcopy(kept.state_dict())
    before = path.stat().st_mtime_ns
    BestModel(network, str(path)).load_state_dict(state)
    assert path.stat().st_mtime_ns == before  # it is there already
    change(network, 2)
    evaluator(network, [0.9], BestModel(network, str(path))).run(1)
    assert not saved(path)(best)
    BestModel(network, str(path)).load_state_dict(state)
    assert saved(path)(best)
    path.write_bytes(b"")
    BestModel(network, str(path)).load_state_dict({})  # of an older version: nothing is known
    assert path.read_bytes() == b""


def test_the_model_of_a_parallel_network_is_saved_without_its_wrapper(tmp_path) -> None:
    network, path = net(), tmp_path / "model.pt"
    wrapped = nn.Module()
    wrapped.module = network
    wrapped.forward = network.forward
    evaluator(wrapped, [0.8], BestModel(wrapped, str(path))).run(1)
    assert saved(path)(network)


class Validator(SupervisedEvaluator):
    """Notes when it is asked."""

    asked: list[int]

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        self.asked.append(global_epoch)


@pytest.mark.parametrize(("share", "spent", "first"), [(0.5, 0.0, 2), (0.74, 0.2, 2), (0.5, 0.9, 0), (0.2, 0.0, 0)])
def test_structures_come_first_and_only_then_is_validated(share, spent, first) -> None:
    network = SymmetricNet(2, "alexnet", structures=1)
    validator, seen, budget = Validator(torch.device("cpu"), [], network), list[bool](), Budget(1e6)
    validator.asked = []
    budget.load_state_dict({"used": spent * 1e6})
    stage = StructuresFirst(network, share, budget)
    trainer = Engine(lambda engine, batch: seen.append(stage.now))
    stage.attach(trainer)
    Validation(1, validator, structures=stage).attach(trainer)
    trainer.run([0], max_epochs=4)
    assert seen == [True] * first + [False] * (4 - first) and validator.asked == list(range(first + 1, 5))
    again = StructuresFirst(network, share, Budget())
    again.load_state_dict(stage.state_dict())
    longer = Engine(lambda engine, batch: seen.append(again.now))
    again.attach(longer)
    longer.run([0], max_epochs=40)  # begun with more epochs it is not begun again
    assert not any(seen[4:])


@pytest.mark.parametrize(
    ("structures", "share", "told"),
    [(1, 1.0, "a share"), (1, -0.1, "a share"), (1, "half", "a share"), (0, 0.5, "no structures")],
)
def test_structures_first_that_leave_nothing_to_register_or_are_none_are_refused(structures, share, told) -> None:
    network = SymmetricNet(2, "alexnet", structures=structures)
    with pytest.raises(InputError, match=told):
        StructuresFirst(network, share, Budget())
    StructuresFirst(network, 0, Budget())  # the default needs none


def test_weights_are_averaged_over_the_last_steps_and_the_beginning_is_forgotten() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, 20)
    trainer = Engine(lambda engine, step: network.weight.data.fill_(1.0 + step))
    average.attach(trainer)
    trainer.run(range(400), max_epochs=1, epoch_length=400)
    kept: Any = average.network
    # e' = e + (w - e) / 20 of w = 1, 2, 3 ... lags 19 steps behind, once the beginning is forgotten
    assert float(kept.module.weight.detach()) == pytest.approx(400 - 19, abs=1e-2)
    again = WeightAverage(nn.Linear(1, 1, bias=False), 20)
    again.load_state_dict(average.state_dict())
    x = torch.ones(1, 1)
    assert torch.equal(again.network(x), kept(x)) and float(network.weight.detach()) == 400


def test_without_averaging_the_network_itself_is_validated() -> None:
    network = nn.Linear(1, 1)
    average = WeightAverage(network, 0)
    assert average.network is network and average.state_dict() == {}
    with pytest.raises(InputError, match="--average -1"):
        WeightAverage(network, -1)
