"""What a version must have before it is released, and the packages that the bundles' metadata name.

    python tests/helpers/release.py 0.1.0        # refuses a version that one of the files does not have
    python tests/helpers/release.py requirements # as the model zoo makes them of a bundle, for pip or uv

Needs the standard library alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
METADATA = ROOT / "regpipe" / "bundle" / "template" / "configs" / "metadata.json"


def versions() -> dict[str, str]:
    """File -> the version that it says."""
    said = {
        "pyproject.toml": r'^version = "(.+)"',
        "CITATION.cff": r"^version: (\S+)",
    }
    found = {name: re.search(line, read(name), re.MULTILINE) for name, line in said.items()}
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    about = {name: match[1] if match else "none" for name, match in found.items()}
    return about | {
        "metadata.json": metadata["version"],
        "metadata.json, regpipe": metadata["required_packages_version"]["regpipe"],
        "metadata.json, changelog": list(metadata["changelog"])[-1],
    }


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def problems(version: str) -> list[str]:
    """Why a version cannot be released yet."""
    wrong = [f"{name} says {said}" for name, said in versions().items() if said != version]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", read("docs/changelog.md"), re.MULTILINE):
        wrong.append(f"docs/changelog.md has no line '## [{version}] - YEAR-MONTH-DAY'")
    return wrong


def requirements() -> list[str]:
    """Lines for pip, as the zoo's ``get_bundle_requirements.py`` makes them."""
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    pins = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    named = {name: metadata[key] for name, key in pins.items()} | metadata["required_packages_version"]
    return [f"{name}=={version}" for name, version in named.items()]


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        print("\n".join(requirements()))
    elif found := problems(sys.argv[1]):
        sys.exit("\n".join(found))
