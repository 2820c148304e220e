"""One slice stored in 3-D, registered: its results lie in space where SimpleITK puts the files themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from helpers.commandline import regpipe
from helpers.folders import save
from regpipe.data.load import LoadPair
from regpipe.data.pairs import working_grid
from regpipe.engines.refine import Refiner
from regpipe.io.images import read_image
from regpipe.transforms.apply import apply
from regpipe.transforms.displacement import read_displacement

SHAPE, SHIFT = (44, 40), np.array([2.0, -1.5])  # pixels
LPS = np.array([-1, -1, 1])
TURN = Rotation.from_euler("zyx", [15, -25, 10], degrees=True).as_matrix()
RNG = np.random.default_rng(12)
NOISE = ndimage.gaussian_filter(RNG.standard_normal((60, 60)), 3)
FIXED = NOISE[8 : 8 + SHAPE[0], 8 : 8 + SHAPE[1]] / NOISE.std() + 5


class Slices(NamedTuple):
    """A registered pair of slices in space."""

    case: Path
    fixed: Path
    moving: Path
    across: np.ndarray  # LPS mm from the plane of the one to that of the other


def place(axis: int, turn: np.ndarray, across: float) -> np.ndarray:
    """Affine of a slice ``across`` mm beside (10, -20, 45) along its normal, one voxel thick along an axis."""
    affine, spacing = np.eye(4), np.insert([1.5, 1.2], axis, 4.0)
    affine[:3, :3] = turn * spacing
    middle = np.insert((np.array(SHAPE) - 1) / 2, axis, 0)
    affine[:3, 3] = np.array([10, -20, 45]) + across * turn[:, axis] - affine[:3, :3] @ middle
    return affine


CASES = {"axial": (2, np.eye(3), 2), "coronal": (1, np.eye(3), 1), "sagittal": (0, np.eye(3), 0)}
CASES |= {
    "oblique": (2, TURN, 2),
    "stored otherwise": (2, TURN, 0),
}  # axis of the fixed, directions, axis of the moving


@pytest.fixture(scope="module", params=CASES)
def slices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Slices:
    """The moving slice lies 7 mm beside the fixed one's plane, and shows the same, shifted."""
    folder = tmp_path_factory.mktemp("slices")
    axis, turn, other = CASES[request.param]
    moving = ndimage.shift(NOISE / NOISE.std() + 5, SHIFT, order=1)[8 : 8 + SHAPE[0], 8 : 8 + SHAPE[1]]
    moved, shown = place(axis, turn, 7.0), np.expand_dims(moving, axis)
    if other != axis:  # (X, Y, 1) as (1, Y, X)
        moved, shown = moved[:, [2, 1, 0, 3]], shown.transpose(2, 1, 0)
    files = [save(folder / "f.nii.gz", np.expand_dims(FIXED, axis).astype(np.float32), place(axis, turn, 0.0))]
    files.append(save(folder / "m.nii.gz", shown.astype(np.float32), moved))
    with pytest.MonkeyPatch.context() as patch:
        told = ["-o", folder / "out", "--bundle", "none", "--affine", "rigid", "--refine", 5, "--uncertainty"]
        assert regpipe(patch, "register", *files, *told) == 0
    return Slices(folder / "out/m_to_f", files[0], files[1], 7 * turn[:, axis] * LPS)


def read_nifti(path: Path) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_filename(path)


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def points_of(file: Path, k: int = 60) -> np.ndarray:
    """Places (K, 3) in a slice, LPS mm, within two pixels of its rim."""
    image = nib.load(file)
    low = np.where(np.array(image.shape) == 1, 0, 3)  # type: ignore[attr-defined]
    at = np.random.default_rng(1).uniform(low, np.array(image.shape) - 1 - low, (k, 3))  # type: ignore[attr-defined]
    return apply_affine(image.affine, at) * LPS  # type: ignore[attr-defined]


