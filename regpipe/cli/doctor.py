"""``regpipe doctor``: whether the installation works, as a report for a bug ticket; how much memory a grid takes."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from nibabel.affines import apply_affine
from packaging.requirements import Requirement

from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.fields.algebra import register
from regpipe.inference import memory
from regpipe.inference.memory import DRY_STEPS
from regpipe.io import itk_bridge
from regpipe.io.images import resample
from regpipe.io.source import Source
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.measures import ncc
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.scenes import make_pair
from regpipe.transforms import affine, export
from regpipe.utils import console, machine
from regpipe.utils.errors import InputError
from regpipe.utils.versions import installed, versions

NAME = r"[^\\/\s:'\",;]+"
PATH = re.compile(rf"(?!\d+/\d+\b)(?<![\w.~-])(?:[A-Za-z]:|{NAME})?(?:[\\/]{NAME})+[\\/]?")
REMEDY = "pip install --upgrade --force-reinstall regpipe; with a GPU, a driver that suits torch's CUDA"


def examine() -> Iterator[str]:
    """Lines of a report; for each check PASS or FAIL, seconds, what was found or what to do.

    The report names no folder, no user and no machine.

    Raises:
        SystemExit: with 1 at the end, where a check failed.
    """
    found = versions()
    console.tell(versions=found)
    yield f"python {found.pop('python')}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {number or 'is missing'}" for name, number in found.items())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield f"{cpu}, {machine.free() / machine.GIB:.1f} GiB of memory free; GPU {', '.join(gpus) or 'none'}"
    results: dict[str, dict[str, Any]] = {}
    for name, check in checks().items():
        results[name] = _done(check)
        console.tell(checks=results)
        yield "{status}  {seconds:4.1f} s  {name}: {said}".format(name=name, **results[name])
    failed = [name for name, result in results.items() if result["status"] == "FAIL"]
    if failed:
        yield f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
        raise SystemExit(1)
    yield "all is well"


def _done(check: Callable[[], str]) -> dict[str, Any]:
    began, status = time.perf_counter(), "PASS"
    try:
        said = check()
    except Exception as error:  # a check that fails, for whatever reason, does not keep the others from running
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        status, said = "FAIL", f"{public(what)} ({Path(place.filename).name}:{place.lineno}); {REMEDY}"
    return {"status": status, "seconds": round(time.perf_counter() - began, 2), "said": said}


def public(text: str) -> str:
    """A text without the folders of its paths, and without the names of this user and this machine."""
    text = PATH.sub(lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], text)
    for name in filter(None, (platform.node(), Path.home().name)):
        text = re.sub(rf"\b{re.escape(name)}\b", "***", text)
    return text


def checks() -> dict[str, Callable[[], str]]:
    """Each check by its name: it says what it found, and raises where that is wrong."""
    devices = ("cpu", *["cuda"] * torch.cuda.is_available())
    trained = {f"training on {device}": lambda device=device: training(device) for device in devices}
    return {"packages": packages, **trained, "a phantom registered": registration}


def packages() -> str:
    """The packages that regpipe needs, at the versions that it needs."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("regpipe") or ()]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one: installed(one.name) for one in needed}
    wrong = [
        f"{one} ({version or 'missing'})"
        for one, version in found.items()
        if not version or not one.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        raise RuntimeError(f"wanted {', '.join(wrong)}")
    return f"{len(needed)} as wanted"


def training(device: str) -> str:
    """A few steps on a volume: convolution, integration, warping, losses and their gradients."""
    phantom = make_pair("mr", (24, 24, 24), seed=0)
    fixed, moving = (torch.tensor(x, device=device)[None, None] for x in (phantom.fixed_image, phantom.moving_image))
    torch.manual_seed(0)
    net = SymmetricNet(3, "resnet18").to(device)
    loss = RegistrationLoss({"lncc": 1.0, "diffusion": 1.0})
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(10):
        found = register(fixed, moving, net(torch.cat([fixed, moving], 1)))
        optimizer.zero_grad()
        loss(found._asdict(), {"fixed_image": fixed, "moving_image": moving}).backward()
        optimizer.step()
    before, after = (ncc(fixed[0, 0], image[0, 0].detach()) for image in (moving, found.warped_moving))
    if not after > before + 0.01:
        raise RuntimeError(f"10 steps of training do not raise the correlation: {before:.3f} to {after:.3f}")
    return f"correlation {before:.3f} before, {after:.3f} after 10 steps"


def registration() -> str:
    """Images that ITK wrote are registered, from the affine stage on; ITK reads the transforms, and landmarks meet."""
    phantom, place = make_pair("mr", (64, 64), seed=1), np.diag([-0.9, -1.1, 1.0])
    with tempfile.TemporaryDirectory() as aside:
        files = [Path(aside) / f"{side}.nii.gz" for side in ("fixed", "moving")]
        for file, array in zip(files, (phantom.fixed_image, phantom.moving_image), strict=True):
            itk.imwrite(itk_bridge.to_itk(array, place), str(file))
        source = Source()
        fixed, moving = map(source.image, files)
        frame = affine.align(fixed, moving).matrix @ fixed.affine
        aligned = resample(moving, frame, fixed.array.shape, order=1)
        pair = torch.tensor(np.stack([fixed.array, aligned]), dtype=torch.float32)[None]
        found = ZeroInferer(zero_refiner(steps=60), repair=True)(pair, torch.nn.Identity())
        u, inverse = (found[name][0].numpy() for name in ("displacement", "inverse"))
        one, other = ((image.array.shape, image.affine) for image in (fixed, moving))
        transform = export.pair_transform(u, inverse, fixed.affine, frame, one, other)
        about = (export.image_file(file, source) for file in files)
        export.write_transforms(aside, transform, *about, formats=["itk"])
        ways = [itk.transformread(str(Path(aside) / f"{way}.h5"))[0] for way in export.WAYS]
    p, q = (apply_affine(place, x) * [-1, -1] for x in (phantom.fixed_landmarks, phantom.moving_landmarks))  # LPS mm
    moved, back = (
        [list(way.TransformPoint(x)) for x in points.tolist()] for way, points in zip(ways, (p, q), strict=True)
    )
    before, *after = (float(np.linalg.norm(a - b, axis=1).mean()) for a, b in ((p, q), (moved, q), (back, p)))
    told = f"landmarks {before:.2f} mm apart before, {after[0]:.2f} and {after[1]:.2f} mm after, both ways"
    if not max(after) < 0.35 * before:
        raise RuntimeError(told)
    return told


def memory_table(
    shape: Sequence[int], device: str | None = None, backbone: str = "resnet18", structures: int = 0
) -> Iterator[str]:
    """Lines of a table: the memory that each task takes on a working grid, this process included, and whether it fits.

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
