"""The data's way: how often each file of a pair, or of a training, is opened; the kernel counts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture
from scipy import ndimage

from helpers.commandline import regpipe
from helpers.opens import opens
from regpipe.io import itk_bridge

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's"),
    pytest.mark.usefixtures("one_thread"),
]

SHAPE = (32, 36)
ITKS_OWN = 6  # MetaImage's looks whether it can read the file, reads the header and the voxels, each by new openings


def write(path: Path, image: np.ndarray) -> Path:
    if path.name.endswith(".nii.gz"):
        nib.save(nib.Nifti1Image(image, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    elif path.suffix == ".png":
        Picture.fromarray(image.T).save(path)
    else:
        itk.imwrite(itk.image_from_array(np.ascontiguousarray(image.T)), str(path))
    return path


def pair(folder: Path, suffix: str) -> dict[str, Path]:
    """Two images with labels, masks and landmarks, the second moved by two voxels."""
    folder.mkdir()
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 3)
    grey = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    files = {}
    for side, shift in (("fixed", 0), ("moving", 2)):
        image = np.roll(grey, shift, axis=0)
        for kind, array in (("image", image), ("label", (image > 128).astype(np.uint8)), ("mask", image // 255 + 1)):
            files[f"{side}_{kind}"] = write(folder / f"{side}_{kind}{suffix}", array)
        files[f"{side}_landmarks"] = folder / f"{side}.csv"
        files[f"{side}_landmarks"].write_text(f"x,y\n{10 + shift},12\n{15 + shift},20\n{8 + shift},25\n")
    return files


@pytest.mark.parametrize(("suffix", "by_the_reader"), [(".nii.gz", 0), (".png", 0), (".mha", ITKS_OWN)])
def test_each_file_of_a_pair_is_opened_once_to_hash_check_load_place_and_save_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, by_the_reader: int
) -> None:
    files = pair(tmp_path / "data", suffix)
    datalist = tmp_path / "pairs.json"
    datalist.write_text(json.dumps({"test": [{"case": "one", **{role: str(path) for role, path in files.items()}}]}))
    told = ["--affine", "rigid", "--affine-from", "both", "--refine", 4]
    with opens(tmp_path / "data") as counted:
        assert regpipe(monkeypatch, "register", datalist, "-o", tmp_path / "out", "--bundle", "none", *told) == 0
    hashes = {source["role"] for source in json.loads((tmp_path / "out/one/manifest.json").read_bytes())["inputs"]}
    assert hashes == files.keys()
    most = {path.name: 1 if path.suffix == ".csv" else 1 + by_the_reader for path in files.values()}
    assert {name: counted[name] for name in most if counted[name] > most[name]} == {}


@pytest.mark.parametrize(("suffix", "most"), [(".nii.gz", 1), (".png", 2), (".mha", 2 * ITKS_OWN)])
def test_applying_opens_each_file_once_and_a_picture_for_its_frames_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, most: int
) -> None:
    files = pair(tmp_path / "data", suffix)
    shift = itk_bridge.composite_h5(itk_bridge.affine_part(np.array([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]])))
    (tmp_path / "shift.h5").write_bytes(shift)
    moved = [files[f"moving_{kind}"] for kind in ("image", "label", "mask", "landmarks")]
    told = ["--reference", files["fixed_image"], "-o", tmp_path / "out"]
    with opens(tmp_path / "data") as counted:
        assert regpipe(monkeypatch, "apply", tmp_path / "shift.h5", *moved, *told) == 0
    used = {path.name for path in (*moved, files["fixed_image"])}
    assert counted.keys() == used and len(list((tmp_path / "out").iterdir())) == len(moved)
    assert {name: n for name, n in counted.items() if n > (1 if name.endswith(".csv") else most)} == {}


def test_no_output_is_read_again_but_what_says_that_its_case_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out, read = pair(tmp_path / "data", ".png"), tmp_path / "out", set[str]()
    listening = True

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if not (listening and event == "open" and isinstance(arguments[0], str | Path)):
            return
        if out in Path(arguments[0]).parents and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            read.add(Path(arguments[0]).name)

    sys.addaudithook(hear)  # there is no way to take it away
    told = ["--bundle", "none", "--affine", "none", "--refine", 4]
    regpipe(monkeypatch, "register", files["fixed_image"], files["moving_image"], "-o", out, *told)
    listening = False
    (case,) = (path.parent for path in out.glob("*/manifest.json"))
    hashes = json.loads((case / "manifest.json").read_bytes())["files"]
    assert {path.relative_to(case).as_posix() for path in case.rglob("*.*")} == {*hashes, "manifest.json"}
    for name, known in hashes.items():
        assert hashlib.sha256((case / name).read_bytes()).hexdigest() == known
    assert {name for name in read if "." in name} <= {"metrics.json"}
