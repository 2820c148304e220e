"""A template of images with known differences: nobody's in particular, from any order, whole files both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from helpers.commandline import regpipe
from helpers.registered import lps_place, simpleitk, voxels
from regpipe.group.run import make_template
from regpipe.io.images import normalise, read_image
from regpipe.io.labels import read_label
from regpipe.provenance.verify import verify
from regpipe.transforms.displacement import write_image
from regpipe.utils.errors import InputError

N, SIDE = 4, 40
QUICK: dict[str, Any] = {"bundle": "none", "affine": "centre", "refine": 24, "rounds": 2}


def write_subjects(folder: Path, names: list[str]) -> Path:
    """One blob with a bar, of four widths, each somewhere else in space; what is bright is the label."""
    x, y = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    for i, name in enumerate(names):
        wide = 9 + 1.5 * (i - (N - 1) / 2)
        shape = 1 / (1 + np.exp(((x / wide) ** 2 + (y / 12) ** 2 - 1) * 4))
        bar = np.exp(-(((x - 2) / 1.5) ** 2)) * (np.abs(y) < 6)
        noise = 0.01 * np.random.default_rng(i).standard_normal(x.shape)
        affine = np.diag([-1.0, -1.0, 1.0])
        affine[:2, 2] = [30 * i, -20 * i]
        write_image(folder / "images" / f"{name}.nii.gz", (100 * (shape + bar + noise)).astype(np.float32), affine)
        write_image(folder / "labels" / f"{name}.nii.gz", (shape > 0.5).astype(np.int32), affine)
    return folder


def subjects(folder: Path, names: list[str]) -> Path:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    return write_subjects(folder, names)


NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subjects(tmp_path_factory.mktemp("group") / "data", NAMES)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A template, and what is told of it. Do not write into it."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, make_template(data, out, **QUICK)


def test_the_template_has_the_mean_width_and_no_transform_is_common_to_all(made: tuple[Path, dict[str, Any]]) -> None:
    out, about = made
    assert about["log_sums"]["matrices"] < 1e-8 and about["log_sums"]["velocities_voxels"] < 1e-6
    width = (read_label(out / "template_label.nii.gz")[0].array[:, SIDE // 2] > 0).sum()
    assert abs(width - 18) <= 1  # twice the mean half-axis
    assert about["labels"]["1"] > 0.95
    blurred, *_, sharp = (stage["sharpness"] for stage in about["stages"])
    assert sharp > 1.03 * blurred


def test_the_template_is_the_mean_of_images_pulled_once_through_the_files(
    made: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, _ = made
    template = read_image(out / "template.nii.gz").array
    seen = []
    for name in NAMES:
        image = read_image(data / "images" / f"{name}.nii.gz")
        write_image(out.parent / "scaled.nii.gz", normalise(image.array), image.affine)
        transform = out / "subjects" / name / "moving_to_fixed.h5"
        seen.append(simpleitk(out.parent / "scaled.nii.gz", out / "template.nii.gz", transform, sitk.sitkLinear))
    inner = (slice(4, -4),) * 2
    assert np.abs(np.mean(seen, axis=0) - template)[inner].max() < 0.02


def test_each_subject_goes_both_ways(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    at = read_image(out / "template.nii.gz").affine
    points = [tuple(lps_place(at, np.array([x, y]))) for x in (12.0, 20.0, 27.0) for y in (14.0, 20.0, 26.0)]
    for name in NAMES:
        ways = (f"subjects/{name}/{way}.h5" for way in ("moving_to_fixed", "fixed_to_moving"))
        there, back = (sitk.ReadTransform(str(out / way)) for way in ways)
        for point in points:
            assert np.linalg.norm(np.subtract(back.TransformPoint(there.TransformPoint(point)), point)) < 0.1


def test_other_names_and_another_order_give_the_same_bytes(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = made
    other = subjects(tmp_path / "data", ["z", "q", "m", "b"])
    make_template(other, tmp_path / "out", **QUICK)
    for name in ("template.nii.gz", "covered.nii.gz", "template_label.nii.gz", "probability_1.nii.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_stopped_template_goes_on_and_a_finished_one_stays(
    made: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")

    def times(pattern: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob(pattern)}

    done = times("*.h5")
    make_template(data, out, **QUICK)
    assert times("*.h5") == done
    for path in ("mean velocity 2.npz", "round 2/b.npz", "mean of round 2.npz", "written/a.npz", "written/c.npz"):
        (out / "rounds" / path).unlink()
    kept = times("*.npz")
    make_template(data, out, **QUICK)
    found = times("*.npz")
    assert kept == {path: found[path] for path in kept} and len(found) == len(kept) + 5
    assert (out / "template.nii.gz").read_bytes() == (made[0] / "template.nii.gz").read_bytes()
    assert verify(out).problems == {}


def test_the_manifest_holds_every_file(made: tuple[Path, dict[str, Any]], data: Path) -> None:
    out, _ = made
    assert verify(out, data=data).problems == {}
    told = json.loads((out / "manifest.json").read_text())
    assert told["kind"] == "template" and {"template.nii.gz", "subjects/a/moving_to_fixed.h5"} <= told["files"].keys()
    assert sorted(item["role"] for item in told["inputs"]) == ["image"] * N + ["label"] * N


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_what_one_does(
    made: tuple[Path, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the second round on: each phase starts a process beside this one."""
    out = shutil.copytree(made[0], tmp_path / "out")
    for path in ("mean velocity 2.npz", "mean of round 2.npz"):
        (out / "rounds" / path).unlink()
    for path in ("round 2", "written"):
        shutil.rmtree(out / "rounds" / path)
    (out / "template.nii.gz").unlink()
    chosen = ["--bundle", "none", "--affine", "centre", "--refine", "24", "--rounds", "2", "--jobs", "2"]
    assert regpipe(monkeypatch, "template", data, *chosen, "-o", out) == 0
    assert np.allclose(voxels(out / "template.nii.gz"), voxels(made[0] / "template.nii.gz"), atol=1e-3)
    assert "4 subjects" in capfd.readouterr().out


