"""Keeps beside a model what it was trained on, so that evaluation and inference need not be told it.

Models are passed on, and folders may be named after patients. So paths are kept as fingerprints: whoever knows a path
can check it against them, and nobody can read it from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from regpipe.bundle import zoo
from regpipe.data import channels, manifest
from regpipe.data.pairs import SIDES, Case
from regpipe.io import images
from regpipe.io.formats import locate
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import distributed
from regpipe.utils.errors import InputError
from regpipe.utils.files import absolute, parse_json, replace_file

NAME = "training.json"


class Data(NamedTuple):
    """The choices that are kept; those that older records lack have a default."""

    dataset_dir: str | None
    holdout: float | int
    pairing: str
    seed: int | None
    landmark_channels: int | None
    mask_rims: bool = False
    cascades: int = 1
    affine: str = "centre"
    affine_from: str = "images"
    space: dict | None = None
    to_fit_memory: list = []
    own_grids: bool = False
    channels: str | None = None
    image_channels: int = 1


KINDS = get_type_hints(Data) | {"training_images": list}  # anything else would end in the middle of a run


def write(ckpt_dir: str, cases: Sequence[Case], data: dict[str, Any]) -> None:
    """Keep the choices ``Data`` and the images of the training pairs beside the model."""
    root, known = absolute(data["dataset_dir"]), {**Data._field_defaults, **data}
    about = {**{key: known[key] for key in Data._fields}, "dataset_dir": _way(root, absolute(ckpt_dir))}
    trained = {path for case in cases for side in SIDES for path in _known(case, side, known["channels"])}
    about |= {"dataset": fingerprint(root), "training_images": [fingerprint(path) for path in sorted(trained)]}
    text = json.dumps(about, indent=1)
    manifest.forget(Path(ckpt_dir))  # of what was there before this training
    replace_file(Path(ckpt_dir) / NAME, text.encode())


def state_format(bundle_root: str, ckpt_dir: str, network: Any, shape: Sequence[int], *, own_grids: bool) -> None:
    """State in a bundle's metadata what the network takes that is about to be trained in it: ``bundle.zoo``.

    Args:
        bundle_root: its folder.
        ckpt_dir: where the model will be; if that is not in the bundle, its metadata stay.
        network: if it is not a ``SymmetricNet``, they stay too.
        shape: of the working grid.
        own_grids: whether it registers pairs on grids of their own.
    """
    own = Path(ckpt_dir).resolve() == Path(bundle_root).resolve() / "models"
    if own and isinstance(network, SymmetricNet) and distributed.rank() == 0:
        zoo.state_format(bundle_root, shape, any_size=own_grids, channels=network.image_channels)


def conclude(
    folder: str,
    kind: str,
    pairs: Mapping[str, Sequence[Case]],
    settings: Mapping[str, Any],
    *,
    device: Any,
    seconds: float,
    **about: Any,
) -> None:
    """Write the manifest of a training or an evaluation that has ended: see ``data.manifest``.

    Args:
        folder: of the model, or of the tables.
        kind: ``training`` or ``evaluation``.
        pairs: role -> cases, of which all files are hashed.
        settings: the choices of the run.
        seconds: what it took.
        about: what else to keep: seed, and of an evaluation the model's files.
    """
    if distributed.rank() == 0:
        known = [item for role, cases in pairs.items() for item in manifest.sources(role, manifest.paths_of(cases))]
        processes = distributed.world_size()
        machine = manifest.machine(device) | ({"processes": processes} if processes > 1 else {})
        files = manifest.hashes(Path(folder), manifest.BESIDE if kind == "training" else manifest.TABLES)
        about |= {"machine": machine, "seconds": round(seconds, 2)}
        manifest.write(Path(folder), kind, inputs=known, files=files, settings=settings, **about)
    distributed.barrier()


def conclude_training(ckpt_dir: str, training: Any, held_out: Sequence[Case], *, device: Any, seconds: float) -> None:
    """The manifest of a training, see ``conclude``; ``training``: an ``engines.describe.Training``."""
    pairs = {"training": training.pairs, "validation": held_out}
    seed = training.split.seed
    conclude(ckpt_dir, "training", pairs, training.recipe, device=device, seed=seed, seconds=seconds)


def conclude_evaluation(
    folder: str, ckpt_dir: str, cases: Sequence[Case], settings: Mapping[str, Any], *, device: Any, seconds: float
) -> None:
    """The manifest of an evaluation, see ``conclude``; ``settings``: ``engines.describe.evaluation``'s."""
    about = {"seed": settings["seed"], "model": manifest.model_files(ckpt_dir)}
    conclude(folder, "evaluation", {"evaluated": cases}, settings, device=device, seconds=seconds, **about)


