"""Two processes that meet as those of ``torchrun`` do, without the seconds that each would take to load torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

# loaded once, by the server that the processes are forked from
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["monai.bundle", "regpipe.engines.run", "regpipe.inference.folder", "torch.utils.tensorboard"]
)

Task = Callable[..., Any]


def together(task: Task, folder: Path, *args: Any) -> list[Any]:
    """What ``task(rank, *args)`` gives in each of two processes, started as ``torchrun`` starts them."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (port, task, folder, args), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, port: int, task: Task, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    torch.save(task(rank, *args), folder / f"{rank}.pt")
