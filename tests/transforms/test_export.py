"""Truth: the pair's closed formula, interpolated by scipy; judges: SimpleITK, ANTs, nitransforms, fslpy, surfa."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import ants
import nitransforms
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage

from helpers.exported import WAY, Setup, dense, image_files, lps, pulled_and_pulling, setup
from regpipe.io.geometry import lps_matrix
from regpipe.io.images import Image
from regpipe.io.source import Source
from regpipe.transforms import export
from regpipe.transforms.displacement import native_jacobian, resample_through, write_image
from regpipe.utils.errors import InputError

BOTH = pytest.mark.parametrize("dim", [2, 3])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[int, Path]:
    """A folder per dimension, with the formats that need no package of their own."""
    folders = {}
    for dim, formats in ((2, ("itk", "ants")), (3, ("itk", "ants", "fsl", "l2r"))):
        folders[dim] = tmp_path_factory.mktemp(f"case{dim}")
        export.write_transforms(
            folders[dim], setup(dim).pair, *image_files(setup(dim)), formats=formats, stage="affine"
        )
    return folders


def interpolated(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A field (D, *S) at voxels (K, D), linear, its rim's value outside."""
    return np.stack([ndimage.map_coordinates(c.astype(float), at.T, order=1, mode="nearest") for c in field], -1)


def all_over(image: Image, k: int = 300) -> np.ndarray:
    """Random places (K, D) in RAS mm, anywhere in the image."""
    shape = np.array(image.array.shape)
    return apply_affine(image.affine, np.random.default_rng(3).uniform(-0.5, shape - 0.5, (k, len(shape))))


def truth(case: Setup, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Points in LPS mm, and where the network's own displacement takes them."""
    if way == "moving_to_fixed":
        points, start, end, u = all_over(case.fixed), case.fixed_frame, case.moving_frame, case.u
    else:
        points, start, end, u = all_over(case.moving), case.moving_frame, case.fixed_frame, case.inverse_u
    at = apply_affine(np.linalg.inv(start), points)
    return lps(points), lps(apply_affine(end, at + interpolated(u, at)))


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "transform.json").read_text())


def through_ants(folder: Path, way: str, points: np.ndarray) -> np.ndarray:
    about = described(folder)[way]
    table = pd.DataFrame(points, columns=list("xyz")[: points.shape[1]])
    files = [str(folder / name) for name in about["ants"]]
    moved = ants.apply_transforms_to_points(points.shape[1], table, files, whichtoinvert=about["ants_invert"])
    return moved.to_numpy()[:, : points.shape[1]]


# The pair


@BOTH
@WAY
def test_points_go_where_the_networks_displacement_takes_them(dim, way):
    points, expected = truth(setup(dim), way)
    _, _, move = pulled_and_pulling(setup(dim), way)
    np.testing.assert_allclose(move(setup(dim).pair, points), expected, atol=1e-4)
    assert np.abs(expected - points).max() > 5


@BOTH
def test_the_grid_is_the_working_grid_grown_until_it_reaches_beyond_both_images(dim):
    case = setup(dim)
    for image, to_fixed in ((case.fixed, np.eye(dim + 1)), (case.moving, np.linalg.inv(case.pair.matrix))):
        ends = [(-0.5, n - 0.5) for n in image.array.shape]
        corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, dim)
        at = apply_affine(np.linalg.inv(case.pair.frame) @ to_fixed @ image.affine, corners)
        assert (at >= 2).all() and (at <= np.array(case.pair.forward.shape[1:]) - 3).all()
    first = np.rint(apply_affine(np.linalg.inv(case.pair.frame) @ case.fixed_frame, np.zeros(dim))).astype(int)
    inner = tuple(slice(a, a + n) for a, n in zip(first, case.u.shape[1:], strict=True))
    vectors = np.tensordot(case.fixed_frame[:-1, :-1], case.u, axes=1).T  # RAS mm
    np.testing.assert_allclose(lps(case.pair.forward[(slice(None), *inner)].T), vectors, atol=1e-5)


