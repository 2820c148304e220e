"""How much memory is used and free: of this process, the machine, a container or job, a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # takes a second or two to import, and only GPUs need it

GIB = 2**30
# Of control groups, version 2 and 1: folder, files of the limit and of what is used, caches that count as free.
CONTROL_GROUPS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def held() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def held_since(before: int) -> int:
    """Bytes that the process has taken since ``before``. The C library keeps freed ones for later use."""
    return max(0, held() - before)


def free(device: str | torch.device = "cpu") -> int:
    """Free bytes: of the GPU, or of the machine within the limit of a container or job."""
    if _is_gpu(device):
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_machine(_table(Path("/proc/meminfo"))), *_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def room(memory_gib: float | None, device: str | torch.device = "cpu") -> int:
    """Bytes that a run may still take: ``free``, or what is left of ``memory_gib`` for the whole process."""
    if memory_gib is None:
        return free(device)
    if not _is_gpu(device):
        return int(memory_gib * GIB) - held()
    import torch

    return int(memory_gib * GIB) - torch.cuda.memory_allocated(device)


def share(memory_gib: float | None, device: str | torch.device = "cpu") -> int:
    """Bytes for each process that ``torchrun`` starts on this machine; call it before they take memory.

    ``memory_gib`` is for one process; free memory is for all processes on the device.
    """
    return room(memory_gib, device) // (1 if memory_gib is not None else _beside(device))


def _is_gpu(device: str | torch.device) -> bool:
    return str(device).partition(":")[0] == "cuda"


def _beside(device: str | torch.device) -> int:
    """How many processes of this job share the machine's memory, or a GPU's."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not _is_gpu(device):
        return here
    import torch

    return math.ceil(here / torch.cuda.device_count())


def _machine(table: Mapping[str, int]) -> int:
    if "MemAvailable" in table:
        return table["MemAvailable"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: the whole memory


def _limits(root: Path, listed: Path) -> list[int]:
    """Bytes left in each control group of this process that has a limit, after a first huge number."""
    left = [2**62]
    entries = listed.read_text().splitlines() if listed.exists() else []
    groups = [entry.split(":", 2)[2].strip("/").split("/") for entry in entries if entry.count(":") >= 2]
    paths = {"", *("/".join(group[:n]) for group in groups for n in range(1, len(group) + 1))}
    for path in sorted(paths):
        for top, limit, used, caches in CONTROL_GROUPS:
            folder = root / top / path
            most = _number(folder / limit)
            if most is not None:
                stat = _table(folder / "memory.stat")
                left.append(most - (_number(folder / used) or 0) + sum(stat.get(cache, 0) for cache in caches))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _table(path: Path) -> dict[str, int]:
    """``name: number`` or ``name number`` a line."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
