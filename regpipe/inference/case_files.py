"""What one registered case leaves in its folder: transforms, warped images, pictures; and how to clear it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.data.load import LoadPair
from regpipe.data.pairs import Case
from regpipe.fields.algebra import Registration
from regpipe.io.images import PICTURE, Image, read_image, read_label
from regpipe.metrics import trust
from regpipe.metrics.measures import dice, mean_of, measure, shared_labels
from regpipe.metrics.typical import numbers
from regpipe.report import pictures, views
from regpipe.report.shown import shown_images, shown_labels, shown_landmarks
from regpipe.report.tensorboard import case_pictures
from regpipe.transforms import displacement, export
from regpipe.utils.files import sweep

DENSE = "displacement"  # one field per direction on the image's own grid, everything in it
BY_DEFAULT = (DENSE, "itk", "ants")
WRITTEN: tuple[str, ...] = (
    "metrics.json",
    "manifest.json",
    "transform.json",
    "*displacement.nii.gz",
    "*_to_*.*",
    export.ANTS_AFFINE,
)
WRITTEN += (*export.ANTS_WARPS, "warped*", "jacobian.nii.gz", "checkerboard.png", "overlay.png", "sheet.png")
WRITTEN += (f"{views.FOLDER}/{views.NAME}", f"{views.FOLDER}/*.*")


def clear(folder: Path) -> None:
    """Remove the results of an earlier registration, what says that they are whole first; other files stay."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()
    sweep(folder, *WRITTEN)


def save_case(
    case: Case,
    batch: Mapping[str, Any],
    prediction: Mapping[str, Any],
    load: LoadPair,
    folder: Path,
    *,
    formats: Sequence[str] = BY_DEFAULT,
    settings: Mapping[str, Any] | None = None,
    typical: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything that one registered case gives, in native space; returns its metrics, on the working grid.

    With them comes a list ``warnings``, see ``metrics.trust``; ``typical``: what is known of the model's training.

    Raises:
        InputError: a native image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    registration = Registration.of(prediction, slice(1))
    fixed, moving = read_image(case["fixed_image"]), read_image(case["moving_image"])
    fields = _array(registration.displacement), _array(registration.inverse)
    frames = _array(batch["fixed_affine"]), _array(batch["moving_affine"])
    forward = displacement.native_displacement(fields[0], *frames, fixed)
    if DENSE in formats:
        backward = displacement.native_displacement(fields[1], *frames[::-1], moving)
        displacement.write_displacement(folder / "displacement.nii.gz", forward, fixed.affine)
        displacement.write_displacement(folder / "inverse_displacement.nii.gz", backward, moving.affine)
        del backward  # as large as the image, three times
    pair = export.pair_transform(*fields, *frames, *((image.array.shape, image.affine) for image in (fixed, moving)))
    files = export.image_file(case["fixed_image"], fixed), export.image_file(case["moving_image"], moving)
    stage = load.frames.stage_of(case, lambda path: fixed if path == case["fixed_image"] else moving)
    wanted = [name for name in formats if name != DENSE]
    export.write_transforms(folder, pair, *files, formats=wanted, stage=stage, settings=settings)
    del pair
    determinant = displacement.native_jacobian(forward, fixed.affine)  # takes the most memory: first
    displacement.write_image(folder / "jacobian.nii.gz", determinant, fixed.affine)
    alignment = frames[1] @ np.linalg.inv(frames[0])
    determinant /= np.linalg.det(alignment[:-1, :-1])
    images, labels, native = _save_warped(case, fixed, moving, forward, alignment, folder, load)
    whole_case = views.Shown(fixed.affine, images, labels, forward, determinant, alignment)
    views.write_view(folder / views.FOLDER, whole_case, shown_landmarks(batch, registration))
    _save_pictures(folder, case_pictures(batch, prediction))
    spacing = load.grid_of(case).spacing
    measured = measure(registration, batch, spacing) | native | load.frames.found(case)
    if "repaired" in prediction:  # voxels that removing folds moved the fields by, at most
        measured["repaired"] = float(prediction["repaired"][0])
    seen = numbers(batch, registration, spacing)
    distrust = trust.warnings({"fixed": fixed, "moving": moving}, typical or {}, seen, measured)
    row = {k: v if math.isfinite(v) else None for k, v in measured.items()}
    return {"case": case["case"], **row, "warnings": distrust}


def _array(tensor: Any) -> np.ndarray:
    return tensor[0].cpu().numpy()


def _save_pictures(folder: Path, shown: Mapping[str, np.ndarray]) -> None:
    for name in ("checkerboard", "overlay"):
        pictures.save_png(folder / f"{name}.png", shown[name])
    pictures.save_png(folder / "sheet.png", pictures.contact_sheet(shown))


def _save_warped(
    case: Case,
    fixed: Image,
    moving: Image,
    forward: np.ndarray,
    matrix: np.ndarray,
    folder: Path,
    load: LoadPair,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, float]]:
    """The warped image and labels; returns what there is to see of both (``report.shown``), and their Dice.

    Dice is on the fixed image's own grid, where both images have labels. ``matrix``: the whole alignment.
    """
    warped = displacement.resample_through(moving, forward, fixed.affine, order=1)
    displacement.write_image(folder / "warped.nii.gz", warped.astype(np.float32), fixed.affine)
    fits = warped.min() >= 0 and 1 < warped.max() <= 65535  # what a picture's whole numbers can show
    if fits and case["fixed_image"].lower().endswith(PICTURE):
        displacement.write_image(folder / "warped.png", warped, fixed.affine)
    images = shown_images(fixed, moving, warped, matrix)
    if "moving_label" not in case:
        return images, {}, {}
    label, _ = read_label(case["moving_label"], landmark_channels=load.landmark_channels)
    labels = displacement.resample_through(label, forward, fixed.affine, order=0)
    displacement.write_image(folder / "warped_label.nii.gz", labels.astype(np.int32), fixed.affine)
    if "fixed_label" not in case:
        return images, {}, {}
    truth, _ = read_label(case["fixed_label"], landmark_channels=load.landmark_channels)
    whole = labels.astype(np.int32)
    overlap = mean_of(dice(truth.array, whole, shared_labels(truth.array, label.array)).values())
    return images, shown_labels(truth, label, whole, matrix), {"dice_native": overlap}
