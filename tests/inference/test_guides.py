"""A pair's own labels and landmarks lead its registration where the images are silent; what led is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers.bundles import deforming_bundle
from helpers.commandline import regpipe
from helpers.registered import write_csv
from regpipe import register_images
from regpipe.data.load import LoadPair
from regpipe.engines.pyramid import pyramid_level
from regpipe.io.images import Grid
from regpipe.io.labels import read_label
from regpipe.metrics.measures import dice
from regpipe.provenance.rerun import rerun
from regpipe.transforms.displacement import write_image
from regpipe.transforms.volume import jacobian
from regpipe.utils.errors import InputError

SIDE, SHIFT = 48, 4.0  # voxels; mm
LPS = np.diag([-1.0, -1.0, 1.0])  # a voxel's index is its place in LPS mm
TOLD: dict[str, Any] = {"bundle": "none", "affine": "none", "refine": 60}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Two images of nothing but noise; a disc in their labels, and points, that move by ``SHIFT`` along x."""
    rng = np.random.default_rng(0)
    files = {}
    corners = np.stack(np.meshgrid([12.0, 20, 28, 36], [12.0, 20, 28, 36]), -1).reshape(-1, 2)
    for side, shift in (("fixed", 0.0), ("moving", SHIFT)):
        image = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 1).astype(np.float32)
        x, y = np.indices((SIDE, SIDE))
        disc = ((x - 22 - shift) ** 2 + (y - 24) ** 2 < 100).astype(np.int32)
        files[f"{side}_image"], files[f"{side}_label"] = (tmp_path / f"{side}_{kind}.nii.gz" for kind in "il")
        write_image(files[f"{side}_image"], image, LPS)
        write_image(files[f"{side}_label"], 7 * disc, LPS)
        files[f"{side}_landmarks"] = write_csv(tmp_path / f"{side}.csv", corners + [shift, 0])
    return files


def registered(pair: dict[str, Path], *kinds: str, **chosen: Any) -> Any:
    beside: dict[str, Any] = {
        f"{side}_{kind}": pair[f"{side}_{kind}"] for side in ("fixed", "moving") for kind in kinds
    }
    return register_images(pair["fixed_image"], pair["moving_image"], **beside, **chosen, **TOLD)


def test_labels_lead_where_the_images_say_nothing(pair: dict[str, Path]) -> None:
    alone = registered(pair, "label")
    led = registered(pair, "label", guide="labels")
    assert alone.metrics["dice"] < 0.85 and led.metrics["dice"] > 0.95
    assert led.metrics["folds_percent"] == 0
    assert any("labels led" in line for line in led.warnings) and not any("led" in line for line in alone.warnings)


def test_landmarks_lead_and_are_named_as_not_independent(pair: dict[str, Path]) -> None:
    alone = registered(pair, "landmarks")
    led = registered(pair, "landmarks", guide=["landmarks"])
    assert alone.metrics["tre"] > 3 and led.metrics["tre"] < 1
    assert any("tre: the landmarks led the registration" in line for line in led.warnings)
    settings = json.loads((led.folder / "manifest.json").read_text())["settings"]
    assert settings["guide"] == ["landmarks"] and "landmarks" in settings["refine_loss"]["2D"]


