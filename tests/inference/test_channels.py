"""Several channels of a pair find together what none of them shows alone; each has its own similarity and weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture

from helpers.commandline import regpipe
from helpers.stripes import FROM_LPS, as_4d, stripes
from regpipe import register_images
from regpipe.io.images import count_of, read_image
from regpipe.provenance.rerun import rerun
from regpipe.utils.errors import InputError

SIDE, MOST = 64, 4.0  # voxels
LPS = np.diag([-1.0, -1.0, 1.0])  # a voxel's index is its place in LPS mm
TOLD: dict[str, Any] = {"bundle": "none", "affine": "none"}
X, Y = np.indices((SIDE, SIDE)).astype(float)
BUMP = np.exp(-((X - 32) ** 2 + (Y - 32) ** 2) / (2 * 12**2))
TRUE = MOST * np.stack([BUMP, -BUMP])  # fixed(p) = moving(p + TRUE(p))


FIXED = [stripes(X + TRUE[0], 1), stripes(Y + TRUE[1], 2)]
MOVING = [stripes(X, 1), stripes(Y, 2)]


def off(found: Any) -> float:
    """Mean distance from the true motion, where that is large, in voxels."""
    return float(np.linalg.norm(found.displacement.array - TRUE, axis=0)[BUMP > 0.3].mean())


def both(**chosen: Any) -> Any:
    return register_images([(a, LPS) for a in FIXED], [(a, LPS) for a in MOVING], **TOLD, **chosen)


def test_two_channels_find_what_neither_finds_alone() -> None:
    alone = [off(register_images((f, LPS), (m, LPS), **TOLD)) for f, m in zip(FIXED, MOVING, strict=True)]
    together = both()
    assert min(alone) > 2 and off(together) < 0.3
    assert together.metrics["folds_percent"] == 0
    moved = read_image(together.folder / "warped_2.nii.gz").array  # resampled once, by what was found
    inside = np.s_[4:-4, 4:-4]
    before, after = (np.abs(a - FIXED[1])[inside].mean() for a in (MOVING[1], moved))
    assert after < 0.3 * before


def test_each_channel_has_its_own_similarity_and_its_share() -> None:
    found = both(similarity="auto,ncc", channel_weights=[1, 0.5])
    assert off(found) < 0.3
    settings = json.loads((found.folder / "manifest.json").read_text())["settings"]
    assert settings["similarity"] == ["auto", "ncc"] and settings["channel_weights"] == [1, 0.5]
    faint = both(channel_weights=[1, 0.001])
    assert np.abs(faint.displacement.array - TRUE)[1][BUMP > 0.3].mean() > 1


def test_a_network_sees_the_first_channel_and_refinement_all() -> None:
    told = {**TOLD, "bundle": "resnet18", "refine": 60}
    alone = register_images((FIXED[0], LPS), (MOVING[0], LPS), **told)
    together = register_images([(a, LPS) for a in FIXED], [(a, LPS) for a in MOVING], **told)
    assert off(alone) > 2 and off(together) < 0.6


def test_channels_of_one_file_of_several_or_of_a_list_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"f": as_4d(tmp_path / "f.nii.gz", FIXED), "m": as_4d(tmp_path / "m.nii.gz", MOVING)}
    single = {}
    for name, channels in (("f", FIXED), ("m", MOVING)):
        for i, channel in enumerate(channels):
            single[name, i] = tmp_path / f"{name}{i}.nii.gz"
            nib.save(nib.Nifti1Image(channel[:, :, None], FROM_LPS), single[name, i])
    quick = ["--bundle", "none", "--affine", "none", "--refine", 8]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert regpipe(monkeypatch, "register", files["f"], files["m"], "--channels", "all", *quick, "-o", one) == 0
    beside = ["--fixed-channel", single["f", 1], "--moving-channel", single["m", 1]]
    assert regpipe(monkeypatch, "register", single["f", 0], single["m", 0], *beside, *quick, "-o", two) == 0
    entry = {f"{side}_image": [f"{side[0]}{i}.nii.gz" for i in (0, 1)] for side in ("fixed", "moving")}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    assert regpipe(monkeypatch, "register", tmp_path / "list.json", *quick, "-o", three) == 0
    fields = [next(out.glob("*/displacement.nii.gz")).read_bytes() for out in (one, two, three)]
    assert fields[0] == fields[1] == fields[2]
    assert not rerun(one, data=tmp_path)[0].different and not rerun(three, data=tmp_path)[0].different


def test_colours_and_values_at_each_place_are_channels(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Picture.fromarray(rgb).save(tmp_path / "a.png")
    sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), tmp_path / "a.mha")
    vectors = nib.Nifti1Image(rgb.swapaxes(0, 1)[:, :, None, None].astype(np.float32), FROM_LPS)
    nib.save(vectors, tmp_path / "a.nii.gz")
    for name in ("a.png", "a.mha", "a.nii.gz"):
        assert count_of(tmp_path / name) == 3
        for i in range(3):
            np.testing.assert_array_equal(read_image(f"{tmp_path / name}#{i}").array, rgb[..., i].T)
    told = {**TOLD, "channels": "0,2", "refine": 2}
    found = register_images(tmp_path / "a.png", tmp_path / "a.mha", **told)
    assert (found.folder / "warped_2.nii.gz").is_file() and not (found.folder / "warped_3.nii.gz").exists()


def test_what_is_wrong_with_channels_is_said_in_a_line(tmp_path: Path) -> None:
    f, m = ([(a, LPS) for a in side] for side in (FIXED, MOVING))
    quick = {**TOLD, "refine": 1}
    for told, message in (
        ({"channel_weights": [1, 2, 3]}, "--channel-weights: 3 of them, the images have 2 channels"),
        ({"channel_weights": [1, 0]}, "--channel-weights 1,0: give numbers above 0"),
        ({"similarity": "auto,ncc,mi"}, "--similarity: 3 of them, the images have 2 channels"),
        ({"similarity": "auto,looks"}, "--similarity looks: choose among"),
    ):
        with pytest.raises(InputError, match=message):
            register_images(f, m, **quick, **told)
    with pytest.raises(InputError, match="1 channels, the fixed image has 2"):
        register_images(f, m[:1], **quick)
    with pytest.raises(InputError, match="not on its image's grid"):
        register_images([f[0], (FIXED[1][:-2], LPS)], m, **quick)
    with pytest.raises(InputError, match="holds one value at each place"):
        register_images(f[0], m[0], channels="all", **quick)
    with pytest.raises(InputError, match="has no channel 2"):
        register_images(
            as_4d(tmp_path / "f.nii.gz", FIXED), as_4d(tmp_path / "m.nii.gz", MOVING), channels="2", **quick
        )
    with pytest.raises(InputError, match="--channels red: give all, or which"):
        register_images(f[0], m[0], channels="red", **quick)
