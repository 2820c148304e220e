"""Which pairs a benchmark is run on, and as what arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from peers import Pair

from regpipe import InputError, list_pairs, working_grid
from regpipe.data.pairs import Case
from regpipe.io.images import Grid
from regpipe.utils.files import replace_file

CONFIGS = Path(__file__).parents[2] / "configs"
# What decides which pairs are held out and on which grid; taken from the overlay configs/SET.yaml where there is one.
CHOICES: dict[str, Any] = {"holdout": 0.2, "pairing": "all", "landmark_channels": None, "grid_spacing": None}
SETS: dict[str, dict[str, Any]] = {
    "hippocampus_mr": {},
    "brain_mr_2d": {},
    "brain_mr_3d": {"holdout": 4},
    "prostate_mrus": {},
    "lung_ct": {"holdout": 0},  # one pair, and nothing to train on
}


class Data(NamedTuple):
    """The pairs to register and the grid to do it on."""

    cases: list[Case]
    grid: Grid
    landmark_channels: int | None
    settings: dict[str, Any]  # of the split, for training too


def choices(name: str) -> dict[str, Any]:
    """``CHOICES`` for a set: the overlay's, then ``SETS``'."""
    overlay = CONFIGS / f"{name}.yaml"
    given = yaml.safe_load(overlay.read_text()) if overlay.is_file() else {}
    return CHOICES | {key: given[key] for key in CHOICES if key in given} | SETS.get(name, {})


def open_data(where: Path, chosen: Mapping[str, Any], pairs: int | None) -> Data:
    """The held-out pairs, drawn as evaluating draws them, on the grid that training would use."""
    split = {"holdout": chosen["holdout"], "pairing": chosen["pairing"], "seed": 0}
    every = list_pairs(where, split="all", pairing=chosen["pairing"])
    if chosen["holdout"]:
        every = [case for part in ("training", "validation") for case in list_pairs(where, split=part, **split)]
    held = "validation" if chosen["holdout"] else "all"
    cases = list_pairs(where, split=held, max_pairs=pairs, **split)
    grid = working_grid(every, spacing=chosen["grid_spacing"])
    settings = {**split, "dataset_dir": str(where), "landmark_channels": chosen["landmark_channels"]}
    return Data(cases, grid, chosen["landmark_channels"], settings)


def lung_datalist(folder: Path, out: Path) -> Path:
    """The lung pair as a datalist: follow-up onto baseline, masks as labels, landmarks as regpipe reads them (LPS)."""
    with (folder / "landmarks.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    case = {"case": "followup_to_baseline"}
    for side, name in (("fixed", "baseline"), ("moving", "followup")):
        ras = [[float(row[f"{name[0]}{axis}_ras"]) for axis in "xyz"] for row in rows]
        lines = ["x,y,z", *(f"{-x},{-y},{z}" for x, y, z in ras)]
        replace_file(out / "lung_ct" / f"{name}.csv", "\n".join(lines).encode())
        case |= {f"{side}_image": str(folder / f"{name}.nii.gz"), f"{side}_label": str(folder / f"{name}_mask.nii.gz")}
        case[f"{side}_landmarks"] = str((out / "lung_ct" / f"{name}.csv").absolute())
    file = out / "lung_ct" / "pairs.json"
    replace_file(file, json.dumps({"training": [], "validation": [case]}).encode())
    return file


def as_pair(batch: Mapping[str, Any], grid: Grid, *, masks: bool) -> Pair:
    """A collated batch of one -> what a peer gets."""
    fixed, moving = (batch[f"{side}_image"][0, 0].numpy() for side in ("fixed", "moving"))
    pair = Pair(fixed, moving, grid.spacing)
    if not masks:
        return pair
    missing = [key for key in ("fixed_mask", "moving_mask") if key not in batch]
    if missing:
        raise InputError(f"--masks: the pairs have no {missing[0]}; leave --masks out")
    fixed_mask, moving_mask = (batch[f"{side}_mask"][0, 0].numpy() for side in ("fixed", "moving"))
    return pair._replace(fixed_mask=fixed_mask, moving_mask=moving_mask)
