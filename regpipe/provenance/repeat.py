"""Train, or evaluate, once more from a manifest, with regpipe's own configuration and the settings that it recorded."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regpipe.bundle.run import bundle_in
from regpipe.bundle.write import write_bundle
from regpipe.data import manifest
from regpipe.data.pairs import list_pairs
from regpipe.engines import record
from regpipe.metrics.cases import read_rows
from regpipe.networks.weights import read_state_dict
from regpipe.provenance.verify import MODELS, nearest, unlike
from regpipe.utils import console
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json

SPLIT: tuple[str, ...] = ("holdout", "pairing", "seed")
BOTH = (*SPLIT, "backbone", "landmark_channels", "mask_rims", "affine", "affine_from", "max_val_pairs")
TRAINING: tuple[str, ...] = (*BOTH, "spatial_dims", "grid_shape", "grid_spacing", "freeze", "transfer", "cascades")
TRAINING += ("encoder_factor", "loss_weights", "lncc_window", "label_ids", "structures_first", "max_epochs", "epochs")
TRAINING += ("budget_seconds", "pairs_per_epoch", "supervised_share", "val_interval", "patience", "batch_size", "amp")
TRAINING += ("accumulate", "num_workers", "augment", "augment_intensity", "mirror", "learning_rate", "average")
TRAINING += ("key_metric",)
EVALUATION = (*BOTH, "split", "refine", "refine_loss", "refine_window", "repair")
NUMBERS = ("holdout", "seed", "max_val_pairs")  # that are needed before the bundle looks at them
ANYWHERE = ("none", "imagenet", "medicalnet")  # weights that are the same wherever they are taken from
MODEL = ("model.pt", "working_grid.json", "typical.json")  # training.json tells where the data are
SPENT = ("seconds_per_pair", "peak_memory_bytes", "training_seconds")  # of summary.json: what no two runs have alike

Settings = dict[str, Any]
Found = tuple[int, list[str], tuple[float, float] | None]  # files, those that differ, how far off


def train(old: Path, content: Mapping[str, Any], chosen: Settings, target: Path, data: Path | None) -> Found:
    """Train in the folder ``target``, which becomes a bundle, and compare the weights with those beside ``old``.

    Args:
        old: the manifest, and ``content`` what it says.
        chosen: its settings ``TRAINING``.
        data: the folder or datalist that it was trained on; None: where the model's record knows it.

    Raises:
        InputError: other data; weights to begin with, or a network, that no manifest holds.
    """
    _require_ours(old, content)
    begun = content["settings"].get("pretrained")
    if begun not in ANYWHERE:
        raise InputError(f"{old}: began from {begun}, which it does not hold; give the training's own command again")
    epochs, budget = chosen.pop("epochs"), chosen.pop("budget_seconds")
    if budget is not None:
        chosen["max_epochs"] = epochs
        console.complain(
            "warning",
            f"{old}: its learning rates, and structures_first, went by the clock (budget_seconds {budget}); "
            f"the same {epochs} epochs are trained without it, and the weights will be others",
        )
    parts = {"training": ("training", None), "validation": ("validation", chosen["max_val_pairs"])}
    chosen["dataset_dir"] = _same_data(old.parent, chosen, content["inputs"], data, parts)
    bundle = write_bundle(str(chosen["backbone"]), target)
    _run(bundle, ["train.yaml"], "training", chosen | {"pretrained": begun})
    before, after = (manifest.hashes(folder, MODEL) for folder in (old.parent, bundle / MODELS))
    before |= {name: known for name, known in content["files"].items() if name in MODEL}
    different = _different(before, after)
    return len(before), different, _weights_off(old.parent, bundle / MODELS) if different else (0.0, 0.0)


def evaluate(
    old: Path, content: Mapping[str, Any], chosen: Settings, target: Path, data: Path | None, bundle: Path | None
) -> Found:
    """Evaluate into ``target`` and compare the numbers with those beside ``old``.

    Args:
        old: the manifest, and ``content`` what it says.
        chosen: its settings ``EVALUATION``.
        data: the folder or datalist that was evaluated; None: the training's, where the model's record knows it.
        bundle: whose model; None: the one that ``old`` lies in.

    Raises:
        InputError: other data or another model.
    """
    _require_ours(old, content)
    bundle = (bundle_in(bundle) if bundle else old.absolute().parent.parent).absolute()
    models, other = nearest(content["model"], bundle)
    if other:
        raise InputError(f"{bundle}: {unlike(other)}; give the --bundle that was evaluated")
    parts = {"evaluated": (chosen["split"], chosen["max_val_pairs"])}
    chosen["dataset_dir"] = _same_data(models, chosen, content["inputs"], data, parts)
    chosen |= {"ckpt_dir": str(models.absolute()), "output_dir": str(target.absolute())}
    with tempfile.TemporaryDirectory() as aside:
        own = write_bundle(str(chosen["backbone"]), Path(aside) / "bundle")
        _run(own, ["train.yaml", "evaluate.yaml"], "evaluating", chosen)
    before, after = content["files"], manifest.hashes(target, manifest.TABLES)
    different = _different(before, after)
    if "summary.json" in different and _numbers(old.parent) == _numbers(target):
        different.remove("summary.json")
    return len(before), different, _numbers_off(old.parent, target) if different else (0.0, 0.0)


def _require_ours(old: Path, content: Mapping[str, Any]) -> None:
    network = content["settings"].get("network")
    if network != "SymmetricNet":
        raise InputError(f"{old}: is of a {network}, which an overlay brought; give its own command again")


def _same_data(
    models: Path, chosen: Settings, inputs: Sequence[Mapping[str, str]], data: Path | None, parts: Mapping[str, Any]
) -> str:
    """The whole path of the data, once they are seen to hold what they did; ``parts``: role -> split, most pairs."""
    wrong = [name for name in NUMBERS if not isinstance(chosen[name], int | float)]
    if wrong:
        raise InputError(f"the manifest's {wrong[0]} is no number: it is not regpipe's, and is not run")
    known = record.read(str(models), required=True)["dataset_dir"] if data is None else str(data.absolute())
    if not known:
        raise InputError(f"{models / record.NAME}: does not say where the data are; give them with --data")
    root = str(known)
    split = {name: chosen[name] for name in SPLIT}
    now = [
        source
        for role, (part, most) in parts.items()
        for source in manifest.sources(role, manifest.paths_of(list_pairs(root, split=part, max_pairs=most, **split)))
    ]
    then, here = ({(s["file"], s["role"], s["sha256"]) for s in sources} for sources in (inputs, now))
    other = sorted(then - here) or sorted(here - then)
    if other:
        name, role, _ = other[0]
        raise InputError(f"{root}: {name} ({role}) is not what it was, or not there; give the same data with --data")
    return root


def _run(bundle: Path, names: Sequence[str], what: str, settings: Settings) -> None:
    """A command of a bundle that was just written, in this process."""
    from monai.bundle import ConfigWorkflow

    configs = bundle.absolute() / "configs"
    workflow = ConfigWorkflow(
        [str(configs / name) for name in names],
        run_id=what,
        workflow_type="train",
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        bundle_root=str(bundle.absolute()),
        **settings,
    )
    workflow.initialize()
    workflow.run()


def _different(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _weights_off(before: Path, after: Path) -> tuple[float, float] | None:
    """Mean and largest difference of a weight; None where they cannot be set against each other."""
    try:
        one, other = (read_state_dict(folder / "model.pt") for folder in (before, after))
    except InputError:  # the one of then is gone, or damaged
        return None
    if {name: w.shape for name, w in one.items()} != {name: w.shape for name, w in other.items()}:
        return None
    apart = torch.cat([(one[name].double() - other[name].double()).abs().flatten() for name in one])
    return float(apart.mean()), float(apart.max())


def _numbers(folder: Path) -> Any:
    """What ``summary.json`` says but for times and memory; None where it cannot be read."""
    try:
        return {k: v for k, v in parse_json((folder / "summary.json").read_bytes()).items() if k not in SPENT}
    except (OSError, ValueError, AttributeError):
        return None


def _numbers_off(before: Path, after: Path) -> tuple[float, float] | None:
    """Mean and largest difference of a number in ``metrics.csv``; None where the lines are others."""
    try:
        one, other = (read_rows(folder / "metrics.csv") for folder in (before, after))
    except (OSError, ValueError, KeyError):
        return None
    if [(row["case"], [*row]) for row in one] != [(row["case"], [*row]) for row in other]:
        return None
    names = [name for name in one[0] if name != "case"] if one else []
    both = [(row[name], new[name]) for row, new in zip(one, other, strict=True) for name in names]
    apart = [0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) for a, b in both]
    return sum(apart) / max(len(apart), 1), max(apart, default=0.0)
