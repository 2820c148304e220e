"""The doctor: all well here; each fault is found, told with its remedy, and nothing private is told."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.inprocess import as_if_in_its_own_process
from regpipe.cli import doctor
from regpipe.cli import main as cli
from regpipe.utils import console

REAL = doctor.checks()
CPU, PAIR = "training on cpu", "a phantom registered"


def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *names: str) -> tuple[int, list[str]]:
    """Exit status and lines of ``regpipe doctor`` with these checks alone."""
    monkeypatch.setattr(doctor, "checks", lambda: {name: REAL[name] for name in names})
    monkeypatch.setattr("sys.argv", ["regpipe", "doctor"])
    with as_if_in_its_own_process(), pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out.splitlines()


def test_here_all_is_well_and_each_check_says_so_with_its_seconds(monkeypatch, capsys) -> None:
    assert {"packages", CPU, PAIR} <= REAL.keys()
    status, lines = examined(monkeypatch, capsys, "packages", CPU, PAIR)
    told = [line for line in lines if re.match(r"PASS +\d+\.\d s  ", line)]
    assert status == 0 and lines[-1] == "all is well" and len(told) == 3
    assert any("itk 5" in line for line in lines) and any(re.search(r"CPU .* threads, .* GiB", line) for line in lines)


def still(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda fixed, moving, velocity: real(fixed, moving, 0 * velocity)


def exchanged(real: Callable[..., Any]) -> Callable[..., Any]:
    """What writes the files takes each displacement for its inverse."""
    return lambda u, inverse, *places: real(inverse, u, *places)


FAULTS: dict[str, tuple[str, Any, str, Callable[[Any], Any], str]] = {
    "a package": (
        "packages",
        importlib.metadata,
        "requires",
        lambda _: lambda name: ["torch>=99", "nothing-of-this-name"],
        "wanted torch>=99",
    ),
    "nothing moves": (CPU, doctor, "register", still, "do not raise the correlation"),
    "the files": (PAIR, doctor.export, "pair_transform", exchanged, "landmarks "),
    "reading": (
        PAIR,
        doctor.Source,
        "image",
        lambda read: lambda source, path: read(source, path)._replace(affine=np.eye(3)),
        "landmarks ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_told_with_its_remedy_and_the_others_are_done(fault, monkeypatch, capsys) -> None:
    name, owner, attribute, spoil, said = FAULTS[fault]
    monkeypatch.setattr(owner, attribute, spoil(getattr(owner, attribute)))
    monkeypatch.setitem(REAL, "another", lambda: "done")
    status, lines = examined(monkeypatch, capsys, name, "another")
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert status == 1 and said in failed and doctor.REMEDY in failed and "doctor.py:" in failed
    assert any(line.startswith("PASS") and "another: done" in line for line in lines)
    assert lines[-1] == f"1 of 2 checks failed: {name}"


def test_the_result_for_machines_has_each_check(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "checks", lambda: {"sound": lambda: "done", "broken": lambda: str(1 / 0)})
    with console.session(), pytest.raises(SystemExit):
        list(doctor.examine())
    found = json.loads(json.dumps(console.told()))["checks"]
    assert found["sound"]["status"] == "PASS" and found["broken"]["status"] == "FAIL"
    assert found["sound"]["seconds"] >= 0 and "ZeroDivisionError" in found["broken"]["said"]


def test_no_path_and_no_name_of_user_or_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "ward7-pc")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/drjones"))
    text = "drjones@ward7-pc: [Errno 28] '/home/drjones/smith/a.nii.gz' and C:\\Users\\drjones\\b.nii; smith/c.nii, 3/4"
    assert doctor.public(text) == "***@***: [Errno 28] 'a.nii.gz' and b.nii; c.nii, 3/4"
