"""Two images of a Python session: whatever they are, what ``regpipe register`` gives of their files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from helpers.bundles import deforming_bundle
from helpers.commandline import regpipe
from regpipe import LoadPair, SymmetricNet, collate_pairs, list_pairs, register, register_images
from regpipe.inference.register import register_files
from regpipe.io.images import Grid, read_image
from regpipe.io.itk_bridge import to_itk
from regpipe.phantoms.cohort import write_cohort
from regpipe.transforms.displacement import read_displacement
from regpipe.utils.errors import InputError

FEW: dict[str, Any] = {"bundle": "none", "affine": "none", "refine": 24}


@pytest.fixture(scope="module", params=[(32, 32), (24, 32, 28)])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    data = write_cohort(tmp_path_factory.mktemp("data") / "pairs", kind="mr", shape=request.param, n_pairs=1)
    return data / "fixed_images" / "case_000.nii.gz", data / "moving_images" / "case_000.nii.gz"


def test_paths_give_the_numbers_and_the_files_of_the_command(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["register", *files, "-o", tmp_path / "command", "--bundle", "none", "--affine", "none", "--refine", 24]
    assert regpipe(monkeypatch, *command) == 0
    found = register_images(*files, **FEW)
    assert found.save(tmp_path / "python") == tmp_path / "python"
    names = [{str(p.relative_to(tmp_path / of)) for p in (tmp_path / of).rglob("*")} for of in ("command", "python")]
    assert names[0] == names[1] and any(name.endswith(".h5") for name in names[0])
    (case,) = (tmp_path / "command").glob("*/metrics.json")
    told = json.loads(case.read_text())
    assert told.pop("warnings") == found.warnings and told == found.metrics
    u, affine = read_displacement(case.parent / "displacement.nii.gz")
    assert np.array_equal(found.displacement.array, u) and np.array_equal(found.displacement.affine, affine)
    assert np.abs(u).max() > 0.5 and np.abs(found.inverse.array).max() > 0.5  # mm
    fixed = read_image(files[0])
    assert found.warped.array.shape == found.jacobian.array.shape == fixed.array.shape
    assert np.allclose(found.warped.affine, fixed.affine)


KINDS: dict[str, Callable[[Path], Any]] = {
    "array": lambda path: tuple(read_image(path)[:2]),
    "read": read_image,
    "itk": lambda path: to_itk(*read_image(path)[:2]),
    "nibabel": nib.load,
    "monai": LoadImage(image_only=True, ensure_channel_first=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_memory_give_what_their_files_give(files: tuple[Path, Path], kind: str) -> None:
    expected, found = register_images(*files, **FEW), register_images(*map(KINDS[kind], files), **FEW)
    assert np.abs(found.displacement.array - expected.displacement.array).max() < 1e-3  # mm
    assert np.allclose(found.warped.array, expected.warped.array, atol=1e-3)


def test_labels_and_a_bundle_of_ones_own(cohort: Path, tmp_path: Path) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)))
    sides = {side: cohort / f"{side}_images" / "case_000.nii.gz" for side in ("fixed", "moving")}
    labels = {f"{side}_label": cohort / f"{side}_labels" / "case_000.nii.gz" for side in sides}
    before = sys.excepthook, list(sys.path)
    found = register_images(sides["fixed"], sides["moving"], bundle=str(bundle), **labels)
    assert (sys.excepthook, sys.path) == before
    assert 0 < found.metrics["dice"] < 1 and found.warped_label.array.max() > 0


def test_a_bundles_network_in_memory_gives_what_the_command_gives(cohort: Path, tmp_path: Path) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)))
    case = list_pairs(cohort)[0]
    images = [case[f"{side}_image"] for side in ("fixed", "moving")]
    told = register_images(*images, bundle=str(bundle), affine="none", refine=0)
    pair = collate_pairs([LoadPair(None)(case)])
    network = SymmetricNet(2, "alexnet", pretrained=str(bundle)).eval()
    with torch.no_grad():
        velocity = network(torch.cat([pair["fixed_image"], pair["moving_image"]], 1))
    found = register(pair["fixed_image"], pair["moving_image"], velocity)
    voxels = (
        np.linalg.inv(told.displacement.affine[:2, :2]) @ np.diag([-1, -1]) @ told.displacement.array.reshape(2, -1)
    )
    assert np.abs(voxels.reshape(2, 32, 32) - found.displacement[0].numpy()).max() < 1e-3
    assert found.displacement.abs().max() > 0.5


def test_structures_tell_how_much_larger_they_are_in_the_moving_image(tmp_path: Path) -> None:
    label = np.zeros((14, 12, 10), np.uint16)
    label[3:11, 3:9, 3:7], label[5:7, 5:7, 4:6] = 7, 300
    image = label.astype(np.float32) + np.random.default_rng(0).random(label.shape).astype(np.float32)
    larger = np.diag([1.1, 1.2, 1.0, 1.0])
    pair = (image, np.eye(4)), (image, larger @ np.eye(4))
    found = register_images(
        *pair, bundle="none", affine="none", refine=1, initial=larger, fixed_label=(label, np.eye(4))
    )
    volumes = found.metrics["volumes"]
    assert volumes.keys() == {"7", "300"}
    for change in volumes.values():
        assert [change[name] for name in ("ratio", "p5", "p95")] == pytest.approx([1.32] * 3, rel=1e-3)
    assert "volumes" not in register_images(*pair, bundle="none", affine="none", refine=1).metrics


def test_what_is_wrong_is_an_error_of_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    image = read_image(files[0])
    for wrong, told in (
        ("missing.nii.gz", "no such file"),
        (image.array, "give a path, \\(array, affine\\)"),
        ((image.array[None], image.affine), "give one channel"),
        ((np.zeros_like(image.array), image.affine), "is constant"),
    ):
        with pytest.raises(InputError, match=told):
            register_images(wrong, files[1], **FEW)
    with pytest.raises(InputError, match="choose among"):
        register_images(*files, bundle="none", similarity="likeness")


def test_a_bundle_without_steps_takes_an_empty_guide_and_refuses_what_would_do_nothing(tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "data", kind="synthetic", shape=(32, 32), n_pairs=1)
    bundle = str(deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0))))
    register_files(data, tmp_path / "out", bundle=bundle, refine=0, guide=[], affine="none")
    assert (tmp_path / "out" / "case_000" / "metrics.json").is_file()
    for name, value in {"finest": 2, "guide": "labels", "channel_weights": "1,2"}.items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: with a bundle needs --refine STEPS"):
            register_files(data, tmp_path / "no", bundle=bundle, **{name: value})  # type: ignore[arg-type]
