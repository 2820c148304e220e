"""Identifiers planted in headers, file names of slices and folders above the data: in no output; and no network."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from helpers.bundles import Command
from helpers.inprocess import as_if_in_its_own_process
from helpers.series import write_series
from regpipe.cli import main as cli
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort
from regpipe.study.compare import compare

MARK = "QZXDOEJANE"  # of everything that is planted; long enough not to arise by chance
WHO = f"{MARK}^1947"
OPTIONS = ("--refine", 2, "--affine", "none")


def texts(path: Path) -> Iterator[bytes]:
    """What can be read in a file: as it is, unpacked, and a picture's texts."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if path.suffix in (".png", ".webp"):
        with Picture.open(path) as picture:
            yield repr(picture.info).encode()


def finds(root: Path, mark: str = MARK) -> dict[str, int]:
    """relative path -> how often ``mark`` is in its name and in what can be read in it, in 8 or 16 bits a letter."""
    forms = mark.encode(), mark.encode("utf-16-le")
    found = {}
    for path in (path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        found[name] = name.count(mark) + sum(text.count(form) for text in texts(path) for form in forms)
    return {name: n for name, n in found.items() if n}


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return (1000 * ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2)).astype(np.int16)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = MARK
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", WHO.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_itk(path: Path, array: np.ndarray) -> Path:
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    for name in ("patient", "ITK_FileNotes", "0010|0010"):
        image.GetMetaDataDictionary()[name] = WHO
    path.parent.mkdir(parents=True, exist_ok=True)
    itk.imwrite(image, str(path))
    return path


def write_png(path: Path, array: np.ndarray) -> Path:
    about = PngInfo()
    about.add_text("Author", WHO)
    about.add_text("Comment", 50 * WHO, zip=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray((array % 256).astype(np.uint8).T).save(path, pnginfo=about)
    return path


TAGS = {
    **{name: WHO for name in ("PatientName", "PatientID", "ReferringPhysicianName", "InstitutionName")},
    "StudyDescription": WHO,
    "AccessionNumber": WHO,
}


def write_inputs(root: Path) -> Path:
    """Pairs of each kind of file, to be registered without training."""
    for seed, side in enumerate(("fixed", "moving")):
        folder = root / f"{side}_images"
        write_series(folder / "series", blob((16, 16, 16), seed).astype(np.uint16), np.eye(4), f"{MARK}1.2.840", **TAGS)
        write_png(folder / "picture.png", blob((32, 32), seed))
        write_nifti(root / f"{side}_labels" / "volume.nii.gz", (blob((16, 16, 16), seed) > 500).astype(np.uint8))
    write_nifti(root / "fixed_images" / "volume.nii.gz", blob((16, 16, 16), 2), np.diag([-1.0, -1.0, 1.0, 1.0]))
    write_nifti(
        root / "fixed_labels" / "volume.nii.gz",
        (blob((16, 16, 16), 2) > 500).astype(np.uint8),
        np.diag([-1.0, -1.0, 1.0, 1.0]),
    )
    write_itk(root / "moving_images" / "volume.nrrd", blob((16, 16, 16), 3))
    (root / "moving_labels" / "volume.nii.gz").unlink()
    write_itk(root / "more" / "volume.mha", blob((16, 16, 16), 3))
    return root


def write_training(root: Path) -> Path:
    """Pairs to train with, each image with an identity in its header."""
    write_cohort(root, shape=(32, 32), n_pairs=5)
    for path in root.glob("*_images/*.nii.gz"):
        image: Any = nib.load(path)
        write_nifti(path, np.asarray(image.dataobj), image.affine)
    return root


def regpipe(*arguments: object) -> None:
    with as_if_in_its_own_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["regpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code


class Outputs:
    """What a day's work leaves behind, and whom it called on the way."""

    def __init__(self, inputs: Path, out: Path) -> None:
        self.inputs, self.out = inputs, out
        self.calls: list[object] = []

    def refuse(self, *called: object, **_: object) -> None:
        self.calls.append(called)
        raise OSError("no network")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, monai_bundle: Command) -> Outputs:
    """Registered from zero, carried, trained, evaluated, compared, registered with the best, reported."""
    root = tmp_path_factory.mktemp("private")
    inputs, out = root / f"{WHO} 01-31", root / "out"
    done = Outputs(inputs, out)
    data, training = write_inputs(inputs / "data"), write_training(inputs / "training")
    torch.save(SymmetricNet(2, "alexnet").state_dict(), inputs / "start.pt")

    def bundle_command(command: list[str]) -> subprocess.CompletedProcess[str]:
        monai_bundle(*command[command.index("monai.bundle") + 1 :])
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regpipe.study.compare.subprocess.run", bundle_command)
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, done.refuse)
        for name in ("getaddrinfo", "gethostbyname", "create_connection"):
            patch.setattr(socket, name, done.refuse)
        regpipe(
            "register",
            data,
            "-o",
            out / "from_zero",
            "--bundle",
            "none",
            "--formats",
            "displacement,itk,ants",
            *OPTIONS,
        )
        files = [
            data / "fixed_images" / "volume.nii.gz",
            data / "more" / "volume.mha",
            data / "fixed_images" / "series",
        ]
        regpipe("apply", out / "from_zero" / "volume", files[1], "-o", out / "applied")
        regpipe("apply", out / "from_zero" / "volume", files[0], files[2], "--to", "moving", "-o", out / "applied")
        settings = {
            "dataset_dir": str(training),
            "pretrained": str(inputs / "start.pt"),
            "max_epochs": 1,
            "val_interval": 1,
        }
        compare(out / "compared", backbones=["alexnet"], settings={**settings, "pairs_per_epoch": 2, "holdout": 2})
        regpipe("register", training, "--bundle", out / "compared", "-o", out / "with_bundle")
        regpipe("report", out / "with_bundle")
        regpipe("report", out / "from_zero", "-o", out / "report")
    return done


