"""Manifests read, and rewritten as somebody does who knows how."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def content(case: Path) -> dict[str, Any]:
    return json.loads((case / "manifest.json").read_text())


def rewrite(case: Path, told: dict[str, Any]) -> None:
    """A manifest as somebody writes it who knows how."""
    told["configuration"] = hashlib.sha256(json.dumps(told["settings"], sort_keys=True).encode()).hexdigest()
    (case / "manifest.json").write_text(json.dumps(told))


RUNS = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["owned"]}}
