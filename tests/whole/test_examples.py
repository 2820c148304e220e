"""The examples of docs/examples do what they say, on the built-in phantoms."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from helpers.places import ROOT
from regpipe.phantoms.cohort import write_cohort

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("examples") / "pairs", shape=(48, 48), n_pairs=5)


def run(name: str, pairs: Path) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"](str(pairs), epochs=2)


def test_every_example_in_python_is_run_here() -> None:
    tested = {"plain_loop.py", "supervised_trainer.py", "lightning_module.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_a_plain_loop(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run("plain_loop.py", pairs)
    assert row["ncc"] > row["ncc_before"] and row["dice"] > row["dice_before"] and row["ndv_percent"] < 1
    assert "epoch 2: loss" in capsys.readouterr().out


def test_ones_own_trainer_of_monai(pairs: Path) -> None:
    means = run("supervised_trainer.py", pairs)
    assert means["ncc"] > means["ncc_before"] and means["dice"] > means["dice_before"]


def test_lightning(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning")
    monkeypatch.chdir(tmp_path)
    means = run("lightning_module.py", pairs)
    assert means["validation/ncc"] > means["validation/ncc_before"]
    assert means["training/loss"] == pytest.approx(means["training/lncc"] + 0.7 * means["training/diffusion"])
    assert not list(tmp_path.iterdir())  # it leaves nothing that nobody asked for
