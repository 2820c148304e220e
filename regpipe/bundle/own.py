"""Whose configuration runs: MONAI's can run any code, so regpipe runs its own, and others' only where it is told to.

A bundle is regpipe's own if the files that are run say what its template says (``bundle.write``), whatever its
weights and documentation; those hold data alone.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any

from regpipe.bundle.write import rendered
from regpipe.networks.encoders import BACKBONES
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json

ALWAYS = ("logging.conf",)  # Python evaluates it


def require_own(bundle: Path, configs: Sequence[str], *, trust: bool = False) -> None:
    """Check the files of a bundle that are going to be run.

    Args:
        bundle: its folder.
        configs: names of the files in ``configs`` that will be run.
        trust: run what is there, whoever wrote it.

    Raises:
        InputError: one of them is not regpipe's own, its metadata holds code, or its folder Python modules.
    """
    found = None if trust else difference(bundle, configs)
    if found:
        raise InputError(f"{found}. It could run any code: give --trust if you know who wrote it, and that it is sound")


def difference(bundle: Path, configs: Sequence[str]) -> str | None:
    """What of a bundle is not regpipe's own, in a line; None where all is.

    Raises:
        InputError: its metadata are no JSON.
    """
    backbone = backbone_of(bundle / "configs" / configs[0])
    for path in (bundle / "configs" / name for name in (*configs, *ALWAYS)):
        line = _first_line(path, rendered(f"configs/{path.name}", backbone)) if path.is_file() else None
        if line is not None:
            return f"{path}: is not as this version of regpipe writes it, from line {line} on"
    metadata = bundle / "configs" / "metadata.json"
    if metadata.is_file():
        try:
            content = parse_json(metadata.read_bytes())
        except ValueError as error:
            raise InputError(f"{metadata}: not a bundle's metadata ({error}); copy the bundle anew") from error
        if _runs(content):
            return f"{metadata}: holds an expression that MONAI would run"
    # MONAI puts the folder before the installed packages: a module there would be taken for one of theirs
    module = next(_modules(bundle), None)
    return None if module is None else f"{bundle}: holds Python code, {module}"


def _modules(bundle: Path) -> Iterator[str]:
    """What Python could import from a bundle; a folder in it needs no ``__init__.py`` to be a package."""
    seen = set()
    for folder, inner, names in os.walk(bundle, followlinks=True):
        seen.add(os.path.realpath(folder))
        new = (name for name in inner if name.isidentifier() and os.path.realpath(Path(folder, name)) not in seen)
        inner[:] = sorted(new)
        yield from (name for name in sorted(names) if name.endswith(tuple(all_suffixes())))


def backbone_of(config: Path) -> str:
    """The backbone that a configuration names; the first one where it names none."""
    said = re.search(r"^backbone: (\w+)", config.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return said[1] if said and said[1] in BACKBONES else next(iter(BACKBONES))


def _first_line(path: Path, own: str) -> int | None:
    """The first line, from 1, in which a file is not ``own``; its line endings do not count."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # nor more kinds of line ends than these
    pairs = enumerate(itertools.zip_longest(lines, own.split("\n")), 1)
    return next((i for i, (one, other) in pairs if one != other), None)


def _runs(value: Any) -> bool:
    """Whether metadata hold what MONAI runs or reads from elsewhere: ``$...``, ``%...``, ``_target_``."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_runs, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_runs, value))
    return isinstance(value, str) and value.lstrip().startswith(("$", "%"))
