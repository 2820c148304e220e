"""Is this installation sound? A report fit for a bug ticket; and what memory each task takes on a grid."""

from __future__ import annotations

import getpass
import platform
import re
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regpipe.cli.checkup import Check, checks
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.inference import memory
from regpipe.inference.memory import DRY_STEPS
from regpipe.losses.terms import RegistrationLoss
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import console, machine
from regpipe.utils.errors import InputError
from regpipe.utils.versions import versions

NAME = r"[^\\/\s:'\",;]+"
PATH = re.compile(rf"(?!\d+/\d+\b)(?<![\w.~-])(?:[A-Za-z]:|{NAME})?(?:[\\/]{NAME})+[\\/]?")


def examine() -> Iterator[str]:
    """Lines of a report, each check as it is done: PASS or FAIL, seconds, what was found or what to do.

    No path, no user's and no machine's name is in it.

    Raises:
        SystemExit: with 1 after all of them, where one failed.
    """
    found = versions()
    console.tell(versions=found)
    yield f"python {found.pop('python')}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {number or 'is missing'}" for name, number in found.items())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield f"{cpu}, {machine.free() / machine.GIB:.1f} GiB of memory free; GPU {', '.join(gpus) or 'none'}"
    results: dict[str, dict[str, Any]] = {}
    for check in checks():
        results[check.name] = _done(check)
        console.tell(checks=results)
        yield "{status}  {seconds:4.1f} s  {name}: {said}".format(name=check.name, **results[check.name])
    failed = [name for name, result in results.items() if result["status"] == "FAIL"]
    if failed:
        yield f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
        raise SystemExit(1)
    yield "all is well"


def _done(check: Check) -> dict[str, Any]:
    began, status = time.perf_counter(), "PASS"
    try:
        said = check.run()
    except Exception as error:  # whatever it is, the others are done, and it is told
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        status, said = "FAIL", f"{public(what)} ({Path(place.filename).name}:{place.lineno}); {check.remedy}"
    return {"status": status, "seconds": round(time.perf_counter() - began, 2), "said": said}


def public(text: str) -> str:
    """A text without the folders of its paths, and without the names of this user and this machine."""
    text = PATH.sub(lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], text)
    for name in sorted(_private(), key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", "***", text)
    return text


def _private() -> Iterator[str]:
    yield from (name for name in (socket.gethostname(), Path.home().name) if name)
    try:
        yield getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's number without a name
        return


def memory_table(
    shape: Sequence[int], device: str | None = None, backbone: str = "resnet18", structures: int = 0
) -> Iterator[str]:
    """Lines of a table: what each task takes on a working grid, this process included, and whether it is free.

    Raises:
        InputError: not 2 or 3 sides of 8 voxels or more, no such device or backbone.
    """
    if len(shape) not in (2, 3) or min(shape) < 8:
        raise InputError(f"--shape {','.join(map(str, shape))}: give 2 or 3 sides of at least 8 voxels")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place != "cpu" and not (place.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"--device {place}: is not here; choose cpu" + (" or cuda" * torch.cuda.is_available()))
    free, libraries = machine.free(place), machine.held() if place == "cpu" else 0
    yield f"{backbone}, grid {'x'.join(map(str, shape))}, {place}: {free / machine.GIB:.1f} GiB free"
    yield f"{'task':<36}{'peak, GiB':>10}  fits"
    rows = []
    for task, needed in _tasks(shape, place, backbone, structures):
        rows.append({"task": task, "peak_gib": (libraries + needed) / machine.GIB, "fits": needed <= free})
        yield _memory_line(rows[-1])
    files = memory.native(shape, shape)
    peak = (machine.held() + files) / machine.GIB
    rows.append({"task": "files of images as large (CPU)", "peak_gib": peak, "fits": files <= machine.free()})
    yield _memory_line(rows[-1])
    console.tell(device=place, free_gib=free / machine.GIB, tasks=rows)


def _memory_line(row: Mapping[str, Any]) -> str:
    return f"{row['task']:<36}{row['peak_gib']:>10.2f}  {'yes' if row['fits'] else 'no'}"


def _tasks(shape: Sequence[int], device: str, backbone: str, structures: int) -> Iterator[tuple[str, int]]:
    """Task and what it takes beyond the libraries."""
    network = SymmetricNet(len(shape), backbone, structures=structures)
    weights = 4 * sum(p.numel() for p in network.parameters())
    refiner = make_refiner(DRY_STEPS, refinement_loss("lncc", structures=structures))
    yield "registration, network", weights + memory.inference(RegistrationInferer(), network, shape, device=device)
    refining = RegistrationInferer(refiner=refiner)
    yield "registration, network and --refine", weights + memory.inference(refining, network, shape, device=device)
    from_zero = ZeroInferer(zero_refiner())
    yield "registration from zero", memory.inference(from_zero, torch.nn.Identity(), shape, device=device)
    loss = RegistrationLoss({"lncc": 1.0, "diffusion": 0.7, "divergence": 0.1}, window=7)
    training = memory.training(RegistrationInferer(), network, loss, shape, device=device)
    yield "training, a pair at a time", weights + training