def through(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


def test_images_come_back_as_the_fixed_slice_is_stored(slices: Slices) -> None:
    fixed = nib.load(slices.fixed)
    for name in ("warped", "jacobian", "uncertainty"):
        image = nib.load(slices.case / f"{name}.nii.gz")
        assert image.shape == fixed.shape  # type: ignore[attr-defined]
        np.testing.assert_allclose(image.affine, fixed.affine, atol=1e-4)  # type: ignore[attr-defined]
    about = json.loads((slices.case / "transform.json").read_text())
    assert tuple(about["moving"]["shape"]) == nib.load(slices.moving).shape  # type: ignore[attr-defined]
    np.testing.assert_allclose(about["moving"]["affine"], nib.load(slices.moving).affine, atol=1e-4)  # type: ignore[attr-defined]


def test_the_slice_is_found_where_it_was_put(slices: Slices) -> None:
    """Closed form: the shift of the pixels, and the way from plane to plane."""
    points, directions = points_of(slices.fixed), nib.load(slices.fixed).affine[:3, :3]  # type: ignore[attr-defined]
    flat = [i for i in range(3) if nib.load(slices.fixed).shape[i] > 1]  # type: ignore[attr-defined]
    shift = directions[:, flat] @ SHIFT * LPS
    moved = through(sitk.ReadTransform(str(slices.case / "moving_to_fixed.h5")), points)
    off = moved - points - shift - slices.across
    assert np.linalg.norm(off, axis=1).mean() < 0.5  # mm
    normal = slices.across / np.linalg.norm(slices.across)
    np.testing.assert_allclose(off @ normal, 0, atol=1e-3)


def test_its_displacement_serves_as_the_true_one_of_the_pair(slices: Slices) -> None:
    case = {"case": "a", "fixed_image": str(slices.fixed), "moving_image": str(slices.moving)}
    case["displacement"] = str(slices.case / "displacement.nii.gz")
    item = LoadPair(working_grid([case]))(case)
    u = item["displacement"].numpy()
    at = np.moveaxis(np.indices(u.shape[1:]), 0, -1)
    here = apply_affine(item["fixed_affine"].numpy(), at)
    there = apply_affine(item["moving_affine"].numpy(), at + np.moveaxis(u, 0, -1))
    planes = [plane for side in (slices.fixed, slices.moving) if (plane := read_image(side).plane)]
    start, end = (  # in space, LPS mm
        apply_affine(plane.lift, np.c_[points[5:-5, 5:-5].reshape(-1, 2), np.zeros(len(u[0, 5:-5, 5:-5].ravel()))])
        * LPS
        for plane, points in zip(planes, (here, there), strict=True)
    )
    transform = sitk.ReadTransform(str(slices.case / "moving_to_fixed.h5"))
    np.testing.assert_allclose(through(transform, start), end, atol=0.05)


@pytest.mark.parametrize("way", ["moving_to_fixed", "fixed_to_moving"])
def test_simpleitk_puts_the_slice_where_regpipe_does(slices: Slices, way: str) -> None:
    onto, of = (slices.fixed, slices.moving)[:: 1 if way == "moving_to_fixed" else -1]
    transform = sitk.ReadTransform(str(slices.case / f"{way}.h5"))
    assert transform.GetDimension() == 3
    name = "displacement" if way == "moving_to_fixed" else "inverse_displacement"
    d, affine = read_displacement(slices.case / f"{name}.nii.gz")
    at = np.argwhere(np.ones(d.shape[1:]))[::7]
    here = apply_affine(affine, at) * LPS
    np.testing.assert_allclose(through(transform, here), here + d[(slice(None), *at.T)].T, atol=2e-3)
    if way == "fixed_to_moving":
        return
    images = [sitk.ReadImage(str(path)) for path in (of, onto)]
    by_itk = sitk.GetArrayFromImage(sitk.Resample(*images, transform, sitk.sitkLinear)).T
    warped = voxels(slices.case / "warped.nii.gz")
    inner = [slice(None) if n == 1 else slice(5, -5) for n in warped.shape]
    np.testing.assert_allclose(by_itk[tuple(inner)], warped[tuple(inner)], atol=5e-3)


def test_ants_files_do_the_same(slices: Slices) -> None:
    points = points_of(slices.fixed)
    field = sitk.ReadImage(str(slices.case / "1Warp.nii.gz"), sitk.sitkVectorFloat64)
    warp = sitk.DisplacementFieldTransform(field)
    affine = sitk.ReadTransform(str(slices.case / "0GenericAffine.mat"))
    ours = through(sitk.ReadTransform(str(slices.case / "moving_to_fixed.h5")), points)
    np.testing.assert_allclose(through(affine, through(warp, points)), ours, atol=2e-3)


def test_off_the_plane_nothing_jumps(slices: Slices) -> None:
    transform = sitk.ReadTransform(str(slices.case / "moving_to_fixed.h5"))
    normal = slices.across / np.linalg.norm(slices.across)
    line = points_of(slices.fixed, 1) + np.arange(-20, 20, 0.02)[:, None] * normal
    moved = through(transform, line) - line
    assert np.linalg.norm(np.diff(moved, axis=0), axis=1).max() < 0.05


def test_apply_takes_slices_and_points_in_space(slices: Slices, tmp_path: Path) -> None:
    moving = nib.load(slices.moving)
    label = save(tmp_path / "l_seg.nii.gz", (voxels(slices.moving) > 5).astype(np.uint8), moving.affine)  # type: ignore[attr-defined]
    points = points_of(slices.moving)
    rows = "\n".join(",".join(f"{v:.6f}" for v in p) for p in points)
    (tmp_path / "p.csv").write_text(f"x,y,z\n{rows}\n")
    image, labels, found = apply(slices.case, [slices.moving, label, tmp_path / "p.csv"], tmp_path / "out")
    np.testing.assert_allclose(nib.load(image).affine, nib.load(slices.fixed).affine, atol=1e-4)  # type: ignore[attr-defined]
    warped = voxels(slices.case / "warped.nii.gz")
    inner = tuple(slice(None) if n == 1 else slice(5, -5) for n in warped.shape)
    np.testing.assert_allclose(voxels(image)[inner], warped[inner], atol=5e-3)
    assert ((voxels(labels) > 0) == (warped > 5))[inner].mean() > 0.95
    moved = np.loadtxt(found, delimiter=",", skiprows=1)
    expected = through(sitk.ReadTransform(str(slices.case / "fixed_to_moving.h5")), points)
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    again = apply(slices.case / "moving_to_fixed.h5", [slices.moving], tmp_path / "again", reference=slices.fixed)
    np.testing.assert_allclose(voxels(again[0]), voxels(image), atol=1e-4)


def test_frames_and_vectors_of_a_slice_lie_in_space(slices: Slices, tmp_path: Path) -> None:
    moving, fixed = read_nifti(slices.moving), read_nifti(slices.fixed)
    frames = np.stack([voxels(slices.moving), 2 * voxels(slices.moving)], -1)
    film = save(tmp_path / "film.nii.gz", frames.astype(np.float32), moving.affine)
    arrow = np.broadcast_to(np.array([1, 2, 3], np.float32), (*moving.shape, 1, 3))
    vectors = nib.Nifti1Image(arrow, moving.affine)
    vectors.header.set_intent("vector")
    nib.save(vectors, tmp_path / "v.nii.gz")
    out, turned = apply(slices.case, [film, tmp_path / "v.nii.gz"], tmp_path / "out")
    warped = voxels(slices.case / "warped.nii.gz")
    inner = tuple(slice(None) if n == 1 else slice(5, -5) for n in warped.shape)
    for i in range(2):
        np.testing.assert_allclose(voxels(out)[..., i][inner], (i + 1) * warped[inner], atol=1e-2)
    for path in (out, turned):
        np.testing.assert_allclose(read_nifti(path).affine, fixed.affine, atol=1e-4)
    lengths = np.linalg.norm(voxels(turned)[..., 0, :], axis=-1)[inner]
    np.testing.assert_allclose(lengths, np.sqrt(14), atol=1e-3)


def start(path: Path, slices: Slices, tilt: float = 0.0, off: float = 0.0) -> Path:
    """A turn of 8 degrees within the fixed plane and the way to the moving one's, as SimpleITK writes it."""
    affine = nib.load(slices.fixed).affine * np.r_[LPS, 1][:, None]  # type: ignore[attr-defined]
    axis = nib.load(slices.fixed).shape.index(1)  # type: ignore[attr-defined]
    normal, other = (affine[:3, i] / np.linalg.norm(affine[:3, i]) for i in (axis, (axis + 1) % 3))
    turn = Rotation.from_rotvec(np.deg2rad(8) * normal) * Rotation.from_rotvec(np.deg2rad(tilt) * other)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(turn.as_matrix().ravel().tolist())
    transform.SetCenter(points_of(slices.fixed).mean(axis=0).tolist())
    transform.SetTranslation((slices.across + off * normal).tolist())
    sitk.WriteTransform(transform, str(path))
    return path


def registered(slices: Slices, out: Path, patch: pytest.MonkeyPatch, *told: object) -> int:
    settings = ["-o", out, "--bundle", "none", "--affine", "none", "--refine", 1]
    return regpipe(patch, "register", slices.fixed, slices.moving, *settings, *told)


def test_a_start_in_space_is_taken_to_the_planes(
    slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refiner, "_descend", lambda _self, start, *_: start)
    assert registered(slices, tmp_path, monkeypatch, "--initial", start(tmp_path / "t.tfm", slices)) == 0
    points, (case,) = points_of(slices.fixed), (path.parent for path in tmp_path.glob("*/metrics.json"))
    truth = through(sitk.ReadTransform(str(tmp_path / "t.tfm")), points)
    moved = through(sitk.ReadTransform(str(case / "moving_to_fixed.h5")), points)
    assert np.linalg.norm(moved - truth, axis=1).max() < 1e-3
    back = through(sitk.ReadTransform(str(case / "fixed_to_moving.h5")), truth)
    assert np.linalg.norm(back - points, axis=1).max() < 1e-3


def test_a_registered_case_of_slices_is_a_start(
    slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refiner, "_descend", lambda _self, start, *_: start)
    assert registered(slices, tmp_path, monkeypatch, "--initial", slices.case) == 0
    points, (case,) = points_of(slices.fixed), (path.parent for path in tmp_path.glob("*/metrics.json"))
    truth, moved = (
        through(sitk.ReadTransform(str(folder / "moving_to_fixed.h5")), points) for folder in (slices.case, case)
    )
    assert np.linalg.norm(moved - truth, axis=1).max() < 0.05


@pytest.mark.parametrize("told", [{"tilt": 10.0}, {"off": 5.0}], ids=str)
def test_a_start_that_leaves_the_plane_is_refused_for_that(
    slices: Slices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: dict[str, float],
) -> None:
    none, away = start(tmp_path / "none.tfm", slices), start(tmp_path / "t.tfm", slices, **told)
    sitk.WriteTransform(sitk.Transform(3, sitk.sitkIdentity), str(none))
    assert registered(slices, tmp_path, monkeypatch, "--initial", none, "--initial", away) == 1
    said = capsys.readouterr().err
    assert "off the plane of the moving one; give one that keeps it" in said
    assert f"{none}, {away}: takes" in said
