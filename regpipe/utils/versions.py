"""The versions that a bug report needs. They are read from what is installed; nothing is imported."""

from __future__ import annotations

import functools
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from regpipe.utils.errors import InputError

PACKAGES: tuple[str, ...] = ("regpipe", "torch", "torchvision", "monai", "pytorch-ignite", "itk", "itk-elastix")
PACKAGES += ("nibabel", "numpy", "scipy", "tensorboard")


def versions() -> dict[str, str | None]:
    """Name -> version; None where it is not installed. ``cuda`` is the version that torch was built for."""
    return {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}, "cuda": _cuda()}


@functools.cache  # each look parses a whole description, and every case of a folder is told of
def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def refuse_old() -> None:
    """Check what is installed against what regpipe was installed for.

    Raises:
        InputError: a package is older; pip can be told to let it be.
    """
    from packaging.requirements import Requirement

    for line in requires("regpipe") or ():
        needed = Requirement(line)
        found = installed(needed.name) if needed.marker is None else None
        if found and not needed.specifier.contains(found, prereleases=True):
            wanted = f"{needed.name}{needed.specifier}"
            raise InputError(f'{needed.name} {found} is older than regpipe needs: pip install --upgrade "{wanted}"')


def _cuda() -> str | None:
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    written = re.search(r"^cuda\b.*= '(.+)'", file.read_text(), re.M) if file and file.is_file() else None
    return written[1] if written else None