@BOTH
def test_the_grid_reaches_beyond_the_images_where_nothing_fades_too(dim):
    """ITK displaces nothing outside a grid, and interpolates towards it."""
    case, still = setup(dim), np.zeros_like(setup(dim).u)
    spaces = [(image.array.shape, image.affine) for image in (case.fixed, case.moving)]
    pair = export.pair_transform(still, still, case.fixed_frame, case.moving_frame, *spaces)
    for image, to_fixed in ((case.fixed, np.eye(dim + 1)), (case.moving, np.linalg.inv(pair.matrix))):
        corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in image.array.shape], indexing="ij"), -1)
        at = apply_affine(np.linalg.inv(pair.frame) @ to_fixed @ image.affine, corners.reshape(-1, dim))
        assert (at > 1.99).all() and (at < np.array(pair.forward.shape[1:]) - 2.99).all()


@BOTH
def test_a_moving_image_of_many_times_the_size_does_not_blow_up_the_grid(dim):
    case = setup(dim)
    spaces = (case.fixed.array.shape, case.fixed.affine), (tuple(20 * n for n in case.u.shape[1:]), case.moving_frame)
    pair = export.pair_transform(case.u, case.inverse_u, case.fixed_frame, case.moving_frame, *spaces)
    assert pair.forward.size < 8 * case.u.size
    points, expected = truth(case, "moving_to_fixed")
    np.testing.assert_allclose(export.moving_points(pair, points), expected, atol=1e-4)


@BOTH
@WAY
@pytest.mark.parametrize("moving_size", [1, 20])
def test_the_deformation_fades_without_a_jump_in_every_file(tmp_path, dim, way, moving_size):
    """Lines across everything, in steps: the files' maps less the affine one, by SimpleITK."""
    case = setup(dim)
    fixed, moving = image_files(case)
    moving = moving._replace(shape=tuple(moving_size * n for n in moving.shape))
    spaces = (fixed.shape, fixed.affine), (moving.shape, moving.affine)
    pair = export.pair_transform(3 * case.u, 3 * case.inverse_u, case.fixed_frame, case.moving_frame, *spaces)
    export.write_transforms(tmp_path, pair, fixed, moving)
    matrix = pair.matrix if way == "moving_to_fixed" else np.linalg.inv(pair.matrix)
    for transform in (sitk.ReadTransform(str(tmp_path / f"{way}.h5")), as_ants(tmp_path, way, dim)):
        bent = False
        for direction in np.random.default_rng(4).standard_normal((4, dim)):
            middle = apply_affine(
                fixed.affine if way == "moving_to_fixed" else moving.affine, np.array(fixed.shape) / 2
            )
            steps = np.arange(-150, 150, 0.02)[:, None] * direction / np.linalg.norm(direction)
            points = lps(middle) + steps
            rest = lps(np.array([transform.TransformPoint(p) for p in points.tolist()])) - apply_affine(
                matrix, lps(points)
            )
            assert np.linalg.norm(np.diff(rest, axis=0), axis=1).max() < 0.05
            np.testing.assert_allclose(rest[[0, -1]], 0, atol=1e-4)
            bent |= np.linalg.norm(rest, axis=1).max() > 1
        assert bent


def as_ants(folder, way, dim):
    """ANTs' files in the order of its -t options, as ITK objects; what is last given is applied to points last."""
    i = export.WAYS.index(way)
    field = sitk.ReadImage(str(folder / export.ANTS_WARPS[i]), sitk.sitkVectorFloat64)
    warp = sitk.DisplacementFieldTransform(field)
    affine = sitk.ReadTransform(str(folder / export.ANTS_AFFINE))
    first, then = (warp, affine) if i == 0 else (affine.GetInverse(), warp)
    chain = sitk.CompositeTransform(dim)
    chain.AddTransform(then)
    chain.AddTransform(first)
    return chain


