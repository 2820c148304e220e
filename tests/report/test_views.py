"""Atlases against closed forms: what lies where on the screen, folds that stay red, a grid that moves as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from nibabel.affines import apply_affine
from PIL import Image as Picture
from scipy import ndimage

from regpipe.fields.algebra import Registration
from regpipe.io.images import Image
from regpipe.metrics.measured import Measured
from regpipe.report import views
from regpipe.report.shown import shown_images, shown_labels, shown_landmarks
from regpipe.report.views import Landmarks, Shown

SHAPE = (20, 24, 16)
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])  # axes run to the left, to posterior, up; 2 mm slices


def shown(
    fixed: np.ndarray,
    affine: np.ndarray,
    d: np.ndarray | None = None,
    determinant: np.ndarray | None = None,
    alignment: np.ndarray | None = None,
    labels: dict[str, np.ndarray] | None = None,
) -> Shown:
    dim = fixed.ndim
    return Shown(
        affine,
        dict.fromkeys(views.IMAGES, fixed.astype(np.float32)),
        labels or {},
        np.zeros((dim, *fixed.shape), np.float32) if d is None else d,
        np.ones(fixed.shape) if determinant is None else determinant,
        np.eye(dim + 1) if alignment is None else alignment,
    )


def tile(folder: Path, plane: str, layer: str, at: int = 0) -> np.ndarray:
    """One slice of an atlas as RGBA."""
    about = json.loads((folder / "view.json").read_text())
    where = next(p for p in about["planes"] if p["name"] == plane)
    width, height = where["fine"] if layer.startswith(("outline", "grid")) else where["tile"]
    sheet = np.asarray(Picture.open(folder / f"{plane}_{about['layers'][layer]}").convert("RGBA"))
    row, column = divmod(at, where["columns"])
    return sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]


def plane(folder: Path, name: str) -> dict[str, Any]:
    return next(p for p in json.loads((folder / "view.json").read_text())["planes"] if p["name"] == name)


def test_a_volume_is_shown_as_in_radiology_however_its_axes_run(tmp_path: Path) -> None:
    """A spot at the patient's left, anterior, inferior corner: right and top in the axial plane, and so on."""
    fixed = np.full(SHAPE, 0.2)
    fixed[-4:, :4, :4] = 1.0  # the axes run to the left and to posterior
    views.write_view(tmp_path, shown(fixed, LPS))
    corners = {"axial": ("top", "right"), "coronal": ("bottom", "right"), "sagittal": ("bottom", "left")}
    at = {"axial": 0, "coronal": -1, "sagittal": 0}  # of slices in RAS order: inferior, anterior, left
    for name, (rows, columns) in corners.items():
        slices = plane(tmp_path, name)["slices"]
        grey = tile(tmp_path, name, "fixed", at[name] % len(slices))[..., 0].astype(float)
        half = [n // 2 for n in grey.shape]
        part = grey[: half[0]] if rows == "top" else grey[half[0] :]
        part = part[:, : half[1]] if columns == "left" else part[:, half[1] :]
        assert part.max() > 240
        assert (grey > 200).sum() == (part > 200).sum()  # and nowhere else
    assert plane(tmp_path, "axial")["letters"] == "RLAP"
    assert plane(tmp_path, "coronal")["mm"] == [20, 32]  # 16 slices of 2 mm


def test_a_picture_is_shown_as_in_an_image_viewer(tmp_path: Path) -> None:
    fixed = np.full((30, 20), 0.2)
    fixed[-3:, :3] = 1.0
    views.write_view(tmp_path, shown(fixed, np.diag([-1.0, -1.0, 1.0])))
    grey = tile(tmp_path, "image", "fixed")[..., 0]
    assert grey.shape == (20, 30)
    assert grey[1, -2] > 240
    assert grey[-2, 1] < 80
    assert plane(tmp_path, "image")["letters"] == ""


def test_slices_are_taken_where_there_is_something_and_are_bounded(tmp_path: Path) -> None:
    fixed = np.zeros((8, 300, 8))
    fixed[:, 100:200] = 0.5
    views.write_view(tmp_path, shown(fixed, np.eye(4)))
    slices = plane(tmp_path, "coronal")["slices"]
    assert len(slices) == views.SLICES
    assert (slices[0], slices[-1]) == (100, 199)
    assert max(plane(tmp_path, "axial")["tile"]) == views.TILE[3]


def test_one_folded_voxel_stays_red_in_a_slice_that_is_reduced(tmp_path: Path) -> None:
    determinant = np.ones((400, 6, 6))
    determinant[201, 3, 3], determinant[300, 3, 3] = -0.1, np.nan
    views.write_view(tmp_path, shown(np.full(determinant.shape, 0.5), np.eye(4), determinant=determinant))
    red = (tile(tmp_path, "axial", "jacobian", 3)[..., :3] == views.FOLD).all(-1)
    assert red.sum() == 2
    assert not (tile(tmp_path, "axial", "jacobian", 2)[..., :3] == views.FOLD).all(-1).any()


def test_volume_change_has_the_colours_of_the_bar(tmp_path: Path) -> None:
    determinant = np.array([[0.001, 0.5], [1.0, 7.0]])
    views.write_view(tmp_path, shown(np.full((2, 2), 0.5), np.diag([-1.0, -1.0, 1.0]), determinant=determinant))
    found = tile(tmp_path, "image", "jacobian")[..., :3].astype(int)
    bar = [tuple(bytes.fromhex(colour[1:])) for colour in views.stops(views.CHANGE)]
    assert tuple(found[0, 0]) == bar[0]
    assert tuple(found[1, 1]) == bar[-1]
    assert np.abs(found[0, 1] - np.array(bar[4])).max() <= 3  # det 1, the middle
    assert np.abs(found[1, 0] - np.array(bar[2])).max() <= 3


def test_outlines_run_between_the_labels_and_nowhere_else(tmp_path: Path) -> None:
    label = np.zeros((16, 16), int)
    label[4:12, 4:12] = 3
    labels = {"fixed": label, "warped": label}
    views.write_view(tmp_path, shown(np.full((16, 16), 0.5), np.diag([-1.0, -1.0, 1.0]), labels=labels))
    drawn = tile(tmp_path, "image", "outline_fixed")[..., 3] > 0
    edge = np.zeros_like(drawn)
    for line in (4 * 48, 12 * 48):  # 768 / 16 pixels a voxel
        edge[line - 1, 4 * 48 : 12 * 48] = edge[4 * 48 : 12 * 48, line - 1] = True
    assert (drawn == edge).mean() > 0.9999
    dashed = tile(tmp_path, "image", "outline_warped")[..., 3] > 0
    assert 0.5 < dashed.sum() / drawn.sum() < 0.8
    assert not (dashed & ~drawn).any()


@pytest.mark.parametrize("turn", [np.eye(3), np.diag([1.0, -1.0, 1.0]), np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])])
def test_the_grid_is_carried_by_what_the_registration_adds_to_the_alignment(tmp_path: Path, turn: np.ndarray) -> None:
    """A shift by 3 voxels to the right on the screen, whatever the array's axes, and none that the alignment makes."""
    fixed, affine = np.full((32, 32), 0.5), np.diag([-1.0, -1.0, 1.0]) @ turn
    alignment = np.eye(3)
    alignment[:2, 2] = [5.0, -7.0]
    rest = np.zeros((2, 32, 32), np.float32)
    for name, right in (("still", 0.0), ("moved", 3.0)):
        d = rest + np.array([right - 5.0, 7.0]).reshape(2, 1, 1).astype(np.float32)  # LPS: x runs to the right
        views.write_view(tmp_path / name, shown(fixed, affine, d, alignment=alignment))
    still, moved = (tile(tmp_path / name, "image", "grid")[..., 3].astype(float) for name in ("still", "moved"))
    step = 3 * 768 // 32
    upright = still[60] > 0  # a row between two lines across
    assert 16 <= upright.sum() < 100
    np.testing.assert_array_equal((moved[60] > 0)[step:], upright[:-step])


