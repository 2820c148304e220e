"""The options of a registration: name, help and choices, once for commands, functions, bundles and manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from regpipe.utils.errors import InputError

LOSS = ("similarity", "smoothness", "guide")  # options of ``engines.refine.refinement_loss``
SOURCES, METRICS = ("images", "landmarks", "both"), ("mi", "ncc")
STAGES = ("auto", "none", "centre", "rigid", "similarity", "affine", "projective")


def _option(default: Any, told: str, among: Sequence[str] = ()) -> Any:
    """A field with its help, where ``{}`` stands for the names to choose from, and these if they are known here."""
    return field(default=default, metadata={"help": told, "among": among})


@dataclass(frozen=True)
class AffineOptions:
    """What is done before any deformation, see ``data.placement``. Raises ``InputError``: no such name."""

    affine: str = _option(
        "centre",
        "First: none, centre, rigid, similarity, affine, projective (2D). Default: affine; a bundle: its own.",
        STAGES,
    )
    affine_from: str = _option(
        "images", "What rigid and more are found by: images (default), landmarks, both.", SOURCES
    )
    affine_metric: str = _option("mi", "What images are aligned by: mi (default), or ncc within a modality.", METRICS)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, known = getattr(self, option.name), option.metadata["among"]
            if value not in known:
                raise InputError(f"--{option.name} {value}: choose among {', '.join(known)}")


@dataclass(frozen=True)
class RefinementOptions:
    """What drives refinement, or registering from zero, and how far; ``engines.refine.refinement_loss`` checks it.

    Raises:
        InputError: features that nothing asks for.
    """

    similarity: str | Sequence[str] = _option(
        "auto", "What refinement compares images by: {}. Of several channels one for all, or each its own: auto,mi."
    )
    smoothness: float = _option(1.0, "Of refinement; 1: the default, 0.5 follows the images further.")
    finest: int | None = _option(
        None, "Of refinement: 1 compares at full resolution, 2 at half, faster; default: by size."
    )
    guide: Sequence[str] = _option(
        (), "Of refinement: what of the pair's own leads it too: labels, landmarks, or both with a comma."
    )
    features: str | None = _option(
        None,
        "Of --similarity features: resnet18 (default), vgg16, alexnet, BACKBONE:WEIGHTS, or a TorchScript file, "
        "FILE.ts or FILE.ts=1,0.5 with weights.",
    )
    channel_weights: Sequence[float] = _option(
        (), "Of several channels: their shares of the similarity; default: alike."
    )

    def __post_init__(self) -> None:
        words = self.guide.split(",") if isinstance(self.guide, str) else self.guide
        object.__setattr__(self, "guide", tuple(name.strip() for name in words))
        object.__setattr__(self, "channel_weights", _numbers(self.channel_weights))
        given = self.similarity.split(",") if isinstance(self.similarity, str) else self.similarity
        names = tuple(name.strip() for name in given)
        object.__setattr__(self, "similarity", names if len(names) > 1 else names[0])
        if self.features is not None and self.first != "features":
            raise InputError(f"--features {self.features}: goes with --similarity features")

    @property
    def first(self) -> str:
        """The similarity of the first channel, or of all."""
        return self.similarity if isinstance(self.similarity, str) else self.similarity[0]

    @property
    def loss(self) -> dict[str, Any]:
        """What ``engines.refine.refinement_loss`` is told."""
        return {name: getattr(self, name) for name in LOSS} | {"similarity": self.first}


def _numbers(weights: str | Sequence[float]) -> tuple[float, ...]:
    try:
        words = weights.split(",") if isinstance(weights, str) else weights
        return tuple(float(word) for word in words)
    except (ValueError, TypeError):
        raise InputError(f"--channel-weights {weights}: give a number for each channel, by commas: 1,0.5") from None


def names(kind: type) -> tuple[str, ...]:
    """The options of ``AffineOptions`` or ``RefinementOptions``."""
    return tuple(option.name for option in fields(kind))


def taken(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options of ``kind`` that are in ``given``, taken out of it."""
    return {name: given.pop(name) for name in names(kind) if name in given}
