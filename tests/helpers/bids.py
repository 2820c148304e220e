"""BIDS data sets, made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from helpers.folders import save

SHAPE = (6, 6, 6)
VOLUME = np.arange(216, dtype=np.float32).reshape(SHAPE)


def describe(folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"Name": "made up", "BIDSVersion": "1.8.0", **more})
    (folder / "dataset_description.json").write_text(text)
    return folder


def put(root: Path, subject: str, session: str, ending: str) -> Path:
    """``sub-S[_ses-T]_ENDING.nii.gz`` at its place."""
    name = "_".join([f"sub-{subject}", *([f"ses-{session}"] if session else []), ending])
    folder = root / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
    return save(folder / f"{name}.nii.gz", VOLUME.astype(np.uint8 if "dseg" in ending else np.float32))