def test_images_and_labels_before_are_those_that_the_alignment_alone_gives() -> None:
    rng = np.random.default_rng(0)
    moving = Image(ndimage.gaussian_filter(rng.random((20, 20)), 1) * 500, np.eye(3))
    fixed = Image(rng.random((20, 20)), np.eye(3))
    shift = np.eye(3)
    shift[0, 2] = 4.0  # fixed x shows moving x + 4
    found = shown_images(fixed, moving, moving.array, shift)
    np.testing.assert_allclose(found["before"][:16], found["warped"][4:], atol=1e-6)
    assert not found["before"][17:].any()  # the moving image ends
    label = Image(rng.integers(0, 4, (20, 20)), np.eye(3))
    labels = shown_labels(fixed, label, label.array, shift)
    np.testing.assert_array_equal(labels["before"][:16], label.array[4:])


def test_landmarks_come_to_lie_where_the_inverse_takes_them() -> None:
    """The field shifts by 2 voxels of 1.5 mm; the second landmark is 1 voxel off, the third is not known."""
    frame = torch.diag(torch.tensor([1.5, 1.5, 1.0], dtype=torch.float64))
    u = torch.zeros(1, 2, 16, 16)
    u[:, 0] = 2.0
    p = torch.tensor([[[4.0, 5], [8, 8], [3, 3]]])
    q = torch.tensor([[[6.0, 5], [10, 9], [float("nan"), 1]]])
    image = torch.zeros(1, 1, 16, 16)
    batch = {"fixed_image": image, "moving_image": image, "fixed_landmarks": p, "moving_landmarks": q}
    pair = Measured.of(Registration(u, u, -u, image, image), batch | {"moving_affine": frame[None]}, (1.5, 1.5))
    found = shown_landmarks(pair, frame.numpy())
    assert found.fixed.tolist() == [[6, 7.5], [12, 12]]
    assert found.before.tolist() == [[9, 7.5], [15, 13.5]]
    assert found.warped.tolist() == [[6, 7.5], [12, 13.5]]
    assert np.abs(found.errors - np.array([[3, 0], [1.5 * 5**0.5, 1.5]])).max() < 1e-5


def test_landmarks_are_told_in_voxels_of_the_turned_axes(tmp_path: Path) -> None:
    index = np.array([[3.0, 4.0, 5.0]])  # of the array; its first two axes are turned round
    place = apply_affine(LPS, index)
    views.write_view(tmp_path, shown(np.full(SHAPE, 0.5), LPS), Landmarks(place, place, place, np.array([[1.0, 0.25]])))
    (row,) = json.loads((tmp_path / "view.json").read_text())["landmarks"]
    assert row["fixed"] == [SHAPE[0] - 1 - 3, SHAPE[1] - 1 - 4, 5]
    assert row["errors"] == [1.0, 0.25]


@pytest.mark.parametrize(("name", "own", "within"), [("PRGn", views.CHANGE, 1.5), ("inferno", views.ERROR, 7)])
def test_colours_are_those_of_matplotlibs_maps(name: str, own: str, within: float) -> None:
    told = 255 * colormaps[name](np.linspace(0, 1, 256))[:, :3]
    assert np.abs(told - views.colours(own, 256)).max() <= within
