"""From two views on disk to transform files, with a homography in between: what other tools read is the whole map."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.affines import apply_affine
from scipy import ndimage

from helpers.bundles import Command, infer, train
from helpers.commandline import regpipe
from helpers.plane import FIXED, FIXED_SHAPE, LPS, MOVING, TRUTH, best_affine, errors
from helpers.registered import nifti, voxels, write_csv
from regpipe.bundle.write import write_bundle
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.placement import Frames
from regpipe.fields.algebra import register
from regpipe.inference.case_files import save_case
from regpipe.io.geometry import carry
from regpipe.io.images import Grid, Image
from regpipe.io.source import Source
from regpipe.metrics.cases import read_rows
from regpipe.transforms.apply import apply
from regpipe.transforms.displacement import write_displacement, write_image
from regpipe.utils.errors import InputError
from regpipe.utils.settings import AffineOptions

SEEN = np.random.default_rng(4).uniform(-45, 45, (7, 2))  # landmarks, RAS mm of the fixed image


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both views, what is bright in them as labels, exact landmarks."""
    folder = tmp_path_factory.mktemp("views")
    found = {"case": "a"}
    for side, image, points in (("fixed", FIXED, SEEN), ("moving", MOVING, carry(TRUTH, SEEN))):
        files = {kind: folder / f"{side}_{kind}.nii.gz" for kind in ("image", "label")}
        write_image(files["image"], image.array, image.affine)
        write_image(files["label"], (image.array > 1).astype(np.int32), image.affine)
        files["landmarks"] = write_csv(folder / f"{side}.csv", points * LPS)
        found |= {f"{side}_{kind}": str(path) for kind, path in files.items()}
    return found


LOAD = LoadPair(None, affine="projective", affine_from="landmarks")


@pytest.fixture(scope="module")
def item(case: dict[str, str]) -> dict[str, Any]:
    return LOAD(case)


def test_the_moving_image_label_and_landmarks_are_seen_through_the_homography(item: dict[str, Any]) -> None:
    fixed, moving = (item[f"{side}_image"].ravel() for side in ("fixed", "moving"))
    assert float(np.corrcoef(fixed, moving)[0, 1]) > 0.999
    assert (item["fixed_label"] == item["moving_label"]).float().mean() > 0.98
    assert torch.allclose(item["fixed_landmarks"], item["moving_landmarks"], atol=1e-4)
    through = item["moving_affine"] @ item["moving_bend"] @ torch.linalg.inv(item["fixed_affine"])
    assert errors(through.numpy()).max() < 1e-6


def test_the_moving_mask_lies_where_its_image_does(case: dict[str, str], tmp_path: Path) -> None:
    drawn = np.zeros(MOVING.array.shape, np.int32)
    drawn[:60] = 1
    write_image(tmp_path / "mask.nii.gz", drawn, MOVING.affine)
    mask = LOAD(case | {"moving_mask": str(tmp_path / "mask.nii.gz")})["moving_mask"][0].numpy()
    seen = carry(np.linalg.inv(MOVING.affine) @ TRUTH @ FIXED.affine, np.moveaxis(np.indices(FIXED_SHAPE), 0, -1))
    assert ((seen[..., 0] < 59.5) == (mask > 0)).mean() > 0.999 and 0.3 < mask.mean() < 0.7


def test_a_true_displacement_is_told_without_the_homography(case: dict[str, str], tmp_path: Path) -> None:
    places = apply_affine(FIXED.affine, np.moveaxis(np.indices(FIXED_SHAPE), 0, -1))
    d = np.moveaxis((carry(TRUTH, places) - places) * LPS, -1, 0)
    write_displacement(tmp_path / "d.nii.gz", d, FIXED.affine)
    item = LOAD(case | {"displacement": str(tmp_path / "d.nii.gz")})
    assert item["displacement"].abs().max() < 1e-4


# --------------------------------------------------------------------- a known displacement, saved and read again


