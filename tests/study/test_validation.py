"""Finished cases held to a truth: a transform in closed form has the errors that it must have."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from helpers.commandline import regpipe
from helpers.registered import write_case, write_csv
from regpipe.study.validation import validate
from regpipe.transforms.displacement import write_displacement
from regpipe.utils.errors import InputError

SIDE = 40
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # a voxel's index is its place in LPS mm
TRUE, FOUND = np.array([5.0, 0.0]), np.array([4.0, 2.0])  # mm, fixed point -> moving point


@pytest.fixture
def registered(tmp_path: Path) -> tuple[Path, Path]:
    """A case that was registered by the shift ``FOUND``, and a data set that says it is ``TRUE``."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    x, y = np.indices((SIDE, SIDE))
    images = {}
    for side, shift in (("fixed", 0), ("moving", 5)):
        disc = ((x - 15 - shift) ** 2 + (y - 20) ** 2 <= 64).astype(np.uint8)
        for kind, array in (("images", disc.astype(np.float32)), ("labels", disc)):
            folder = data / f"{side}_{kind}"
            folder.mkdir(parents=True)
            image = nib.Nifti1Image(array, AFFINE)
            nib.save(image, folder / "a.nii.gz")
            images[side] = image
        points = np.array([[10.0, 10], [20, 15], [15, 30]]) + (TRUE if side == "moving" else 0)
        (data / f"{side}_landmarks").mkdir()
        write_csv(data / f"{side}_landmarks" / "a.csv", points)
    (data / "displacements").mkdir()
    field = np.broadcast_to(TRUE[:, None, None], (2, SIDE, SIDE)).astype(np.float32)
    write_displacement(data / "displacements" / "a.nii.gz", field, np.diag([-1.0, -1.0, 1.0]))
    moves = {"moving_to_fixed": FOUND, "fixed_to_moving": -FOUND}
    one = sitk.TranslationTransform
    ways: dict[str, sitk.Transform] = {name: one(2, v.tolist()) for name, v in moves.items()}
    write_case(out / "a", ways, images)
    return out, data


def test_errors_are_those_of_the_closed_form(registered: tuple[Path, Path]) -> None:
    rows, problems = validate(*registered)
    found = {row.measure: row for row in rows if row.case == "a"}
    assert problems == {} and set(found) == {"tre", "dice", "hd95", "end_point"}
    for name in ("tre", "end_point"):  # |TRUE| before, |FOUND - TRUE| = sqrt(5) after, everywhere alike
        row = found[name]
        assert row.before == pytest.approx(5, abs=1e-4)
        assert [row.after, row.low, row.high, row.worst] == pytest.approx([5**0.5] * 4, abs=1e-4)
    assert found["tre"].n == 3 and found["end_point"].n == 64
    x, y = np.indices((SIDE, SIDE))
    disc = (x - 15) ** 2 + (y - 20) ** 2 <= 64
    off = (x - 16) ** 2 + (y - 18) ** 2 <= 64  # of the moving disc, pulled by FOUND
    expected = 2 * (disc & off).sum() / (disc.sum() + off.sum())
    assert found["dice"].after == pytest.approx(expected, abs=1e-6) and found["dice"].before < expected
    with (registered[0] / "validation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == ["a"] * 4 + ["all"] * 4
    assert float(table[-1]["after"]) == pytest.approx(5**0.5, abs=1e-4)


def test_the_command_validates_and_shows_checkerboards(
    registered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (registered[0] / "a" / "checkerboard.png").write_bytes(b"picture")
    assert regpipe(monkeypatch, "validate", registered[0], "--truth", registered[1], "-o", tmp_path / "new") == 0
    assert "tre: 5 -> 2.24 mm (95 % interval 2.24 to 2.24), 1 case" in capsys.readouterr().out
    page = (tmp_path / "new" / "validation.html").read_text()
    assert 'alt="checkerboard of a" src="data:image/png;base64,cGljdHVyZQ=="' in page and "script" not in page


def test_what_cannot_be_validated_is_said_in_a_line(registered: tuple[Path, Path]) -> None:
    out, data = registered
    (out / "a").rename(out / "b")
    with pytest.raises(InputError, match="has no pair of such a name"):
        validate(out, data)
    with pytest.raises(InputError, match="no such folder"):
        validate(out / "none", data)
