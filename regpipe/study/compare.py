"""The three backbones on equal terms: same data, split, seed and number of steps; one table with intervals.

Each backbone is trained and evaluated by its bundle's own commands in processes of their own, so that a
comparison is nothing else than what a user of the bundles gets; a backbone whose results are there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regpipe.bundle.own import require_own
from regpipe.bundle.run import BEST
from regpipe.bundle.write import write_bundle
from regpipe.data import manifest
from regpipe.data.pairs import list_pairs
from regpipe.engines.options import refuse_unknown_ids
from regpipe.io import images
from regpipe.metrics.measures import HIGHER_IS_BETTER
from regpipe.report import tensorboard_pages
from regpipe.study import compare_page
from regpipe.utils import console
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file, require_file, sha256

WRITTEN = (BEST, compare_page.NAME, *compare_page.PAGE)


def compare(
    out: str | Path,
    *,
    backbones: Sequence[str],
    overlays: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> str:
    """Train and evaluate each backbone in ``out/<backbone>``; writes the table, returns it as Markdown.

    ``out/comparison.csv`` and, made of it, ``comparison.md`` with its figures (``study.compare_page``); ``best``, the
    best backbone's name; and TensorBoard logs beside each other: ``regpipe dashboard out``.

    Args:
        out: a folder, made where needed.
        backbones: which.
        overlays: configuration files that lie over the bundle's ``train.yaml``.
        settings: ids of ``train.yaml`` and their values, e.g. ``dataset_dir``, ``max_epochs``.
        trust: run bundles that are in ``out`` already though their configuration is not regpipe's own.

    Raises:
        InputError: an unknown backbone or setting; a bundle that is not trusted (``bundle.own``); or a run failed.
    """
    out, settings = Path(out).absolute(), dict(settings or {})
    for overlay in overlays:
        require_file(overlay)
    with tempfile.TemporaryDirectory() as aside:  # mistakes show before anything is written
        for name in backbones:
            known = _bundle(name, out / name, Path(aside) / name)
            require_own(known, ("train.yaml", "evaluate.yaml"), trust=trust)
            # MONAI would take a misspelt setting for a new id
            refuse_unknown_ids(settings, [str(known / "configs" / "train.yaml")])
    bundles = {name: _bundle(name, out / name, out / name) for name in backbones}
    results: dict[str, dict[str, Any]] = {}
    for name, folder in bundles.items():
        results[name] = run_bundle(folder, overlays=overlays, settings=settings)
        took = [result["training_seconds"] or 0 for result in results.values()]
        left = sum(took) / len(took) * (len(bundles) - len(results)) / 60
        print(f"== {name}: done, {len(results)} of {len(bundles)}; about {left:.0f} min of training left", flush=True)
    manifest.forget(out)  # of a comparison that was here before
    compare_page.write_csv(out, results)
    page = compare_page.write_page(out)
    tensorboard_pages.log_comparison(out / "comparison", page, compare_page.drawings(out))
    replace_file(out / BEST, best_of(results).encode())
    _conclude(out, backbones, overlays, settings)
    console.tell(folder=out, best=best_of(results), table=out / "comparison.csv", backbones=results)
    return page


def _conclude(out: Path, backbones: Sequence[str], overlays: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Write the manifest: the table and page, and those of the trainings and evaluations that they were made of."""
    parts = ("models/manifest.json", "eval/manifest.json", "eval/summary.json")
    files = manifest.hashes(out, (*WRITTEN, *(f"{name}/{part}" for name in backbones for part in parts)))
    # no paths: what was read from them is in the trainings' own manifests
    chosen = {k: v for k, v in settings.items() if k != "dataset_dir" and tensorboard_pages.plain(v) == v}
    asked = {"backbones": [*backbones], "overlays": [sha256([Path(overlay)]) for overlay in overlays], **chosen}
    manifest.write(out, "comparison", inputs=[], files=files, settings=asked)


def _bundle(backbone: str, folder: Path, new: Path) -> Path:
    """The backbone's bundle in ``folder``; where there is none, one that is written to ``new``."""
    return folder if (folder / "configs").is_dir() else write_bundle(backbone, new)


def best_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The backbone with the highest Dice; without labels the lowest TRE, else the highest NCC."""

    def score(name: str) -> float:
        metrics = results[name]["metrics"]
        key = compare_page.key_metric(metrics)
        return metrics[key][0] if HIGHER_IS_BETTER[key] else -metrics[key][0]

    return max(results, key=score)


def run_bundle(bundle: Path, *, overlays: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and evaluate one bundle; returns its summary. Skipped where the same has been run already."""
    summary, record = bundle / "eval" / "summary.json", bundle / "eval" / "command.json"
    asked = _asked(overlays, settings)
    if not (summary.is_file() and record.is_file() and record.read_text() == asked):
        configs = [str(bundle / "configs" / "train.yaml"), *overlays]
        print(f"== {bundle.name}: training", flush=True)
        _bundle_command(bundle, "training", configs, settings)
        print(f"== {bundle.name}: evaluating", flush=True)
        configs.append(str(bundle / "configs" / "evaluate.yaml"))
        # where the weights came from is the overlay's to say now: from the trained model
        kept = {k: v for k, v in settings.items() if k not in ("pretrained", "freeze", "transfer")}
        _bundle_command(bundle, "evaluating", configs, kept)
        replace_file(record, asked.encode())
    return json.loads(summary.read_text())


def _asked(overlays: Sequence[str], settings: Mapping[str, Any]) -> str:
    """What a run was asked for: overlays, settings, data. Of paths in the settings only their last part is told."""
    told = {"overlays": [Path(o).read_text() for o in overlays]}
    whole = json.dumps({**settings, "files": _files(settings)}, default=str)
    shown = {name: tensorboard_pages.plain(value) for name, value in settings.items()}
    return json.dumps({**told, **shown, "asked": hashlib.sha256(whole.encode()).hexdigest()}, indent=1)


def _files(settings: Mapping[str, Any]) -> str:
    """A hash of the data's files by name, size and time: a comparison of other data is not taken for done."""
    if "dataset_dir" not in settings:
        return ""
    pairing = str(settings.get("pairing", "all"))
    cases = list_pairs(settings["dataset_dir"], pairing=pairing, problems={})
    paths = sorted({path for case in cases for key, path in case.items() if key != "case"})
    files = [file for path in paths for file in images.files(path)]
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _bundle_command(bundle: Path, run_id: str, configs: Sequence[str], settings: Mapping[str, Any]) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", run_id]
    for name, value in {
        "config_file": str(list(configs)),
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "logging_file": str(bundle / "configs" / "logging.conf"),
        "bundle_root": str(bundle),
        **settings,
    }.items():
        command += [f"--{name}", str(value)]
    if subprocess.run(command).returncode:
        raise InputError(f"{bundle}: {run_id} failed, see above; mend it and repeat the command, or give another -o")