@BOTH
def test_a_faded_field_does_not_fold(dim):
    case = setup(dim)
    spaces = (case.fixed.array.shape, case.fixed.affine), (case.moving.array.shape, case.moving.affine)
    pair = export.pair_transform(2 * case.u, 2 * case.inverse_u, case.fixed_frame, case.moving_frame, *spaces)
    for field in (pair.forward, pair.inverse):
        for axis in range(1, dim + 1):
            assert not field.take([0, -1], axis).any()
        assert native_jacobian(field, pair.frame).min() > 0


@BOTH
def test_there_and_back_is_where_one_was(dim):
    case = setup(dim)
    middle = np.random.default_rng(8).uniform(0.25, 0.75, (500, dim)) * (np.array(case.u.shape[1:]) - 1)
    points = lps(apply_affine(case.fixed_frame, middle))
    back = export.fixed_points(case.pair, export.moving_points(case.pair, points))
    off = apply_affine(np.linalg.inv(case.fixed_frame), lps(back)) - middle
    assert np.percentile(np.linalg.norm(off, axis=1), 99) < 0.1
    assert np.linalg.norm(interpolated(case.u, middle), axis=1).max() > 1


# Files, read by others


@BOTH
@WAY
def test_simpleitk_and_ants_take_points_where_the_formula_does(dim, way, written):
    points, expected = truth(setup(dim), way)
    path = str(written[dim] / described(written[dim])[way]["itk"])
    moved = [sitk.ReadTransform(path).TransformPoint([float(v) for v in p]) for p in points]
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    np.testing.assert_allclose(through_ants(written[dim], way, points), expected, atol=1e-3)
    composite = ants.apply_transforms_to_points(
        dim, pd.DataFrame(points, columns=list("xyz")[:dim]), [path], whichtoinvert=[False]
    )
    np.testing.assert_allclose(composite.to_numpy()[:, :dim], expected, atol=1e-3)


@WAY
def test_nitransforms_takes_the_grids_voxels_where_the_formula_does(way, written):
    case = setup(3)  # its fields are cubic between voxels, and 3-D only
    voxels = np.random.default_rng(9).integers(0, case.pair.forward.shape[1:], (200, 3))
    points = apply_affine(case.pair.frame, voxels)
    if way == "fixed_to_moving":
        points = apply_affine(case.pair.matrix, points)
    _, _, move = pulled_and_pulling(case, way)
    chain = nitransforms.manip.TransformChain.from_filename(written[3] / f"{way}.h5", fmt="itk")
    np.testing.assert_allclose(lps(chain.map(points)), move(case.pair, lps(points)), atol=1e-3)


@BOTH
@WAY
def test_simpleitk_and_ants_resample_images_as_the_formula_does(dim, way, written):
    case = setup(dim)
    pulled, pulling, _ = pulled_and_pulling(case, way)
    d, inside = dense(case, way)
    expected = resample_through(pulled, d, pulling.affine, order=1)
    about = described(written[dim])[way]
    source, grid = (sitk_image(image) for image in (pulled, pulling))
    read = sitk.ReadTransform(str(written[dim] / about["itk"]))
    by_sitk = sitk.GetArrayFromImage(sitk.Resample(source, grid, read, sitk.sitkLinear)).T
    by_ants = ants.apply_transforms(
        ants.from_sitk(grid),
        ants.from_sitk(source),
        [str(written[dim] / name) for name in about["ants"]],
        whichtoinvert=about["ants_invert"],
    ).numpy()
    assert inside.mean() > 0.3
    np.testing.assert_allclose(by_sitk[inside], expected[inside], atol=1e-3)  # of a range of 1
    np.testing.assert_allclose(by_ants[inside], expected[inside], atol=1e-3)


