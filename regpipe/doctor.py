"""Is this installation sound? Each check does the real thing in small."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch

from regpipe import console, memory, transforms
from regpipe.encoders import BACKBONES
from regpipe.engines import RegistrationInferer, ZeroInferer
from regpipe.errors import InputError
from regpipe.fields import register
from regpipe.losses import RegistrationLoss
from regpipe.memory import DRY_STEPS
from regpipe.metrics import ncc
from regpipe.network import SymmetricNet
from regpipe.phantoms import make_pair
from regpipe.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.versions import versions


def examine() -> Iterator[str]:
    """Lines of a report, each check as it is done.

    Raises:
        Exception: whatever a failed check raised: it is what a bug report needs.
    """
    found = versions()
    console.tell(versions=found)
    yield f"python {found.pop('python')}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {number or 'is missing'}" for name, number in found.items())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield f"CPU threads {torch.get_num_threads()}, GPU {gpu}"
    checks: dict[str, Callable[[], str]] = {
        "backbones": _backbones,
        "training on one phantom": _training,
        "displacement read by ITK": _itk,
    }
    results = {}
    for name, check in checks.items():
        results[name] = check()
        console.tell(checks=results)
        yield f"{name}: {results[name]}"
    yield "all is well"


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
    free, libraries = memory.free(place), memory.held() if place == "cpu" else 0
    yield f"{backbone}, grid {'x'.join(map(str, shape))}, {place}: {free / memory.GIB:.1f} GiB free"
    yield f"{'task':<36}{'peak, GiB':>10}  fits"
    rows = []
    for task, needed in _tasks(shape, place, backbone, structures):
        rows.append({"task": task, "peak_gib": (libraries + needed) / memory.GIB, "fits": needed <= free})
        yield _memory_line(rows[-1])
    files = memory.native(shape, shape)
    peak = (memory.held() + files) / memory.GIB
    rows.append({"task": "files of images as large (CPU)", "peak_gib": peak, "fits": files <= memory.free()})
    yield _memory_line(rows[-1])
    console.tell(device=place, free_gib=free / memory.GIB, tasks=rows)


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


def _backbones() -> str:
    for dim in (2, 3):
        pair = torch.rand(1, 2, *(24,) * dim)
        for backbone in BACKBONES:
            net = SymmetricNet(dim, backbone).eval()
            with torch.no_grad():
                swapped = net(pair.flip(1))
                if not torch.allclose(net(pair), -swapped, atol=1e-6):
                    raise RuntimeError(f"{backbone} in {dim}D is not symmetric on this machine")
    return ", ".join(BACKBONES) + " build and are symmetric in 2D and 3D"


def _training() -> str:
    phantom = make_pair("mr", (48, 48), seed=0)
    fixed, moving = (torch.tensor(a)[None, None] for a in (phantom.fixed_image, phantom.moving_image))
    torch.manual_seed(0)
    net, loss = SymmetricNet(2, "resnet18"), RegistrationLoss({"lncc": 1.0, "diffusion": 1.0})
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(30):
        registration = register(fixed, moving, net(torch.cat([fixed, moving], 1)))
        optimizer.zero_grad()
        loss(registration._asdict(), {"fixed_image": fixed, "moving_image": moving}).backward()
        optimizer.step()
    before, after = ncc(fixed[0, 0], moving[0, 0]), ncc(fixed[0, 0], registration.warped_moving[0, 0].detach())
    if not after > before:
        raise RuntimeError(f"30 steps of training did not raise the correlation: {before:.3f} to {after:.3f}")
    return f"correlation {before:.3f} before, {after:.3f} after 30 steps"


def _itk() -> str:
    field = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)
    affine = np.diag([0.9, 1.1, 3.0, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "displacement.nii.gz"
        transforms.write_displacement(path, field, affine)
        read = itk.array_from_image(itk.imread(str(path), itk.Vector[itk.F, 3]))
    if not np.array_equal(read.transpose(3, 2, 1, 0), field):
        raise RuntimeError("ITK reads another field than was written")
    return "equal to what was written"
