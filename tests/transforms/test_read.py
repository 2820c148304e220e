"""Truth: closed forms of chained maps, with ITK and SimpleITK as readers; files damaged one way each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from helpers.registered import (
    Pair,
    at,
    inner_points,
    inverted,
    lps_map,
    lps_place,
    turned,
    voxels,
    write_affine,
)
from regpipe.io.images import read_image
from regpipe.io.source import Source
from regpipe.transforms import export
from regpipe.transforms.apply import apply, compose
from regpipe.transforms.displacement import read_displacement
from regpipe.transforms.read import find, read_transform
from regpipe.utils.errors import InputError


@pytest.fixture
def rigid(tmp_path: Path, pair: Pair) -> tuple[Path, np.ndarray]:
    """A second registration: a .mat that takes points of the first one's result further."""
    dim = len(pair.frame) - 1
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = turned(dim, (5, 0, 0))
    matrix[:dim, dim] = [0.5, 1.0, -0.5][:dim]
    write_affine(tmp_path / "second.mat", matrix)
    return tmp_path / "second.mat", lps_map(matrix)


def test_a_chain_takes_the_last_ones_fixed_point_to_the_first_ones_moving_point(
    tmp_path: Path, pair: Pair, rigid: tuple[Path, np.ndarray]
) -> None:
    path, matrix = rigid
    chain = compose([pair.case, path], tmp_path / "chain.h5")
    points = inner_points(pair.fixed, 50)
    expected = pair.to_moving(at(matrix, points))
    assert np.abs(expected - at(matrix, pair.to_moving(points))).max() > 0.2  # the order matters
    for transform in (read_transform(chain), sitk.ReadTransform(str(chain))):
        found = [list(transform.TransformPoint(p)) for p in points.tolist()]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    again = compose([chain, path], tmp_path / "again.h5")
    found = [list(read_transform(again).TransformPoint(p)) for p in points.tolist()]
    np.testing.assert_allclose(found, pair.to_moving(at(matrix @ matrix, points)), atol=1e-3)