def test_the_command_takes_both(pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--fixed-label", pair["fixed_label"], "--moving-label", pair["moving_label"]]
    files += ["--landmarks", pair["fixed_landmarks"], pair["moving_landmarks"], "--guide", "labels,landmarks"]
    quick = ["--bundle", "none", "--affine", "none", "--refine", 8]
    images = pair["fixed_image"], pair["moving_image"]
    assert regpipe(monkeypatch, "register", *images, *files, *quick, "-o", tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("*/metrics.json")
    assert sum("led" in line for line in json.loads(path.read_text())["warnings"]) == 2


def test_what_led_a_refinement_with_a_bundle_is_recorded_and_not_repeated_without_it(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((SIDE, SIDE), (1.0, 1.0)))
    files = {key: pair[key] for key in ("fixed_label", "moving_label")}
    images = pair["fixed_image"], pair["moving_image"]
    led = register_images(*images, bundle=str(bundle), refine=2, guide="labels", **files)
    assert json.loads((led.folder / "manifest.json").read_text())["settings"]["guide"] == ["labels"]
    with pytest.raises(InputError, match="with a bundle and --guide; do so again"):
        rerun(led.folder, data=tmp_path, bundle=bundle)


def test_a_coarser_grid_has_the_labels_and_the_points_where_they_are() -> None:
    labels = torch.zeros(1, 1, 9, 5, dtype=torch.int64)
    labels[..., 4:, :] = 2**40
    points = torch.tensor([[[8.0, 4.0], [4.0, 1.0]]])
    images = {f"{side}_image": torch.zeros(1, 1, 9, 5) for side in ("fixed", "moving")}
    level = pyramid_level({**images, "fixed_label": labels, "fixed_landmarks": points}, (5, 3))
    assert level["fixed_label"].unique().tolist() == [0, 2**40] and level["fixed_label"][0, 0, 2, 0] == 2**40
    assert level["fixed_landmarks"].tolist() == [[[4.0, 2.0], [2.0, 0.5]]]


def test_what_is_ignored_does_not_count(pair: dict[str, Path], tmp_path: Path) -> None:
    lesion = np.zeros((SIDE, SIDE), np.int32)
    lesion[10:20, 5:9] = 3
    write_image(tmp_path / "lesion.nii.gz", lesion, LPS)
    case = {"case": "a"} | {key: str(path) for key, path in pair.items() if key.endswith("image")}
    item = LoadPair(None, affine="none")(case | {"fixed_ignore": str(tmp_path / "lesion.nii.gz")})
    assert torch.equal(item["fixed_mask"][0] == 0, torch.from_numpy(lesion > 0))
    half = np.ones_like(lesion)
    half[:, 24:] = 0
    write_image(tmp_path / "half.nii.gz", half, LPS)
    both = {"fixed_ignore": str(tmp_path / "lesion.nii.gz"), "fixed_mask": str(tmp_path / "half.nii.gz")}
    item = LoadPair(None, affine="none")(case | both)
    assert torch.equal(item["fixed_mask"][0] == 0, torch.from_numpy((lesion > 0) | (half == 0)))


def test_labels_that_lie_apart_find_each_other_and_others_are_left(pair: dict[str, Path]) -> None:
    """Ids of Allen's kind, and above all signed ones: 7 lies 20 voxels from its partner, 2^40 is not to lead."""
    x, y = np.indices((SIDE, SIDE))
    for side, shift in (("fixed", 0), ("moving", 20)):
        labels = np.zeros((SIDE, SIDE), np.uint64)
        labels[(x - 14 - shift) ** 2 + (y - 14) ** 2 < 25] = 7
        labels[(x - 30 + shift) ** 2 + (y - 36) ** 2 < 25] = 2**40
        write_image(pair[f"{side}_label"], labels, LPS)
    led = registered(pair, "label", guide="labels", guide_labels="7")
    moved = led.warped_label.array
    fixed = read_label(pair["fixed_label"])[0].array
    scores = dice(fixed, moved, [7, 2**40])
    assert scores[7] > 0.9 and scores[2**40] < 0.1
    assert led.metrics["folds_percent"] == 0
    settings = json.loads((led.folder / "manifest.json").read_text())["settings"]
    assert settings["guide_labels"] == [7]
    with pytest.raises(InputError, match="--guide labels: needs labels 9 of both images"):
        registered(pair, "label", guide="labels", guide_labels="9")
    with pytest.raises(InputError, match="--guide-labels goes with --guide labels"):
        registered(pair, "label", guide_labels="7")


def test_landmarks_weigh_as_their_column_says(pair: dict[str, Path]) -> None:
    """Half of the points say that nothing moves, half that all does: those of more weight are followed."""
    rows = [(x, y) for x in (14, 24, 34) for y in (14, 24, 34)]
    off = {}
    for name, (still, moved) in {"still": (1.0, 0.01), "moved": (0.01, 1.0)}.items():
        lines = {"fixed": ["x,y,weight"], "moving": ["x,y"]}
        for x, y in rows:
            for step, weight in ((0.0, still), (SHIFT, moved)):
                lines["fixed"].append(f"{x},{y},{weight}")
                lines["moving"].append(f"{x + step},{y}")
        for side, text in lines.items():
            pair[f"{side}_landmarks"].write_text("\n".join(text) + "\n")
        u = registered(pair, "landmarks", guide="landmarks").displacement.array
        off[name] = np.mean([u[0][x, y] for x, y in rows])
    assert abs(off["still"]) < 0.5 and abs(off["moved"] - SHIFT) < 0.5


def test_what_is_wrong_is_said_in_a_line(pair: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--guide labels: needs labels of both images"):
        registered(pair, guide="labels")
    with pytest.raises(InputError, match="--guide shapes: choose among labels, landmarks"):
        registered(pair, guide="shapes")
    pair["fixed_landmarks"].write_text("x,y,weight\n1,1,-1\n2,2,1\n3,3,1\n")
    with pytest.raises(InputError, match="has weights below 0"):
        registered(pair, "landmarks", guide="landmarks")


def turned(degrees: float, about: tuple[float, float], shift: tuple[float, float], p: np.ndarray) -> np.ndarray:
    """Points (2, ...) moved rigidly."""
    angle, (middle, step) = np.deg2rad(degrees), (np.reshape(v, (2, 1, 1)) for v in (about, shift))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.tensordot(turn, p - middle, 1) + middle + step


@pytest.fixture
def bones(tmp_path: Path) -> dict[str, Any]:
    """Two bars that turn by 8 and -10 degrees in a tissue that follows them; the bars' labels."""
    size, rng = 80, np.random.default_rng(0)
    p = np.indices((size, size)).astype(float)
    texture = ndimage.gaussian_filter(rng.standard_normal((3 * size, 3 * size)), 2)
    labels = np.zeros((size, size), np.int64)
    labels[14:38, 24:36], labels[46:70, 46:58] = 4, 2**40
    motions = {4: turned(8, (26, 30), (2, 1), p), 2**40: turned(-10, (58, 52), (-1, 3), p)}
    near = {i: 1 / np.maximum(ndimage.distance_transform_edt(labels != i), 0.5) ** 2 for i in motions}
    u = sum(near[i] * (motions[i] - p) for i in motions) / (sum(near.values()) + 1 / 20**2)
    u = np.stack([ndimage.gaussian_filter(part, 1) for part in u])
    for i, moved in motions.items():
        u[:, labels == i] = (moved - p)[:, labels == i]
    files: dict[str, Any] = {"fixed_label": tmp_path / "bones_seg.nii.gz", "true": u, "labels": labels}
    for side, at in (("fixed", p + u), ("moving", p)):
        image = ndimage.map_coordinates(texture, at + size, order=3) + 0.005 * rng.standard_normal((size, size))
        files[f"{side}_image"] = tmp_path / f"{side}.nii.gz"
        write_image(files[f"{side}_image"], image.astype(np.float32), LPS)
    write_image(files["fixed_label"], labels, LPS)
    return files


def test_bones_move_as_rigid_bodies_each_by_its_own_motion(bones: dict[str, Any], tmp_path: Path) -> None:
    told = {"bundle": "none", "affine": "none", "fixed_label": bones["fixed_label"], "smoothness": 0.5}
    found = register_images(bones["fixed_image"], bones["moving_image"], rigid="all", **told)
    motions, inside = found.metrics["rigid"], bones["labels"] > 0
    assert motions["4"]["angle"] == pytest.approx(8, abs=0.5)
    assert motions[str(2**40)]["angle"] == pytest.approx(10, abs=0.5)
    assert np.linalg.norm(found.displacement.array - bones["true"], axis=0)[inside].max() < 0.3
    assert found.metrics["ndv_percent"] == 0 and found.warnings == []
    case, labels = found.save(tmp_path / "out") / found.folder.name, bones["fixed_label"]
    rows = jacobian(case, tmp_path / "e.nii.gz", strained=True, labels=labels)
    assert max(abs(row[name]) for row in rows for name in row if name.startswith("strain")) < 1e-3
    free = register_images(bones["fixed_image"], bones["moving_image"], **told).save(tmp_path / "free")
    rows = jacobian(free / found.folder.name, tmp_path / "free.nii.gz", strained=True, labels=labels)
    assert all(row["strain_max_p95"] > 0.01 for row in rows)
    assert not rerun(tmp_path / "out", data=tmp_path)[0].different


def test_rigid_labels_have_to_be_there(bones: dict[str, Any], pair: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--rigid: the fixed image has no label 5"):
        register_images(
            bones["fixed_image"], bones["moving_image"], fixed_label=bones["fixed_label"], rigid="5", **TOLD
        )
    with pytest.raises(InputError, match="--rigid: the fixed image has no label that is not 0"):
        registered(pair, rigid="all")
