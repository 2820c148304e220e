"""A folder registered without any network: one case's trouble stays its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.folders import finished
from regpipe.data.load import LoadPair
from regpipe.inference.from_zero import register_from_zero
from regpipe.io.images import read_image
from regpipe.metrics.cases import read_rows
from regpipe.phantoms.cohort import write_cohort
from regpipe.provenance.rerun import rerun
from regpipe.utils.errors import InputError


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


def test_how_far_off_each_place_may_be_is_written_in_mm_and_shown(tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 40), n_pairs=1)
    out = tmp_path / "out"
    register_from_zero(str(data), str(out), steps=2, affine="none")
    plain = (out / "case_000" / "displacement.nii.gz").read_bytes()
    assert not (out / "case_000" / "uncertainty.nii.gz").exists()
    register_from_zero(str(data), str(out), steps=2, affine="none", uncertainty=True)
    folders = {"uncertainty": out / "case_000", "case_000": data / "fixed_images"}
    error, fixed = (read_image(folder / f"{name}.nii.gz") for name, folder in folders.items())
    np.testing.assert_allclose(error.affine, fixed.affine)
    values = error.array
    assert values.shape == (32, 40) and values.min() >= 0.2 * np.sqrt(abs(np.linalg.det(fixed.affine[:2, :2])))
    assert (out / "case_000" / "displacement.nii.gz").read_bytes() == plain
    row = json.loads((out / "case_000" / "metrics.json").read_text())
    assert values.min() < row["uncertainty"] < values.max()
    view = json.loads((out / "case_000" / "view" / "view.json").read_text())
    assert (out / "case_000" / "view" / f"image_{view['layers']['uncertainty']}").is_file()
    assert not rerun(out, data=data)[0].different


def test_what_guides_a_pair_does_not_go_with_starts_elsewhere(tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "data", shape=(32, 32), n_pairs=1)
    with pytest.raises(InputError, match="--uncertainty: it moves the images, and --guide's"):
        register_from_zero(str(data), str(tmp_path), steps=2, affine="none", uncertainty=True, guide=["labels"])
