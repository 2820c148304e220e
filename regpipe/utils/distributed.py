"""Several processes, started by ``torchrun``, that train one model or divide a folder among them.

Without ``torchrun`` there is one process, and nothing here changes it. Rank and world size are torch's, as Ignite's
(``idist``) are, which half a second goes to import.
Every process must call whatever gathers or waits, in the same order.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regpipe.utils.errors import ENDED_TOGETHER, InputError

T = TypeVar("T")


def join(*, hours: float, nccl: bool = False) -> None:
    """Join the process group of ``torchrun``; does nothing without it, nor a second time.

    From here on ranks other than 0 print only warnings and errors. A process that ``torchrun`` ends because another
    one ended says so in a line, wherever it waits.

    Args:
        hours: how long a process waits for another one before it gives up.
        nccl: exchange tensors between GPUs by NCCL, one GPU for each process, where there are GPUs; else by gloo.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    # Not idist.initialize: under Slurm it takes the rank of the task that runs torchrun for this process's own.
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        if nccl and int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise InputError(f"more processes than the {gpus} GPUs of this machine: give --nproc_per_node {gpus}")
        torch.cuda.set_device(local % gpus)
    dist.init_process_group("nccl" if nccl and gpus else "gloo", timeout=timedelta(hours=hours))
    import ignite.distributed as idist

    idist.sync()  # now: if rank 0 alone were the first to use Ignite, it would wait for the others
    _say_when_ended()
    if rank() > 0:
        logging.getLogger("regpipe").setLevel(logging.WARNING)


def leave() -> None:
    """Wait for every process, then leave the group; does nothing without one."""
    if dist.is_initialized():
        import ignite.distributed as idist

        idist.barrier()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on others may end
        idist.finalize()


def _say_when_ended() -> None:
    """On SIGTERM print a line and end. A handler in Python would not run while the process waits for another."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        os.write(2, f"error: {ENDED_TOGETHER}\n".encode())
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """The GPU of this process, or the CPU. Ask after ``join``."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def of_first(value: T) -> T:
    """Rank 0's value, for all."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value)
    return held


def merged(part: dict[str, T]) -> dict[str, T]:
    """The entries of all processes."""
    return {name: value for held in gathered(part) for name, value in held.items()}


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a list that all have: every ``world size``-th item, each in one part only."""
    return list(items[rank() :: world_size()])


def validation_indices(count: int) -> list[int]:
    """This process's ``share`` of ``count`` cases. A process without any gets another's, for it must run too.

    ``CaseMetrics`` counts a case once.
    """
    return share(range(count)) or [rank() % count]


def parallel(network: nn.Module, *, in_parts: bool = False) -> nn.Module:
    """The network for the trainer: gradients are averaged over processes, and all begin with rank 0's weights.

    Use the network itself to save, load, clip and evaluate: its names have no prefix.
    ``in_parts``: in some steps some of the weights are not used.
    """
    if world_size() == 1:
        return network
    on_gpu = next(network.parameters()).is_cuda
    # No buffer changes (the only BatchNorm is frozen), so none is sent. Torch 2.15 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "find_unused_parameters": in_parts}
    return DistributedDataParallel(network, [torch.cuda.current_device()] if on_gpu else None, **options)


class NoWriter:
    """Stands for TensorBoard's writer on a process that does not write: takes anything, does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def writer(log_dir: str) -> Any:
    """TensorBoard's writer on rank 0; ``NoWriter`` on the others."""
    if rank() > 0:
        return NoWriter()
    from torch.utils.tensorboard import SummaryWriter  # a second or two

    return SummaryWriter(log_dir)
