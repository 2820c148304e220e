"""A folder in, a folder out, through the bundle's own inference.yaml: right files, skipping, bad cases, mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.affines import apply_affine
from PIL import Image as Picture
from scipy import ndimage

from helpers.bundles import Command, deforming_bundle, infer
from helpers.folders import finished, save
from helpers.judges import itk_resampled
from regpipe.bundle.write import write_bundle
from regpipe.inference import folder as folder_module
from regpipe.io.images import Grid, read_image
from regpipe.metrics.cases import read_rows
from regpipe.transforms.apply import apply
from regpipe.transforms.displacement import map_points, read_displacement
from regpipe.utils.errors import cause

IMAGES = {"displacement", "inverse_displacement", "warped", "warped_label", "jacobian", "1Warp", "1InverseWarp"}
TRANSFORMS = {"moving_to_fixed.h5", "fixed_to_moving.h5", "0GenericAffine.mat", "transform.json"}
PICTURES = {"checkerboard", "overlay", "sheet"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((32, 32), (1.0, 1.0)))


@pytest.fixture
def data(tmp_path: Path, cohort: Path) -> Path:
    """Three cases of the cohort, to be spoilt."""
    for name in ("fixed_images", "moving_images", "fixed_labels", "moving_labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            shutil.copy(cohort / name / f"case_00{i}.nii.gz", tmp_path / "data" / name)
    return tmp_path / "data"


def smooth(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2).astype(np.float32)


@pytest.fixture(scope="module")
def oblique(tmp_path_factory: pytest.TempPathFactory, monai_bundle: Command) -> tuple[Path, Path, int]:
    """One 3D pair, oblique and anisotropic, fixed and moving of unlike grids, registered."""
    root = tmp_path_factory.mktemp("oblique")
    turned = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    places = {"fixed": ((24, 26, 12), turned * [-1.1, 1.0, 2.5]), "moving": ((22, 28, 20), turned.T * [1.3, -0.9, 1.5])}
    for side, (shape, matrix) in places.items():
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = -apply_affine(affine, (np.array(shape) - 1) / 2) + [30, -20, 5]  # centres on each other
        image = smooth(shape, seed=len(side))
        save(root / f"{side}_images" / "p.nii.gz", image, affine)
        save(root / f"{side}_labels" / "p.nii.gz", (image > image.mean()).astype(np.uint8) * 3, affine)
    model = deforming_bundle(root / "bundle", Grid((24, 24, 24), (1.2, 1.2, 1.3)))
    infer(monai_bundle, model, root, root / "out")
    return root, root / "out" / "p", 3


@pytest.fixture(scope="module")
def flat(
    tmp_path_factory: pytest.TempPathFactory, cohort: Path, bundle: Path, monai_bundle: Command
) -> tuple[Path, Path, int]:
    """The cohort registered; its second case is looked at."""
    root = tmp_path_factory.mktemp("flat")
    infer(monai_bundle, bundle, cohort, root)
    for folder in ("fixed_images", "moving_images", "moving_labels"):
        (root / "in" / folder).mkdir(parents=True)
        shutil.copy(cohort / folder / "case_001.nii.gz", root / "in" / folder / "p.nii.gz")
    return root / "in", root / "case_001", 2


@pytest.fixture(params=["flat", "oblique"])
def registered(request: pytest.FixtureRequest) -> tuple[Path, Path, int]:
    return request.getfixturevalue(request.param)


def test_a_case_has_every_file_and_things_did_move(registered: tuple[Path, Path, int]) -> None:
    _, case, dim = registered
    files = {
        "metrics.json",
        "manifest.json",
        *(f"{name}.nii.gz" for name in IMAGES),
        *(f"{name}.png" for name in PICTURES),
        *TRANSFORMS,
    }
    assert {path.name for path in case.iterdir()} == {*files, "view"}
    d, _ = read_displacement(case / "displacement.nii.gz")
    assert len(d) == dim and 1 < np.linalg.norm(d, axis=0).max() < 20  # mm
    assert read_image(case / "jacobian.nii.gz").array.min() > 0
    assert all(min(Picture.open(case / f"{name}.png").size) >= 256 for name in PICTURES)


def test_itk_warps_image_and_labels_as_we_did(registered: tuple[Path, Path, int]) -> None:
    data, case, dim = registered
    fixed, moving = data / "fixed_images" / "p.nii.gz", data / "moving_images" / "p.nii.gz"
    field, inner = case / "displacement.nii.gz", (slice(3, -3),) * dim
    ours = read_image(case / "warped.nii.gz").array
    theirs = itk_resampled(moving, fixed, field, dim)
    assert np.abs(ours - theirs)[inner].max() < 1e-3 * np.ptp(read_image(moving).array)
    labels = np.asarray(nib.load(case / "warped_label.nii.gz").dataobj).reshape(ours.shape)  # type: ignore[attr-defined]
    theirs = itk_resampled(data / "moving_labels" / "p.nii.gz", fixed, field, dim, nearest=True)
    assert set(np.unique(labels)) <= {*np.unique(read_image(data / "moving_labels" / "p.nii.gz").array)}
    assert (labels != theirs)[inner].mean() < 2e-3  # ties between two voxels


def test_the_composite_gives_in_simpleitk_what_was_written(registered: tuple[Path, Path, int]) -> None:
    data, case, dim = registered
    fixed, moving = (sitk.ReadImage(str(data / f"{side}_images" / "p.nii.gz")) for side in ("fixed", "moving"))
    ours, inner = read_image(case / "warped.nii.gz").array, (slice(3, -3),) * dim
    transform = sitk.ReadTransform(str(case / "moving_to_fixed.h5"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.Cast(moving, sitk.sitkFloat32), fixed, transform)).T.reshape(
        ours.shape
    )
    bound = 1e-3 if dim == 2 else 2e-2  # on another grid than the field's: linear between other points
    error = np.abs(ours - theirs)[inner] / np.ptp(ours)
    assert error.max() < bound and error.mean() < 1e-3
    (again,) = apply(case, [data / "moving_images" / "p.nii.gz"], case.parent / "again")
    np.testing.assert_allclose(read_image(again).array[inner], theirs[inner], atol=1e-5)


def test_there_and_back_is_where_one_was(registered: tuple[Path, Path, int]) -> None:
    data, case, dim = registered
    fixed = read_image(data / "fixed_images" / "p.nii.gz")
    inside = np.random.default_rng(0).uniform(0.35, 0.65, (200, dim)) * (np.array(fixed.array.shape) - 1)
    points = apply_affine(fixed.affine, inside) * [-1, -1, 1][:dim]
    moved = map_points(points, *read_displacement(case / "displacement.nii.gz"))
    back = map_points(moved, *read_displacement(case / "inverse_displacement.nii.gz"))
    way, error = (np.linalg.norm(ends - points, axis=1).mean() for ends in (moved, back))
    # mm; the rest is interpolation between native voxels of a random network's rough field
    assert way > 0.5 and error < 0.2 * way, (way, error)


def test_pictures_give_a_picture_and_pairs_of_a_folder_are_named(
    tmp_path: Path, bundle: Path, monai_bundle: Command
) -> None:
    for i, shape in enumerate(((30, 40), (28, 36))):
        (tmp_path / "in").mkdir(exist_ok=True)
        pixels = (255 * smooth(shape, i)).astype(np.uint8)
        Picture.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    infer(monai_bundle, bundle, tmp_path / "in", tmp_path / "out")
    assert finished(tmp_path / "out") == {"0_to_1", "1_to_0"}
    warped = Picture.open(tmp_path / "out" / "1_to_0" / "warped.png")
    assert warped.size == (40, 30) and warped.mode == "L"  # as the fixed picture: width, height
    exact = read_image(tmp_path / "out" / "1_to_0" / "warped.nii.gz").array
    assert np.abs(np.asarray(warped).T - exact).max() <= 0.5


def test_a_label_beyond_16_bits_is_kept(tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command) -> None:
    label = nib.load(data / "moving_labels" / "case_000.nii.gz")
    big = np.where(np.asarray(label.dataobj) > 0, 70000, 0).astype(np.int32)  # type: ignore[attr-defined]
    save(data / "moving_labels" / "case_000.nii.gz", big, label.affine)  # type: ignore[attr-defined]
    infer(monai_bundle, bundle, data, tmp_path / "out")
    warped = nib.load(tmp_path / "out" / "case_000" / "warped_label.nii.gz")
    assert set(np.unique(np.asarray(warped.dataobj))) == {0, 70000}  # type: ignore[attr-defined]


def test_finished_cases_are_skipped_and_the_table_is_over_all(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    infer(monai_bundle, bundle, data, out)
    whole = (out / "metrics.csv").read_text()
    (out / "case_001" / "metrics.json").unlink()  # as if it was broken off there
    (out / "metrics.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("case_00[02]/*")}
    infer(monai_bundle, bundle, data, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("case_00[02]/*")}
    assert (out / "metrics.csv").read_text() == whole and len(read_rows(out / "metrics.csv")) == 3
    assert "2 of 3 cases are finished already" in capsys.readouterr().out


def truncate(data: Path) -> None:
    path = data / "moving_images" / "case_001.nii.gz"
    path.write_bytes(path.read_bytes()[:500])


def put_infinity(data: Path) -> None:
    image = read_image(data / "fixed_images" / "case_001.nii.gz")
    image.array[3, 4] = np.inf
    save(data / "fixed_images" / "case_001.nii.gz", image.array, np.diag([-1, -1, 1, 1]))


def take_the_partner(data: Path) -> None:
    (data / "moving_images" / "case_001.nii.gz").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "broken or truncated"),
        (put_infinity, "infinite"),
        (take_the_partner, "no partner in moving_images"),
    ],
)
def test_a_bad_case_is_reported_and_the_others_are_done(
    spoil: Any, said: str, tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, capfd: Any
) -> None:
    spoil(data)
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, data, tmp_path / "out")
    printed = capfd.readouterr()
    assert end.value.code == 1 and "Traceback" not in printed.out + printed.err
    assert finished(tmp_path / "out") == {"case_000", "case_002"}
    line = next(line for line in printed.out.splitlines() if line.startswith("  case_001: "))
    assert said in line and "case_001.nii.gz" in line
    assert "2 of 3 pairs registered" in printed.out and "1 failed" in printed.out
    assert [row["case"] for row in read_rows(tmp_path / "out" / "metrics.csv")] == ["case_000", "case_002"]


def test_if_every_case_is_bad_each_is_reported(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in data.glob("moving_images/*"):
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, data, tmp_path / "out")
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "0 of 3 pairs registered" in printed and "3 failed" in printed
    assert not list((tmp_path / "out").iterdir())


def test_a_datalist_of_nothing_but_missing_files_names_them(
    tmp_path: Path, bundle: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"test": [{"fixed_image": "a.nii", "moving_image": "b.nii"}]}))
    with pytest.raises(SystemExit):
        infer(monai_bundle, bundle, tmp_path / "list.json", tmp_path / "out")
    assert "a.nii: no such file" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc, where not even root can make a folder")
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command
) -> None:
    (tmp_path / "file").write_text("in its place")
    for out in (tmp_path / "file", Path("/proc/regpipe")):
        with pytest.raises(Exception) as error:
            infer(monai_bundle, bundle, data, out)
        assert re.search(rf"{out}.*: cannot be .*; give another folder", str(cause(error.value)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "case_001").write_text("where its folder should be")
    with pytest.raises(SystemExit):
        infer(monai_bundle, bundle, data, tmp_path / "out")
    assert finished(tmp_path / "out") == {"case_000", "case_002"}


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folder_module.save_case

    def interrupted(case: dict[str, str], *rest: Any, **kwargs: Any) -> Any:
        if case["case"] == "case_001":
            raise KeyboardInterrupt
        return real(case, *rest, **kwargs)

    monkeypatch.setattr(folder_module, "save_case", interrupted)
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, data, tmp_path / "out")
    assert end.value.code == 130 and finished(tmp_path / "out") == {"case_000"}
    monkeypatch.undo()
    infer(monai_bundle, bundle, data, tmp_path / "out")
    assert finished(tmp_path / "out") == {"case_000", "case_001", "case_002"}


def test_a_case_that_the_network_cannot_take_does_not_stop_the_others(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folder_module.collate_pairs

    def poisoned(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = real(items)
        if batch["case"] == ["case_001"]:
            batch["fixed_image"] = batch["fixed_image"].to_sparse()  # fails inside the engine, as out of memory does
        return batch

    monkeypatch.setattr(folder_module, "collate_pairs", poisoned)
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, data, tmp_path / "out")
    assert end.value.code == 1 and finished(tmp_path / "out") == {"case_000", "case_002"}


def test_a_case_finished_with_another_model_or_file_is_done_again(
    tmp_path: Path, data: Path, bundle: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(monai_bundle, bundle, data, tmp_path / "out")
    results = {name: tmp_path / "out" / name / "metrics.json" for name in finished(tmp_path / "out")}
    before = {name: path.stat().st_mtime_ns for name, path in results.items()}
    mine = shutil.copytree(data, tmp_path / "mine")  # the same files by name, size and time
    os.utime(mine / "moving_images" / "case_001.nii.gz")
    infer(monai_bundle, bundle, mine, tmp_path / "out")
    assert {n for n, p in results.items() if p.stat().st_mtime_ns != before[n]} == {"case_001"}
    assert capsys.readouterr().out.count("and is replaced") == 1
    other = shutil.copytree(bundle, tmp_path / "bundle")
    state = torch.load(other / "models" / "model.pt", weights_only=True)
    torch.save({k: v * 1.5 if "flow" in k else v for k, v in state.items()}, other / "models" / "model.pt")
    infer(monai_bundle, other, mine, tmp_path / "out")
    assert all(path.stat().st_mtime_ns != before[name] for name, path in results.items())


def test_a_2d_model_refuses_volumes_in_a_line(
    tmp_path: Path, bundle: Path, monai_bundle: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        save(tmp_path / "in" / f"v{i}.nii.gz", smooth((9, 8, 7), i), np.eye(4))
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, tmp_path / "in", tmp_path / "out")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  v0_to_v1")]
    assert len(said) == end.value.code == 1 and "v1.nii.gz: a 3-D image" in said[0] and "(32, 32)" in said[0]


def test_an_untrained_bundle_says_which_file_is_missing(tmp_path: Path, data: Path, monai_bundle: Command) -> None:
    with pytest.raises(Exception) as error:
        infer(monai_bundle, write_bundle("resnet18", tmp_path / "new"), data, tmp_path / "out")
    assert str(cause(error.value)).startswith(str(tmp_path / "new" / "models" / "model.pt") + ": no trained model")
    assert "\n" not in str(cause(error.value))
