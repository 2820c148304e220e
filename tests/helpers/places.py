"""Where the repository is, its parts, and the real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
QUICK = ROOT / "configs" / "quick.yaml"
DATA = Path(os.environ.get("REGPIPE_DATA", ROOT.parent / "shared" / "data"))


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set REGPIPE_DATA to the folder of real images")
    return DATA / name
