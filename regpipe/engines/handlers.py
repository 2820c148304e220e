"""Handlers around an iteration: what is learnt, stop at NaN, clip, average, show progress, keep the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader, ValidationHandler
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from regpipe.engines.inferers import require_model
from regpipe.networks.weights import read_state_dict, weights_now
from regpipe.utils import console
from regpipe.utils.distributed import of_first
from regpipe.utils.errors import InputError
from regpipe.utils.files import save_tensors


class TrainingDiverged(InputError):
    """A loss term is NaN or infinite."""


class NanGuard:
    """Stops training before a NaN or infinite loss reaches the weights; names the term and the case."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output: Any = engine.state.output
        bad = [name for name, value in terms_of(output).items() if not math.isfinite(value)]
        if bad:
            named = ", ".join(name for name in bad if name != "loss") or "loss"
            raise TrainingDiverged(
                f"loss term {named} is not finite at iteration {engine.state.iteration}, "
                f"{_cases(engine)}: look at that case's images, or lower --learning_rate in another --ckpt_dir; "
                "the last checkpoint and the best model are untouched"
            )


def terms_of(output: Mapping[str, Any]) -> dict[str, float]:
    """The loss terms in a trainer's ``engine.state.output``; of another step than ours the loss alone."""
    return output["terms"] if "terms" in output else {"loss": float(output[Keys.LOSS])}


def _cases(engine: Engine) -> str:
    batch: Any = engine.state.batch
    return "case " + ", ".join(batch["case"])