def sitk_image(image: Image) -> sitk.Image:
    placed_lps = lps_matrix(image.affine, places=False)
    made = sitk.GetImageFromArray(np.ascontiguousarray(image.array.T))
    made.SetSpacing(image.spacing.tolist())
    made.SetOrigin(placed_lps[:-1, -1].tolist())
    made.SetDirection((placed_lps[:-1, :-1] / image.spacing).ravel().tolist())
    return made


@BOTH
def test_a_blob_comes_to_lie_where_the_points_say(dim, written):
    case = setup(dim)
    middle = lps(apply_affine(case.fixed.affine, (np.array(case.fixed.array.shape) - 1) / 2))
    there = export.moving_points(case.pair, middle[None])[0]
    at = np.indices(case.moving.array.shape).reshape(dim, -1).T
    far = np.linalg.norm(lps(apply_affine(case.moving.affine, at)) - there, axis=1)
    blob = Image(np.exp(-(far**2) / 8).reshape(case.moving.array.shape), case.moving.affine)
    read = sitk.ReadTransform(str(written[dim] / "moving_to_fixed.h5"))
    pulled = sitk.GetArrayFromImage(sitk.Resample(sitk_image(blob), sitk_image(case.fixed), read)).T
    found = lps(apply_affine(case.fixed.affine, np.array(ndimage.center_of_mass(pulled))))
    assert np.linalg.norm(found - middle) < 0.3  # mm; the field bends the blob itself
    assert np.linalg.norm(there - middle) > 2


@BOTH
def test_the_same_pair_gives_the_same_bytes_at_another_time(dim, tmp_path):
    formats = ["itk", "ants"] if dim == 2 else ["itk", "ants", "fsl", "l2r"]
    formats += ["freesurfer"] if dim == 3 and importlib.util.find_spec("surfa") else []
    for name in "ab":
        export.write_transforms(tmp_path / name, setup(dim).pair, *image_files(setup(dim)), formats=formats)
        time.sleep(1.1 if name == "a" else 0)  # time stamps are in seconds
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == (6 if dim == 2 else 9 + 2 * ("freesurfer" in formats))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@BOTH
def test_transform_json_says_which_files_they_are(dim, written):
    content = described(written[dim])
    case = setup(dim)
    assert content["format"] == "regpipe transform 1"
    assert content["fixed"]["file"] == "fixed.nii.gz" and content["moving"]["shape"] == [*case.moving.array.shape]
    np.testing.assert_array_equal(content["moving"]["affine"], case.moving.affine)
    np.testing.assert_array_equal(content["alignment"]["matrix"], case.pair.matrix)
    assert content["alignment"]["stage"] == "affine"
    files = {**content["moving_to_fixed"]["sha256"], **content["fixed_to_moving"]["sha256"]}
    assert {*files, "transform.json"} == {path.name for path in written[dim].iterdir()}
    for name, digest in files.items():
        assert hashlib.sha256((written[dim] / name).read_bytes()).hexdigest() == digest


def test_an_image_is_named_without_its_folder_and_hashed_whole(tmp_path):
    path = tmp_path / "secret" / "scan.nii.gz"
    write_image(path, np.arange(12.0).reshape(3, 4), np.eye(3))
    about = export.image_file(path, Source(hashed=True))
    assert about.file == "scan.nii.gz" and about.shape == (3, 4)
    assert about.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("dim", "formats", "said"),
    [(3, ["itk", "m3z"], "'m3z'; choose among itk, ants"), (2, ["itk", "fsl"], "fsl: is 3-D only")],
)
def test_a_format_that_cannot_be_is_refused_before_anything_is_written(dim, formats, said, tmp_path):
    with pytest.raises(InputError, match=said):
        export.write_transforms(tmp_path / "case", setup(dim).pair, *image_files(setup(dim)), formats=formats)
    assert not (tmp_path / "case").exists()


def test_freesurfer_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "surfa", None)
    with pytest.raises(InputError, match="pip install surfa"):
        export.check_formats(["freesurfer"], 3)
