"""What a model's images and registrations look like, in a few numbers kept beside it: ``typical.json``.

Written while training, asked when other images are registered (``metrics.trust``). Of the training images, fixed and
moving ones apart, ranges of what ``look`` gives, and the mean of their thumbnails; of the validation pairs, as the best
model so far registers them, ranges of what ``numbers`` gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from regpipe.data.pairs import SIDES, Case
from regpipe.fields.algebra import LAYERS, Layers
from regpipe.io import background, images
from regpipe.io.geometry import upright, voxel_size
from regpipe.io.images import Image
from regpipe.metrics.measured import Measured, measured
from regpipe.metrics.measures import ncc
from regpipe.transforms.likeness import DARK, information
from regpipe.utils import distributed
from regpipe.utils.console import Progress
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json, replace_file

NAME = "typical.json"
FORMAT = "regpipe typical 1"
FEWEST, MOST = 5, 100  # images, or pairs: of fewer nothing is kept, more are not looked at
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
THUMBNAIL = {2: 16, 3: 12}  # blocks along each axis
VOXELS = 200_000  # that are enough for a histogram
ASKED = ("ncc", "mi", "covered", "moved", "sdlogj")  # of a pair's numbers, those that have a usual range
FAR = 0.995  # of all displacements, those below


class Look(NamedTuple):
    """What an image looks like, on its axes closest to RAS (2-D: as a picture)."""

    spacing: np.ndarray  # (D,) mm
    extent: np.ndarray  # (D,) mm
    brightness: np.ndarray  # (5,) quantiles of the intensities scaled to [0, 1]
    texture: np.ndarray  # (1,) mean step from voxel to voxel, in standard deviations
    thumbnail: np.ndarray  # (12, 12, 12) or (16, 16): means over blocks of the whole field of view


def look(image: Image) -> Look:
    """The numbers of one image."""
    dim = image.array.ndim
    array, affine = upright(image.array, image.affine)
    array, spacing = images.normalise(np.ascontiguousarray(array)), voxel_size(affine)
    steps = np.mean([np.abs(np.diff(array, axis=axis)).mean() for axis in range(dim)])
    pool = torch.nn.functional.adaptive_avg_pool2d if dim == 2 else torch.nn.functional.adaptive_avg_pool3d
    small = pool(torch.from_numpy(array)[None], THUMBNAIL[dim])[0].numpy()
    texture = np.array([steps / max(float(array.std()), 1e-6)])
    return Look(spacing, spacing * array.shape, np.quantile(array, QUANTILES), texture, small)


def content(thumbnail: np.ndarray, mean: np.ndarray) -> float:
    """How like the images of the training an image is as a whole: the correlation with their mean."""
    return ncc(thumbnail, mean)


def numbers(batch: Mapping[str, Any], pair: Measured) -> dict[str, float]:
    """What a registered pair looks like on the working grid, where both images are; a batch of one.

    ``ncc``; ``mi_before`` and ``mi``, mutual information in nats; ``moved``, the displacement in mm that all but a
    few voxels stay below; ``sdlogj``; ``covered``, the share of the fixed image where the moving one is; ``shared``,
    the mutual information where the fixed image is not dark, as a share of what is to be known of the plainer of both.
    """
    u, fixed, warped = pair.displacement[None], pair.fixed, pair.warped
    ones = torch.ones_like(fixed)
    inside, other = (batch.get(f"{side}_mask", ones).to(u.device) > 0 for side in SIDES)
    mm = u.new_tensor(list(pair.spacing)).view(1, -1, *[1] * (u.ndim - 2))
    lengths = _some((u * mm).norm(dim=1))
    both = inside & other
    return {
        "ncc": pair.row["ncc"],
        "mi_before": _information(fixed, pair.moving, both),
        "mi": _information(fixed, warped, both),
        "moved": float(np.quantile(lengths, FAR)),
        "sdlogj": pair.row["sdlogj"],
        "shared": _shared(fixed, warped, both & (fixed > DARK)),
        "covered": float((both.sum() / inside.sum().clamp(min=1)).item()),
    }


def _information(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    x, y = (_some(image[where]) for image in (a, b))
    return information(x, y) if len(x) > 1 else 0.0


def _shared(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    x, y = (_some(image[where]) for image in (a, b))
    if len(x) < 2:
        return 0.0
    known = min(information(x, x), information(y, y))  # with itself: the entropy
    return information(x, y) / known if known > 0 else 0.0


def _some(values: torch.Tensor) -> np.ndarray:
    """(N,) at most ``VOXELS`` of the values, evenly."""
    flat = values.flatten()
    some: np.ndarray = flat[:: max(1, math.ceil(len(flat) / VOXELS))].float().cpu().numpy()
    return some


# ------------------------------------------------------------------------------------------ the record


def read(ckpt_dir: str | Path, dim: int | None = None) -> dict[str, Any]:
    """What is known of a model's images and registrations; empty where nothing was kept.

    Raises:
        InputError: damaged, of another version, or of images of another
            dimension than ``dim``; taken for nothing it would silence the warnings.
    """
    path = Path(ckpt_dir) / NAME
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
        if found["format"] != FORMAT or not found["images"].keys() <= set(SIDES):
            raise ValueError("of another version of regpipe")
        for known in found["images"].values():
            axes = len(known["spacing"][0])
            if dim not in (None, axes):
                raise ValueError(f"of {axes}D images, the working grid is {dim}D")
            single = {"texture": 1, "content": 1}
            _check(known, {"spacing": axes, "extent": axes, "brightness": len(QUANTILES), **single})
            if np.shape(known["thumbnail"]) != (THUMBNAIL[axes],) * axes:
                raise ValueError("thumbnail")
            np.array(known["thumbnail"], float)
        if found["pairs"]:
            _check(found["pairs"], dict.fromkeys(ASKED, 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        why = f"damaged ({type(cause).__name__}: {str(cause)[:100]})"
        raise InputError(f"{path}: {why}; copy it again, or delete it: then unusual images are not told") from cause
    return dict(found)


def _check(known: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises one of many errors unless each is so many lowest and as many highest values, of some number of things."""
    if not known["count"] >= 1:
        raise ValueError("count")
    for name, size in sizes.items():
        low, high = np.array(known[name], float)
        if low.shape != (size,) or (low > high).any():
            raise ValueError(name)


