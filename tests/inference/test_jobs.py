"""A folder by several processes: the files of one process, each failure said once, each case taken by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.commandline import regpipe
from regpipe.inference.jobs import Taken
from regpipe.phantoms.cohort import write_cohort


@pytest.fixture
def register(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """The command; whatever it starts beside this process is a process."""

    def command(folder: Path, out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
        options = ["--bundle", "none", "--refine", "2", "--affine", "none", *words]
        status = regpipe(monkeypatch, "--json", "register", folder, "-o", out, *options)
        told = capfd.readouterr()
        return status, json.loads(told.out)["result"], told.err

    return command


def test_a_case_is_taken_once(tmp_path: Path) -> None:
    one, other = Taken(str(tmp_path)), Taken(str(tmp_path))
    assert one.free("a/b") and one.take("a/b")
    assert not other.free("a/b") and not other.take("a/b") and other.take("c")
    assert Taken().free("a/b") and Taken().take("a/b")


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_what_one_writes_and_go_on_from_what_is_finished(
    tmp_path: Path, register: Callable[..., tuple[int, dict[str, Any], str]]
) -> None:
    folder = write_cohort(tmp_path / "data", kind="ultrasound", shape=[32, 28], n_pairs=5, seed=1)
    for kept in ("labels", "landmarks"):
        for side in ("fixed", "moving"):
            for file in (folder / f"{side}_{kept}").iterdir():
                file.unlink()
            (folder / f"{side}_{kept}").rmdir()
    (folder / "moving_images" / "case_002.nii.gz").write_bytes(b"no image")
    status, told, errors = register(folder, tmp_path / "one")
    assert status == 1 and [*told["failures"]] == ["case_002"]
    shutil.copytree(tmp_path / "one" / "case_000", tmp_path / "two" / "case_000")
    status, shared, errors = register(folder, tmp_path / "two", "--jobs", "2")
    assert status == 1 and shared["failures"] == told["failures"] and shared["cases"] == told["cases"]
    assert (told["finished_before"], shared["finished_before"]) == (0, 1)
    assert errors.count("error: case_002") == 1
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert {path.name for path in one if one[path] != two.get(path)} == {"manifest.json"}
    assert one.keys() == two.keys() and len({path.parts[0] for path in one}) == 5  # four cases, metrics.csv
