"""Measures what transferred weights and depth contribute: a grid of short runs on equal terms.

Every cell of {backbone} x {transfer} x {number of training subjects} x {seed} has the same number of steps, batch
size, learning rate and order of data. It keeps its last weights (held-out pairs choose none) and is evaluated on the
same held-out pairs.

Transferred weights are trained here on phantoms, once per backbone and dimension, or are ImageNet's, or those of the
models that came with regpipe. The seed also chooses the subjects, where not all are used; smaller sets are parts of
larger ones.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser

from regpipe.bundle.write import write_bundle
from regpipe.data import manifest
from regpipe.data.pairs import Case, list_pairs, working_grid
from regpipe.engines import record
from regpipe.engines.run import require
from regpipe.io import images
from regpipe.io.images import Grid
from regpipe.networks.encoders import BACKBONES, CUT, MAX_STRIDE, TRANSFERRED
from regpipe.networks.weights import shipped
from regpipe.report.figures import TRANSFERS
from regpipe.study import effects, page
from regpipe.study.runs import Task, run_all
from regpipe.study.slices import write_slices as write_slices
from regpipe.utils import console
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file, sha256


class Transfer(NamedTuple):
    """Where a run's weights come from, and what is done with them."""

    source: str  # none | phantoms | imagenet | shipped
    frozen: bool = False  # the encoder keeps them
    whole: bool = False  # the decoder takes its own, too

    @classmethod
    def named(cls, kind: str) -> Transfer:
        """Of a kind of ``figures.TRANSFERS``."""
        source, _, way = kind.rpartition("-")
        return cls("none" if way == "scratch" else source or "phantoms", way == "frozen", way == "network")


SIZES = ("5", "20", "100", "all")
SEEDS = ("0", "1", "2")
# What is run where nothing is said, and what may be said.
AXES = {"backbone": tuple(BACKBONES), "transfer": ("scratch", "frozen", "finetuned"), "subjects": SIZES, "seed": SEEDS}
OFFERED = {**AXES, "backbone": (*BACKBONES, *CUT), "transfer": tuple(TRANSFERS)}
WRITTEN = ("study.csv", "effects.csv", *page.PAGE, "[23]d/*.json", "[23]d/runs/*.json", "[23]d/pretrained/*.*")
MOST_PAIRS = 5000  # in a datalist: more than a run uses; a list of all pairs is slow to read


class Cell(NamedTuple):
    """One run of the grid; its fields are columns of ``study.csv``."""

    backbone: str
    transfer: str
    subjects: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.backbone} {self.transfer} {self.subjects} subjects seed {self.seed}"


def study(
    data: str | Path,
    out: str | Path,
    *,
    overlays: Sequence[str | Path],
    pretraining: str | Path | None = None,
    imagenet: str | Path | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    jobs: int = 1,
) -> str:
    """Run the missing cells of the grid, write ``study.csv`` and the page; returns the page as Markdown.

    Args:
        data: a folder of subjects with labels (layout 2 of docs/data.md).
        out: a folder, made where needed; 2D and 3D studies of the same data may share it.
        overlays: over the bundle's ``train.yaml``. They say ``spatial_dims``: 2 for 3D data means slices of them.
        pretraining: the overlay of the training on phantoms; needed where its weights are transferred.
        imagenet: a folder of torchvision's files, each named after its backbone (``vgg16-397923af.pth``); None: as
            torchvision finds or fetches them. Cells whose weights there are none of are left out, and said.
        only: values in place of those of ``AXES``: ``{"subjects": ["5", "all"]}``.
        jobs: how many runs at a time, each in a process of one thread.

    Raises:
        InputError: data, overlays or ``only`` cannot be used, or ``out`` holds runs of other data or settings.
        SystemExit: with 130, on Ctrl-C: finished runs are kept.
    """
    out = Path(out).absolute()
    axes = _axes(only or {})
    train = str(write_bundle("resnet18", out / "bundle") / "configs" / "train.yaml")
    configs = [train, *(str(path) for path in overlays)]
    dims = _dimension(ConfigParser.load_config_files(configs))
    folder = out / f"{dims}d"
    subjects, data = data, _data_of(data, dims, out)
    held_out, training, grid = _split(data, configs)
    _refuse_other(folder / "study.json", overlays, data, held_out)
    manifest.forget(out)  # of an earlier study
    sources = {name: _source(*name, dims, imagenet) for name in itertools.product(axes["backbone"], axes["transfer"])}
    cells = [c for c in _cells(axes, len(_subjects(training))) if sources[c.backbone, c.transfer] is not None]
    missing = [", ".join(name) for name, source in sources.items() if source is None]
    if missing:
        console.say(f"left out, for there is nothing to begin from: {'; '.join(missing)}")
    pretrainings = _pretrainings(cells, configs, pretraining, folder)
    settings = {"grid_shape": [*grid.shape], "grid_spacing": [*grid.spacing], "max_val_pairs": len(held_out)}
    for size, seed in {(cell.subjects, cell.seed) for cell in cells}:
        _write_datalist(_datalist(folder, size, seed), training, held_out, (size, seed))
    tasks = [_task(cell, dims, folder, configs, settings, sources[cell.backbone, cell.transfer]) for cell in cells]
    try:
        run_all(pretrainings, jobs, lambda: None)
        run_all(tasks, jobs, functools.partial(effects.write_runs, out))
    except KeyboardInterrupt:
        print("\nstopped: the finished runs are kept, the same command goes on", flush=True)
        raise SystemExit(130) from None
    effects.write_effects(out)
    text = page.write_page(out)
    texts = {"overlays": overlays, "pretraining": [pretraining] if pretraining else []}
    chosen = {name: [sha256([Path(path)]) for path in paths] for name, paths in texts.items()}
    _conclude(out, subjects, {"dimension": dims, **chosen, **axes})
    return text