class Saved:
    """The case saved with a displacement of some voxels upon the homography, and its map in closed form."""

    def __init__(self, case: dict[str, str], item: dict[str, Any], folder: Path) -> None:
        batch = collate_pairs([item])
        noise = np.random.default_rng(0).standard_normal((2, *FIXED_SHAPE))
        velocity = np.stack([ndimage.gaussian_filter(n, 9) for n in noise])
        velocity *= 2.5 / np.abs(velocity).max()
        images = batch["fixed_image"], batch["moving_image"]
        result = register(*images, torch.from_numpy(velocity)[None].float())
        self.folder, self.u = folder, result.displacement[0].numpy()
        self.frames = item["fixed_affine"].numpy(), (item["moving_affine"] @ item["moving_bend"]).numpy()
        self.row, _ = save_case(case, batch, result._asdict(), LOAD, folder, Source())

    def chain(self, points: np.ndarray) -> np.ndarray:
        """Fixed points (K, 2) -> ``M R(x + u(x))``, RAS mm; u linear between its voxels."""
        at = apply_affine(np.linalg.inv(self.frames[0]), points)
        moved = at + np.stack([ndimage.map_coordinates(c, at.T, order=1, mode="nearest") for c in self.u], 1)
        return carry(self.frames[1], moved)

    def read(self, way: str, points: np.ndarray) -> np.ndarray:
        """Points RAS mm through a file as SimpleITK reads it."""
        transform = sitk.ReadTransform(str(self.folder / f"{way}.h5"))
        return np.array([transform.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS


@pytest.fixture(scope="module")
def saved(case: dict[str, str], item: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(case, item, tmp_path_factory.mktemp("saved") / "a")


def inside(k: int = 500) -> np.ndarray:
    """Points (K, 2) RAS mm all over the fixed image."""
    return apply_affine(FIXED.affine, np.random.default_rng(1).uniform(0, 1, (k, 2)) * (np.array(FIXED_SHAPE) - 1))


def pixels(vectors: np.ndarray, image: Image = MOVING) -> np.ndarray:
    return np.linalg.norm(vectors / image.spacing, axis=1)


def test_itk_reads_the_closed_form_chain(saved: Saved) -> None:
    points = inside()
    assert pixels(saved.chain(points) - carry(TRUTH, points)).max() > 1.5  # there is a displacement
    assert pixels(saved.read("moving_to_fixed", points) - saved.chain(points)).max() < 1e-2


def test_there_and_back_is_where_one_was(saved: Saved) -> None:
    points = inside()
    back = saved.read("fixed_to_moving", saved.read("moving_to_fixed", points))
    assert np.percentile(pixels(back - points, FIXED), 99) < 0.1
    assert pixels(back - points, FIXED).max() < 0.5


def test_images_warped_and_applied_are_what_itk_resamples(saved: Saved, case: dict[str, str], tmp_path: Path) -> None:
    transform = sitk.ReadTransform(str(saved.folder / "moving_to_fixed.h5"))
    fixed, moving = (sitk.ReadImage(case[f"{side}_image"]) for side in ("fixed", "moving"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)).T
    ours = voxels(saved.folder / "warped.nii.gz")
    both = (ours > 0) & (theirs > 0)
    assert np.abs(ours - theirs)[both].max() < 0.01 * np.ptp(FIXED.array)
    assert both.sum() > 0.98 * (ours > 0).sum() > 0.5 * ours.size
    (applied,) = apply(saved.folder, [case["moving_image"]], tmp_path)
    assert np.abs(voxels(applied) - theirs).max() < 1e-4


def test_errors_at_landmarks_are_mm_of_the_moving_image(saved: Saved) -> None:
    expected = np.linalg.norm(saved.chain(SEEN) - carry(TRUTH, SEEN), axis=1).mean()
    assert saved.row["tre"] == pytest.approx(expected, rel=1e-3) and expected > 0.5
    assert saved.row["tre_before"] < 1e-4
    assert saved.row["folds_percent"] == 0 and saved.row["inverse_consistency"] < 0.1


def test_the_jacobian_holds_the_homography(saved: Saved) -> None:
    # det of P at p is det P / w^3; the displacement is volume-preserving on average to a few per cent.
    determinant = voxels(saved.folder / "jacobian.nii.gz")
    places = apply_affine(FIXED.affine, np.moveaxis(np.indices(FIXED_SHAPE), 0, -1))
    expected = np.linalg.det(TRUTH) / (places @ TRUTH[2, :2] + TRUTH[2, 2]) ** 3
    assert expected.max() > 5 * expected.min()
    assert np.corrcoef(determinant.ravel(), expected.ravel())[0, 1] > 0.9
    assert (determinant > 0).all()


def test_transform_json_keeps_the_homography(saved: Saved) -> None:
    about = json.loads((saved.folder / "transform.json").read_text())["alignment"]
    assert about["stage"] == "projective"
    assert errors(np.array(about["homography"])).max() < 1e-6
    assert errors(np.array(about["matrix"]), best_affine()).max() < 2  # its affine part


# ------------------------------------------------------------------------------------------- what users type


def test_two_files_seen_from_two_angles_are_registered(
    case: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = case["fixed_image"], case["moving_image"]
    told = ("--bundle", "none", "--affine", "projective", "--refine", 8)
    assert regpipe(monkeypatch, "register", *files, "-o", tmp_path, *told) == 0
    (row,) = read_rows(tmp_path / "metrics.csv")
    folder = tmp_path / row["case"]
    assert row["affine_similarity"] > row["affine_similarity_before"]
    transform = sitk.ReadTransform(str(folder / "moving_to_fixed.h5"))
    corners = apply_affine(FIXED.affine, np.array([[3, 3], [3, 100], [116, 3], [116, 100]]))
    found = np.array([transform.TransformPoint(p) for p in (corners * LPS).tolist()]) * LPS
    truth = carry(TRUTH, corners)
    assert pixels(apply_affine(best_affine(), corners) - truth).mean() > 3
    assert pixels(found - truth).mean() < 0.5
    warped = voxels(folder / "warped.nii.gz")
    assert np.abs(warped - FIXED.array)[warped > 0].mean() < 0.02 * np.ptp(FIXED.array)
    assert nifti(folder / "warped.nii.gz").shape == FIXED_SHAPE
    about = json.loads((folder / "transform.json").read_text())
    assert about["settings"]["affine"] == about["alignment"]["stage"] == "projective"


def test_a_bundle_trains_and_registers_with_it(tmp_path: Path, cohort: Path, monai_bundle: Command) -> None:
    bundle, stage = write_bundle("alexnet", tmp_path / "bundle"), ("--affine", "projective")
    train(monai_bundle, bundle, cohort, "--holdout", 2, *stage, "--affine_from", "landmarks", "--max_epochs", 1)
    infer(monai_bundle, bundle, cohort, tmp_path / "out")  # as it was trained
    assert len(read_rows(tmp_path / "out" / "metrics.csv")) == 5
    about = json.loads((tmp_path / "out" / "case_000" / "transform.json").read_text())
    assert about["alignment"]["stage"] == "projective" and "homography" in about["alignment"]


def test_a_homography_that_folds_on_the_grid_leaves_the_affine_map(
    case: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steep = np.array([[1.0, 0, 0], [0, 1, 0], [0.04, 0, 1]])  # its horizon runs through the image at x = -25 mm
    seen = np.array([[0.0, 0], [30, 0], [30, 25], [0, 25], [12, 9]])
    points = {"fixed_landmarks": seen, "moving_landmarks": carry(steep, seen)}
    files = {name: str(write_csv(tmp_path / f"{name}.csv", at * LPS)) for name, at in points.items()}
    with caplog.at_level(logging.WARNING, "regpipe.data.placement"):
        frames, linear = (Frames(None, AffineOptions(stage, "landmarks")) for stage in ("projective", "affine"))
        kept = frames(case | files, Source())
    assert "folds on the working grid; the affine map is kept" in caplog.text
    assert np.array_equal(kept.moving, linear(case | files, Source()).moving)
    assert kept.bend is not None and np.array_equal(kept.bend, np.eye(3))


def test_an_image_laid_on_itself_keeps_its_bend_beside_the_cache(case: dict[str, str]) -> None:
    alone = {"case": "b"} | {
        f"{s}_{k}": case[f"fixed_{k}"] for s in ("fixed", "moving") for k in ("image", "landmarks")
    }
    load = LoadPair(None, affine="projective", affine_from="landmarks")
    for _ in range(2):
        assert torch.allclose(load(alone)["moving_bend"], torch.eye(3, dtype=torch.double), atol=1e-9)
    assert load.cache is not None and len(load.cache) == 1  # the fixed image


def test_without_opencv_landmarks_do_and_images_say_at_once_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    Frames(None, AffineOptions("projective", "landmarks"))
    with pytest.raises(InputError, match=r"pip install regpipe\[projective\]"):
        Frames(None, AffineOptions("projective"))


def test_volumes_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="projective is for 2D images; use affine"):
        Frames(Grid((8, 8, 8), (1.0, 1.0, 1.0)), AffineOptions("projective"))
    files = {f"{side}_image": str(tmp_path / f"{side}.nii.gz") for side in ("fixed", "moving")}
    for path in files.values():
        write_image(path, np.random.default_rng(0).random((8, 8, 8)).astype(np.float32), np.eye(4))
    with pytest.raises(InputError, match="projective is for 2D images; use affine"):
        Frames(None, AffineOptions("projective"))({"case": "a", **files}, Source())
