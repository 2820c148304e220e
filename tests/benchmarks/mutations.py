"""Do the tests fail where the code is wrong? Each mistake of ``TABLE`` is put into a copy, and its test file is run.

    python tests/benchmarks/mutations.py [-k WORD ...] [-o TABLE.md]

In the table stands a module and the test file that must fail, then of each mistake what is wrong, the old text and the
new. A file of tests that is broken by it (nothing is collected, the process ends) has told nothing: none has seen it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".txt")
LONG = 300  # seconds
LOADED = (
    "torch",
    "monai.bundle",
    "monai.losses",
    "monai.metrics",
    "scipy.stats",
    "nibabel",
    "SimpleITK",
    "ants",
    "hypothesis",
)


class Mistake(NamedTuple):
    """See above."""

    module: str
    test: str
    what: str
    old: str
    new: str


def mistakes() -> Iterator[Mistake]:
    """Those of ``TABLE``."""
    for part in TABLE.read_text().split("\n\n"):
        (where, *lines) = part.strip().split("\n")
        module, test = where.split(" | ")
        for what, old, new in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
            yield Mistake(module, test, what, *(text[2:].replace("\\n", "\n") for text in (old, new)))


def copied(folder: Path) -> Path:
    """The package in ``folder``, with what it looks for beside itself."""
    shutil.copytree(ROOT / "regpipe", folder / "regpipe", ignore=shutil.ignore_patterns("__pycache__"))
    for beside in ("bundles", "configs"):
        (folder / beside).symlink_to(ROOT / beside)
    return folder / "regpipe"


def seen_by(mistake: Mistake, package: Path) -> str | None:
    """The first test that fails; None: none does.

    The tests run in a fork of this process, which holds torch and MONAI already and nothing of regpipe.
    """
    path = package / mistake.module
    whole = path.read_text()
    if whole.count(mistake.old) != 1:
        raise SystemExit(f"{mistake.module}: holds {whole.count(mistake.old)} times: {mistake.old}")
    path.write_text(whole.replace(mistake.old, mistake.new))
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if not child:
            _test(ROOT / "tests" / mistake.test, package.parent, told.fileno())
        _, status = os.waitpid(child, 0)
        path.write_text(whole)
        if os.WIFSIGNALED(status):
            return "none ends" if os.WTERMSIG(status) == signal.SIGALRM else None
        told.seek(0)
        found = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", told.read(), re.M)
    return found[1] if os.WEXITSTATUS(status) == 1 and found else None


def _test(file: Path, beside: Path, output: int) -> None:
    """Does not return."""
    for stream in (1, 2):
        os.dup2(output, stream)
    signal.alarm(LONG)
    os.chdir(beside)
    sys.path.insert(0, str(beside))
    os.environ["PYTHONPATH"] = str(beside)
    options = ["-x", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no", "-c", str(ROOT / "pyproject.toml")]
    os._exit(pytest.main([*options, "--rootdir", str(ROOT), str(file)]))


def main() -> None:
    """A line of a table for each; exit status 1 where a mistake is not seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", nargs="*", default=[""], help="only mistakes whose text has one of these words")
    parser.add_argument("-o", type=Path, help="write the table here too")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True  # two mistakes may be of one size and one second
    for name in LOADED:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "regpipe" for name in sys.modules)
    lines, survived = ["| module | what is wrong | the test that fails |", "|---|---|---|"], 0
    with tempfile.TemporaryDirectory() as folder:
        package = copied(Path(folder))
        chosen = [m for m in mistakes() if any(word in " ".join(m) for word in given.k)]
        for mistake in chosen:
            test = seen_by(mistake, package)
            survived += test is None
            told = f"`{test}`" if test else f"**none of `{mistake.test}`**"
            lines.append(f"| `{mistake.module}` | {mistake.what} | {told} |")
            print(lines[-1], flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} seen")
    if given.o:
        given.o.write_text("\n".join(lines) + "\n")
    raise SystemExit(bool(survived))


if __name__ == "__main__":
    main()