class GradientClip:
    """Scales gradients down to a total norm, so that one odd pair does not undo an epoch.

    A gradient that is not finite ends the training. With a ``scaler`` (``engines.step``) it does so only at a scale
    below 1: float16 finds its scale by overflowing, and such steps are skipped.
    """

    def __init__(
        self, network: nn.Module, *, max_norm: float = 1.0, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.network, self.max_norm, self.scaler = network, max_norm, scaler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        searching = self.scaler is not None and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not (torch.isfinite(norm) or searching):
            raise TrainingDiverged(
                f"the gradient is not finite at iteration {engine.state.iteration}, "
                f"{_cases(engine)}; the last checkpoint is untouched"
            )


class Budget:
    """Ends training after the epoch in which its wall-clock seconds are used up; without a number, never.

    Validation counts. The seconds are saved with the run, so that those before a stop count too.
    """

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise InputError(f"--budget_seconds {seconds}: give more than 0, or leave it out for no limit")
        self.seconds, self._before, self._from = seconds, 0.0, math.nan

    @property
    def spent(self) -> float:
        """Share of the seconds used so far; 0 without a limit. The learning rate's schedule follows it.

        It is measured by the clock of rank 0, so that all processes stop together: call it on all of them.
        """
        return of_first(self._used()) / self.seconds if self.seconds else 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        self._from = time.monotonic()
        self._end(engine)  # a run whose seconds were spent already has nothing left to do

    def _end(self, engine: Engine) -> None:
        if self.spent >= 1:
            engine.terminate()

    def _used(self) -> float:
        return self._before + (0.0 if math.isnan(self._from) else time.monotonic() - self._from)

    def state_dict(self) -> dict[str, float]:
        return {"used": self._used()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._before, self._from = state["used"], math.nan


class StructuresFirst:
    """In the first share of the training the network learns structures only, see ``regpipe.SymmetricNet``.

    ``now`` is True during that share; the training step, the validation and the weight average look at it.

    Args:
        network: without DDP's wrapper.
        share: of the epochs, and of the seconds of a ``budget``: whichever end first. It ends once: a run that goes on
            with more of them does not return to it.
        budget: the time limit.

    Raises:
        InputError: the share is not in [0, 1), or the network sees no structures.
    """

    def __init__(self, network: nn.Module, share: float, budget: Budget) -> None:
        if not (isinstance(share, int | float) and 0 <= share < 1):
            raise InputError(f"--structures_first {share}: give a share of the training, like 0.3; 0 for none")
        if share and getattr(network, "anatomy", None) is None:
            raise InputError("--structures_first: no structures to see; give --label_ids, and anatomy a loss weight")
        self.share, self.budget, self.ended, self.now = share, budget, False, False

    def attach(self, engine: Engine) -> None:
        if self.share:
            engine.add_event_handler(Events.EPOCH_STARTED, self._choose)

    def _choose(self, engine: Engine) -> None:
        within = engine.state.epoch <= int(self.share * (engine.state.max_epochs or 0))
        self.ended = self.ended or not within or self.budget.spent >= self.share
        self.now = not self.ended

    def state_dict(self) -> dict[str, bool]:
        return {"ended": self.ended}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        self.ended = state.get("ended", False)


class WeightAverage:
    """The mean of the network's weights over about the last ``batches``: what is validated and kept as the model.

    An exponential moving average (Polyak & Juditsky 1992; torch's ``AveragedModel``). Early in the training, while
    ``batches`` exceeds a tenth of those so far, it runs over that tenth. It begins after the epochs of
    ``StructuresFirst``. The training itself is not changed.

    Args:
        network: without DDP's wrapper.
        batches: 0 for none: ``network`` here is the one given.
        structures: weights of its epochs are left out.

    Raises:
        InputError: not a number of batches.
    """

    def __init__(self, network: nn.Module, batches: int, *, structures: StructuresFirst | None = None) -> None:
        if not (isinstance(batches, int) and batches >= 0):
            raise InputError(f"--average {batches}: give a number of batches, 0 for none")
        self.source, self.batches, self.structures = network, batches, structures
        self.network = AveragedModel(network, multi_avg_fn=self._average) if batches else network

    def attach(self, engine: Engine) -> None:
        if self.batches:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)

    def _update(self) -> None:
        if self.structures is None or not self.structures.now:
            self.network.update_parameters(self.source)  # type: ignore[operator]  # an AveragedModel

    def _average(self, kept: Sequence[Tensor], new: Sequence[Tensor], count: Tensor | int) -> None:
        share = max(1 / self.batches, 10 / (10 + int(count)))
        for mean, weight in zip(kept, new, strict=True):
            mean.lerp_(weight, share)

    def state_dict(self) -> dict[str, Any]:
        return self.network.state_dict() if self.batches else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.batches:
            self.network.load_state_dict(state)


class TrainedModel(CheckpointLoader):
    """MONAI's, of the model in ``ckpt_dir``, which is not looked for where the handler is disabled.

    Raises:
        InputError: as ``engines.inferers.require_model``.
    """

    def __init__(self, ckpt_dir: str, network: nn.Module, *, map_location: Any = None) -> None:
        super().__init__(require_model(ckpt_dir, network), {"model": network}, map_location=map_location)


class Validation(ValidationHandler):
    """MONAI's, except in the epochs of ``StructuresFirst``, in which nothing is registered."""

    def __init__(self, interval: int, validator: Evaluator, *, structures: StructuresFirst | None = None) -> None:
        super().__init__(interval, validator)
        self.structures = structures

    def __call__(self, engine: Engine) -> None:
        if self.structures is None or not self.structures.now:
            super().__call__(engine)


class EpochSeed:
    """Seeds torch at the start of each epoch from the run's seed, the epoch and the rank.

    No two processes then draw the same random motion, and a resumed process draws what it would have drawn, although a
    checkpoint holds the random state of rank 0 only. A single process also draws other numbers than without it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        place = engine.state.epoch * idist.get_world_size() + idist.get_rank()
        torch.manual_seed(hash((self.seed, place)))


class Progress:
    """One bar over the whole training, with the running loss terms, the key metric and the time left."""

    def __init__(self, evaluator: Engine) -> None:
        self.evaluator = evaluator

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE | Events.EXCEPTION_RAISED, self._close)

    def _open(self, engine: Engine) -> None:
        total = (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0)
        self.bar = console.Progress(
            what="training", unit="steps", total=total, initial=engine.state.iteration, leave=True
        )

    def _step(self, engine: Engine) -> None:
        best: Any = self.evaluator.state
        output: Any = engine.state.output
        shown = {"epoch": engine.state.epoch, **{k: f"{v:.4f}" for k, v in terms_of(output).items()}}
        if best.best_metric_epoch > 0:
            shown["best"] = f"{best.best_metric:.4f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def _close(self, engine: Engine, *error: BaseException) -> None:
        self.bar.close()
        if error:
            raise error[0]  # Ignite takes an error that a handler saw for handled


class BestModel:
    """Saves the network's weights to ``path`` whenever the evaluator's key metric is the best so far.

    Attach it to the evaluator. Unlike MONAI's ``CheckpointSaver``, which keeps its own list of scores, it goes by
    the engine's ``best_metric``, which ``engines.run`` brings back: a resumed run does not take its first epoch for
    the best. The weights are saved with the run and come back with it: those in the file may be of a later epoch,
    whose state was lost.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.network, self.path = network, Path(path)
        self._best: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if idist.get_rank() == 0 and engine.state.best_metric_epoch == engine.state.epoch:  # type: ignore[attr-defined]
            self._best = weights_now(self.network)
            save_tensors(self.path, self._best)

    def state_dict(self) -> dict[str, Tensor]:
        return self._best

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if idist.get_rank() > 0:
            return
        self._best = dict(state)
        if self._best and not self._written():
            save_tensors(self.path, self._best)

    def _written(self) -> bool:
        try:
            held = read_state_dict(self.path)
        except InputError:  # missing or broken
            return False
        return held.keys() == self._best.keys() and all(torch.equal(held[k], v) for k, v in self._best.items())


def stopper(patience: int, trainer: Engine) -> EarlyStopping:
    """Ends a training after so many validations without a better key metric."""
    return EarlyStopping(patience, _key_metric, trainer)


def _key_metric(engine: Engine) -> float:
    state: Any = engine.state
    return float(state.metrics[state.key_metric_name])
