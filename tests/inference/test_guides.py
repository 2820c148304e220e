"""A pair's own labels and landmarks lead its registration where the images are silent; what led is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers.commandline import regpipe
from helpers.registered import write_csv
from regpipe import register_images
from regpipe.data.load import LoadPair
from regpipe.engines.pyramid import pyramid_level
from regpipe.transforms.displacement import write_image
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


def test_what_is_wrong_is_said_in_a_line(pair: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--guide labels: needs labels of both images"):
        registered(pair, guide="labels")
    with pytest.raises(InputError, match="--guide shapes: choose among labels, landmarks"):
        registered(pair, guide="shapes")
