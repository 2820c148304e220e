"""Peers of regpipe, one registration each in a process of its own: ``python peers.py METHOD PAIR.npz OUT.npz``.

A peer gets both images as arrays on one grid and gives back a displacement by regpipe's convention (voxels, channel i
along array axis i, ``warped(x) = moving(x + u(x))``), and what it says the warped images are, to check that by.
Settings are each tool's own defaults unless a line here says otherwise. Nothing is imported before its method needs it,
so that a tool's memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BACKBONES = ("resnet18", "vgg16", "alexnet")
TRAINED = ("voxelmorph", "localnet", "symnet_trained")  # bundles trained with the overlay of that name


class Pair(NamedTuple):
    """Two images (*spatial) float32 in [0, 1] on one grid, axis-aligned."""

    fixed: np.ndarray
    moving: np.ndarray
    spacing: tuple[float, ...]  # mm
    fixed_mask: np.ndarray | None = None  # 1 where the image is known
    moving_mask: np.ndarray | None = None


class Field(NamedTuple):
    """What a peer found."""

    displacement: np.ndarray  # (D, *spatial) voxels, warps moving onto fixed
    inverse: np.ndarray | None = None  # (D, *spatial) voxels, warps fixed onto moving
    warped_moving: np.ndarray | None = None  # by the peer's own resampler, linear
    warped_fixed: np.ndarray | None = None


class Place(NamedTuple):
    """Where trained weights are."""

    bundles: Path | None = None  # a folder of trained bundles, by name
    symnet: Path | None = None  # the authors' .pth


class Peer(NamedTuple):
    """One method in three steps, of which only the second is timed."""

    load: Callable[[Place], Any]  # imports and weights
    solve: Callable[[Any, Pair], Any]  # from arrays to the tool's own result
    field: Callable[[Any, Pair, Any], Field]  # the result as arrays by the convention


# ------------------------------------------------------------------------------------------------ identity


def _stand_still(_: Any, pair: Pair) -> np.ndarray:
    return np.zeros((pair.fixed.ndim, *pair.fixed.shape), np.float32)


def _both_still(_: Any, pair: Pair, u: np.ndarray) -> Field:
    return Field(u, u, pair.moving, pair.fixed)


# ---------------------------------------------------------------------------------------------------- ANTs


def ants_peer(kind: str, *, correlation: int = 0) -> Peer:
    """``ants.registration`` of one kind, everything else by default.

    ``correlation``: radius in voxels of the correlation (CC) that takes the place of mutual information, if any.

    SyN: affine, then mutual information, 40 x 20 x 0 iterations: none at full resolution. SyNCC: rigid, affine, then
    CC of radius 4, 2100 x 1200 x 1200 x 20. SyNOnly: SyN without its affine stage, which on images that share little
    may go astray.
    """
    metric = {"syn_metric": "CC", "syn_sampling": correlation} if correlation else {}

    def load(_: Place) -> Any:
        os.environ["ANTS_RANDOM_SEED"] = "1"  # mutual information is sampled at random
        return importlib.import_module("ants")

    def solve(ants: Any, pair: Pair) -> dict[str, Any]:
        masks = {"mask": pair.fixed_mask, "moving_mask": pair.moving_mask}
        given = {name: ants.from_numpy(m, spacing=pair.spacing) for name, m in masks.items() if m is not None}
        images = (ants.from_numpy(image, spacing=pair.spacing) for image in (pair.fixed, pair.moving))
        return dict(ants.registration(*images, type_of_transform=kind, **given, **metric))

    return Peer(load, solve, _ants_field)


def _ants_field(ants: Any, pair: Pair, result: Mapping[str, Any]) -> Field:
    forward, backward = result["fwdtransforms"], result["invtransforms"]
    try:
        u = _ants_displacement(ants, pair, forward, [False] * len(forward))
        inverse = _ants_displacement(ants, pair, backward, [name.endswith(".mat") for name in backward])
    finally:
        for name in {*forward, *backward}:
            Path(name).unlink(missing_ok=True)
    return Field(u, inverse, result["warpedmovout"].numpy(), result["warpedfixout"].numpy())


def _ants_displacement(ants: Any, pair: Pair, transforms: Sequence[str], inverted: Sequence[bool]) -> np.ndarray:
    """A list of transforms as one displacement: ANTs composes it to a field in mm along its axes, which are ours."""
    grid = ants.from_numpy(pair.fixed, spacing=pair.spacing)
    with tempfile.TemporaryDirectory() as folder:
        file = ants.apply_transforms(grid, grid, transforms, whichtoinvert=inverted, compose=f"{folder}/u")
        mm = ants.image_read(file).numpy()  # (*spatial, D)
    return np.moveaxis(mm / np.array(pair.spacing), -1, 0).astype(np.float32)


# ------------------------------------------------------------------------------------------------- elastix


def _load_elastix(_: Place) -> Any:
    itk: Any = importlib.import_module("itk")
    for part in ("ElastixRegistrationMethod", "TransformixFilter"):
        getattr(itk, part)  # ITK loads its parts when they are asked for first, for many seconds
    return itk


def _itk_image(itk: Any, array: np.ndarray, spacing: Sequence[float], kind: Any = np.float32) -> Any:
    image = itk.image_from_array(np.ascontiguousarray(array.astype(kind).T))  # ITK's first index is numpy's last
    image.SetSpacing([float(mm) for mm in spacing])
    return image


def _elastix(itk: Any, pair: Pair) -> Any:
    """Default 'affine', then default 'bspline': mutual information, bending energy, control points every 10 mm."""
    stages = itk.ParameterObject.New()
    for name in ("affine", "bspline"):
        stages.AddParameterMap(stages.GetDefaultParameterMap(name))
    masks = {"fixed_mask": pair.fixed_mask, "moving_mask": pair.moving_mask}
    given = {name: _itk_image(itk, m, pair.spacing, np.uint8) for name, m in masks.items() if m is not None}
    images = (_itk_image(itk, image, pair.spacing) for image in (pair.fixed, pair.moving))
    _, transform = itk.elastix_registration_method(*images, parameter_object=stages, log_to_console=False, **given)
    return transform


def _elastix_field(itk: Any, pair: Pair, transform: Any) -> Field:
    last = transform.GetNumberOfParameterMaps() - 1
    transform.SetParameter(last, "FinalBSplineInterpolationOrder", "1")  # linear, as everything else here warps
    moving = _itk_image(itk, pair.moving, pair.spacing)
    mm = itk.array_from_image(itk.transformix_deformation_field(moving, transform))  # (*reversed, D)
    warped = itk.array_from_image(itk.transformix_filter(moving, transform)).T
    components = [mm[..., i].T / spacing for i, spacing in enumerate(pair.spacing)]
    return Field(np.stack(components).astype(np.float32), None, warped.astype(np.float32))


# ---------------------------------------------------------------------------------------------- ConvexAdam


def _load_convexadam(_: Place) -> Any:
    importlib.import_module("convexAdam.apply_convex")
    return importlib.import_module("convexAdam.convex_adam_MIND")


def _convexadam(package: Any, pair: Pair) -> np.ndarray:
    """MIND-SSC, coupled convex optimisation, then Adam; voxels are taken for isotropic, as the tool does."""
    if pair.fixed.ndim != 3:
        raise SystemExit("convexadam: registers 3D images only; leave it out of --methods")
    masks = {"path_fixed_mask": pair.fixed_mask, "path_moving_mask": pair.moving_mask}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: _saved(m, f"{folder}/{name}.nii.gz") for name, m in masks.items() if m is not None}
        return np.asarray(package.convex_adam_pt(pair.fixed, pair.moving, use_mask=len(files) == 2, **files))


def _saved(mask: np.ndarray, path: str) -> str:
    nib: Any = importlib.import_module("nibabel")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.eye(4)), path)
    return path


def _convexadam_field(_: Any, pair: Pair, voxels: np.ndarray) -> Field:
    apply: Any = importlib.import_module("convexAdam.apply_convex")
    warped = apply.apply_convex(voxels, pair.moving)  # (*spatial, 3), pulled like ours
    return Field(np.moveaxis(voxels, -1, 0).astype(np.float32), None, warped.astype(np.float32))


# ---------------------------------------------------------------------------------------- learned networks


def network_peer(name: str) -> Peer:
    """A trained bundle in the folder ``name`` of ``Place.bundles``."""

    def load(place: Place) -> Any:
        folder = _bundle(place, name)
        return importlib.import_module("networks").load_bundle(folder)

    def solve(model: Any, pair: Pair) -> Any:
        return importlib.import_module("networks").infer(model, pair)

    return Peer(load, solve, _registration_field)


def refined_peer(name: str | None) -> Peer:
    """Instance optimisation after the network ``name``, or from the identity."""

    def load(place: Place) -> Any:
        folder = _bundle(place, name) if name else None
        networks: Any = importlib.import_module("networks")
        return networks.load_bundle(folder) if folder else None

    def solve(model: Any, pair: Pair) -> Any:
        return importlib.import_module("networks").regpipe_refined(model, pair)

    return Peer(load, solve, _registration_field)


def _load_symnet(place: Place) -> Any:
    if place.symnet is None:
        raise SystemExit("symnet: needs the authors' weights; give --symnet FILE.pth")
    return importlib.import_module("networks").load_authors_symnet(place.symnet)


def _symnet(model: Any, pair: Pair) -> Any:
    return importlib.import_module("networks").infer_symnet(model, pair)


def _registration_field(_: Any, pair: Pair, registration: Any) -> Field:
    named = ("displacement", "inverse", "warped_moving", "warped_fixed")
    u, inverse, moving, fixed = (getattr(registration, name)[0].cpu().numpy() for name in named)
    return Field(u, inverse, moving[0], fixed[0])


def _bundle(place: Place, name: str) -> Path:
    if place.bundles is None or not (place.bundles / name / "models" / "model.pt").is_file():
        raise SystemExit(f"{name}: no trained bundle {name}/ in --bundle; train it with --train, or leave it out")
    return place.bundles / name


# -------------------------------------------------------------------------------------------- the registry

METHODS: dict[str, Peer] = {
    "identity": Peer(lambda place: None, _stand_still, _both_still),
    "ants_affine": ants_peer("Affine"),
    "syn_mi": ants_peer("SyN"),
    "syn_cc": ants_peer("SyNCC"),
    "syn_cc_short": ants_peer("SyN", correlation=4),
    "syn_only": ants_peer("SyNOnly"),
    "elastix": Peer(_load_elastix, _elastix, _elastix_field),
    "convexadam": Peer(_load_convexadam, _convexadam, _convexadam_field),
    "symnet": Peer(_load_symnet, _symnet, _registration_field),
    **{name: network_peer(name) for name in TRAINED},
    **{f"regpipe_{name}": network_peer(name) for name in BACKBONES},
    **{f"regpipe_{name}_refined": refined_peer(name) for name in BACKBONES},
    "regpipe_zero": refined_peer(None),
}
PACKAGES = {
    **dict.fromkeys(("ants_affine", "syn_mi", "syn_cc", "syn_cc_short", "syn_only"), "antspyx"),
    "elastix": "itk-elastix",
    "convexadam": "convexAdam",
}


# ----------------------------------------------------------------------------------------- in this process


def peak_mib() -> float:
    """Most resident memory this program has held, MiB. ``getrusage`` would count what the parent held before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def run(method: str, pair: Pair, place: Place) -> tuple[Field, dict[str, float]]:
    """(field, what registering cost: wall-clock and processor seconds, peak MiB of the process until then)."""
    peer = METHODS[method]
    model = peer.load(place)
    started, used = time.perf_counter(), time.process_time()
    result = peer.solve(model, pair)
    costs = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    costs["peak_mib"] = peak_mib()  # before the result is turned into arrays
    return peer.field(model, pair, result), costs


def save_pair(path: Path, pair: Pair) -> None:
    np.savez(path, **{name: value for name, value in pair._asdict().items() if value is not None})


def load_pair(path: Path) -> Pair:
    with np.load(path) as data:
        known = {name: data[name] for name in data.files}
    return Pair(**(known | {"spacing": tuple(known["spacing"].tolist())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("pair", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--symnet", type=Path)
    options = parser.parse_args()
    field, costs = run(options.method, load_pair(options.pair), Place(options.bundles, options.symnet))
    arrays: dict[str, Any] = {name: value for name, value in field._asdict().items() if value is not None}
    np.savez(options.out, **(arrays | costs))


if __name__ == "__main__":
    main()
