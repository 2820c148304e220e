"""Which versions the tests pass on: an environment of its own for each, made by uv; a line of a CSV for each.

    python tests/benchmarks/versions.py -o docs/results/versions.csv [--only 3.10-lowest] [-- tests/fields -n 2]

``lowest``: every dependency of regpipe, not of its tests, as old as ``pyproject.toml`` allows; ``newest``: as new as
there is. What stands after ``--`` is told to pytest; else all tests that are not slow run. uv and the interpreters are
found on the PATH. Environments are several GB each, and are removed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from tables import kept_rows, write_rows

ROOT = Path(__file__).parents[2]
KINDS = ("3.10-lowest", "3.11-newest", "3.12-newest", "3.13-newest")
PACKAGES = ("torch", "torchvision", "monai", "pytorch-ignite", "itk", "nibabel", "numpy", "scipy", "tensorboard")
COLUMNS = ("kind", *PACKAGES, "passed", "failed", "skipped", "seconds", "commit", "date", "failures")


def call(*words: str, **more: object) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, **more).stdout  # type: ignore[call-overload]


def environment(folder: Path, kind: str) -> Path:
    """A new environment with regpipe and its tests' tools; its interpreter."""
    version, _, age = kind.partition("-")
    call("uv", "venv", "--python", version, str(folder))
    python, held = folder / "bin" / "python", folder / "constraints.txt"
    words = ["--resolution", "lowest-direct"] if age == "lowest" else []
    call("uv", "pip", "compile", *words, "--python-version", version, str(ROOT / "pyproject.toml"), "-o", str(held))
    call("uv", "pip", "install", "--python", str(python), "-c", str(held), "-e", f"{ROOT}[test]")
    return python


def versions(python: Path) -> dict[str, str]:
    frozen = call("uv", "pip", "freeze", "--python", str(python)).lower().splitlines()
    known = dict(line.split("==") for line in frozen if "==" in line)
    return {name: known[name] for name in PACKAGES}


def tested(python: Path, told: Sequence[str], aside: Path) -> dict[str, str]:
    """What the tests say; those that failed by name."""
    report, began = aside / "report.xml", time.monotonic()
    words = [str(python), "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", "-p", "no:cacheprovider"]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*words, *told], cwd=ROOT, check=False, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    if not report.is_file():
        raise SystemExit(f"{python}: no test ran: {(done.stdout + done.stderr)[-3000:]}")
    suite = ET.parse(report).getroot()[0]  # our own file
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        c.attrib["name"] for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None
    ]
    failed = count["failures"] + count["errors"]
    return {
        "passed": str(count["tests"] - failed - count["skipped"]),
        "failed": str(failed),
        "skipped": str(count["skipped"]),
        "seconds": f"{time.monotonic() - began:.0f}",
        "failures": "; ".join(bad),
    }


def main() -> None:
    own, _, told = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("-o", "--out", type=Path, default=Path("versions.csv"))
    o = parser.parse_args(own.split())
    commit = call("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()
    for kind in o.only:
        with tempfile.TemporaryDirectory() as aside:
            python = environment(Path(aside) / "venv", kind)
            row = {"kind": kind, **versions(python), **tested(python, told.split(), Path(aside))}
        row |= {"commit": commit, "date": datetime.date.today().isoformat()}
        print(row, flush=True)
        write_rows(o.out, COLUMNS, [*(r for r in kept_rows(o.out) if r["kind"] != kind), row])


if __name__ == "__main__":
    main()
