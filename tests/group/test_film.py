"""A film with known motion: steady after warping, its label and landmarks found in all frames, smooth over time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.linalg import expm

from regpipe.group import film
from regpipe.group.means import along_time
from regpipe.group.run import make_template
from regpipe.group.subjects import list_subjects
from regpipe.transforms.displacement import write_image
from regpipe.utils.errors import InputError

SIDE, FRAMES, LABELLED, MARKED = 40, 8, 2, (1, 5)
SHIFTS = 2.5 * np.sin(2 * np.pi * np.arange(FRAMES) / FRAMES)  # voxels along x
SECONDS = 0.25


def test_what_is_steady_or_moves_evenly_stays_and_a_jitter_goes() -> None:
    shares = film.shares(60, 1.0)
    assert np.allclose(shares, shares.T) and np.allclose(shares.sum(axis=1), 1)
    assert np.allclose(film.shares(5, 0), np.eye(5))
    even, jitter = np.arange(60.0), (-1.0) ** np.arange(60)
    assert np.abs(shares @ even - even).max() < 0.01  # what is left out of the shares
    middle = np.abs(shares @ jitter)[20:-20]  # a period of 2: 1 / (1 + (2 - 2 cos pi)^2)
    assert np.allclose(middle, 1 / 17, atol=1e-3)


def test_the_shares_minimise_the_penalty() -> None:
    v, b = np.random.default_rng(1).standard_normal(9), 0.8**4
    w = film.shares(9, 0.8) @ v

    def penalty(w: np.ndarray) -> float:
        return float(((w - v) ** 2).sum() + b * (np.diff(w, 2) ** 2).sum())

    for i in range(9):
        for step in (-0.01, 0.01):
            assert penalty(w + step * np.eye(9)[i]) > penalty(w)


def test_matrices_over_time_are_meaned_by_their_logarithms() -> None:
    turn = np.array([[0.0, -1, 3], [1, 0, 0], [0, 0, 0]])
    found = along_time([expm(a * turn) for a in (0.1, 0.4, 0.1)], np.full((3, 3), 1 / 3))
    assert all(np.allclose(matrix, expm(0.2 * turn)) for matrix in found)
    assert all(np.allclose(matrix, np.eye(3)) for matrix in along_time([np.eye(3)] * 3, film.shares(3, 1)))


def frame(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label: an ellipse with a bar, moved along x, all around it still."""
    x, y = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    x = x - SHIFTS[i]
    shape = 1 / (1 + np.exp(((x / 9) ** 2 + (y / 12) ** 2 - 1) * 4))
    bar = np.exp(-(((x - 2) / 1.5) ** 2)) * (np.abs(y) < 6)
    noise = 0.02 * np.random.default_rng(i).standard_normal(x.shape)
    return (100 * (shape + bar + noise)).astype(np.float32), (shape > 0.5).astype(np.int32)


def landmarks(i: int) -> str:
    """LPS mm of a 2-D NIfTI with the affine diag(-1, -1, 1): the voxels. The rims of the ellipse."""
    middle = (SIDE - 1) / 2
    return f"name,x,y\nleft,{middle - 9 + SHIFTS[i]},{middle}\nright,{middle + 9 + SHIFTS[i]},{middle}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film in a file, one frame's label, two frames' landmarks."""
    root = tmp_path_factory.mktemp("film")
    frames = np.stack([frame(i)[0] for i in range(FRAMES)], -1)[:, :, None]
    image = nib.Nifti1Image(frames, np.diag([-1.0, -1, 1, 1]))
    image.header["pixdim"][4] = SECONDS
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(root / "echo.nii.gz")
    write_image(root / "labels" / f"echo_{LABELLED}.nii.gz", frame(LABELLED)[1], np.diag([-1.0, -1, 1]))
    (root / "landmarks").mkdir()
    for i in MARKED:
        (root / "landmarks" / f"echo_{i}.csv").write_text(landmarks(i))
    return root / "echo.nii.gz"


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The film's mean, and what is told of it. Do not write into it."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, make_template(data, out, sequence=True, bundle="none", refine=32, rounds=2)


def test_the_warped_film_stands_still_and_keeps_its_time(made: tuple[Path, dict[str, Any]]) -> None:
    out, about = made
    warped = nib.Nifti1Image.from_filename(out / "film.nii.gz")
    assert warped.shape == (SIDE, SIDE, 1, FRAMES) and warped.header.get_zooms()[3] == SECONDS
    values = warped.get_fdata()[:, :, 0]
    edges = [np.argmax(values[:, SIDE // 2, i] > 50) for i in range(FRAMES)]
    assert np.ptp(edges) <= 1
    assert about["film"]["flicker"] < 0.5 * about["film"]["flicker_before"]
    assert about["log_sums"]["velocities_voxels"] < 1e-6
    assert about["film"]["drift_mm"] < 0.1 and about["film"]["largest_drift_mm"] < 0.5


def test_one_frames_label_is_in_all_frames(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    held = np.asarray(nib.Nifti1Image.from_filename(out / "film_label.nii.gz").dataobj)
    alike, unmoved = list[float](), list[float]()
    for i in range(FRAMES):
        true, still = frame(i)[1] > 0, frame(LABELLED)[1] > 0
        for found, label in ((alike, held[:, :, 0, i] > 0), (unmoved, still)):
            found.append(2 * (label & true).sum() / (label.sum() + true.sum()))
    assert min(alike) > 0.92 and min(unmoved) < 0.8


def test_landmarks_of_two_frames_are_found_in_all_and_their_drift_is_told(made: tuple[Path, dict[str, Any]]) -> None:
    out, about = made
    with (out / "film.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == [f"echo_{i}" for i in range(FRAMES)]
    middle = (SIDE - 1) / 2
    for i, row in enumerate(rows):
        assert abs(float(row["left_x"]) - (middle - 9 + SHIFTS[i])) < 0.7
        assert abs(float(row["right_x"]) - (middle + 9 + SHIFTS[i])) < 0.7
    assert about["film"]["landmarks_mm"] < 0.7


def test_labels_beside_a_link_to_a_film_are_found(data: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "echo.nii.gz").write_bytes(data.read_bytes())  # beside which there are none
    (tmp_path / "echo.nii.gz").symlink_to(tmp_path / "away" / "echo.nii.gz")
    (tmp_path / "labels").symlink_to(data.parent / "labels")
    found = list_subjects(tmp_path / "echo.nii.gz", film=True)
    assert [i for i, one in enumerate(found) if one.label is not None] == [LABELLED]


def test_a_folder_of_frames_keeps_their_order_and_one_image_is_no_film(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        Image.fromarray(frame(i % FRAMES)[0].clip(0, 255).astype(np.uint8)).save(tmp_path / f"frame_{i}.png")
    assert [one.name for one in list_subjects(tmp_path, film=True)] == ["frame_1", "frame_9", "frame_10"]
    with pytest.raises(InputError, match="is one image"):
        list_subjects(tmp_path / "frame_1.png", film=True)
    with pytest.raises(InputError, match="--over-time -1"):
        make_template(tmp_path, tmp_path / "out", sequence=True, over_time=-1)
