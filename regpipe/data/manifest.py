"""``manifest.json`` beside a result: what it was made of, with which settings, when and on which machine.

Registered cases, models, evaluations, comparisons and studies have one; ``regpipe apply`` and ``compose`` write one
where they are asked to.

    inputs    role, file's name and SHA-256 of each image, label map, mask, landmark file (a series: of all files)
    model     the same of the model's files; empty without a network
    settings  what the result depends on beside them, and the SHA-256 of that: ``configuration``
    seed, versions, machine, finished, seconds
    files     SHA-256 of each file of the result

``provenance.verify`` holds files to it, ``provenance.rerun`` makes them again. No folder and no name of a user or of a
machine is in it, only the names of files.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from regpipe.data.pairs import Case
from regpipe.io import images
from regpipe.io.source import Source
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.files import absolute, parse_json, replace_file, sha256
from regpipe.utils.versions import versions

NAME = "manifest.json"
TRANSFORM = "transform.json"  # of a case: it holds the hashes of its transform files
WITHIN = "within"  # of a template of subjects of several images: the folder of their own ones
FORMAT = "regpipe manifest 1"
KINDS = ("registration", "training", "evaluation", "comparison", "study", "application", "composition", "template")
SEED = 0  # of a registration: elastix draws its samples from it, nothing else is random
CONFIG = "inference.yaml"
BESIDE = ("model.pt", "working_grid.json", "training.json", "typical.json")  # what makes up a trained model
TABLES = ("metrics.csv", "summary.json")  # and an evaluation


def write(
    path: Path,
    kind: str,
    *,
    inputs: Sequence[Mapping[str, str]],
    files: Mapping[str, str],
    settings: Mapping[str, Any],
    **about: Any,
) -> None:
    """Write the manifest of what lies in a folder; see the top.

    Args:
        path: the folder; or the file itself, where it has another name than ``NAME``.
        kind: of ``KINDS``.
        inputs: see ``inputs_of``.
        files: name, or path within the folder, -> SHA-256.
        about: what else to keep: case, model, seed, machine, seconds.
    """
    content = {
        "format": FORMAT,
        "kind": kind,
        **about,
        "settings": settings,
        "configuration": _digest(settings),
        "versions": versions(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": inputs,
        "files": files,
    }
    replace_file(path / NAME if path.is_dir() else path, _text(content))


def check_beside(path: Path, out: Path) -> None:
    """Raises ``InputError`` unless the file ``path`` can be the manifest of results at ``out``."""
    if path.suffix.lower() != ".json" or path.is_dir():
        raise InputError(f"{path}: no name for a manifest; give one that ends in .json")
    if not absolute(out).is_relative_to(absolute(path.parent)):
        raise InputError(f"{path}: a manifest names files beside or below it; {out} is elsewhere: give one there")
    if path.exists():
        read(path)  # nothing else is written over


def of_files(
    path: Path, kind: str, inputs: Mapping[str, Iterable[Path]], written: Iterable[Path], settings: Mapping[str, Any]
) -> None:
    """Write the manifest of single files, see ``check_beside``.

    Args:
        inputs: role -> files and cases' folders, of which the transform.json is taken.
        written: what came out.
    """
    cases = {p: p / TRANSFORM for paths in inputs.values() for p in paths if (p / TRANSFORM).is_file()}
    told = {role: [str(cases.get(p, p)) for p in paths] for role, paths in inputs.items()}
    known = [item for role, paths in told.items() for item in sources(role, paths)]
    root = absolute(path.parent)
    files = {absolute(file).relative_to(root).as_posix(): sha256([file]) for file in written}
    write(path, kind, inputs=known, files=files, settings=settings)


def forget(folder: Path) -> None:
    """Remove a manifest, before the files that it describes are written anew."""
    (folder / NAME).unlink(missing_ok=True)


def renew(folder: Path, patterns: Iterable[str]) -> None:
    """Update the hashes of files that were made again from the same result; without a manifest do nothing."""
    if (folder / NAME).is_file():
        content = read(folder / NAME)
        replace_file(folder / NAME, _text({**content, "files": content["files"] | hashes(folder, patterns)}))


def _text(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=1)}\n".encode()


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """What ``write`` wrote.

    Raises:
        InputError: missing, damaged, of another format, its settings edited.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing; register or train again with this version")
    try:
        content = parse_json(path.read_bytes())
        if content["format"] != FORMAT:
            raise InputError(f"{path}: is of format {content['format']!r}, not {FORMAT!r}; update regpipe")
        for key, kind in (("inputs", list), ("files", dict), ("settings", dict), ("versions", dict)):
            if not isinstance(content[key], kind):
                raise TypeError(key)
        told = [source[key] for source in content["inputs"] for key in ("role", "file", "sha256")]
        told += [*content["files"], *content["files"].values(), content["configuration"]]
        if content["kind"] == "registration":
            told.append(content["case"])
        if content["kind"] in ("registration", "evaluation"):
            told += [source[key] for source in content["model"] for key in ("file", "sha256")]
        if content["kind"] not in KINDS or not all(isinstance(text, str) for text in told):
            raise TypeError("a name or hash")
        if content["configuration"] != _digest(content["settings"]):
            raise InputError(f"{path}: its settings were edited; register or train again")
    except (ValueError, KeyError, TypeError) as cause:
        if isinstance(cause, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(cause).__name__}: {cause}); register or train again") from cause
    return content


def inputs_of(case: Case, files: Source) -> list[dict[str, str]]:
    """Role, name and hash of each file of a case."""
    return [
        {"role": role, "file": Path(path).name, "sha256": files.sha256(path)}
        for role, path in case.items()
        if role != "case"
    ]


def sources(role: str, paths: Iterable[str]) -> list[dict[str, str]]:
    """Role, name and hash of each file, in the order of the paths; a series is one."""
    shown = Progress(list(paths), what="hashing", unit="files")
    return [{"role": role, "file": Path(path).name, "sha256": sha256(images.files(path))} for path in shown]


def paths_of(cases: Iterable[Case]) -> list[str]:
    """All files of the cases, each once."""
    return sorted({path for case in cases for role, path in case.items() if role != "case"})


def model_files(folder: str | Path) -> list[dict[str, str]]:
    """Name and hash of each file that makes up the model in ``folder``."""
    found = (Path(folder) / name for name in BESIDE)
    return [{"file": path.name, "sha256": sha256([path])} for path in found if path.is_file()]


def bundle_files(models: Path) -> list[dict[str, str]]:
    """The same, and of the configuration that registers with them, which may be a foreign one that is trusted."""
    places = (bundle / "configs" / CONFIG for bundle in models.parents[:2])  # of ``models``, or of ``models/2d``
    config = next((path for path in places if path.is_file()), None)
    return model_files(models) + ([{"file": CONFIG, "sha256": sha256([config])}] if config else [])


def hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Path within ``folder`` -> SHA-256, of the files that any pattern finds."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): sha256([path]) for path in found}


def machine(device: Any) -> dict[str, Any]:
    """What rounding depends on: the GPU's name; or the processor's kind, its instructions and the threads."""
    import torch

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": f"cpu {kind}", "threads": torch.get_num_threads()}
