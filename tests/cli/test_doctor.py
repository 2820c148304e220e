"""The doctor: all well here; each fault is found, told with its remedy, and nothing private is told."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.inprocess import as_if_in_its_own_process
from regpipe.cli import checkup, doctor
from regpipe.cli import main as cli
from regpipe.cli.checkup import Check
from regpipe.fields import algebra
from regpipe.transforms import displacement
from regpipe.utils import console

QUICK = ("packages", "temporary files", "formats", "transforms read by ITK", "pages", "a phantom registered both ways")
REAL = {check.name: check for check in checkup.checks()}


def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *names: str) -> tuple[int, list[str]]:
    """Exit status and lines of ``regpipe doctor`` with these checks alone."""
    monkeypatch.setattr(doctor, "checks", lambda: [REAL[name] for name in names])
    monkeypatch.setattr("sys.argv", ["regpipe", "doctor"])
    with as_if_in_its_own_process(), pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out.splitlines()


def test_here_all_is_well_and_each_check_says_so_with_its_seconds(monkeypatch, capsys) -> None:
    status, lines = examined(monkeypatch, capsys, *QUICK)
    told = [line for line in lines if re.match(r"PASS +\d+\.\d s  ", line)]
    assert status == 0 and lines[-1] == "all is well" and len(told) == len(QUICK)
    assert any("itk 5" in line for line in lines) and any(re.search(r"CPU .* threads, .* GiB", line) for line in lines)


def test_every_check_has_a_remedy_and_the_parts_that_can_break_have_a_check() -> None:
    assert {*QUICK, "backbones", "training on a phantom", "affine stage", "operations on cpu"} <= REAL.keys()
    assert all(check.remedy for check in REAL.values())


def test_operations_hold_on_the_cpu_and_backbones_are_symmetric() -> None:
    assert "gradients" in checkup.operations("cpu") and "symmetric" in checkup.backbones()


def test_training_and_the_affine_stage_do_here_what_they_should() -> None:
    assert "after 30 steps" in checkup.training()
    assert "a translation by 5 mm is found" in checkup.affine_stage()


def half_of_it(velocity: torch.Tensor) -> torch.Tensor:
    return velocity / 2


def exchanged(write: Callable[..., Any]) -> Callable[..., None]:
    return lambda path, d, affine: write(path, -d, affine)


FAULTS: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "integration": ("operations on cpu", "regpipe.cli.checkup.integrate", lambda _: half_of_it, "off by 1 voxels"),
    "a warp": (
        "operations on cpu",
        "regpipe.cli.checkup.warp",
        lambda _: lambda image, u: image + 0 * u[:, :1],
        "off by 1.5",
    ),
    "a transform": (
        "transforms read by ITK",
        "regpipe.transforms.displacement.write_displacement",
        exchanged,
        "another displacement",
    ),
    "an image": (
        "formats",
        "regpipe.cli.checkup.read_image",
        lambda read: lambda path: read(path)._replace(affine=np.eye(4)),
        ".nii.gz: another image",
    ),
    "the disk": ("temporary files", "regpipe.cli.checkup.ROOM", lambda _: 2**60, "GiB are free"),
    "a package": (
        "packages",
        "importlib.metadata.requires",
        lambda _: lambda name: ["torch>=99", "nothing-of-this-name"],
        "torch>=99",
    ),
    "optimising": (
        "a phantom registered both ways",
        "regpipe.cli.checkup.zero_refiner",
        lambda _: lambda steps: lambda fixed, moving, masks: torch.zeros(1, 2, 32, 32),
        "landmarks: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_told_with_its_remedy_and_the_others_are_done(fault, monkeypatch, capsys) -> None:
    name, place, spoil, said = FAULTS[fault]
    module, _, attribute = place.rpartition(".")
    owner = {
        "regpipe.cli.checkup": checkup,
        "regpipe.transforms.displacement": displacement,
        "importlib.metadata": checkup.importlib.metadata,
    }
    monkeypatch.setattr(owner[module], attribute, spoil(getattr(owner[module], attribute)))
    status, lines = examined(monkeypatch, capsys, name, "pages")
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert status == 1 and said in failed and REAL[name].remedy in failed and "checkup.py:" in failed
    assert any(line.startswith("PASS") and "pages" in line for line in lines)
    assert lines[-1] == f"1 of 2 checks failed: {name}"


def test_the_result_for_machines_has_each_check(monkeypatch, capsys) -> None:
    broken = Check("broken", lambda: str(algebra.warp(None, None)), "mend it")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "checks", lambda: [REAL["pages"], broken])
    with console.session(), pytest.raises(SystemExit):
        list(doctor.examine())
    found = json.loads(json.dumps(console.told()))["checks"]
    assert found["pages"]["status"] == "PASS" and found["broken"]["status"] == "FAIL"
    assert found["pages"]["seconds"] >= 0 and "mend it" in found["broken"]["said"]


def test_no_path_and_no_name_of_user_or_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ward7-pc")
    monkeypatch.setattr(getpass, "getuser", lambda: "drjones")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/drjones"))
    text = "drjones@ward7-pc: [Errno 28] '/home/drjones/smith/a.nii.gz' and C:\\Users\\drjones\\b.nii; smith/c.nii, 3/4"
    assert doctor.public(text) == "***@***: [Errno 28] 'a.nii.gz' and b.nii; c.nii, 3/4"
