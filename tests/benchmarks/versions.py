"""Which versions the tests pass on: an environment of its own for each, made by uv; a line of a CSV for each folder.

    python tests/benchmarks/versions.py -o docs/results/versions.csv [--only 3.10-lowest] [-- tests/fields tests/io]

``lowest``: every dependency of regpipe, not of its tests, as old as ``pyproject.toml`` allows; ``newest``: as new as
they go together. The tests are those of the last commit, all that are not slow, one folder after the other, or what
stands after ``--``, each at most ``--minutes``. Printed is the page's table, of all lines that the CSV has by then. uv
and the interpreters are found on the PATH. Environments are several GB each, and are removed, unless ``--keep FOLDER``
says where they stay, to be taken again and brought to what ``pyproject.toml`` then says.
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
PACKAGES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "monai",
    "pytorch-ignite",
    "itk",
    "itk-elastix",
    "nibabel",
    "numpy",
    "scipy",
)
PACKAGES += ("tensorboard", "typer")
COUNTS = ("passed", "failed", "skipped")
COLUMNS = ("kind", "tests", *COUNTS, "seconds", "commit", "date", *PACKAGES, "failures")


def call(*words: str, **more: object) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, **more).stdout  # type: ignore[call-overload]


def environment(folder: Path, kind: str, source: Path) -> Path:
    """The interpreter of an environment with regpipe of ``source`` and its tests' tools; made where there is none."""
    version, _, age = kind.partition("-")
    python, held = folder / "bin" / "python", folder / "constraints.txt"
    if not python.is_file():
        call("uv", "venv", "--python", version, str(folder))
    words = ["-e", f"{source}[test]"]
    if age == "lowest":
        asked = ["--resolution", "lowest-direct", "--python-version", version, str(source / "pyproject.toml")]
        held.write_text(call("uv", "pip", "compile", *asked))
        words += ["-c", str(held)]
    call("uv", "pip", "install", "--python", str(python), *words)
    return python


def versions(python: Path) -> dict[str, str]:
    frozen = call("uv", "pip", "freeze", "--python", str(python)).lower().splitlines()
    known = dict(line.split("==") for line in frozen if "==" in line)
    return {name: known[name] for name in PACKAGES}


def tested(python: Path, words: str, source: Path, minutes: float) -> dict[str, str]:
    """What the tests say; those that failed by name."""
    began = time.monotonic()
    suite = _suite(python, words, source, minutes)
    count, bad = dict.fromkeys(COUNTS, "?"), ["not finished"]
    if suite is not None:
        failed, skipped = (sum(int(suite.attrib[n]) for n in ns) for ns in (("failures", "errors"), ("skipped",)))
        passed = int(suite.attrib["tests"]) - failed - skipped
        count = {"passed": str(passed), "failed": str(failed), "skipped": str(skipped)}
        bad = [f"{c.attrib['classname']}::{c.attrib['name']}" for c in suite.iter("testcase") if _failed(c)]
    return {"tests": words, **count, "seconds": f"{time.monotonic() - began:.0f}", "failures": "; ".join(bad)}


def _suite(python: Path, words: str, source: Path, minutes: float) -> ET.Element | None:
    """One run of pytest; None where it crashed or took too long."""
    report = source / "report.xml"
    report.unlink(missing_ok=True)
    asked = [str(python), "-m", "pytest", "-m", "not slow", f"--junitxml={report}", "-p", "no:cacheprovider", words]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    try:
        subprocess.run(asked, cwd=source, check=False, env={**os.environ, "PATH": path}, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return None
    return ET.parse(report).getroot()[0] if report.is_file() else None  # our own file


def _failed(case: ET.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def table(rows: Sequence[dict[str, str]]) -> str:
    """A line for each kind: its versions, and its tests' counts, summed over the folders that were finished."""
    lines = ["| " + " | ".join(("kind", *PACKAGES, *COUNTS)) + " |", "|---" * (len(PACKAGES) + len(COUNTS) + 1) + "|"]
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        sums = [sum(int(row[name]) for row in own if row[name].isdigit()) for name in COUNTS]
        if own:
            cells = [f"Python {kind.replace('-', ', ')}", *(own[-1][name] for name in PACKAGES), *map(str, sums)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    own, _, told = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("versions.csv"))
    o = parser.parse_args(own.split())
    about = {"commit": call("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()}
    for kind in o.only:
        with tempfile.TemporaryDirectory() as aside:
            source = Path(aside) / "source"
            call("git", "clone", "--quiet", str(ROOT), str(source))
            python = environment((o.keep or Path(aside)).absolute() / kind, kind, source)
            about |= {"kind": kind, **versions(python), "date": datetime.date.today().isoformat()}
            rooms = {str(file.parent.relative_to(source)) for file in source.glob("tests/*/test_*.py")}
            for words in told.split() or sorted(rooms):
                row = {**about, **tested(python, words, source, o.minutes)}
                others = [r for r in kept_rows(o.out) if (r["kind"], r["tests"]) != (kind, words)]
                write_rows(o.out, COLUMNS, [*others, row])
    print(table(kept_rows(o.out)))


if __name__ == "__main__":
    main()
