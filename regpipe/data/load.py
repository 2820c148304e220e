"""Pairs -> tensors on the working grid."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpipe.data import channels
from regpipe.data.cache import Store
from regpipe.data.checks import unlike_landmarks
from regpipe.data.members import KINDS
from regpipe.data.pairs import SIDES, Case
from regpipe.data.placement import Frames, paired_landmarks
from regpipe.io import geometry, images
from regpipe.io.background import SLIGHT
from regpipe.io.formats import warn_once
from regpipe.io.geometry import extent
from regpipe.io.images import Grid, Image
from regpipe.io.source import Source
from regpipe.transforms import displacement, homography, initial, lift
from regpipe.utils.errors import InputError
from regpipe.utils.settings import AffineOptions

log = logging.getLogger(__name__)


class _View(NamedTuple):
    """How an image is seen: in its frame, and of the moving one what bends that, see ``data.placement``."""

    frame: np.ndarray  # (D+1, D+1)
    bend: np.ndarray | None = None  # (D+1, D+1), a homography
    field: np.ndarray | None = None  # (D, *grid)

    @property
    def is_bent(self) -> bool:
        return self.bend is not None or self.field is not None

    @property
    def affine(self) -> np.ndarray:
        """The frame after the homography."""
        return self.frame if self.bend is None else self.frame @ self.bend

    def straight(self, points: np.ndarray) -> np.ndarray:
        """Points (K, D) of the frame to where they are seen, in working voxels."""
        return points if self.field is None or not len(points) else initial.back(self.field, points.T).T


class LoadPair:
    """case -> tensors on the working grid; a callable for ``monai.data.Dataset``.

    Gives ``case`` and, for ``fixed_`` and ``moving_``: ``image`` (1, *S) float32 in [0, 1];
    ``label`` (1, *S) int32, or int64 where ids need that, zeros where there is none; ``landmarks`` (K, D) float32 in
    working voxels, K is 0 where either image has none, ``landmark_weights`` (K,) of a file that has some; ``mask``
    (1, *S) float32, 1 where the grid lies inside the image's field of view and, where there is a mask file, inside its
    nonzero voxels, else 0; ``affine`` (D+1, D+1) float64, working voxel -> RAS mm; ``channels`` (C - 1, *S), as
    ``image``, of those beside it, where there are any (``data.channels``): a mask is that of all. ``moving_bend``
    (3, 3) float64 where the stage is ``projective``: the moving image is seen at ``bend(x)``, see
    ``transforms.homography``; ``moving_field`` (D, *S) float64 after an initial transform that is not linear: it is
    seen at ``x + field(x)``, see ``transforms.initial``. ``displacement`` (D, *S) where there is a true one, working
    voxels.
    With ``cache`` they are kept, per image and field and not per pair, and handed out without a copy: never change them
    in place. In the folder ``cache_dir`` they are kept beyond this process, the alignments too; see ``data.cache``.

    Outside an image's field of view the grid repeats its rim; without ``mask_rims`` that counts as image.
    ``space`` and the ``AffineOptions``: how the moving image's frame is aligned with the fixed one's, see
    ``data.placement``; each alignment is found once (by each worker of a data loader, without ``cache_dir``). Without a
    ``grid`` each pair has its own. A case of other than ``image_channels`` is refused, where a network takes several.
    """

    def __init__(
        self,
        grid: Grid | None,
        *,
        landmark_channels: int | None = None,
        cache: bool = True,
        cache_dir: str | None = None,
        mask_rims: bool = True,
        affine: str = "centre",
        affine_from: str = "images",
        affine_metric: str = "mi",
        space: Mapping[str, Any] | None = None,
        image_channels: int = 1,
    ) -> None:
        self.grid, self.image_channels = grid, image_channels
        self.alignment = AffineOptions(affine, affine_from, affine_metric)
        self.landmark_channels = landmark_channels
        self.mask_rims = mask_rims
        self.store = Store(cache_dir) if cache_dir else None
        self.frames = Frames(grid, self.alignment, space=space, store=self.store)
        self.paired: dict[tuple[str | None, ...], Any] = {}
        self.cache: dict[tuple[Any, ...], dict[str, Tensor]] | None = {} if cache else None

    def __call__(self, case: Case, files: Source | None = None) -> dict[str, Any]:
        self.require_channels(case)
        item: dict[str, Any] = {"case": case["case"]}
        files = files or Source()  # both frames and arrays may ask for a file
        grid = self.grid_of(case, files)
        placed = self.frames(case, files)
        for side, view in (("fixed", _View(placed.fixed)), ("moving", _View(*placed[1:]))):
            tensors = self._side(case, side, view, grid, files)
            item |= {f"{side}_{key}": value for key, value in tensors.items()}
        if "displacement" in case:
            item |= self._true_displacement(case, item, grid, files)
        item |= self._paired(case, item, files)
        counts = {side: len(item[f"{side}_landmarks"]) for side in SIDES}
        unlike = unlike_landmarks(case, counts)
        if unlike:
            raise InputError(unlike)
        if not all(counts.values()):  # one of them has no partner's: no supervision from this pair
            item |= {name: item[name][:0] for name in item if name.endswith(("landmarks", "landmark_weights"))}
        return item

    def _paired(self, case: Case, item: Mapping[str, Any], files: Source) -> dict[str, Tensor]:
        """The landmarks with those of the files, which stand behind a label's channels, in the order of their names."""
        key = tuple(case.get(f"{side}_landmarks") for side in SIDES)
        if key not in self.paired:
            found = paired_landmarks(case, files)
            self.paired[key] = None if found is None or found.order is None else (found.counts, found.order)
        paired = self.paired[key]
        if paired is None:
            return {}
        moved = {}
        for side, count, order in zip(SIDES, *paired, strict=True):
            for name in {f"{side}_landmarks", f"{side}_landmark_weights"} & item.keys():
                values, first = item[name], len(item[name]) - count
                moved[name] = torch.cat([values[:first], values[first:][torch.from_numpy(order)]])
        return moved

    def require_channels(self, case: Case) -> None:
        """Raises ``InputError`` where the case is not of as many channels as the network takes."""
        many = 1 + len(channels.keys(case, "moving"))
        if self.image_channels not in (1, many):
            told = f"{case['moving_image']}: {many} of the {self.image_channels} channels that the network takes"
            raise InputError(f"{told}; give as many: --channels, --fixed-channel or a list of images")

    def grid_of(self, case: Case, files: Source | None = None) -> Grid:
        """The working grid of a case."""
        return self.frames.grid_of(case, files)

    def _side(self, case: Case, side: str, view: _View, grid: Grid, files: Source) -> dict[str, Tensor]:
        beside = [case[key] for key in channels.keys(case, side)]
        paths, image = (*(case.get(f"{side}_{kind}") for kind in KINDS), *beside), case[f"{side}_image"]
        make = functools.partial(self._make, paths, side, view, grid.shape, files)
        # An image's frame of its own is the same in all pairs; any other, and what is bent, is this pair's alone.
        if view.is_bent or not np.array_equal(view.frame, self.frames.around(image, grid, files)):
            return make()
        return self._kept(paths, grid, (view.frame,), make)

    def _kept(
        self, paths: tuple[Any, ...], grid: Grid, frames: Sequence[np.ndarray], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``make`` gives of these files in these frames; from memory or from the store where it is there."""
        key = (*paths, *(frame.tobytes() for frame in frames))
        if self.cache is not None and key in self.cache:
            return self.cache[key]
        told = {"landmark_channels": self.landmark_channels, "mask_rims": self.mask_rims}
        about = {"frames": [frame.tolist() for frame in frames], "shape": grid.shape, **told}
        tensors = make() if self.store is None else self.store.tensors(paths, about, make)
        if self.cache is not None:
            self.cache[key] = tensors
        return tensors

    def _make(
        self, paths: Sequence[Any], side: str, view: _View, shape: tuple[int, ...], files: Source
    ) -> dict[str, Tensor]:
        image = paths[0]
        seen = _covered(files.image(image), view.frame, shape)
        if not seen:
            raise InputError(f"{image}: nothing of it lies where the fixed image does; take --affine affine or centre")
        if seen < 0.9 and side == "fixed":
            log.warning("%s: the working grid covers only %.0f %% of it, around its middle", image, 100 * seen)
        tensors = self._load(paths, view, shape, files) | {"affine": torch.from_numpy(view.frame)}
        beside = {"bend": view.bend, "field": view.field}
        return tensors | {name: torch.from_numpy(value) for name, value in beside.items() if value is not None}

    def _true_displacement(self, case: Case, item: Mapping[str, Any], grid: Grid, files: Source) -> dict[str, Tensor]:
        frames = item["fixed_affine"].numpy(), item["moving_affine"].numpy()

        def make() -> dict[str, Tensor]:
            field, affine = files.read(case["displacement"], displacement.read_displacement)
            if len(field) > len(grid.shape):
                field, affine = lift.displacement_in_planes(field, affine, files.image(case["moving_image"]))
            if len(field) != len(grid.shape):
                raise InputError(f"{case['displacement']}: is {len(field)}-D, the images are not; give one of theirs")
            u = displacement.grid_displacement(field, affine, *frames, grid.shape)
            if "moving_bend" in item:
                u = homography.after(u, np.linalg.inv(item["moving_bend"].numpy()))
            if "moving_field" in item:
                x = np.indices(grid.shape)
                u = initial.back(item["moving_field"].numpy(), x + u) - x
            return {"displacement": torch.from_numpy(u).float()}

        if {"moving_bend", "moving_field"} & item.keys():
            return make()
        return self._kept((case["displacement"], case["moving_image"]), grid, frames, make)

    @staticmethod
    def scale(array: np.ndarray) -> np.ndarray:
        """An image's values as a network sees them."""
        return images.normalise(array)

    def _load(self, paths: Sequence[Any], view: _View, shape: tuple[int, ...], files: Source) -> dict[str, Tensor]:
        path, label, landmarks, mask, ignore, *more = paths
        dim, affine = len(shape), view.affine
        shown = [self._shown(files.image(one), view, shape) for one in (path, *more)]
        labels, points, back = np.zeros(shape, np.int32), [np.zeros((0, dim))], np.linalg.inv(affine)
        weights: dict[str, np.ndarray] = {}
        if label:
            found, channels = files.label(label, self.landmark_channels, image=path)
            labels = images.resample(found, affine, shape, order=0, field=view.field)
            if channels is not None:
                points.append(geometry.carry(back @ found.affine, channels))
        if landmarks:
            named = files.landmarks(landmarks, path)
            points.append(geometry.carry(back, geometry.flipped(named.points)))
            if named.weights is not None:  # those of channels have none
                weights = {"landmark_weights": np.r_[np.ones(sum(map(len, points[:-1]))), named.weights]}
        masks = [_mask(one, (mask, ignore), files, view, shape, rims=self.mask_rims) for one in (path, *more)]
        return {
            "image": torch.from_numpy(shown[0])[None],
            "label": torch.from_numpy(labels)[None],
            "landmarks": torch.from_numpy(view.straight(np.concatenate(points))).float(),
            "mask": functools.reduce(torch.minimum, masks)[None],
            **{key: torch.from_numpy(value).float() for key, value in weights.items()},
            **({"channels": torch.from_numpy(np.stack(shown[1:]))} if more else {}),
        }

    def _shown(self, image: Image, view: _View, shape: tuple[int, ...]) -> np.ndarray:
        grey = image._replace(array=self.scale(image.array))
        return images.resample(grey, view.affine, shape, order=1, field=view.field)


def _mask(
    image: str, drawn: tuple[str | None, str | None], files: Source, view: _View, shape: tuple[int, ...], *, rims: bool
) -> Tensor:
    """(*shape) float32: 1 inside the image's field of view (everywhere without ``rims``), its data, its mask file.

    ``drawn``: the mask's file, and that of what is to be ignored.
    """
    seen, known = files.image(image), files.known(image)
    whole, inside = seen._replace(array=np.ones(seen.array.shape, np.uint8)), np.ones(shape, bool)
    parts = [files.label(path, image=image)[0] for path in drawn if path is not None]
    if drawn[1] is not None:
        parts[-1] = parts[-1]._replace(array=(parts[-1].array == 0).astype(np.uint8))
    for part in parts + ([whole] if rims else []):
        inside &= images.resample(part, view.affine, shape, order=0, field=view.field) != 0
    if known is not None:  # nothing of what lies between voxels with and without
        data = seen._replace(array=known.astype(np.float32))
        inside &= images.resample(data, view.affine, shape, order=1, field=view.field) > 1 - SLIGHT
    told = [path for path in drawn if path is not None]
    if told and not inside.any():
        warn_once(f"{image}: nothing of what counts by {' and '.join(told)} lies on the working grid")
    if inside.all():  # most are: one number in memory in place of a volume
        return torch.ones(()).expand(shape)
    return torch.from_numpy(inside).float()


def _covered(image: Image, affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """Share of an image's volume inside the working grid, along the grid's axes."""
    low, high = extent(image.array.shape, image.affine, affine)
    inside = np.minimum(high, np.array(shape) - 0.5) - np.maximum(low, -0.5)
    return float(np.prod(inside.clip(min=0) / (high - low)))


def collate_pairs(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batch items of ``LoadPair``: tensors stacked, landmarks NaN-padded, ``case`` a list.

    Raises:
        InputError: a spatial transform of MONAI's moved a tensor, whose affine and landmarks know nothing of it.
    """
    for key, value in ((key, value) for item in items for key, value in item.items()):
        if getattr(value, "applied_operations", None):
            name = value.applied_operations[-1].get("class", "a transform")
            raise InputError(
                f"{name} moved {key}, and its affine and landmarks did not follow: give MONAI's transforms to "
                "regpipe.MonaiTransforms(load, [...]), which loads the pairs and sees to that"
            )
    batch: dict[str, Any] = {"case": [item["case"] for item in items]}
    for key in set.intersection(*({*item} for item in items)):  # not every case has a true displacement
        if key.endswith(("landmarks", "landmark_weights")):
            points = [item[key] for item in items]
            batch[key] = torch.nn.utils.rnn.pad_sequence(points, True, float("nan"))
        elif key != "case":
            batch[key] = torch.stack([item[key] for item in items])
    return batch
