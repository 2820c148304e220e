"""2D cohorts from 3D ones: which slice, how it lies, and that the split stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.folders import save
from regpipe.data.pairs import list_pairs
from regpipe.io.images import read_image
from regpipe.io.labels import read_label
from regpipe.study.slices import write_slices
from regpipe.utils.errors import InputError

SHAPE = (10, 12, 14)


def ramp() -> np.ndarray:
    """Every voxel has a value of its own: a slice is known by its values."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def labels() -> np.ndarray:
    """Both structures in sagittal slices 3 to 5, most voxels of both in 4; slice 7 has more, but of one of them."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:6, 2:4, 3:6] = 1
    label[3:6, 4:6, 3:6] = 2
    label[4, 4:8, 3:6] = 2
    label[7, 1:9, 1:9] = 1
    return label


def three_d(root: Path, n: int = 5, *, affine: np.ndarray | None = None) -> Path:
    for i in range(n):
        save(root / "images" / f"s{i}.nii.gz", ramp() + 10_000 * i, affine)
        save(root / "labels" / f"s{i}.nii.gz", labels(), affine)
    return root


def test_the_slice_has_most_label_voxels_of_those_with_every_label(tmp_path: Path) -> None:
    out = write_slices(three_d(tmp_path / "in", affine=np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "out", axis=0)
    for i in range(5):
        image = read_image(out / "images" / f"s{i}.nii.gz")
        assert np.array_equal(image.array, (ramp() + 10_000 * i)[4]) and image.spacing.tolist() == [2.0, 3.0]
        label = read_label(out / "labels" / f"s{i}.nii.gz")[0]
        assert np.array_equal(label.array, labels()[4]) and label.spacing.tolist() == [2.0, 3.0]


def test_a_volume_stored_in_other_axes_gives_the_same_slice(tmp_path: Path) -> None:
    affine = np.array([[0, -1.0, 0, 9], [0, 0, 2.0, 0], [-3.0, 0, 0, 39], [0, 0, 0, 1.0]])  # stored as (-S, -R, +A)
    for name, array in (("images", ramp()), ("labels", labels())):
        for i in range(2):
            stored = array.transpose(2, 0, 1)[::-1, ::-1]
            save(tmp_path / "in" / name / f"s{i}.nii.gz", np.ascontiguousarray(stored), affine)
    out = write_slices(tmp_path / "in", tmp_path / "out", axis=0)
    image = read_image(out / "images" / "s1.nii.gz")
    assert np.array_equal(image.array, ramp()[4]) and np.allclose(image.spacing, [2.0, 3.0])


def test_the_axis_is_the_one_whose_poorest_subject_shows_most(tmp_path: Path) -> None:
    for i, length in enumerate((12, 3)):  # along the second axis one subject is long and the other short
        label = np.zeros(SHAPE, np.uint8)
        label[3:5, :length, 2:8] = 1
        label[5:7, :length, 2:8] = 2
        save(tmp_path / "in" / "images" / f"s{i}.nii.gz", ramp())
        save(tmp_path / "in" / "labels" / f"s{i}.nii.gz", label)
    # sagittal: no slice has both; coronal: 24 and 24; axial: 48 and 12
    out = write_slices(tmp_path / "in", tmp_path / "out")
    assert read_image(out / "images" / "s0.nii.gz").array.shape == (10, 14)
    with pytest.raises(InputError, match=r"s0\.nii\.gz: no sagittal slice shows all its labels"):
        write_slices(tmp_path / "in", tmp_path / "other", axis=0)
    assert not (tmp_path / "other").exists()


def test_names_and_groups_stay_and_so_does_the_split(tmp_path: Path) -> None:
    src = three_d(tmp_path / "in", 8)
    (src / "groups.csv").write_text("case,group\n" + "".join(f"s{i},{i // 2}\n" for i in range(8)))
    out = write_slices(src, tmp_path / "out")
    for split in ("training", "validation"):
        there, here = (
            [case["case"] for case in list_pairs(folder, split=split, holdout=2, seed=3)] for folder in (src, out)
        )
        assert there == here


def test_the_same_slices_are_written_once_and_nothing_is_overwritten(tmp_path: Path) -> None:
    src = three_d(tmp_path / "in")
    out = write_slices(src, tmp_path / "out")
    before = (out / "images" / "s0.nii.gz").stat().st_mtime_ns
    assert write_slices(src, out) == out and (out / "images" / "s0.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="out: holds something else"):
        write_slices(three_d(tmp_path / "more", 6), out)


def test_what_cannot_be_sliced_is_named(tmp_path: Path) -> None:
    src = three_d(tmp_path / "in")
    (src / "labels" / "s2.nii.gz").unlink()
    with pytest.raises(InputError, match=r"s2\.nii\.gz: has no label"):
        write_slices(src, tmp_path / "out")
    with pytest.raises(InputError, match="2D; slices are made of 3D"):
        write_slices(write_slices(three_d(tmp_path / "whole"), tmp_path / "flat"), tmp_path / "out")
