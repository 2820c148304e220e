"""A start of one's own: what known files say goes before what is found, whole and both ways, as SimpleITK reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from helpers.commandline import regpipe
from helpers.manifests import content
from helpers.registered import Pair, inner_points, nifti, simpleitk, voxels, write_csv
from regpipe import register_images
from regpipe.data.load import LoadPair
from regpipe.engines.refine import Refiner
from regpipe.io import itk_bridge
from regpipe.io.images import Image, header, read_image
from regpipe.transforms import initial
from regpipe.transforms.affine import matrix_of
from regpipe.transforms.displacement import interpolate, write_displacement, write_image
from regpipe.transforms.read import Space, read_transform
from regpipe.transforms.resample import resample
from regpipe.utils.errors import InputError

STILL: dict[str, Any] = {"bundle": "none", "affine": "none", "refine": 1}


@pytest.fixture
def case(pair: Pair, tmp_path: Path) -> dict[str, str]:
    """The moving image, what the pair's known transform makes of it as the fixed one, and exact landmarks of both."""
    warped = simpleitk(pair.moving, pair.fixed, pair.case / "moving_to_fixed.h5", sitk.sitkLinear)
    write_image(tmp_path / "fixed.nii.gz", warped.astype(np.float32), read_image(pair.fixed).affine)
    points = inner_points(pair.fixed, 40)
    return {
        "case": "a",
        "fixed_image": str(tmp_path / "fixed.nii.gz"),
        "moving_image": str(pair.moving),
        "fixed_landmarks": str(write_csv(tmp_path / "fixed.csv", points)),
        "moving_landmarks": str(write_csv(tmp_path / "moving.csv", pair.to_moving(points))),
    }


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found after what was given."""
    monkeypatch.setattr(Refiner, "_descend", lambda _self, start, *_: start)


def through(path: Path, points: np.ndarray) -> np.ndarray:
    transform = sitk.ReadTransform(str(path))
    return np.array([transform.TransformPoint(point) for point in points.tolist()])


def test_the_moving_image_and_its_landmarks_are_seen_where_the_files_say(pair: Pair, case: dict[str, str]) -> None:
    told = {"initial_1": str(pair.case / "transform.json")}
    item = LoadPair(None, affine="none")(case | told)
    fixed, moving = (item[f"{side}_image"][item["moving_mask"] > 0] for side in ("fixed", "moving"))
    assert np.corrcoef(fixed, moving)[0, 1] > 0.98
    assert (item["fixed_landmarks"] - item["moving_landmarks"]).norm(dim=1).max() < 0.05  # voxels; the inverse's 0.01


@pytest.mark.parametrize("kind", ["case", "displacement", "parts"])
def test_both_ways_of_the_result_are_the_files_and_what_was_found(
    pair: Pair, case: dict[str, str], tmp_path: Path, kind: str, still: None
) -> None:
    files: list[str] = [str(pair.case)]
    if kind != "case":
        write_displacement(tmp_path / "d.nii.gz", pair.d, pair.frame)
        (tmp_path / "affine.mat").write_bytes(itk_bridge.affine_mat(np.linalg.inv(pair.matrix)))
        files = [f"{tmp_path / 'affine.mat'},inverse", str(tmp_path / "d.nii.gz")]  # as they move an image
    if kind == "displacement":  # without its affine part, so that it alone does not fit
        files = files[1:]
    given = {key: value for key, value in case.items() if key.endswith("landmarks")} | STILL
    found = register_images(case["fixed_image"], case["moving_image"], initial=files, **given)
    points = inner_points(pair.fixed)
    moved = through(found.folder / "moving_to_fixed.h5", points)
    first = itk_bridge.itk_field(pair.d, pair.frame)
    truth = pair.to_moving(points)
    if kind == "displacement":
        truth = np.array([first.TransformPoint(point) for point in points.tolist()])
    assert np.linalg.norm(moved - truth, axis=1).max() < 0.1  # linear between other voxels
    back = through(found.folder / "fixed_to_moving.h5", moved)
    assert np.linalg.norm(back - points, axis=1).max() < 0.15
    assert (found.metrics["tre_before"] < 0.1) == (kind != "displacement")
    warped = simpleitk(pair.moving, Path(case["fixed_image"]), found.folder / "moving_to_fixed.h5", sitk.sitkLinear)
    assert np.abs(warped - found.warped.array).mean() < 0.01 * np.ptp(warped)
    told = json.loads((found.folder / "transform.json").read_text())["alignment"]
    assert told["stage"] == "initial, none"
    inputs = [(item["role"], item["file"]) for item in content(found.folder)["inputs"]]
    expected = {
        "case": [("initial_1", "transform.json")],
        "displacement": [("initial_1", "d.nii.gz")],
        "parts": [("initial_1_inverse", "affine.mat"), ("initial_2", "d.nii.gz")],
    }
    assert [item for item in inputs if item[0].startswith("initial")] == expected[kind]


def test_a_matrix_is_kept_to_the_last_digit(pair: Pair, case: dict[str, str]) -> None:
    found = register_images(case["fixed_image"], case["moving_image"], initial=pair.matrix, **STILL)
    told = json.loads((found.folder / "transform.json").read_text())["alignment"]
    assert np.allclose(told["matrix"], pair.matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_an_affine_stage_goes_on_from_it(flat: Pair, tmp_path: Path, nonlinear: bool) -> None:
    # half a turn: no start of the affine stage's own comes near; and 1.2 mm, which are left to find
    moving, off = read_image(flat.moving), np.array([[1, 0, 1.2], [0, 1, 1.2], [0, 0, 1]])
    turn = np.diag([-1.0, -1.0, 1.0])
    truth = [itk_bridge.itk_affine(turn @ flat.matrix)]
    files = [tmp_path / "start.mat"]
    files[0].write_bytes(itk_bridge.affine_mat(turn @ flat.matrix @ off))
    if nonlinear:
        truth = [itk_bridge.itk_field(flat.d, flat.frame), *truth]
        write_displacement(tmp_path / "d.nii.gz", flat.d, flat.frame)
        (tmp_path / "off.mat").write_bytes(itk_bridge.affine_mat(off))
        files[0].write_bytes(itk_bridge.affine_mat(turn @ flat.matrix))
        files += [tmp_path / "d.nii.gz", tmp_path / "off.mat"]
    turned = Image(moving.array, turn @ moving.affine)
    space = Space(*header(flat.fixed))
    fixed = resample(turned, itk_bridge.composite(*truth), space, "linear")
    write_image(tmp_path / "fixed.nii.gz", fixed, space.affine)
    write_image(tmp_path / "turned.nii.gz", turned.array, turned.affine)
    case = {
        f"{side}_image": str(tmp_path / f"{name}.nii.gz") for side, name in (("fixed", "fixed"), ("moving", "turned"))
    }
    case |= {"case": "a"} | {key: str(path) for key, path in initial.named(files).items()}
    seen = {}
    for stage in ("none", "rigid"):
        item = LoadPair(None, affine=stage)(case)
        inside = item["moving_mask"] > 0
        seen[stage] = np.corrcoef(item["fixed_image"][inside], item["moving_image"][inside])[0, 1]
    assert seen["rigid"] > 0.95 and seen["rigid"] > seen["none"] + 0.05  # interpolated twice


def test_the_command_takes_what_python_takes(
    pair: Pair, case: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = case["fixed_image"], case["moving_image"]
    told = ("--initial", pair.case, "--bundle", "none", "--affine", "none", "--refine", 1)
    assert regpipe(monkeypatch, "register", *files, *told, "-o", tmp_path / "out") == 0
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/metrics.json"))
    expected = register_images(*files, initial=pair.case, **STILL)
    assert np.array_equal(voxels(folder / "displacement.nii.gz"), voxels(expected.folder / "displacement.nii.gz"))
    assert nifti(folder / "warped.nii.gz").shape == nifti(Path(case["fixed_image"])).shape


@pytest.mark.parametrize("kind", ["Euler", "field", "chain"])
def test_an_inverted_file_takes_its_points_back(pair: Pair, tmp_path: Path, kind: str) -> None:
    dim = len(pair.d)
    points = inner_points(pair.fixed)
    if kind == "Euler":
        turn = sitk.Euler3DTransform() if dim == 3 else sitk.Euler2DTransform()
        turn.SetTranslation([3.0, -2.0, 5.0][:dim])
        sitk.WriteTransform(turn, str(tmp_path / "t.tfm"))
    elif kind == "field":
        write_displacement(tmp_path / "t.nii.gz", pair.d, pair.frame)
    else:
        (tmp_path / "t.h5").write_bytes((pair.case / "moving_to_fixed.h5").read_bytes())
    (path,) = tmp_path.glob("t.*")
    found = initial.read({"initial_1_inverse": str(path)}, dim)
    assert found is not None and (found.matrix is None) == (kind != "Euler")
    there = read_transform(path)
    moved = [there.TransformPoint(point) for point in points.tolist()]
    back = np.array([list(found.transform.TransformPoint(list(point))) for point in moved])
    assert np.linalg.norm(back - points, axis=1).max() < 0.1  # a field of 3 mm, interpolated


def test_the_bend_has_an_inverse_where_it_stretches_threefold() -> None:
    x = np.indices((60, 30), dtype=float)
    b = np.stack([10 * np.tanh((x[0] - 30) / 5), 0 * x[1]])  # 3 in the middle
    places = x[:, 20:40, 5:25]
    found = initial.back(b, places)
    assert np.abs(found + interpolate(b, found) - places).max() < 0.02


@pytest.mark.parametrize("shape", [(20, 30), (200, 200, 20)])
def test_a_linear_map_that_is_split_leaves_no_bend(shape: tuple[int, ...]) -> None:
    matrix, frame = np.eye(len(shape) + 1), np.diag([-1.5, -2.0, 1.2][: len(shape)] + [1.0])
    matrix[:2, :2], matrix[:2, -1] = [[0.9, 0.2], [-0.1, 1.1]], [3.0, -4.0]
    begin = initial.Initial(itk_bridge.itk_affine(matrix), None)
    moving_frame, b = initial.split(begin, np.eye(len(shape) + 1), frame, shape)
    assert np.allclose(moving_frame, matrix @ frame, atol=1e-4) and np.abs(b).max() < 1e-4
    assert np.allclose(matrix_of(begin.transform, len(shape)), matrix)


def test_what_is_wrong_is_said_in_a_line(pair: Pair, case: dict[str, str], tmp_path: Path) -> None:
    files, dim = (case["fixed_image"], case["moving_image"]), len(pair.d)
    with pytest.raises(InputError, match="no such file"):
        register_images(*files, initial=tmp_path / "none.mat", **STILL)
    other = np.eye(6 - dim)
    with pytest.raises(InputError, match=f"is {5 - dim}-D, the images are {dim}-D"):
        register_images(*files, initial=other, **STILL)
    told: dict[str, Any] = {key: case[key] for key in case if key.endswith("landmarks")}
    told |= STILL | {"affine": "affine", "affine_from": "landmarks"}
    with pytest.raises(InputError, match="give one of them"):
        register_images(files[0], files[1], initial=pair.matrix, **told)
    spline = sitk.BSplineTransform(dim, 3)
    spline.SetTransformDomainMeshSize([4] * dim)
    sitk.WriteTransform(spline, str(tmp_path / "spline.tfm"))
    with pytest.raises(InputError, match="BSplineTransform is not inverted here"):
        register_images(*files, initial=f"{tmp_path / 'spline.tfm'},inverse", **STILL)
