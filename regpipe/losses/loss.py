"""What training minimises: the weighted sum of ``losses.terms``."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import LAYERS, Layers, Registration, warp_both
from regpipe.losses.modules import terms_of
from regpipe.losses.terms import TERMS, Options, Target, Term
from regpipe.networks.encoders import Encoder
from regpipe.networks.extractor import Extractor
from regpipe.utils.errors import InputError


class Weighed(NamedTuple):
    """What a loss says of a batch."""

    value: Tensor  # what is minimised
    terms: dict[str, float]  # each term, unweighted, and ``value`` as ``loss``: what logs and the NaN guard read


def weigh(loss: nn.Module, prediction: Mapping[str, Tensor], target: Target) -> Weighed:
    """A loss of any kind, with its terms; one that is no ``RegistrationLoss`` has none but ``loss``."""
    if isinstance(loss, RegistrationLoss):
        return loss.weigh(prediction, target)
    value = loss(prediction, target).mean()
    return Weighed(value, {"loss": float(value.detach())})


class RegistrationLoss(nn.Module):
    """The weighted sum of named terms: ``loss(prediction, target) -> scalar``; ``weigh`` gives the terms too.

    Args:
        weights: term name -> weight; a weight of 0 leaves the term out.
        window: LNCC's window in voxels, odd.
        label_ids: the labels that ``dice`` and ``anatomy`` see; none given: all that a batch's images share.
        encoder: what ``features`` looks through (``networks.extractor`` for any other); a frozen copy is used.
        layers: what warps and integrates.
        terms: further terms by name, as modules: ``losses.modules.term_of``.

    Raises:
        InputError: a term that does not exist, a negative or non-finite weight, no term at all, an even window,
            ``features`` without an encoder.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        window: int = 9,
        label_ids: Sequence[int] = (),
        encoder: Encoder | Extractor | None = None,
        layers: Layers = LAYERS,
        terms: Mapping[str, nn.Module | Term] | None = None,
    ) -> None:
        super().__init__()
        self.channels: Sequence[RegistrationLoss] = ()  # of similarity, of further channels: ``engines.channels``
        self.terms = terms_of(terms or {}, TERMS)
        self.weights = _checked(weights, self.terms)
        if window < 1 or window % 2 == 0:
            raise InputError(f"the window of lncc must be odd, got {window} voxels")
        if "features" in self.weights and encoder is None:
            raise InputError(
                "loss term features: no encoder to look through; give RegistrationLoss(encoder=Encoder(...)) with "
                "transferred weights, or leave the term out"
            )
        if "anatomy" in self.weights and not label_ids:
            raise InputError("loss term anatomy: give --label_ids, the structures to tell apart")
        self.encoder = None if encoder is None else copy.deepcopy(encoder).requires_grad_(False)
        self.window, self.label_ids, self.layers = window, tuple(label_ids), layers
        self.eval()

    @property
    def options(self) -> Options:
        """What its terms are told."""
        return Options(self.window, self.label_ids, self.encoder, self.layers)

    def train(self, mode: bool = True) -> RegistrationLoss:
        """Stays in evaluation mode: the encoder is a fixed measure."""
        return super().train(False)

    def forward(self, prediction: Mapping[str, Tensor], target: Target) -> Tensor:
        return self.weigh(prediction, target).value

    def weigh(self, prediction: Mapping[str, Tensor], target: Target) -> Weighed:
        """The weighted sum, and each term.

        Args:
            prediction: ``Registration``'s fields by name, and ``anatomy`` where the network sees structures.
            target: the collated batch.
        """
        registration = Registration.of(prediction)
        if "anatomy" in prediction:  # what the network sees in both images
            target = {**target, "anatomy": prediction["anatomy"]}
        with torch.autocast(registration.displacement.device.type, enabled=False):
            terms = {name: self.terms[name].function(registration, target, self.options) for name in self.weights}
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            told: dict[str, float] = {}
            for i, (loss, view) in enumerate(zip(self.channels, self._views(target), strict=True), start=2):
                other = loss.weigh(seen_through(registration, view, self.layers)._asdict(), view)
                total, told = total + other.value, told | {f"{name}_{i}": x for name, x in other.terms.items()}
        return Weighed(total, told | {name: float(x.detach()) for name, x in {**terms, "loss": total}.items()})

    def _views(self, target: Target) -> Sequence[Target]:
        """The pair as each further channel shows it: ``channels`` of a refinement, or a batch's own."""
        if not self.channels:
            return ()
        if "channels" in target:
            given: Sequence[Target] = target["channels"]
            return given
        masks = {key: target[key] for key in ("fixed_mask", "moving_mask") if key in target}
        return [{**view, **masks} for view in views_of(*(target[f"{side}_channels"] for side in SIDES))]


def views_of(fixed: Tensor, moving: Tensor) -> list[Target]:
    """Further channels (B, C - 1, *spatial) of both sides as pairs (B, 1, *spatial)."""
    views = zip(fixed.split(1, 1), moving.split(1, 1), strict=True)
    return [{"fixed_image": one, "moving_image": other} for one, other in views]


def seen_through(registration: Registration, view: Target, layers: Layers) -> Registration:
    """The registration of a pair as another channel of it shows it."""
    images = view["moving_image"], view["fixed_image"]
    warped = warp_both(*images, registration.displacement, registration.inverse, layers=layers)
    return registration._replace(warped_moving=warped[0], warped_fixed=warped[1])


def _checked(weights: Mapping[str, float], terms: Mapping[str, Term]) -> dict[str, float]:
    """The terms that have a weight. Raises InputError for what cannot be one."""
    unknown = sorted(set(weights) - set(terms))
    if unknown:
        raise InputError(f"unknown loss terms {unknown}: choose among {', '.join(terms)}")
    if any(not math.isfinite(w) or w < 0 for w in weights.values()):
        raise InputError(f"loss weights must be finite and not negative, got {dict(weights)}")
    kept = {name: float(w) for name, w in weights.items() if w > 0}
    if not kept:
        raise InputError("every loss weight is 0: give at least one term a weight")
    return kept


def feature_encoder(
    weights: Mapping[str, float], backbone: str, spatial_dims: int, *, pretrained: str
) -> Encoder | None:
    """The encoder that the loss ``weights`` call for, or None where ``features`` has no weight.

    Raises:
        InputError: ``features`` has a weight, but there are no transferred weights to look through.
    """
    if not weights.get("features"):
        return None
    if pretrained == "none":
        raise InputError(
            "loss term features: random features tell nothing; give --pretrained (imagenet, a file, a bundle), "
            "or leave the term out"
        )
    return Encoder(backbone, spatial_dims, pretrained=pretrained)
