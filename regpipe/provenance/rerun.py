"""Registers cases again from their manifests, and says whether the same comes out: to the bit, or how far off."""

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
from regpipe.fields.algebra import Layers
from regpipe.inference.from_zero import register_from_zero
from regpipe.provenance.verify import Sources, manifests, nearest, unlike
from regpipe.transforms.displacement import read_displacement
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json
from regpipe.utils.settings import AffineOptions, RefinementOptions, names

NEAR = ("*", "*/*", "*/*/*", "*/*/*/*")  # how deep beside the results inputs are looked for
FIELDS = ("displacement.nii.gz", "1Warp.nii.gz")  # what is compared in mm; the latter is without the affine part
# settings that are given again where they were given; and those that registering with a bundle by MONAI does not know
MORE = ("guide", "guide_labels", "rigid", "uncertainty", "features", "channel_weights")
OWN = {"guide", "rigid", "channel_weights", "channel_similarity"}
BOTH = (*names(AffineOptions), "formats", "landmark_channels", "refine")
ZERO = (*BOTH, *(name for name in names(RefinementOptions) if name not in MORE))  # given to registering from zero
BUNDLE = (*BOTH, "refine_loss", "refine_window", "refine_finest", "repair")  # and registering with a bundle


class Again(NamedTuple):
    """How a case that was registered again compares with what it was."""

    case: str
    files: int
    different: list[str]  # files that are not the same to the bit; of metrics.json only the numbers count
    conditions: dict[str, list[Any]]  # version, machine ... -> [then, now], where they differ
    off: tuple[float, float] | None  # mean and largest difference of the displacement, mm; None: no two to compare
    of: str = "displacement"


def rerun(
    given: Path, out: Path | None = None, *, data: Path | None = None, bundle: Path | None = None, trust: bool = False
) -> list[Again]:
    """Register again the cases whose manifests are in ``given``.

    Args:
        given: a manifest, or a folder of registered cases.
        out: where to; None: nowhere, only the comparison is wanted.
        data: below it the inputs are found, by name and hash; None: near ``given``.
        bundle: with the network, where there was one; None: one that came with regpipe.
        trust: run a bundle whose configuration is not regpipe's own.

    Raises:
        InputError: no manifest of a registered case; an input or the model is missing or has changed; the cases have
            different settings, or settings that regpipe never wrote.
        SystemExit: a case cannot be registered any more.
    """
    old = {path.parent: manifest.read(path) for path in manifests(given)[0]}
    kinds = {content["kind"] for content in old.values()}
    if kinds != {"registration"}:
        told = f"holds manifests of: {', '.join(sorted(kinds)) or 'nothing'}"
        raise InputError(f"{given}: {told}; give registered cases. All else its own command makes again")
    first = next(iter(old.values()))
    if any((other["settings"], other["model"]) != (first["settings"], first["model"]) for other in old.values()):
        raise InputError(f"{given}: its cases were registered with different settings; give them one at a time")
    if first["settings"].get("network") == "symnet":
        raise InputError(f"{given}: was registered by SYMNet; do so again with its weights, to another folder")
    if "features_sha256" in first["settings"]:
        raise InputError(f"{given}: was registered by --features {first['settings']['features']}; do so again with it")
    if first["model"] and not OWN.isdisjoint(first["settings"]):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(OWN & first["settings"].keys()))
        raise InputError(f"{given}: was registered with a bundle and {told}; do so again, to another folder")
    if not first["settings"].keys().isdisjoint(Layers._fields):
        raise InputError(f"{given}: was registered with a warp and a dvf2ddf of its own; do so again by its bundle")
    if bundle is not None and not first["model"]:
        raise InputError(f"{given}: was registered without a network; leave out --bundle")
    beside = next(iter(old)).absolute().parent.parent  # of the folder of cases
    sources = Sources(beside, NEAR) if data is None else Sources(data.absolute())
    entries = [_entry(content, sources) for content in old.values()]
    with tempfile.TemporaryDirectory() as aside:
        target, listed = out or Path(aside) / "again", Path(aside) / "pairs.json"
        if target.resolve() in {path.resolve() for folder in old for path in (folder, folder.parent)}:
            raise InputError(f"{target}: holds the results to compare with; give another --out")
        listed.write_text(json.dumps({"test": entries}))
        more = [name for name in MORE if name in first["settings"]]
        if first["model"]:
            bundle, models = _with_model(bundle, first["model"])
            chosen = _chosen(first["settings"], [*BUNDLE, *more]) | {"ckpt_dir": str(models.absolute())}
            register_with_bundle(bundle, listed, target, chosen, trust=trust)
        else:
            chosen = _chosen(first["settings"], [*ZERO, *more])
            register_from_zero(str(listed), str(target), steps=chosen.pop("refine"), **chosen)
        return [_compared(folder, content, target / content["case"]) for folder, content in old.items()]


def _entry(content: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    """The case as a datalist has it."""
    entry = {"case": content["case"]}
    for source in content["inputs"]:
        if source["role"] == "displacement":  # a phantom's true one: nothing registered depends on it
            continue
        path = sources.find(source)
        if path is None:
            told = f"{source['file']}: {source['role']}, not in {sources.folder}"
            raise InputError(f"{told}; give its folder with --data")
        entry[source["role"]] = path
    return entry


def _with_model(bundle: Path | None, used: Sequence[Mapping[str, str]]) -> tuple[Path, Path]:
    """The bundle that holds the model that was used, and the model's folder in it."""
    # another version's configuration may well give the same result
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
    missing = [name for name in names if name not in settings]
    if missing:
        raise InputError(f"the manifest's settings lack {missing[0]!r}; register again with this version")
    chosen = {name: settings[name] for name in names}
    if not _is_value(chosen):
        raise InputError("the manifest's settings hold an expression: it is not regpipe's, and is not run")
    return chosen | _outside(settings)


def _outside(settings: Mapping[str, Any]) -> dict[str, float]:
    """``fill``, a number or nan in words, where it was given."""
    try:
        return {"fill": float(settings["fill"])} if "fill" in settings else {}
    except (TypeError, ValueError) as cause:
        raise InputError("the manifest's fill is no number; register again with this version") from cause


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
    if "metrics.json" in different and _numbers(before) == _numbers(after):
        different.remove("metrics.json")  # it also says when its images were written
    off = _off(before, after) if different else (0.0, 0.0)
    return Again(old["case"], len(names), different, _conditions(old, new), off)


def _conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Under what each was made, where that differs."""
    then, now = ({key: made.get(key) for key in ("machine", "given_up")} | made["versions"] for made in (old, new))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return {name: [then.get(name), now.get(name)] for name in names}


def _off(before: Path, after: Path) -> tuple[float, float] | None:
    for name in FIELDS:
        if (before / name).is_file() and (after / name).is_file():
            (one, _), (other, _) = (read_displacement(folder / name) for folder in (before, after))
            if one.shape == other.shape:
                distance = np.linalg.norm(one - other, axis=0)
                return float(distance.mean()), float(distance.max())
    return None


def _numbers(folder: Path) -> dict[str, Any] | None:
    """The metrics of a case without what says of which files it was made; None where they cannot be read."""
    try:
        row = parse_json((folder / "metrics.json").read_bytes())
        return {key: value for key, value in row.items() if key != "made_from"}
    except (OSError, ValueError, AttributeError):
        return None
