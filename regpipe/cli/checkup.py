"""The checks of ``regpipe doctor``: each does the real thing in small, says what it found, raises where it is wrong."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import itk
import numpy as np
import torch
from packaging.requirements import Requirement

from regpipe.engines.inferers import ZeroInferer
from regpipe.engines.refine import zero_refiner
from regpipe.fields.algebra import integrate, register, warp
from regpipe.io import itk_bridge
from regpipe.io.images import Image, read_image
from regpipe.losses.terms import RegistrationLoss
from regpipe.metrics.measures import inverse_consistency, ncc, tre
from regpipe.networks.encoders import BACKBONES
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.scenes import make_pair
from regpipe.transforms import affine, displacement
from regpipe.utils import machine

DEVELOPERS = ("test", "docs", "notebook", "peers")  # extras that a user's installation does without
FORMATS = (".nii.gz", ".nii", ".mha", ".nrrd")
ROOM = machine.GIB  # bytes of disk
REINSTALL = "pip install --upgrade --force-reinstall {}"


class Check(NamedTuple):
    """One check: what it is called, what it does, what to do where it fails."""

    name: str
    run: Callable[[], str]
    remedy: str


def packages() -> str:
    wanted = [Requirement(text) for text in importlib.metadata.requires("regpipe") or ()]
    own = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [f"{one} ({_version(one.name) or 'missing'})" for one in own if not _met(one)]
    if wrong:
        raise RuntimeError("wanted " + ", ".join(wrong))
    extras = {name: all(map(_met, _of_extra(wanted, name))) for name in _extras()}
    return f"{len(own)} as wanted; optional: " + ", ".join(
        f"{name} {'there' if there else 'missing'}" for name, there in extras.items()
    )


def _extras() -> list[str]:
    found = importlib.metadata.metadata("regpipe").get_all("Provides-Extra") or []
    return [name for name in found if name not in DEVELOPERS]


def _of_extra(wanted: list[Requirement], extra: str) -> Iterator[Requirement]:
    return (one for one in wanted if one.marker is not None and f'"{extra}"' in str(one.marker))


def _met(wanted: Requirement) -> bool:
    return wanted.specifier.contains(_version(wanted.name) or "", prereleases=True) if _version(wanted.name) else False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def temporary_files() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path, data = Path(folder) / "a file ü", bytes(1 << 20)
        path.write_bytes(data)
        if path.read_bytes() != data:
            raise RuntimeError("what was written is not what is read")
        free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise RuntimeError(f"{free / machine.GIB:.2f} GiB are free")
    return f"can be written; {free / machine.GIB:.0f} GiB free"


def operations(device: str) -> str:
    """Integrating a constant velocity is a translation, which moves a ramp by as much; the network as on the CPU."""
    for dim in (2, 3):
        shift = torch.tensor([1.5, -2.0, 0.5][:dim], device=device)
        velocity = shift.view(1, dim, *[1] * dim).repeat(1, 1, *[12] * dim).requires_grad_()
        u = integrate(velocity)
        ramp = torch.arange(12.0, device=device).view(1, 1, 12, *[1] * (dim - 1)).expand(1, 1, *[12] * dim)
        moved = warp(ramp.contiguous(), u)
        moved.sum().backward()
        inner = (moved - ramp).detach()[:, :, 4:-4]  # of the axis along which the ramp rises
        error = max(float((u - velocity).detach().abs().max()), float((inner - 1.5).abs().max()))
        if not (error < 1e-3 and velocity.grad is not None and torch.isfinite(velocity.grad).all()):
            raise RuntimeError(f"{dim}D: a translation is off by {error:.2g} voxels, or its gradient is no number")
        torch.manual_seed(0)
        network, pair = SymmetricNet(dim, "resnet18").eval(), torch.rand(1, 2, *[24] * dim)
        with torch.no_grad():
            here, there = network(pair), network.to(device)(pair.to(device)).cpu()
        if not torch.allclose(here, there, atol=1e-2 * float(here.abs().max())):
            raise RuntimeError(
                f"{dim}D: the network gives {float((here - there).abs().max()):.2g} more than on the CPU"
            )
    return "integration, warping, convolution and gradients in 2D and 3D"


def backbones() -> str:
    for dim in (2, 3):
        pair = torch.rand(1, 2, *(24,) * dim)
        for backbone in BACKBONES:
            net = SymmetricNet(dim, backbone).eval()
            with torch.no_grad():
                swapped = net(pair.flip(1))
                if not torch.allclose(net(pair), -swapped, atol=1e-6):
                    raise RuntimeError(f"{backbone} in {dim}D is not symmetric on this machine")
    return ", ".join(BACKBONES) + " build and are symmetric in 2D and 3D"


def training() -> str:
    fixed, moving = _phantom()
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


def _phantom() -> tuple[torch.Tensor, torch.Tensor]:
    phantom = make_pair("mr", (48, 48), seed=0)
    return torch.tensor(phantom.fixed_image)[None, None], torch.tensor(phantom.moving_image)[None, None]


def both_ways() -> str:
    """A phantom registered from zero: its landmarks meet in either direction, and there and back is where one was."""
    phantom = make_pair("mr", (64, 64), seed=1)
    pair = torch.tensor(np.stack([phantom.fixed_image, phantom.moving_image]))[None]
    found = ZeroInferer(zero_refiner(steps=60), repair=True)(pair, torch.nn.Identity())
    points, errors = (phantom.fixed_landmarks, phantom.moving_landmarks), []
    for (p, q), u in ((points, found["displacement"][0]), (points[::-1], found["inverse"][0])):
        errors.append([float(tre(p, q, field, (1.0, 1.0)).mean()) for field in (torch.zeros_like(u), u)])
    back = inverse_consistency(found["displacement"][0], found["inverse"][0], (1.0, 1.0))
    told = "; ".join(f"{before:.2f} to {after:.2f}" for before, after in errors)
    if not all(after < 0.6 * before for before, after in errors) or back > 0.5:
        raise RuntimeError(f"landmarks: {told} voxels; there and back: {back:.2f} voxels")
    return f"landmark errors of {told} voxels; there and back {back:.3f}"


def affine_stage() -> str:
    """elastix finds a translation, from where the files say the images are."""
    phantom = make_pair("mr", (48, 48), seed=0)
    place, away = np.eye(3), np.eye(3)
    away[:2, 2] = (4.0, -3.0)  # RAS mm: the same image elsewhere
    pair = Image(phantom.fixed_image, place), Image(phantom.fixed_image, away)
    error = float(np.abs(affine.align(*pair, "rigid", start=place).matrix - away).max())
    if not error < 0.3:
        raise RuntimeError(f"a translation by 5 mm is off by {error:.2f} mm")
    return f"a translation by 5 mm is found to {error:.3f} mm"


def formats() -> str:
    """What ITK writes is read as it is, voxels and place; PNG too."""
    rng = np.random.default_rng(0)
    array, place = rng.normal(size=(5, 6, 7)).astype(np.float32), np.diag([-0.9, -1.1, 3.0, 1.0])
    place[:3, 3] = (10, -20, 30)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in FORMATS:
            path = Path(folder) / f"image{suffix}"
            itk.imwrite(itk_bridge.to_itk(array, place), str(path))
            read = read_image(path)
            if not (np.array_equal(read.array, array) and np.allclose(read.affine, place, atol=1e-4)):
                raise RuntimeError(f"{suffix}: another image is read than ITK wrote")
        grey = rng.integers(0, 255, (9, 8), dtype=np.uint8)
        itk.imwrite(itk.image_from_array(grey.T.copy()), str(Path(folder) / "image.png"))
        if not np.array_equal(read_image(Path(folder) / "image.png").array, grey):
            raise RuntimeError(".png: another image is read than ITK wrote")
    return f"{' '.join(FORMATS)} .png, written by ITK, are read as they are"


def transform_files() -> str:
    """A displacement and a composite, written by regpipe, are to ITK what they are to us."""
    field = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)
    place, matrix = np.diag([0.9, 1.1, 3.0, 1.0]), np.eye(4)
    matrix[:3, 3] = (1.0, 2.0, 3.0)  # RAS mm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "displacement.nii.gz"
        displacement.write_displacement(path, field, place)
        read = itk.array_from_image(itk.imread(str(path), itk.Vector[itk.F, 3]))
        if not np.array_equal(read.transpose(3, 2, 1, 0), field):
            raise RuntimeError("ITK reads another displacement field than was written")
        composite = Path(folder) / "composite.h5"
        parts = itk_bridge.field_part(field, place), itk_bridge.affine_part(matrix)
        composite.write_bytes(itk_bridge.composite_h5(*parts))
        (transform,) = itk.transformread(str(composite))
        voxel = (2, 3, 4)
        point = place[:3, :3] @ voxel * [-1, -1, 1]  # LPS mm
        moved = np.array(transform.TransformPoint(itk.Point[itk.D, 3](point.tolist())))
    wanted = point + field[(slice(None), *voxel)] + np.array([-1.0, -2.0, 3.0])
    if not np.allclose(moved, wanted, atol=1e-4):
        raise RuntimeError(f"ITK moves a point of a composite by {np.abs(moved - wanted).max():.2g} mm too far")
    return "displacement and composite are equal to what was written"


def pages() -> str:
    """A curve for TensorBoard is read again; the report's page and a figure are made."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from regpipe.report.qc_page import template

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 0.5, 1)
        events = EventAccumulator(folder).Reload().Scalars("loss")
        if [(event.step, event.value) for event in events] != [(1, 0.5)]:
            raise RuntimeError("TensorBoard reads another curve than was written")
        figure = Figure()
        figure.subplots().plot([0, 1])
        figure.savefig(Path(folder) / "figure.png")
    template()
    return "TensorBoard, matplotlib and the report's page"


def checks() -> Iterator[Check]:
    """All, in the order in which a later one needs the former."""
    yield Check("packages", packages, "pip install --upgrade regpipe")
    yield Check("temporary files", temporary_files, "free some space, or set TMPDIR to a folder with room")
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        remedy = REINSTALL.format("torch torchvision") + "; with a GPU the driver must suit torch's CUDA"
        yield Check(f"operations on {device}", lambda device=device: operations(device), remedy)  # type: ignore[misc]
    yield Check("backbones", backbones, REINSTALL.format("torch torchvision monai"))
    yield Check("training on a phantom", training, REINSTALL.format("torch monai"))
    yield Check("a phantom registered both ways", both_ways, REINSTALL.format("regpipe torch"))
    yield Check("affine stage", affine_stage, REINSTALL.format("itk itk-elastix"))
    yield Check("formats", formats, REINSTALL.format("itk nibabel pillow"))
    yield Check("transforms read by ITK", transform_files, REINSTALL.format("itk h5py nibabel"))
    yield Check("pages", pages, REINSTALL.format("tensorboard matplotlib jinja2"))
