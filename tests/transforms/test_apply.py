"""Truth: SimpleITK with the same files, blobs whose centroids are known, closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from typer.testing import CliRunner

from helpers.folders import save
from helpers.registered import (
    Pair,
    at,
    inner_points,
    lps_place,
    nifti,
    simpleitk,
    voxels,
    write_affine,
    write_csv,
)
from regpipe.cli import main as cli
from regpipe.inference.register import register_images
from regpipe.io.images import read_image
from regpipe.io.points import read_points
from regpipe.transforms.apply import apply, compose
from regpipe.transforms.displacement import map_points, write_displacement
from regpipe.transforms.read import read_transform
from regpipe.transforms.resample import INTERPOLATIONS
from regpipe.utils.errors import InputError


@pytest.mark.parametrize("to", ["fixed", "moving"])
@pytest.mark.parametrize(("method", "theirs"), [("auto", sitk.sitkLinear), ("bspline", sitk.sitkBSpline)])
def test_an_image_is_resampled_as_simpleitk_does_with_the_same_file(
    tmp_path: Path, pair: Pair, to: str, method: str, theirs: int
) -> None:
    source, target = (pair.moving, pair.fixed) if to == "fixed" else (pair.fixed, pair.moving)
    (out,) = apply(pair.case, [source], tmp_path, to=to, interpolation=method)
    way = "moving_to_fixed" if to == "fixed" else "fixed_to_moving"
    expected = simpleitk(source, target, pair.case / f"{way}.h5", theirs)
    found, reference = nifti(out), nifti(target)
    assert out.name == source.name and found.get_data_dtype() == np.float32 and expected.any()
    np.testing.assert_allclose(found.affine, reference.affine, atol=1e-4)
    difference = np.abs(np.asarray(found.dataobj) - expected)
    assert difference.max() < 1e-3 * np.ptp(expected)


def test_points_go_where_the_moved_image_shows_them(tmp_path: Path, pair: Pair) -> None:
    p_fixed = inner_points(pair.fixed)
    moving = write_csv(tmp_path / "moving.csv", pair.to_moving(p_fixed))
    (back,) = apply(pair.case, [moving], tmp_path / "out", to="fixed")
    error = np.linalg.norm(read_points(back).points - p_fixed, axis=1)
    assert np.percentile(error, 99) < 0.1  # mm; voxels are 0.9 mm and more


def test_there_and_back_again(tmp_path: Path, pair: Pair) -> None:
    start = inner_points(pair.fixed)
    (there,) = apply(pair.case, [write_csv(tmp_path / "p.csv", start)], tmp_path / "there", to="moving")
    (back,) = apply(pair.case, [there], tmp_path / "back", to="fixed")
    np.testing.assert_allclose(read_points(there).points, pair.to_moving(start), atol=1e-4)  # the closed form
    error = np.linalg.norm(read_points(back).points - start, axis=1)
    assert np.linalg.norm(read_points(there).points - start, axis=1).min() > 0.5
    assert np.percentile(error, 99) < 0.09  # a tenth of the smallest voxel


def test_points_equal_simpleitks_transform_point(tmp_path: Path, pair: Pair) -> None:
    points = inner_points(pair.moving)
    (out,) = apply(pair.case, [write_csv(tmp_path / "p.csv", points)], tmp_path / "out", to="fixed")
    theirs = sitk.ReadTransform(str(pair.case / "fixed_to_moving.h5"))
    np.testing.assert_allclose(read_points(out).points, [theirs.TransformPoint(p) for p in points.tolist()], atol=1e-5)


def test_voxels_of_the_one_image_become_voxels_of_the_other(tmp_path: Path, pair: Pair) -> None:
    points = inner_points(pair.moving)
    (mm,) = apply(pair.case, [write_csv(tmp_path / "p.csv", points)], tmp_path / "out")
    dim = points.shape[1]
    keep, flip = np.ix_([*range(dim), 3], [*range(dim), 3]), np.array([-1, -1, 1])[:dim]
    moving, fixed = (nifti(path).affine[keep] for path in (pair.moving, pair.fixed))
    voxel = at(np.linalg.inv(moving), points * flip)
    rows = [",".join(map(repr, row)) for row in voxel.tolist()]
    (tmp_path / "v.csv").write_text("\n".join(["i,j,k"[: 2 * dim - 1], *rows]) + "\n")
    (out,) = apply(pair.case, [tmp_path / "v.csv"], tmp_path / "out")
    found = np.loadtxt(out, delimiter=",", skiprows=1)
    np.testing.assert_allclose(at(fixed, found) * flip, read_points(mm).points, atol=1e-3)
    with pytest.raises(InputError, match="v.csv: counts in voxels"):
        apply(pair.case / "fixed_to_moving.h5", [tmp_path / "v.csv"], tmp_path / "o")


def test_voxels_of_a_sheared_image_are_the_files_own(tmp_path: Path) -> None:
    array = ndimage.gaussian_filter(np.random.default_rng(0).random((14, 15, 16)), 2)
    sheared = np.array([[1, 0.3, 0, 5], [0, 1, 0.2, 0], [0, 0, 1.5, -3], [0, 0, 0, 1]])
    images = (array, np.diag([1.0, 2, 1, 1])), (array, sheared)
    register_images(*images, bundle="none", affine="none", refine=1).save(tmp_path / "out")
    (case,) = (path.parent for path in (tmp_path / "out").rglob("transform.json"))
    points = np.array([[4.0, 5, 6], [7, 7, 7], [10, 9, 11]])
    (tmp_path / "v.csv").write_text("i,j,k\n" + "".join(f"{i},{j},{k}\n" for i, j, k in points))
    write_csv(tmp_path / "mm.csv", at(sheared, points) * [-1, -1, 1])
    mm, voxel = apply(case, [tmp_path / "mm.csv", tmp_path / "v.csv"], tmp_path / "there")
    expected = np.diag([1.0, 0.5, 1]) @ (read_points(mm).points * [-1, -1, 1]).T
    np.testing.assert_allclose(np.loadtxt(voxel, delimiter=",", skiprows=1), expected.T, atol=1e-3)
    (back,) = apply(case, [voxel], tmp_path / "back", to="moving")
    np.testing.assert_allclose(np.loadtxt(back, delimiter=",", skiprows=1), points, atol=0.05)


def test_voxels_of_a_sheared_slice_in_space_are_the_files_own(tmp_path: Path) -> None:
    array = ndimage.gaussian_filter(np.random.default_rng(0).random((34, 35)), 2)[:, :, None]
    sheared = np.array([[1, 0.3, 0, 5], [0, 1, 0, 0], [0, 0, 1.5, -3], [0, 0, 0, 1]])
    found = register_images((array, np.eye(4)), (array, sheared), bundle="none", affine="none", refine=1)
    points = np.array([[12.0, 15, 0], [17, 17, 0]])
    (tmp_path / "v.csv").write_text("i,j,k\n" + "".join(f"{i},{j},{k}\n" for i, j, k in points))
    write_csv(tmp_path / "mm.csv", at(sheared, points) * [-1, -1, 1])
    mm, voxel = apply(found.folder, [tmp_path / "mm.csv", tmp_path / "v.csv"], tmp_path / "there")
    expected = read_points(mm).points * [-1, -1, 1]  # the fixed image's voxels are its mm
    np.testing.assert_allclose(np.loadtxt(voxel, delimiter=",", skiprows=1), expected, atol=1e-3)


def test_a_blob_moves_with_its_point(tmp_path: Path, pair: Pair) -> None:
    array, affine, *_ = read_image(pair.moving)
    place = pair.to_moving(inner_points(pair.fixed, 1))
    distance = lps_place(affine, np.indices(array.shape).reshape(array.ndim, -1).T) - place
    blob = np.exp(-(distance**2).sum(1) / (2 * 2.0**2)).reshape(array.shape).astype(np.float32)
    full = nifti(pair.moving).affine
    files = [save(tmp_path / "blob.nii.gz", blob, full), write_csv(tmp_path / "p.csv", place)]
    image, points = apply(pair.case, files, tmp_path / "out")
    moved = read_image(image)
    weight = moved.array.ravel()
    index = np.indices(moved.array.shape).reshape(array.ndim, -1).T
    centroid = lps_place(moved.affine, (index * weight[:, None]).sum(0)[None] / weight.sum())
    assert np.linalg.norm(read_points(points).points - place) > 0.5
    assert np.linalg.norm(centroid - read_points(points).points) < 0.25  # mm, of a blob 2 mm wide that is bent


def test_points_with_a_z_go_through_a_flat_transform(tmp_path: Path, flat: Pair) -> None:
    points = inner_points(flat.fixed, 5)
    spatial = np.c_[points, np.full(5, 7.0)]
    (out,) = apply(flat.case, [write_csv(tmp_path / "p.csv", spatial)], tmp_path / "out", to="moving")
    np.testing.assert_allclose(read_points(out).points, np.c_[flat.to_moving(points), spatial[:, 2]], atol=1e-4)
    spatial[0, 2] = 8
    with pytest.raises(InputError, match="p.csv: is 3-D, the transform is 2-D"):
        apply(flat.case, [write_csv(tmp_path / "p.csv", spatial)], tmp_path / "out", to="moving")


def test_a_displacement_file_alone_maps_points_as_it_says(tmp_path: Path, flat: Pair) -> None:
    write_displacement(tmp_path / "d.nii.gz", flat.d, flat.frame)
    points = inner_points(flat.fixed, 20)
    (out,) = apply(tmp_path / "d.nii.gz", [write_csv(tmp_path / "p.csv", points)], tmp_path / "out.csv")
    assert out == tmp_path / "out.csv"
    np.testing.assert_allclose(read_points(out).points, map_points(points, flat.d, flat.frame), atol=1e-5)


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if isinstance(done.exception, InputError):
        return 1, done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


def test_bad_inputs_do_not_stop_the_good_ones(tmp_path: Path, flat: Pair) -> None:
    volume = save(tmp_path / "volume.nii.gz", np.random.default_rng(0).random((4, 5, 6)).astype(np.float32))
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    (tmp_path / "a.doc").write_text("")
    inputs = [bad, volume, tmp_path / "a.doc", tmp_path / "missing.csv", flat.moving]
    status, said, errors = run("apply", flat.case, *inputs, "-o", tmp_path / "out")
    assert status == 1 and [f.name for f in (tmp_path / "out").iterdir()] == [flat.moving.name]
    assert f"{flat.moving} -> " in said and "(linear)" in said
    lines = errors.strip().splitlines()
    assert len(lines) == 4 and all(f"{path}" in line for path, line in zip(inputs, lines, strict=False))
    assert "is 3-D, the transform is 2-D" in lines[1]


def test_commands_do_what_the_functions_do(tmp_path: Path, flat: Pair) -> None:
    assert run("apply", flat.case, flat.fixed, "-o", tmp_path / "a.nii.gz", "--to", "moving")[0] == 0
    assert voxels(tmp_path / "a.nii.gz").shape == voxels(flat.moving).shape
    assert run("compose", flat.case, flat.case / "moving_to_fixed.h5", "-o", tmp_path / "c.h5")[0] == 0
    assert read_transform(tmp_path / "c.h5").GetNumberOfTransforms() == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["apply", "{h5}", "{moving}", "-o", "{out}"], "--reference"),
        (["apply", "{h5}", "{moving}", "-o", "{out}", "--to", "moving"], "one way"),
        (["apply", "{case}", "{moving}", "-o", "{out}", "--to", "left"], "fixed or moving"),
        (["apply", "{case}", "{moving}", "-o", "{out}", "--interpolation", "sinc"], ", ".join(INTERPOLATIONS)),
        (["apply", "{case}", "{moving}", "{fixed}", "-o", "{out}/a.nii.gz"], "one file"),
        (["apply", "{out}/none", "{moving}", "-o", "{out}"], "no such file or folder"),
        (["apply", "{case}", "{moving}", "-o", "{moving}"], "overwrite"),
        (["apply", "{case}", "{moving}", "{moving}", "-o", "{out}"], "overwrite"),
        (["apply", "{case}", "{points}", "-o", "{out}/a.fcsv"], "name it .csv"),
        (["compose", "{case}", "-o", "{out}/a.mat"], ".h5"),
        (["compose", "{case}", "{solid}", "-o", "{out}/a.h5"], "is 3-D"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(tmp_path: Path, flat: Pair, arguments: list[str], told: str) -> None:
    write_affine(tmp_path / "solid.mat", np.eye(4))
    points = write_csv(tmp_path / "p.csv", np.zeros((1, 2)))
    names = {"case": flat.case, "h5": flat.case / "moving_to_fixed.h5", "moving": flat.moving, "fixed": flat.fixed}
    names |= {"out": tmp_path / "out", "solid": tmp_path / "solid.mat", "points": points}
    status, _, error = run(*(argument.format(**names) for argument in arguments))
    assert status == 1 and told in error and "\n" not in error.strip()


def test_points_and_images_of_another_place_warn(tmp_path: Path, flat: Pair, caplog: pytest.LogCaptureFixture) -> None:
    far = np.eye(4)
    far[:2, 3] = 1000
    files = [write_csv(tmp_path / "p.csv", np.full((3, 2), 900.0)), save(tmp_path / "i.nii.gz", np.eye(9), far)]
    apply(flat.case, files, tmp_path / "out")
    assert "p.csv: 3 of 3 points lie outside" in caplog.text and "i.nii.gz: nothing of it" in caplog.text


def test_a_chain_that_does_not_join_warns(tmp_path: Path, flat: Pair, caplog: pytest.LogCaptureFixture) -> None:
    compose([flat.case, flat.case / "moving_to_fixed.h5"], tmp_path / "a.h5")
    assert "the order" not in caplog.text  # of a file nobody knows where it begins
    compose([flat.case, flat.case], tmp_path / "b.h5")
    assert "does not begin where" in caplog.text and "is the order right?" in caplog.text