def test_the_search_finds_what_is_planted_in_every_kind_of_file(outputs: Outputs) -> None:
    found = finds(outputs.inputs.parent)
    suffixes = {suffix for name in found for suffix in (".nii.gz", ".nrrd", ".mha", ".png") if name.endswith(suffix)}
    assert suffixes == {".nii.gz", ".nrrd", ".mha", ".png"}
    inside = finds(outputs.inputs)
    assert all(
        inside[f"data/{name}"] for name in ("more/volume.mha", "moving_images/volume.nrrd", "fixed_images/picture.png")
    )
    assert sum("series" in name and n > 5 for name, n in inside.items()) == 32  # each slice, by more than its name


@pytest.mark.parametrize("part", ["from_zero", "applied", "compared", "with_bundle", "report"])
def test_no_output_tells_whose_images_they_were(outputs: Outputs, part: str) -> None:
    written = [path for path in (outputs.out / part).rglob("*") if path.is_file()]
    assert written and not finds(outputs.out / part)
    assert not finds(outputs.out / part, str(outputs.inputs.parent))  # nor where they were


def test_what_was_searched_is_all_that_there_is(outputs: Outputs) -> None:
    names = {path.name for path in outputs.out.rglob("*") if path.is_file()}
    expected = {"transform.json", "metrics.json", "warped.nii.gz", "warped.png", "sheet.png", "moving_to_fixed.h5"}
    expected |= {"training.json", "model.pt", "checkpoint_1.pt", "command.json", "summary.json", "comparison.csv"}
    assert expected | {"report.html", "volume.mha", "volume.nii.gz", "metrics.csv"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_nobody_was_called(outputs: Outputs) -> None:
    assert not outputs.calls
    with pytest.MonkeyPatch.context() as patch:  # which would be noticed
        patch.setattr(socket, "create_connection", outputs.refuse)
        with pytest.raises(OSError, match="no network"):
            socket.create_connection(("127.0.0.1", 1))
    assert outputs.calls.pop()


def test_the_model_still_knows_its_data(outputs: Outputs) -> None:
    from regpipe.data.pairs import list_pairs
    from regpipe.engines import record

    models = outputs.out / "compared" / "alexnet" / "models"
    kept = json.loads((models / record.NAME).read_text())
    assert kept["dataset_dir"] is None and len(kept["training_images"]) == 6
    known = record.read(str(models))
    assert record.default_split(str(outputs.inputs / "training"), known) == "validation"
    with pytest.raises(record.InputError, match="give --dataset_dir"):
        record.dataset_dir(known)
    with pytest.raises(record.InputError, match="3 of 5 pairs hold images that the model was trained on"):
        record.refuse_training_images(list_pairs(outputs.inputs / "training"), known)
