"""Make results again from their manifests, and say whether the same comes out: to the bit, or how far off.

Registered cases here; a training and an evaluation in ``provenance.repeat``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpipe.bundle.run import register_with_bundle
from regpipe.bundle.write import all_shipped
from regpipe.data import manifest
from regpipe.inference.from_zero import register_from_zero
from regpipe.provenance.verify import MODELS, Sources, manifests, metrics_of, nearest, unlike
from regpipe.transforms.displacement import read_displacement
from regpipe.utils.errors import InputError

NEAR = ("*", "*/*", "*/*/*", "*/*/*/*")  # where inputs are looked for beside the results: so deep and no deeper
FIELDS = ("displacement.nii.gz", "1Warp.nii.gz")  # what says how far off it is; the latter is without the affine part
BOTH = ("affine", "affine_from", "affine_metric", "formats", "landmark_channels", "refine")
ZERO = (*BOTH, "finest", "similarity", "smoothness")  # settings that the command is given again
BUNDLE = (*BOTH, "refine_loss", "refine_window", "refine_finest", "repair")


class Again(NamedTuple):
    """How what was made again compares with what it was."""

    case: str  # or ``training``, ``evaluation``
    files: int
    different: list[str]  # files that are not the same to the bit; of metrics.json and summary.json the numbers count
    conditions: dict[str, list[Any]]  # version, machine ... -> [then, now], where they differ
    off: tuple[float, float] | None  # mean and largest difference, see ``of``; None: there is nothing to compare
    of: str = "displacement"  # in mm; or ``weight``, ``number``


def rerun(
    given: Path,
    out: Path | None = None,
    *,
    data: Path | None = None,
    bundle: Path | None = None,
    trust: bool = False,
) -> list[Again]:
    """Register, train or evaluate again what the manifests in ``given`` tell of.

    Args:
        given: a manifest, or a folder with manifests of registered cases, or with a single one.
        out: where to; None: nowhere, only the comparison is wanted.
        data: below it the inputs are found, by name and hash; None: near ``given``. Of a training or an evaluation the
            data set itself; None: where the model's record knows it.
        bundle: with the network, where there was one.
        trust: run it though its configuration is not regpipe's own.

    Raises:
        InputError: no such manifest; an input or the model is not there, or is another; the cases were registered
            with different settings, or with some that regpipe never wrote.
        SystemExit: a case cannot be registered any more.
    """
    old = {path.parent: manifest.read(path) for path in manifests(given)[0]}
    kinds = {content["kind"] for content in old.values()}
    if len(old) == 1 and kinds <= {"training", "evaluation"}:
        return [_repeated(given if given.is_file() else next(iter(old)) / manifest.NAME, out, data, bundle)]
    if kinds != {"registration"}:
        told = f"holds manifests of: {', '.join(sorted(kinds)) or 'nothing'}"
        raise InputError(
            f"{given}: {told}; give the manifest.json of one training or evaluation, or registered cases. "
            "What else there is, its own command makes again"
        )
    first = next(iter(old.values()))
    if any((other["settings"], other["model"]) != (first["settings"], first["model"]) for other in old.values()):
        raise InputError(f"{given}: its cases were registered with different settings; give them one at a time")
    beside = next(iter(old)).absolute().parent.parent  # of the folder of cases
    sources = Sources(beside, NEAR) if data is None else Sources(data.absolute())
    entries = [_entry(content, sources) for content in old.values()]
    models = Path()
    if first["settings"].get("network") == "symnet":
        raise InputError(f"{given}: was registered by SYMNet; do so again with its weights, to another folder")
    if first["model"]:
        bundle, models = _with_model(bundle, first["model"])
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
            register_with_bundle(bundle, listed, target, chosen | {"ckpt_dir": str(models.absolute())}, trust=trust)
        else:
            register_from_zero(str(listed), str(target), steps=chosen.pop("refine"), **chosen)
        return [_compared(folder, content, target / content["case"]) for folder, content in old.items()]


def _repeated(old: Path, out: Path | None, data: Path | None, bundle: Path | None) -> Again:
    """A training or an evaluation once more."""
    from regpipe.provenance import repeat

    content = manifest.read(old)
    trained = content["kind"] == "training"
    if trained and bundle is not None:
        raise InputError(f"{old}: is of a training; leave out --bundle")
    try:
        chosen = _chosen(content["settings"], repeat.TRAINING if trained else repeat.EVALUATION)
    except KeyError as missing:
        raise InputError(f"{old}: does not say {missing}; an older version's, make the result again") from missing
    with tempfile.TemporaryDirectory() as aside:
        target = out or Path(aside) / "again"
        if trained:
            found = repeat.train(old, content, chosen, target, data)
        else:
            found = repeat.evaluate(old, content, chosen, target, data, bundle)
        new = manifest.read((target / MODELS if trained else target) / manifest.NAME)
    files, different, off = found
    return Again(content["kind"], files, different, _conditions(content, new), off, "weight" if trained else "number")


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


def _with_model(bundle: Path | None, used: Sequence[Mapping[str, str]]) -> tuple[Path, Path]:
    """The bundle that holds the model that was used, and where in it: its own training may have come since.

    Where none is given it is one that came with regpipe.
    """
    # another version's configuration may well come to the same
    used = [item for item in used if item["file"] != manifest.CONFIG]
    for one in all_shipped() if bundle is None else [bundle]:
        models, other = nearest(used, one)
        if not other:
            return one, models
        if bundle is not None:
            raise InputError(f"{bundle}: {unlike(other)}; give the bundle that the cases were registered with")
    raise InputError("these cases were registered with a network; give it with --bundle")


def _chosen(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings of a manifest, to be given to the command again: numbers and words, which MONAI does not run."""
    chosen = {name: settings[name] for name in names}
    if not _is_value(chosen):
        raise InputError("the manifest's settings hold an expression: it is not regpipe's, and is not run")
    return chosen


def _is_value(value: Any) -> bool:
    """Whether JSON says nothing but numbers and plain words, under plain names."""
    if isinstance(value, dict):
        return all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in value) and all(map(_is_value, value.values()))
    if isinstance(value, list):
        return all(map(_is_value, value))
    return not isinstance(value, str) or re.fullmatch("([a-z0-9]+(_[a-z0-9]+)*)?", value) is not None


def _compared(before: Path, old: Mapping[str, Any], after: Path) -> Again:
    new = manifest.read(after / manifest.NAME)
    names = sorted(old["files"].keys() | new["files"].keys())
    different = [name for name in names if old["files"].get(name) != new["files"].get(name)]
    if "metrics.json" in different and metrics_of(before) == metrics_of(after):
        different.remove("metrics.json")  # it also says when its images were written
    off = _off(before, after) if different else (0.0, 0.0)
    return Again(old["case"], len(names), different, _conditions(old, new), off)


def _conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Under what each was made, where that differs."""
    found = {key: [old.get(key), new.get(key)] for key in ("machine", "given_up") if old.get(key) != new.get(key)}
    packages = old["versions"].keys() | new["versions"].keys()
    versions = {name: [old["versions"].get(name), new["versions"].get(name)] for name in sorted(packages)}
    return found | {name: pair for name, pair in versions.items() if pair[0] != pair[1]}


def _off(before: Path, after: Path) -> tuple[float, float] | None:
    for name in FIELDS:
        if (before / name).is_file() and (after / name).is_file():
            (one, _), (other, _) = (read_displacement(folder / name) for folder in (before, after))
            if one.shape == other.shape:
                distance = np.linalg.norm(one - other, axis=0)
                return float(distance.mean()), float(distance.max())
    return None
