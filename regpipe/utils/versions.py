"""The versions that a bug report needs. They are read from what is installed; nothing is imported."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES: tuple[str, ...] = ("regpipe", "torch", "torchvision", "monai", "pytorch-ignite", "itk", "itk-elastix")
PACKAGES += ("nibabel", "numpy", "scipy", "tensorboard")


def versions() -> dict[str, str | None]:
    """Name -> version; None where it is not installed. ``cuda`` is the version that torch was built for."""
    return {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}, "cuda": _cuda()}


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    written = re.search(r"^cuda\b.*= '(.+)'", file.read_text(), re.M) if file and file.is_file() else None
    return written[1] if written else None
