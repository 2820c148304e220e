"""Compares the three backbones on equal terms: same data, split, seed and number of steps; one table with intervals.

The commands of each backbone's bundle train and evaluate it, in processes of their own, so that a comparison gives what
a user of the bundles gets. A backbone that has its results is not run again.
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
from regpipe.metrics.metric import METRICS, key_metric
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
    """Train and evaluate each backbone in ``out/<backbone>``; returns the table as Markdown.

    It also writes ``out/comparison.csv``; of this ``comparison.md`` and its figures (``study.compare_page``); ``best``,
    the best backbone's name; and TensorBoard logs for ``regpipe dashboard out``.

    Args:
        out: a folder, made where needed.
        backbones: names of the backbones.
        overlays: configuration files over the bundle's ``train.yaml``.
        settings: ids of ``train.yaml`` and their values, e.g. ``dataset_dir``, ``max_epochs``.
        trust: run bundles that are already in ``out`` though their configuration is not regpipe's own.

    Raises:
        InputError: an unknown backbone or setting, a bundle that is not trusted (``bundle.own``), a run that failed.
    """
    out, settings = Path(out).absolute(), dict(settings or {})
    for overlay in overlays:
        require_file(overlay)
    with tempfile.TemporaryDirectory() as aside:  # check before anything is written
        for name in backbones:
            known = _bundle(name, out / name, Path(aside) / name)
            require_own(known, ("train.yaml", "evaluate.yaml"), trust=trust)
            # MONAI takes a misspelt setting for a new id
            refuse_unknown_ids(settings, [str(known / "configs" / "train.yaml")])
    bundles = {name: _bundle(name, out / name, out / name) for name in backbones}
    results: dict[str, dict[str, Any]] = {}
    for name, folder in bundles.items():
        results[name] = run_bundle(folder, overlays=overlays, settings=settings)
        took = [result["training_seconds"] or 0 for result in results.values()]
        left = sum(took) / len(took) * (len(bundles) - len(results)) / 60
        print(f"== {name}: done, {len(results)} of {len(bundles)}; about {left:.0f} min of training left", flush=True)
    manifest.forget(out)  # of an earlier comparison
    compare_page.write_csv(out, results)
    page = compare_page.write_page(out)
    tensorboard_pages.log_comparison(out / "comparison", page, compare_page.drawings(out))
    replace_file(out / BEST, best_of(results).encode())
    _conclude(out, backbones, overlays, settings)
    console.tell(folder=out, best=best_of(results), table=out / "comparison.csv", backbones=results)
    return page


def _conclude(out: Path, backbones: Sequence[str], overlays: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Write the manifest: of the table, the page, and the manifests of the trainings and evaluations behind them."""
    parts = ("models/manifest.json", "eval/manifest.json", "eval/summary.json")
    files = manifest.hashes(out, (*WRITTEN, *(f"{name}/{part}" for name in backbones for part in parts)))
    # without paths: the trainings' own manifests have the hashes of the files
    chosen = {k: v for k, v in settings.items() if k != "dataset_dir" and tensorboard_pages.plain(v) == v}
    asked = {"backbones": [*backbones], "overlays": [sha256([Path(overlay)]) for overlay in overlays], **chosen}
    manifest.write(out, "comparison", inputs=[], files=files, settings=asked)


def _bundle(backbone: str, folder: Path, new: Path) -> Path:
    """The backbone's bundle in ``folder``; if there is none, a new one in ``new``."""
    return folder if (folder / "configs").is_dir() else write_bundle(backbone, new)


def best_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The backbone with the highest Dice; without labels the lowest TRE, else the highest NCC."""

    def score(name: str) -> float:
        metrics = results[name]["metrics"]
        key = key_metric(metrics)
        return metrics[key][0] if METRICS[key].higher else -metrics[key][0]

    return max(results, key=score)


def run_bundle(bundle: Path, *, overlays: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and evaluate one bundle, unless the same command has already run; returns its summary."""
    summary, record = bundle / "eval" / "summary.json", bundle / "eval" / "command.json"
    asked = _asked(overlays, settings)
    if not (summary.is_file() and record.is_file() and record.read_text() == asked):
        configs = [str(bundle / "configs" / "train.yaml"), *overlays]
        print(f"== {bundle.name}: training", flush=True)
        _bundle_command(bundle, "training", configs, settings)
        print(f"== {bundle.name}: evaluating", flush=True)
        configs.append(str(bundle / "configs" / "evaluate.yaml"))
        # the evaluation takes its weights from the trained model
        kept = {k: v for k, v in settings.items() if k not in ("pretrained", "freeze", "transfer")}
        _bundle_command(bundle, "evaluating", configs, kept)
        replace_file(record, asked.encode())
    return json.loads(summary.read_text())


def _asked(overlays: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Overlays, settings and data of a run, as JSON. Of a path only the last part is shown."""
    told = {"overlays": [Path(o).read_text() for o in overlays]}
    whole = json.dumps({**settings, "files": _files(settings)}, default=str)
    shown = {name: tensorboard_pages.plain(value) for name, value in settings.items()}
    return json.dumps({**told, **shown, "asked": hashlib.sha256(whole.encode()).hexdigest()}, indent=1)


def _files(settings: Mapping[str, Any]) -> str:
    """A hash of the data's files by name, size and time, so that changed data are compared anew."""
    if "dataset_dir" not in settings:
        return ""
    pairing = str(settings.get("pairing", "all"))
    cases = list_pairs(settings["dataset_dir"], pairing=pairing, problems={})
    paths = sorted({path for case in cases for key, path in case.items() if key != "case"})
    known = [(str(file), *about) for path in paths for file, *about in images.stamps(path)]
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