def test_an_image_moved_by_a_chain_is_the_image_moved_twice(
    tmp_path: Path, pair: Pair, rigid: tuple[Path, np.ndarray]
) -> None:
    chain = compose([pair.case, rigid[0]], tmp_path / "chain.h5")
    (once,) = apply(chain, [pair.moving], tmp_path / "once", reference=pair.fixed)
    (first,) = apply(pair.case, [pair.moving], tmp_path / "first")
    (second,) = apply(rigid[0], [first], tmp_path / "second", reference=pair.fixed)
    images = [voxels(file) for file in (once, second)]
    inner = tuple(slice(n // 3, -(n // 3)) for n in images[0].shape)
    assert np.corrcoef(images[0][inner].ravel(), images[1][inner].ravel())[0, 1] > 0.95  # the second is blurred twice


def test_a_dense_chain_is_the_chain_at_each_voxel(tmp_path: Path, pair: Pair, rigid: tuple[Path, np.ndarray]) -> None:
    path, matrix = rigid
    out = compose([path, pair.case], tmp_path / "dense.nii.gz")  # the case's fixed grid
    d, affine = read_displacement(out)
    assert d.shape[1:] == read_image(pair.fixed).array.shape
    places = lps_place(affine, np.indices(d.shape[1:]).reshape(len(d), -1).T)
    np.testing.assert_allclose(places + d.reshape(len(d), -1).T, at(matrix, pair.to_moving(places)), atol=1e-3)
    with pytest.raises(InputError, match="--reference"):
        compose([pair.case, path], out)


def test_the_same_chain_is_the_same_bytes(tmp_path: Path, flat: Pair) -> None:
    first = compose([flat.case], tmp_path / "a.h5").read_bytes()
    time.sleep(1.1)  # time stamps count seconds
    assert compose([flat.case], tmp_path / "b.h5").read_bytes() == first


def damage(folder: Path, flat: Pair, how: str) -> Path:
    case = folder / "case"
    case.mkdir()
    for file in flat.case.iterdir():
        (case / file.name).write_bytes(file.read_bytes())
    about, h5 = case / "transform.json", case / "moving_to_fixed.h5"
    content = json.loads(about.read_text())
    match how:
        case "bytes":
            h5.write_bytes(h5.read_bytes()[:-1] + b"?")
        case "gone":
            h5.unlink()
        case "no json":
            about.unlink()
        case "half json":
            about.write_text(about.read_text()[:40])
        case "keys":
            del content["fixed"]["affine"]
            about.write_text(json.dumps(content))
        case "format":
            about.write_text(json.dumps(content | {"format": "regpipe transform 9"}))
        case "no itk":
            del content["moving_to_fixed"]["itk"]
            about.write_text(json.dumps(content))
    return case


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("bytes", r"moving_to_fixed.h5: is not the file"),
        ("gone", r"moving_to_fixed.h5: missing"),
        ("no json", r"transform.json: missing"),
        ("half json", r"transform.json: damaged"),
        ("keys", r"transform.json: damaged"),
        ("format", r"transform.json: is of format 'regpipe transform 9'"),
        ("no itk", r"transform.json: .* without the format itk"),
    ],
)
def test_a_damaged_case_is_refused(tmp_path: Path, flat: Pair, how: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        find(damage(tmp_path, flat, how))


def test_a_truncated_composite_is_refused_without_noise(
    tmp_path: Path, flat: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (flat.case / "moving_to_fixed.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="half.h5: not a readable transform .*truncated"):
        read_transform(tmp_path / "half.h5")
    assert capfd.readouterr().err == ""


def test_several_transforms_in_a_file_are_refused_because_their_order_is_not_told(tmp_path: Path) -> None:
    one = "Transform: AffineTransform_double_2_2\nParameters: 1 0 0 1 {} 0\nFixedParameters: 0 0\n"
    path = tmp_path / "two.tfm"
    path.write_text("#Insight Transform File V1.0\n#Transform 0\n" + one.format(3) + "#Transform 1\n" + one.format(5))
    with pytest.raises(InputError, match="two.tfm: holds 2 transforms"):
        read_transform(path)


@pytest.mark.parametrize("to", ["fixed", "moving"])
def test_a_registered_case_as_regpipe_writes_it_is_found(tmp_path: Path, pair: Pair, to: str) -> None:
    d, e = (field.astype(np.float32) for field in (pair.d, inverted(pair.d, pair.frame)))
    sides = [export.image_file(file, Source()) for file in (pair.fixed, pair.moving)]
    export.write_transforms(tmp_path, export.PairTransform(pair.matrix, d, e, pair.frame), *sides)
    points = inner_points(pair.fixed if to == "fixed" else pair.moving, 20)
    ours, theirs = find(tmp_path, to), find(pair.case, to)
    for files in ((ours.images, theirs.images), (ours.points, theirs.points)):
        maps = [read_transform(file) for file in files]
        moved, expected = [[list(m.TransformPoint(p)) for p in points.tolist()] for m in maps]
        np.testing.assert_allclose(moved, expected, atol=1e-4)
    onto, of = (pair.fixed, pair.moving) if to == "fixed" else (pair.moving, pair.fixed)
    for found, image in ((ours.target, onto), (ours.source, of), (theirs.target, onto), (theirs.source, of)):
        array, affine, *_ = read_image(image)
        assert found is not None and found.shape == array.shape
        np.testing.assert_allclose(found.affine, affine, atol=1e-4)


@pytest.mark.parametrize("name", ["a.h5", "a.mat", "a.tfm", "a.txt", "a.nii.gz", "a.doc"])
def test_a_file_that_is_no_transform_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no transform\n" * 20)
    with pytest.raises(InputError, match=name) as error:
        read_transform(tmp_path / name)
    assert "\n" not in str(error.value)
