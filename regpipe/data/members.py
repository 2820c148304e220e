"""The files of a data set's folders: images, and the labels, landmarks and masks that belong to each by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regpipe.io import images, landmarks
from regpipe.io.formats import SEGMENTS
from regpipe.io.images import SUFFIXES, is_series
from regpipe.utils.errors import InputError, printable

KINDS = {"image": SUFFIXES, "label": SUFFIXES, "landmarks": landmarks.SUFFIXES, "mask": SUFFIXES, "ignore": SUFFIXES}
FOLDERS = {"image": "images", "label": "labels", "landmarks": "landmarks", "mask": "masks", "ignore": "ignored"}
LAYOUTS = "fixed_images/ + moving_images/, images/, a folder of images, or a .json datalist"
# what may follow an image's name in those of its labels, masks and landmarks: a.seg.nrrd, a_dseg.nii.gz, a-label.nrrd
WORDS = "d?seg|segmentation|labels?|labelmap|masks?|ignored?|landmarks|points|fiducials"
ADDED = re.compile(f"[._-]({WORDS})$", re.IGNORECASE)


def natural(name: str) -> list[Any]:
    """Sort key under which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", name)  # texts, and between them numbers, of any length
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)]


def files_of(folder: Path, suffixes: Sequence[str], problems: dict[str, str] | None = None) -> dict[str, str]:
    """stem -> path of the files with these suffixes, in natural order; other files are ignored.

    Where images are looked for, a sub-folder with a DICOM series is one of them.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir(), key=lambda f: natural(f.name)):
        is_file = file.name.lower().endswith(tuple(suffixes)) and not file.is_dir()
        series = suffixes == SUFFIXES and file.name not in FOLDERS.values() and is_series(file)
        if file.name.startswith(".") or not (is_file or series):
            continue
        if file.suffix == ".img" and file.with_suffix(".hdr").exists():
            continue
        name = _stem(file, suffixes)
        if name != printable(name):
            report(problems, name, f"{file}: its name is not printable; rename it")
            continue
        if name in found:
            report(problems, name, f"{file}: {found[name]} has the same stem; keep one of them")
        found[name] = str(file)
    return found


def subjects_of(root: Path, prefix: str, folder: Path, problems: dict[str, str] | None) -> dict[str, dict[str, str]]:
    """stem -> {image, label, landmarks} of one set of folders."""
    found = {k: files_of(root / (prefix + FOLDERS[k]), s, problems) for k, s in KINDS.items() if k != "image"}
    pictures = files_of(folder, SUFFIXES, problems)
    if not pictures:
        if (root / "dataset_description.json").is_file():
            raise InputError(f"{root}: is a BIDS data set; make a datalist of it: regpipe bids {root} -o datalist.json")
        raise InputError(f"{folder}: holds no image ({' '.join(SUFFIXES)}, folder of DICOM); layouts: {LAYOUTS}")
    beside = {name: path for name, path in pictures.items() if path.lower().endswith(SEGMENTS)}  # labels among images
    pictures = {name: path for name, path in pictures.items() if name not in beside}
    found["label"] = beside | found["label"]
    owned = {kind: _by_image(files, pictures, folder, problems) for kind, files in found.items()} | {"image": pictures}
    return {n: {k: files[n] for k, files in owned.items() if n in files} for n in pictures}


def _by_image(
    files: dict[str, str], pictures: dict[str, str], folder: Path, problems: dict[str, str] | None
) -> dict[str, str]:
    """An image's stem -> the file that belongs to it: of the same stem, or with one of ``ADDED`` behind it."""
    owned: dict[str, str] = {}
    for name, path in files.items():
        owner = name if name in pictures else ADDED.sub("", name)
        if owner not in pictures:
            report(problems, name, f"{path}: no image of this stem in {folder}; add it or remove this")
        elif owner in owned:
            report(problems, owner, f"{path}: {owned[owner]} belongs to the same image; keep one of them")
        else:
            owned[owner] = path
    return owned


def _stem(file: Path, suffixes: Sequence[str]) -> str:
    suffix = next((s for s in suffixes if suffixes != SUFFIXES and file.name.lower().endswith(s)), None)
    return images.stem(file) if suffix is None else file.name[: -len(suffix)]


def report(problems: dict[str, str] | None, case: str, message: str) -> None:
    if problems is None:
        raise InputError(message)
    problems[printable(case)] = printable(message)
