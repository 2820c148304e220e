"""A registered pair as metrics, warnings, pictures and TensorBoard see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpipe.fields.algebra import LAYERS, Layers, Registration, warp
from regpipe.metrics.measures import bend_of, determinant_of, shared_labels, tre
from regpipe.metrics.metric import columns
from regpipe.utils.errors import InputError

KEPT = "measured"  # in a prediction, what ``measured`` gave of it


@dataclass(frozen=True)
class Measured:
    """A registered pair on the working grid; each of its numbers is computed once."""

    fixed: Tensor  # (1, 1, *S), images in [0, 1]
    moving: Tensor
    warped: Tensor  # the moving one, onto the fixed one
    labels: tuple[Tensor, Tensor]  # (1, 1, *S), the fixed one's, and the moving one's, warped by nearest neighbour
    moving_label: Tensor
    ids: Sequence[int]  # of the structures that both images hold
    points: tuple[Tensor, Tensor]  # (K, D) landmarks in voxels, fixed and moving; NaN: not known
    displacement: Tensor  # (D, *S) voxels
    inverse: Tensor
    spacing: Sequence[float]  # mm per voxel
    moving_mm: Sequence[float] | Tensor  # see ``tre``
    bend: Callable[[Tensor], Tensor] | None
    layers: Layers  # what warps and integrates

    @classmethod
    def of(
        cls, registration: Registration, item: Mapping[str, Any], spacing: Sequence[float], *, layers: Layers = LAYERS
    ) -> Measured:
        """One pair; the arguments, and what is raised, as ``measure``'s."""
        u = registration.displacement
        if not {"fixed_image", "moving_image"} <= item.keys():
            raise InputError(f"a batch of {', '.join(map(str, item))}: name its images fixed_image and moving_image")
        fixed, moving = (item[f"{side}_image"].to(u.device) for side in ("fixed", "moving"))
        none = {"label": torch.zeros_like(fixed), "landmarks": fixed.new_zeros(1, 0, u.shape[1])}
        labels, points = (
            tuple(item.get(f"{side}_{kind}", none[kind]) for side in ("fixed", "moving"))
            for kind in ("label", "landmarks")
        )
        fixed_label, moving_label = (label.to(u.device, torch.int32) for label in labels)
        return cls(
            fixed,
            moving,
            registration.warped_moving,
            (fixed_label, warp(moving_label, u, mode="nearest")),
            moving_label,
            shared_labels(fixed_label, moving_label),
            (points[0][0], points[1][0]),
            u[0],
            registration.inverse[0],
            spacing,
            item["moving_affine"][0, :-1, :-1] if "moving_affine" in item else spacing,  # where errors are lengths
            bend_of(item),
            layers,
        )

    @functools.cached_property
    def before(self) -> Measured:
        """The same pair with no displacement."""
        still = torch.zeros_like(self.displacement)
        labels = self.labels[0], self.moving_label
        return replace(self, warped=self.moving, labels=labels, displacement=still, inverse=still)

    @functools.cached_property
    def determinant(self) -> Tensor:
        """det(I + grad u), (*S)."""
        return determinant_of(self.displacement)

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """``tre`` of each landmark."""
        return tre(*self.points, self.displacement, self.moving_mm, bend=self.bend)

    @functools.cached_property
    def row(self) -> dict[str, float]:
        """What ``measure`` gives."""
        return {
            name: metric.measure(self.before if name.endswith("_before") else self)
            for name, metric in columns().items()
            if metric.measure is not None
        }


def measure(
    registration: Registration, item: Mapping[str, Any], spacing: Sequence[float], *, layers: Layers = LAYERS
) -> dict[str, float]:
    """Every metric of ``metrics.metric.columns`` for one case: one row of the CSV.

    Args:
        registration: of batch size 1.
        item: a batch of size 1 as ``data.pairs.collate_pairs`` gives it, on any device; of one's own: ``fixed_image``
            and ``moving_image``, and of the rest what there is.
        spacing: mm per voxel of the working grid.
        layers: what warps; labels are warped by nearest neighbour, by ``fields.algebra.warp`` always.

    Returns:
        name -> number; NaN for labels or landmarks that the case does not have. ``before`` is after the affine stage,
        projective included: what measures the displacement measures what was found beyond it.

    Raises:
        InputError: the batch has not both images.
    """
    return Measured.of(registration, item, spacing, layers=layers).row


def measured(
    prediction: Any, batch: Mapping[str, Any], spacing: Sequence[float], *, layers: Layers = LAYERS
) -> list[Measured]:
    """Each pair of a batch, as ``Measured``. Kept in the prediction: who asks next gets the same.

    Args:
        prediction: ``Registration``'s fields by name, as the inferers give them.
        batch: as ``data.pairs.collate_pairs`` gives it.
        spacing, layers: as ``measure``'s; only those of the first call count.
    """
    if KEPT not in prediction:
        parts = [slice(i, i + 1) for i in range(len(batch["case"]))]
        items = [{name: value[one] for name, value in batch.items()} for one in parts]
        pairs = zip((Registration.of(prediction, one) for one in parts), items, strict=True)
        prediction[KEPT] = [Measured.of(*pair, spacing, layers=layers) for pair in pairs]
    found: list[Measured] = prediction[KEPT]
    return found
