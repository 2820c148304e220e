"""One step of training: half precision, gradients accumulated over batches, activations computed again.

MONAI's ``SupervisedTrainer`` has switches of its own for the first two, which are not used: ``amp`` knows CUDA only and
hands scaled gradients to what clips them, and ``accumulation_steps`` divides an epoch's last, shorter group by the size
of a whole one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from regpipe.engines.handlers import Budget, StructuresFirst
from regpipe.losses.loss import weigh
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils.errors import InputError

log = logging.getLogger(__name__)


def half_precision(device: torch.device) -> torch.dtype:
    """The half precision of a device: bfloat16, which needs no scaling; float16 on a GPU without units for that."""
    bare_gpu = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if bare_gpu else torch.bfloat16


def half_pays(device: torch.device | str) -> bool:
    """Whether half precision is faster on a device: on a CPU without bfloat16 units it is many times slower."""
    return torch.device(device).type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_amp(amp: bool, device: torch.device, shape: Sequence[int]) -> None:
    """Raises ``InputError`` where half precision would silently go wrong.

    On the CPU, torch 2.15's gradient of a bfloat16 3D convolution is garbage where its first axis is shorter than the
    kernel (oneDNN, with AVX512-BF16): the networks' coarsest grids are, of images of up to 17 voxels.
    """
    if amp and not half_pays(device):
        log.warning("--amp True: this processor has no bfloat16 units, and is many times slower with it; leave it out")
    if amp and device.type == "cpu" and len(shape) == 3 and min(shape) < 18:
        raise InputError(
            f"--amp True: on the CPU it needs 18 voxels an axis in 3D, and the grid has {tuple(shape)}; leave it out"
        )


def gradient_scaler(device: torch.device, *, amp: bool) -> torch.amp.GradScaler:
    """Keeps float16 gradients from vanishing (Micikevicius et al., ICLR 2018); does nothing without float16."""
    return torch.amp.GradScaler(device.type, enabled=amp and half_precision(device) == torch.float16)


class TrainingStep:
    """An iteration of MONAI's trainer, for its ``iteration_update``: the same results and events in the same order.

    Beside MONAI's results the output has ``terms``, see ``losses.loss.Weighed``, and ``learning_rate``.

    The gradient of a group of ``accumulate`` batches is the mean of theirs; what is left at an epoch's end is a group
    too. ``BACKWARD_COMPLETED`` is fired once a group, when its gradient is whole and in its own scale: what then looks
    at it, or clips it, needs to know nothing of groups and scales.

    Args:
        scaler: see ``gradient_scaler``.
        amp: the network alone computes in half precision; a ``RegistrationInferer`` and the loss leave the autocast.
        accumulate: batches to a step of the optimiser.
        structures: in its epochs the network computes structures only.
        dtype: what half precision is; None: see ``half_precision``.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        *,
        amp: bool = False,
        accumulate: int = 1,
        structures: StructuresFirst | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scaler, self.amp, self.accumulate, self.dtype = scaler, amp, accumulate, dtype
        self.structures = structures

    def __call__(self, engine: Any, batch: Any) -> dict[str, Any]:
        state = engine.state
        pair, target, args, told = engine.prepare_batch(batch, state.device, engine.non_blocking, **engine.to_kwargs)
        if self.structures is not None and self.structures.now:
            told = {**told, "structures_only": True}
        state.output = {Keys.IMAGE: pair, Keys.LABEL: target}
        place, size = self._group(engine)
        engine.network.train()
        if place == 0:
            engine.optimizer.zero_grad()
        with torch.autocast(state.device.type, self.dtype or half_precision(state.device), enabled=self.amp):
            state.output[Keys.PRED] = engine.inferer(pair, engine.network, *args, **told)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        loss, state.output["terms"] = weigh(engine.loss_function, state.output[Keys.PRED], target)
        state.output[Keys.LOSS] = loss
        state.output["learning_rate"] = engine.optimizer.param_groups[-1]["lr"]  # of what is not the encoder
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        self.scaler.scale(loss / size).backward()
        if place == size - 1:
            self._descend(engine)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def _group(self, engine: Any) -> tuple[int, int]:
        """This batch's place in its group, and how many batches that has."""
        length = engine.state.epoch_length
        done = (engine.state.iteration - 1) % length
        place = done % self.accumulate
        return place, min(self.accumulate, length - done + place)

    def _descend(self, engine: Any) -> None:
        self.scaler.unscale_(engine.optimizer)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.scaler.step(engine.optimizer)  # left out where a scaled gradient was too large for float16
        self.scaler.update()


def falling(epochs: int, budget: Budget, *, warm_up: int = 0) -> Callable[[int], float]:
    """The learning rate's factor: 1 for half of the epochs, or of the budget, then down to a hundredth.

    ``warm_up``: epochs in which it rises to 1. A function: torch would save an object's attributes.
    """

    def factor(epoch: int) -> float:
        rising = (epoch + 1) / warm_up if warm_up else 1.0
        return min(1.0, rising, max(0.01, 2 - 2 * max(epoch / epochs, budget.spent)))

    return factor


def checkpointed(network: nn.Module, wanted: bool) -> nn.Module:
    """The network, told to keep no activations for the gradient but to compute them again, where that is ``wanted``.

    Raises:
        InputError: it cannot.
    """
    if wanted:
        if not isinstance(network, SymmetricNet):
            raise InputError(f"--checkpointing True: {type(network).__name__} keeps all it computes; leave it out")
        network.checkpoint()
    return network