def _conclude(out: Path, subjects: str | Path, settings: Mapping[str, Any]) -> None:
    """Write the manifest: the subjects, every finished run, tables and page."""
    manifest.write(
        out,
        "study",
        inputs=manifest.sources("study", manifest.paths_of(list_pairs(subjects, pairing="first"))),
        files=manifest.hashes(out, WRITTEN),
        settings=settings,
        machine=manifest.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )


# ------------------------------------------------------------------------------ which runs


def _axes(only: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """``AXES`` with some values replaced, each checked."""
    for axis, values in only.items():
        if axis not in AXES:
            raise InputError(f"--only {axis}=...: no such axis; take {', '.join(AXES)}")
        for value in values:
            free = axis in ("subjects", "seed") and value.isdecimal() and (axis == "seed" or int(value) > 1)
            if not (free or value in OFFERED[axis]):
                raise InputError(f"--only {axis}={value}: take of {', '.join(OFFERED[axis])}")
    return {axis: tuple(only.get(axis, values)) for axis, values in AXES.items()}


def _cells(axes: Mapping[str, Sequence[str]], n: int) -> list[Cell]:
    """The grid for n training subjects, cheap questions first: whole seeds, from few subjects to many."""
    sizes = sorted({n if size == "all" else min(n, int(size)) for size in axes["subjects"]})
    return [
        Cell(backbone, transfer, size, int(seed))
        for seed in axes["seed"]
        for size in sizes
        for backbone in axes["backbone"]
        for transfer in axes["transfer"]
    ]


def _dimension(config: Mapping[str, Any]) -> int:
    dims = config["spatial_dims"]
    if dims not in (2, 3):
        raise InputError("--overlay: the study's overlay must say spatial_dims: 2 or 3; see configs/study_2d.yaml")
    return int(dims)


def _data_of(data: str | Path, dims: int, out: Path) -> Path:
    """The data in the study's dimension: slices of 3D data for a 2D study."""
    path = Path(data).expanduser().absolute()
    theirs = len(images.geometry(list_pairs(path, pairing="first")[0]["fixed_image"])[0])
    if theirs < dims:
        raise InputError(f"{path}: holds {theirs}D images; the overlay says spatial_dims: {dims}")
    return path if theirs == dims else write_slices(path, out / "slices")


def _split(data: Path, configs: Sequence[str]) -> tuple[list[Case], list[Case], Grid]:
    """Held-out pairs, training pairs, the grid; every file is read once. The split has the data's seed, 0."""
    config = ConfigParser.load_config_files(list(configs))
    require(list_pairs(data, pairing="first"))
    held_out = list_pairs(data, split="validation", holdout=config["holdout"], max_pairs=config["max_val_pairs"])
    training = list_pairs(data, split="training", holdout=config["holdout"])
    if len(_subjects(training)) == 2 * len(training):
        raise InputError(f"{data}: holds ready pairs; the study needs a folder of subjects to choose some of")
    grid = working_grid(training + held_out, shape=config["grid_shape"], spacing=config["grid_spacing"])
    return held_out, training, grid


def _subjects(cases: Iterable[Case]) -> list[str]:
    return sorted({case[f"{side}_image"] for case in cases for side in ("fixed", "moving")})


def _refuse_other(path: Path, overlays: Sequence[str | Path], data: Path, held_out: Sequence[Case]) -> None:
    """Keep what the runs in a folder have in common; refuse runs of another study."""
    stems = [[images.stem(case[f"{side}_image"]) for side in ("moving", "fixed")] for case in held_out]
    digest = record.digest(list_pairs(data, pairing="first"))
    about = {"overlays": [Path(o).read_text() for o in overlays], "data": digest, "held_out": stems}
    text = json.dumps(about, indent=1)
    if path.is_file() and path.read_text() != text:
        raise InputError(f"{path.parent}: holds runs of other data or settings; give another -o, or delete it")
    replace_file(path, text.encode())


def choose(subjects: Sequence[str], size: int, seed: int) -> set[str]:
    """The first ``size`` of the subjects in an order drawn by ``seed``: smaller sets lie inside larger ones."""
    order = np.random.default_rng(seed).permutation(len(subjects))
    return {subjects[i] for i in order[:size]}


def _datalist(folder: Path, size: int, seed: int) -> Path:
    return folder / "datalists" / f"{size} subjects seed {seed}.json"


def _write_datalist(path: Path, training: Sequence[Case], held_out: Sequence[Case], which: tuple[int, int]) -> None:
    """The pairs of ``which = (size, seed)`` subjects, and the held-out pairs of every cell."""
    chosen = choose(_subjects(training), *which)
    kept = [case for case in training if {case["fixed_image"], case["moving_image"]} <= chosen]
    if not kept:
        raise InputError(f"{which[0]} training subjects make no pair; give --only subjects=5 or more")
    drawn = np.random.default_rng(which[1]).permutation(len(kept))[:MOST_PAIRS]
    kept = [kept[i] for i in sorted(drawn)]
    replace_file(path, json.dumps({"training": kept, "validation": held_out}).encode())


def _source(backbone: str, transfer: str, dims: int, imagenet: str | Path | None) -> str | None:
    """``pretrained`` of such runs, empty for weights that are trained here; None where there are none to be had."""
    source, _, whole = Transfer.named(transfer)
    cut, backbone = backbone in CUT, CUT.get(backbone, (backbone,))[0]
    if (backbone == "pooled" and source != "none") or (cut and whole):  # no weights; another decoder
        return None
    if source == "phantoms":
        return ""
    if source == "shipped":
        there = shipped(backbone, dims) or (None if whole else shipped(backbone, 2))
        return None if there is None else source
    if source == "imagenet" and imagenet is not None:
        return next((str(path.absolute()) for path in sorted(Path(imagenet).glob(f"{backbone}[-_]*.pth"))), None)
    if source == "imagenet" and backbone not in TRANSFERRED:
        return None
    return source


def _task(
    cell: Cell, dims: int, folder: Path, configs: Sequence[str], settings: Mapping[str, Any], source: str | None
) -> Task:
    backbone, most = CUT.get(cell.backbone, (cell.backbone, MAX_STRIDE))
    mine: dict[str, Any] = {"backbone": backbone, "max_stride": most, "seed": cell.seed}
    mine["dataset_dir"] = str(_datalist(folder, cell.subjects, cell.seed))
    mine["pretrained"] = source or str(folder / "pretrained" / f"{backbone}.pt")
    transfer = Transfer.named(cell.transfer)
    mine["transfer"] = "network" if transfer.whole else "encoder"
    if transfer.frozen:
        mine["freeze"] = sum(stride <= most for stride in BACKBONES[backbone].strides)
    about = {"dims": dims, **cell._asdict()}
    return Task(cell.name, configs, {**settings, **mine}, about, folder / "runs" / f"{cell.name}.json")


def _pretrainings(
    cells: Sequence[Cell], configs: Sequence[str], overlay: str | Path | None, folder: Path
) -> list[Task]:
    """The trainings on phantoms that the cells need, with seed 0, in the folder that all backbones share."""
    taught = [cell.backbone for cell in cells if Transfer.named(cell.transfer).source == "phantoms"]
    backbones = list(dict.fromkeys(CUT.get(name, (name,))[0] for name in taught))
    if not backbones:
        return []
    if overlay is None:
        raise InputError("frozen and finetuned weights are made on phantoms: give --pretrain configs/pretrain.yaml")
    text, kept = Path(overlay).read_text(), folder / "pretrained" / "overlay.yaml"
    if kept.is_file() and kept.read_text() != text:
        raise InputError(f"{kept.parent}: holds weights of another --pretrain; give another -o, or delete {folder}")
    replace_file(kept, text.encode())
    settings = {"seed": 0, "output_dir": str(kept.parent)}
    return [
        Task(
            f"{name} on phantoms",
            [*configs, str(overlay)],
            {**settings, "backbone": name},
            {"backbone": name},
            kept.with_name(f"{name}.json"),
            kept.with_name(f"{name}.pt"),
        )
        for name in backbones
    ]
