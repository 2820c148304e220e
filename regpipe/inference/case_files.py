"""What one registered case leaves in its folder: transforms, warped images, pictures; and how to clear it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.data import channels
from regpipe.data.load import LoadPair
from regpipe.data.pairs import SIDES, Case
from regpipe.fields.algebra import LAYERS, Layers, Registration
from regpipe.io import background
from regpipe.io.images import PICTURE, Image, read_image
from regpipe.io.planes import as_stored
from regpipe.io.source import Source
from regpipe.metrics import trust
from regpipe.metrics.measured import Measured
from regpipe.metrics.measures import dice, mean_of, shared_labels
from regpipe.metrics.typical import numbers
from regpipe.report import pictures, views
from regpipe.report.shown import shown_images, shown_labels, shown_landmarks
from regpipe.transforms import displacement, export, homography, initial, lift, volume
from regpipe.utils.files import sweep, written_together

DENSE = "displacement"  # one field per direction on the image's own grid, everything in it
BY_DEFAULT = (DENSE, "itk", "ants")
Arrays = tuple[np.ndarray, np.ndarray]
WRITTEN: tuple[str, ...] = (
    "metrics.json",
    "manifest.json",
    "transform.json",
    "*displacement.nii.gz",
    "*_to_*.*",
    export.ANTS_AFFINE,
)
WRITTEN += (
    *export.ANTS_WARPS,
    "warped*",
    "jacobian.nii.gz",
    "uncertainty.nii.gz",
    "checkerboard.png",
    "overlay.png",
    "sheet.png",
)
WRITTEN += (f"{views.FOLDER}/{views.NAME}", f"{views.FOLDER}/*.*")


def clear(folder: Path) -> None:
    """Remove the results of an earlier registration, first the file that marks them as finished; other files stay."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()
    sweep(folder, *WRITTEN)