def test_an_affine_template_finds_turned_subjects(tmp_path: Path) -> None:
    x = np.indices((48, 48)) - 23.5
    for i, degrees in enumerate((-12, 0, 12)):
        turn = np.deg2rad(degrees)
        u, v = np.cos(turn) * x[0] - np.sin(turn) * x[1], np.sin(turn) * x[0] + np.cos(turn) * x[1]
        blob = np.exp(-((u / 14) ** 2 + (v / 7) ** 2)) + 0.5 * np.exp(-(((u - 8) / 3) ** 2 + (v / 3) ** 2))
        (tmp_path / "data").mkdir(exist_ok=True)
        write_image(
            tmp_path / "data" / f"{i}.nii.gz",
            ndimage.gaussian_filter(blob, 1).astype(np.float32),
            np.diag([-1.0, -1, 1]),
        )
    about = make_template(
        tmp_path / "data", tmp_path / "out", bundle="none", affine="rigid", affine_metric="ncc", rounds=0
    )
    assert about["stages"][-1]["sharpness"] > about["stages"][0]["sharpness"]
    found = []
    for i in range(3):
        told = json.loads((tmp_path / "out" / "subjects" / str(i) / "transform.json").read_text())
        matrix = np.array(told["alignment"]["matrix"])
        found.append(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0])))
    steps = np.diff(found)
    assert np.abs(np.abs(steps) - 12).max() < 1.5 and steps[0] * steps[1] > 0
    assert abs(sum(found)) < 0.1  # the mean of the logarithms is out


def test_what_is_wrong_is_said_in_a_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--affine projective"):
        make_template(data, tmp_path / "out", affine="projective")
    with pytest.raises(InputError, match="--rounds -1"):
        make_template(data, tmp_path / "out", rounds=-1)
    bad = shutil.copytree(data, tmp_path / "bad")
    (bad / "images" / "a.nii.gz").write_bytes(b"none")
    with pytest.raises(InputError, match="a.nii.gz.*mend a or leave it out"):
        make_template(bad, tmp_path / "out")