def fingerprint(path: str | Path) -> str:
    """16 digits that identify a path without revealing it."""
    return hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:16]


def named(source: str) -> str:
    """A source of weights (``networks.weights``): of a file or bundle its own name and the path's fingerprint."""
    path = absolute(source)
    return f"{path.name} {fingerprint(path)}" if path.exists() else str(source)


def _way(root: Path, folder: Path) -> str | None:
    """The relative path from ``folder`` to the data, if it reveals no more than their own name; else None.

    Data in the folder that holds ``folder``, as a bundle its built-in phantoms, are handed on with it: the whole way.
    """
    try:
        parts = Path(os.path.relpath(root, folder)).parts
    except ValueError:  # another drive
        return None
    up = parts.count(os.pardir)
    return Path(*parts).as_posix() if up <= 1 or len(parts) - up <= 1 else None


def read(ckpt_dir: str, *, required: bool = False) -> dict[str, Any]:
    """What ``write`` kept; defaults without training images where there is nothing and it is not ``required``.

    Raises:
        InputError: the file is damaged, or missing though required.
    """
    path = Path(ckpt_dir) / NAME
    if required and not path.is_file():
        raise InputError(f"{path}: missing; copy the whole folder of the model, or train again")
    if not path.is_file():
        unknown: dict[str, Any] = {
            "pairing": "all",
            "landmark_channels": None,
            "mask_rims": True,
            "training_images": [],
        }
        return Data._field_defaults | unknown
    try:
        known = Data._field_defaults | parse_json(path.read_bytes())
        if not KINDS.keys() <= known.keys():
            raise KeyError(f"no {min(KINDS.keys() - known.keys())}")
        wrong = next((key for key, kind in KINDS.items() if not isinstance(known[key], kind)), None)
        if wrong:
            raise TypeError(wrong)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}); train again") from error
    if known["dataset_dir"]:
        known["dataset_dir"] = str(absolute(Path(ckpt_dir) / known["dataset_dir"]))
    return known


def dataset_dir(record: dict[str, Any]) -> str:
    """Where the data are that the model was trained on.

    Raises:
        InputError: that is not kept.
    """
    if not record["dataset_dir"]:
        raise InputError(
            f"{NAME} does not say where the data of the training are, to keep names of folders private: "
            "give --dataset_dir; the held-out part of them is found"
        )
    return str(record["dataset_dir"])


def stage_for_others(record: dict[str, Any]) -> str:
    """The affine stage for any images: that of the training; ``auto`` where all of its images shared a space."""
    return "auto" if record["affine"] == "none" and record["space"] else str(record["affine"])


def default_split(dataset_dir: str, record: dict[str, Any]) -> str:
    """``validation`` of the data that the model was trained on, ``all`` of any other."""
    root = absolute(dataset_dir)
    known = str(root) == record.get("dataset_dir") or fingerprint(root) == record.get("dataset")
    return "validation" if known else "all"


def refuse_training_images(cases: Sequence[Case], record: dict[str, Any]) -> None:
    """A model is not evaluated on what it was trained on.

    A sequence's fixed image is in every pair of it, and is no leak while the moving ones are held out.

    Raises:
        InputError: a case's moving image was trained on, or another channel of its file.
    """
    seen = set(record["training_images"])
    leaks = []
    for case in cases:
        moving = channels.images(case, "moving")
        paths = {*moving, *(str(locate(path)[0]) for path in moving)}
        if seen & {*paths, *map(fingerprint, paths)}:  # records of earlier versions hold the paths
            leaks.append(case["case"])
    if leaks:
        raise InputError(
            f"{len(leaks)} of {len(cases)} pairs hold images that the model was trained on, e.g. {leaks[0]}: "
            "evaluate with the data, holdout, pairing and seed of the training (the default), or on other data"
        )


def digest(cases: Sequence[Case]) -> str:
    """A short hash of the pairs' names and of their images' sizes: other data, another digest."""
    paths = [[path for side in SIDES for path in channels.images(case, side)] for case in cases]
    sizes = {path: sum(file.stat().st_size for file in images.files(path)) for path in {*chain(*paths)}}
    known = [(case["case"], *map(sizes.__getitem__, theirs)) for case, theirs in zip(cases, paths, strict=True)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def _known(case: Case, side: str, chosen: str | None) -> set[str]:
    """What of a side counts as trained on: of channels their whole file, of a film its frame: others may be held out.

    ``chosen``: of ``data.channels.spread``, or None.
    """
    paths = channels.images(case, side)
    places = [locate(path) for path in paths]
    files = [file for file, _ in places]
    spread = chosen is not None and len(paths) == 1
    return {
        path if frame is not None and files.count(file) == 1 and not spread else str(file)
        for path, (file, frame) in zip(paths, places, strict=True)
    }