@written_together()
def save_case(
    case: Case,
    batch: Mapping[str, Any],
    prediction: Mapping[str, Any],
    load: LoadPair,
    folder: Path,
    files: Source,
    *,
    formats: Sequence[str] = BY_DEFAULT,
    fill: float | None = None,
    settings: Mapping[str, Any] | None = None,
    typical: Mapping[str, Any] | None = None,
    layers: Layers = LAYERS,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write everything that one registered case gives, in native space.

    Args:
        files: of the case.
        fill: see ``FolderRun``.
        typical: what is known of the model's training.
        layers: see ``metrics.measured.measure``.

    Returns:
        Its metrics on the working grid with a list ``warnings``, see ``metrics.trust``; and the SHA-256 of each file
        that was written, by its path within ``folder``.

    Raises:
        InputError: a native image cannot be read.
    """
    registration = Registration.of(prediction, slice(1))
    out = _Case(case, files, load, folder)
    fixed, moving = out.sides
    fields, frames, matrix = _placed(batch, registration)
    forward = displacement.native_displacement(fields[0], *frames, fixed)
    if DENSE in formats:
        out.save_displacements(forward, displacement.native_displacement(fields[1], *frames[::-1], moving))
    out.save_transforms(fields, frames, matrix, [name for name in formats if name != DENSE], settings)
    determinant = displacement.native_jacobian(forward, fixed.affine)  # takes the most memory: first
    out.image("jacobian.nii.gz", determinant)
    volumes = out.volumes(determinant)
    alignment = frames[1] @ np.linalg.inv(frames[0])
    determinant /= np.linalg.det(alignment[:-1, :-1])
    error = None
    if "uncertainty" in prediction:
        error = displacement.native_lengths(_array(prediction["uncertainty"]), *frames, fixed)
        out.image("uncertainty.nii.gz", error)
    images, labels, native = out.save_warped(forward, alignment if matrix is None else matrix, fill)
    pair = Measured.of(registration, batch, load.grid_of(case, files).spacing, layers=layers)
    shown = views.Shown(fixed.affine, images, labels, forward, determinant, alignment, error)
    view = views.write_view(folder / views.FOLDER, shown, shown_landmarks(pair, frames[0]))
    out.hashes |= {f"{views.FOLDER}/{name}": digest for name, digest in view.items()}
    out.save_pictures(pictures.case_pictures(batch, prediction, pair.determinant))
    measured = pair.row | native | load.frames.found(case)
    if "repaired" in prediction:  # voxels that removing folds moved the fields by, at most
        measured["repaired"] = float(prediction["repaired"][0])
    if error is not None:
        inside = error[images["fixed"] > views.FOREGROUND]
        measured["uncertainty"] = float(inside.mean()) if inside.size else math.nan
    distrust = trust.warnings({"fixed": fixed, "moving": moving}, typical or {}, numbers(batch, pair), measured)
    row = {k: v if math.isfinite(v) else None for k, v in measured.items()}
    return {"case": case["case"], **row, **volumes, "warnings": distrust}, out.hashes


class _Case:
    """A case's folder and what is written into it from its files, each file hashed on its way."""

    def __init__(self, case: Case, files: Source, load: LoadPair, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.case, self.files, self.load, self.path = case, files, load, path
        self.sides = lift.alike(case["case"], *(files.image(case[f"{side}_image"]) for side in SIDES))
        self.hashes: dict[str, str] = {}

    def write(self, name: str, writer: Callable[..., str], *what: Any) -> None:
        self.hashes[name] = writer(self.path / name, *what)

    def image(self, name: str, array: np.ndarray) -> None:
        """On the fixed image's grid; of one slice stored in 3-D as that is stored."""
        self.write(name, displacement.write_image, *as_stored(array, self.sides[0].affine, self.sides[0].plane))

    def save_displacements(self, forward: np.ndarray, backward: np.ndarray) -> None:
        for name, d, onto, of in (("", forward, *self.sides), ("inverse_", backward, *self.sides[::-1])):
            in_space = lift.displacement_in_space(d, onto, of)
            self.write(f"{name}displacement.nii.gz", displacement.write_displacement, *in_space)

    def save_transforms(
        self, fields: Arrays, frames: Arrays, matrix: np.ndarray | None, formats: Sequence[str], settings: Any
    ) -> None:
        spaces = ((image.array.shape, image.affine) for image in self.sides)
        pair = lift.pair_in_space(export.pair_transform(*fields, *frames, *spaces), *self.sides)
        named = (export.image_file(self.case[f"{side}_image"], self.files) for side in SIDES)
        sides = (lift.file_in_space(file, image) for file, image in zip(named, self.sides, strict=True))
        stage = self.load.frames.stage_of(self.case, self.files)
        stage = f"initial, {stage}" if initial.keys(self.case) else stage
        bent = None if matrix is None else lift.matrix_in_space(matrix, *self.sides)
        told: dict[str, Any] = {"formats": formats, "stage": stage, "homography": bent, "settings": settings}
        self.hashes |= export.write_transforms(self.path, pair, *sides, **told)

    def volumes(self, determinant: np.ndarray) -> dict[str, Any]:
        """How much larger each structure of the fixed image is in the moving one, see ``transforms.volume``."""
        if "fixed_label" not in self.case:
            return {}
        regions = volume.regions(self._label("fixed").array, determinant)
        return {"volumes": {str(i): volume.ratios(inside) for i, inside in regions}}

    def save_pictures(self, shown: Mapping[str, np.ndarray]) -> None:
        for name in ("checkerboard", "overlay"):
            self.write(f"{name}.png", pictures.save_png, shown[name])
        sheet = pictures.contact_sheet(shown.values(), [pictures.PICTURES[name].title for name in shown])
        self.write("sheet.png", pictures.save_png, sheet)

    def save_warped(
        self, forward: np.ndarray, matrix: np.ndarray, fill: float | None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, float]]:
        """The warped image and labels; returns what there is to see of both (``report.shown``), and their Dice.

        Dice is on the fixed image's own grid, where both images have labels. ``matrix``: the whole alignment.
        """
        case, (fixed, moving) = self.case, (self.files.image(self.case[f"{side}_image"]) for side in SIDES)
        warped = self._save_image("warped.nii.gz", "moving_image", forward, fill)
        for key in channels.keys(case, "moving"):
            self._save_image(f"warped_{key.rpartition('_')[2]}.nii.gz", key, forward, fill)
        warped = np.where(np.isnan(warped), moving.array.min(), warped)
        # what a picture's whole numbers can show
        fits = warped.ndim == 2 and warped.min() >= 0 and 1 < warped.max() <= 65535
        if fits and case["fixed_image"].lower().endswith(PICTURE):
            self.image("warped.png", warped)
        images = shown_images(fixed, moving, warped, matrix)
        if "moving_label" not in case:
            return images, {}, {}
        label = self._label("moving")
        labels = displacement.resample_through(label, forward, fixed.affine, order=0)
        self.image("warped_label.nii.gz", labels)
        if "fixed_label" not in case:
            return images, {}, {}
        truth = self._label("fixed")
        overlap = mean_of(dice(truth.array, labels, shared_labels(truth.array, label.array)).values())
        return images, shown_labels(truth, label, labels, matrix), {"dice_native": overlap}

    def _save_image(self, name: str, key: str, forward: np.ndarray, fill: float | None) -> np.ndarray:
        """A moving image, resampled once, with its gaps."""
        read, onto = self.files.read(self.case[key], read_image), self.files.image(self.case["fixed_image"]).affine
        fill = background.outside(read.array) if fill is None else fill
        warped = displacement.resample_through(read, forward, onto, order=1, fill=fill)
        self.image(name, warped.astype(np.float32))
        return warped

    def _label(self, side: str) -> Image:
        image = self.case[f"{side}_image"]
        return self.files.label(self.case[f"{side}_label"], self.load.landmark_channels, image=image)[0]


def _placed(batch: Mapping[str, Any], registration: Registration) -> tuple[Arrays, Arrays, np.ndarray | None]:
    """Both displacements, both frames, and the homography (RAS mm) where that is what lies between the frames."""
    fields = _array(registration.displacement), _array(registration.inverse)
    frames = _array(batch["fixed_affine"]), _array(batch["moving_affine"])
    if "moving_field" in batch:
        return *initial.bent(*fields, frames, _array(batch["moving_field"])), None
    if "moving_bend" not in batch:
        return fields, frames, None
    bend = _array(batch["moving_bend"])
    return *homography.bent(*fields, frames, bend), frames[1] @ bend @ np.linalg.inv(frames[0])


def _array(tensor: Any) -> np.ndarray:
    return tensor[0].cpu().numpy()
