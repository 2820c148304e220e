"""Make registered cases again from their manifests, and say whether the same comes out: to the bit, or how far off."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe import manifest
from regpipe.cli_register import register_with_bundle
from regpipe.errors import InputError
from regpipe.fromzero import register_from_zero
from regpipe.transforms import read_displacement
from regpipe.verify import Sources, manifests, metrics_of, model_problem

NEAR = ("*", "*/*", "*/*/*", "*/*/*/*")  # where inputs are looked for beside the results: so deep and no deeper
FIELDS = ("displacement.nii.gz", "1Warp.nii.gz")  # what says how far off it is; the latter is without the affine part
BOTH = ("affine", "affine_from", "affine_metric", "formats", "landmark_channels", "refine")
ZERO = (*BOTH, "finest", "similarity", "smoothness")  # settings that the command is given again
BUNDLE = (*BOTH, "refine_loss", "refine_window", "repair")


class Again(NamedTuple):
    """How a case that was made again compares with what it was."""

    case: str
    files: int
    different: list[str]  # files that are not the same to the bit; of metrics.json the numbers count
    conditions: dict[str, list[Any]]  # version, machine ... -> [then, now], where they differ
    off: tuple[float, float] | None  # mean and largest distance of the displacements in mm; None: there are none


def rerun(
    given: Path,
    out: Path | None = None,
    *,
    data: Path | None = None,
    bundle: Path | None = None,
    trust: bool = False,
) -> list[Again]:
    """Register again what the manifests in ``given`` tell of.

    Args:
        given: a manifest, a case's folder or a folder of cases.
        out: where to; None: nowhere, only the comparison is wanted.
        data: below it the inputs are found, by name and hash; None: near ``given``.
        bundle: with the network, where there was one.
        trust: run it though its configuration is not regpipe's own.

    Raises:
        InputError: no manifest of a registration; an input or the model is not there, or is another; the cases were
            registered with different settings, or with some that regpipe never wrote.
        SystemExit: a case cannot be registered any more.
    """
    files = [given] if given.is_file() else manifests(given)[0]
    old = {path.parent: manifest.read(path) for path in files}
    if any(content["kind"] != "registration" for content in old.values()) or not old:
        raise InputError(f"{given}: not of a registration; a training is repeated by its own command")
    first = next(iter(old.values()))
    if any((other["settings"], other["model"]) != (first["settings"], first["model"]) for other in old.values()):
        raise InputError(f"{given}: its cases were registered with different settings; give them one at a time")
    beside = next(iter(old)).absolute().parent.parent  # of the folder of cases
    sources = Sources(beside, NEAR) if data is None else Sources(data.absolute())
    entries = [_entry(content, sources) for content in old.values()]
    if first["model"]:
        _check_model(bundle, first["model"])
    elif bundle is not None:
        raise InputError(f"{given}: was registered without a network; leave out --bundle")
    with tempfile.TemporaryDirectory() as aside:
        target, listed = out or Path(aside) / "again", Path(aside) / "pairs.json"
        if target.resolve() in {path.resolve() for folder in old for path in (folder, folder.parent)}:
            raise InputError(f"{target}: holds the results to compare with; give another --out")
        listed.write_text(json.dumps({"test": entries}))
        try:
            chosen = _chosen(first["settings"], BUNDLE if bundle else ZERO)
        except KeyError as missing:
            raise InputError(f"{given}: its settings lack {missing}; register again with this version") from missing
        if bundle is not None:
            register_with_bundle(bundle, listed, target, chosen, trust=trust)
        else:
            register_from_zero(str(listed), str(target), steps=chosen.pop("refine"), **chosen)
        return [_compared(folder, content, target / content["case"]) for folder, content in old.items()]


def _entry(content: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    """The case as a datalist has it."""
    entry = {"case": content["case"]}
    for source in content["inputs"]:
        if source["role"] == "displacement":  # a phantom's true one: for training, nothing registered depends on it
            continue
        path = sources.find(source)
        if path is None:
            raise InputError(
                f"{source['file']}: {source['role']}, not in {sources.folder}; give its folder with --data"
            )
        entry[source["role"]] = path
    return entry


def _check_model(bundle: Path | None, used: Sequence[Mapping[str, str]]) -> None:
    if bundle is None:
        raise InputError("these cases were registered with a network; give it with --bundle")
    problem = model_problem(used, bundle)
    if problem:
        raise InputError(f"{bundle}: {problem}; give the bundle that the cases were registered with")


def _chosen(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings of a manifest, to be given to the command again: values only, for MONAI runs what begins with $ or @."""
    chosen = {name: settings[name] for name in names}
    if re.search(r"[$@%]", json.dumps(chosen)):
        raise InputError("the manifest's settings hold an expression: it is not regpipe's, and is not run")
    return chosen


def _compared(before: Path, old: Mapping[str, Any], after: Path) -> Again:
    new = manifest.read(after / manifest.NAME)
    names = sorted(old["files"].keys() | new["files"].keys())
    different = [name for name in names if old["files"].get(name) != new["files"].get(name)]
    if "metrics.json" in different and metrics_of(before) == metrics_of(after):
        different.remove("metrics.json")  # it also says when its images were written
    conditions = {key: [old[key], new[key]] for key in ("machine", "given_up") if old[key] != new[key]}
    packages = old["versions"].keys() | new["versions"].keys()
    versions = {name: [old["versions"].get(name), new["versions"].get(name)] for name in sorted(packages)}
    conditions |= {name: pair for name, pair in versions.items() if pair[0] != pair[1]}
    return Again(old["case"], len(names), different, conditions, _off(before, after) if different else (0.0, 0.0))


def _off(before: Path, after: Path) -> tuple[float, float] | None:
    for name in FIELDS:
        if (before / name).is_file() and (after / name).is_file():
            (one, _), (other, _) = (read_displacement(folder / name) for folder in (before, after))
            if one.shape == other.shape:
                distance = np.linalg.norm(one - other, axis=0)
                return float(distance.mean()), float(distance.max())
    return None