def write_images(ckpt_dir: str | Path, cases: Sequence[Case]) -> None:
    """Keep what the images of the training pairs look like; what is known of pairs stays.

    Raises:
        InputError: an image cannot be read.
    """
    paths = {side: sorted({case[f"{side}_image"] for case in cases}) for side in SIDES}
    chosen = {side: [found[i] for i in _evenly(len(found))] for side, found in paths.items()}
    every = sorted({path for found in chosen.values() for path in found})
    looks = {
        path: look(background.filled(images.read_image(path)))
        for path in Progress(every, what="looking at", unit="images")
    }
    sides = {side: _ranges([looks[path] for path in found]) for side, found in chosen.items()}
    known = {side: ranges for side, ranges in sides.items() if ranges}
    _write(ckpt_dir, {"pairs": read(ckpt_dir).get("pairs", {}), "images": known})


def _evenly(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST))})


def _ranges(looks: Sequence[Look]) -> dict[str, Any]:
    """Lowest and highest of each number, and the mean thumbnail; ``content`` of each image with the others' mean."""
    if len(looks) < FEWEST or len({len(one.spacing) for one in looks}) > 1:
        return {}
    total = np.sum([one.thumbnail for one in looks], axis=0)
    alike = [content(one.thumbnail, total - one.thumbnail) for one in looks]
    found: dict[str, Any] = {"count": len(looks), "thumbnail": (total / len(looks)).round(3).tolist()}
    values = {name: [getattr(one, name) for one in looks] for name in ("spacing", "extent", "brightness", "texture")}
    return found | {name: _range(rows) for name, rows in (values | {"content": [[a] for a in alike]}).items()}


def _range(rows: Iterable[Any]) -> list[list[float]]:
    table = np.array(list(rows), float)
    return [[float(f"{v:.5g}") for v in edge] for edge in (table.min(0), table.max(0))]


def _write(ckpt_dir: str | Path, content: Mapping[str, Any]) -> None:
    replace_file(Path(ckpt_dir) / NAME, json.dumps({"format": FORMAT, **content}).encode())


class TypicalPairs:
    """Handler of the validating evaluator: keeps the ranges of the validation pairs when its epoch is the best so far.

    Args:
        ckpt_dir: where the model is.
        spacing: mm per voxel of the working grid.
        layers: see ``metrics.measured.measure``.
    """

    def __init__(self, ckpt_dir: str, spacing: Sequence[float], *, layers: Layers = LAYERS) -> None:
        self.ckpt_dir, self.spacing, self.layers = ckpt_dir, tuple(spacing), layers
        self._rows: dict[str, dict[str, float]] = {}

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events  # of a training alone

        engine.add_event_handler(Events.STARTED, lambda: self._rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        engine.add_event_handler(Events.COMPLETED, self._keep)

    @torch.no_grad()
    def _note(self, engine: Any) -> None:
        output: Any = engine.state.output
        batch, prediction = output["label"], output["pred"]
        for i, pair in enumerate(measured(prediction, batch, self.spacing, layers=self.layers)):
            item = {name: value[i : i + 1] for name, value in batch.items()}
            self._rows[batch["case"][i]] = numbers(item, pair)

    def _keep(self, engine: Any) -> None:
        rows = {case: row for part in distributed.gathered(self._rows) for case, row in part.items()}
        state: Any = engine.state
        if distributed.rank() > 0 or state.best_metric_epoch != state.epoch:
            return
        values = {name: [[row[name]] for row in rows.values()] for name in next(iter(rows.values()))}
        ranges = {name: _range(column) for name, column in values.items()}
        pairs = {"count": len(rows), **ranges} if len(rows) >= FEWEST else {}
        _write(self.ckpt_dir, {"images": read(self.ckpt_dir).get("images", {}), "pairs": pairs})
