"""A folder registered without any network: one case's trouble stays its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.folders import finished
from regpipe.data.load import LoadPair
from regpipe.inference.from_zero import register_from_zero
from regpipe.metrics.cases import read_rows
from regpipe.phantoms.cohort import write_cohort


def test_a_failure_while_loading_is_its_own_case_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, real = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=3), LoadPair.__call__

    def broken(self: LoadPair, case: dict[str, str], *files: Any) -> dict[str, Any]:
        if case["case"] == "case_001":
            raise RuntimeError("no memory left\nin some library")
        return real(self, case, *files)

    monkeypatch.setattr(LoadPair, "__call__", broken)
    with pytest.raises(SystemExit):
        register_from_zero(str(data), str(tmp_path / "out"), steps=2, affine="none")
    assert finished(tmp_path / "out") == {"case_000", "case_002"}
    assert "case_001: cannot be loaded (no memory left)" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_not_taken_for_one(tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=3)
    (tmp_path / "out" / "case_000").mkdir(parents=True)
    (tmp_path / "out" / "case_000" / "metrics.json").write_text("[half")
    register_from_zero(str(data), str(tmp_path / "out"), steps=2, affine="none")
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 3
