"""Several channels of a pair in one refinement or training: each its own similarity and weight, one motion.

What is optimised, and what judges, is a pair as ever, whose ``channels`` are the same pair seen in another image each
(``data.channels``); the loss's ``channels`` say how each of them compares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from regpipe.losses.loss import RegistrationLoss, views_of
from regpipe.losses.terms import TERMS, Target
from regpipe.utils.errors import InputError
from regpipe.utils.settings import RefinementOptions


class Channels(NamedTuple):
    """How the images of a side compare."""

    similarity: tuple[str, ...] = ()  # one for each channel, the first one's too, or for all; none: those of the loss
    weights: tuple[float, ...] = ()  # their shares, of whatever sum; none: alike

    @classmethod
    def of(cls, asked: RefinementOptions) -> Channels:
        """What was asked for. Raises ``InputError``: as ``weight_of``."""
        names = () if isinstance(asked.similarity, str) else tuple(asked.similarity)
        for name in names:
            weight_of(name)
        return cls(names, tuple(asked.channel_weights))

    def asked(self) -> dict[str, list[Any]]:
        """What was asked for, for records."""
        told = {"channel_similarity": self.similarity, "channel_weights": self.weights}
        return {name: [*values] for name, values in told.items() if values}

    def loss(self, first: RegistrationLoss, many: int) -> RegistrationLoss:
        """The loss of so many channels: ``first`` with its similarity shared out among them, so that its regularity
        weighs as of one. ``first`` itself if it has none, and none was asked for: no channel beside it is seen.

        Raises:
            InputError: not as many similarities or weights as channels; a weight that is not above 0; ``features``
                that ``first`` knows no network for.
        """
        similarity = self.similarity * many if len(self.similarity) == 1 else self.similarity
        for option, told in (("--similarity", similarity), ("--channel-weights", self.weights)):
            if len(told) not in (0, many):
                raise InputError(f"{option}: {len(told)} of them, the images have {many} channels; give one for each")
        weights = self.weights or (1.0,) * many
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"--channel-weights {','.join(f'{w:g}' for w in weights)}: give numbers above 0")
        alike = _similarities(first)
        if not (alike or similarity):
            return first
        unit = _strength(first) if alike else 1.0
        losses = []
        for i, weight in enumerate(weights):
            names = similarity[i : i + 1]
            of_this = {name: unit * weight_of(name) for name in names} or alike
            if "features" in of_this and first.encoder is None:
                raise InputError(
                    "--similarity features: of what network is not told; in training give features a weight in "
                    "loss_weights, in refinement name it for the first channel"
                )
            one = copy.copy(first)
            one.weights = {name: value * weight / sum(weights) for name, value in of_this.items()}
            losses.append(one)
        whole, *others = losses
        whole.weights |= {name: weight for name, weight in first.weights.items() if name not in alike}
        whole.channels = others
        return whole


ALIKE = Channels()


def of_all(
    loss: nn.Module, many: int, *, similarity: str | Sequence[str] = (), weights: Sequence[float] = ()
) -> nn.Module:
    """The loss of a training whose images have so many channels: ``Channels.loss``.

    Args:
        loss: of the first one.
        many: 1 and nothing beside it: ``loss`` itself, as is any that has no terms.
        similarity, weights: as in ``RefinementOptions``; no ``similarity``: those of ``loss`` for all.

    Raises:
        InputError: as ``Channels.loss``.
    """
    asked = RefinementOptions(similarity or "auto", channel_weights=weights)
    names = (asked.similarity,) if isinstance(asked.similarity, str) else tuple(asked.similarity)
    compared = Channels(names if similarity else (), tuple(asked.channel_weights))
    if not isinstance(loss, RegistrationLoss) or (many == 1 and compared == ALIKE):
        return loss
    return compared.loss(loss, many)


def options_of(loss: nn.Module) -> dict[str, Any]:
    """What a training is told to have such a loss of ``of_all``: ``loss_weights``, and where channels are not alike."""
    weights = dict(getattr(loss, "weights", {}))
    if not isinstance(loss, RegistrationLoss) or not loss.channels:
        return {"loss_weights": weights}
    channels = (loss, *loss.channels)
    each, units = [*map(_similarities, channels)], [*map(_strength, channels)]
    shares = [round(unit / sum(units), 6) for unit in units]
    weights |= {name: round(weight * sum(units) / units[0], 9) for name, weight in each[0].items()}
    told: dict[str, Any] = {"loss_weights": weights}
    if len(set(shares)) > 1:
        told["channel_weights"] = shares
    if len(set(map(frozenset, each))) > 1:
        told["similarity"] = [name for alike in each for name in alike]
    return told


def _similarities(loss: RegistrationLoss) -> dict[str, float]:
    """The weights of its similarities alone."""
    return {name: weight for name, weight in loss.weights.items() if loss.terms[name].kind == "similarity"}


def _strength(loss: RegistrationLoss) -> float:
    """How strongly it compares: the sum of ``_similarities``, each over its weight of like effect."""
    return sum(weight / (loss.terms[name].weight or 1.0) for name, weight in _similarities(loss).items())


def weight_of(similarity: str) -> float:
    """Of a similarity in refinement, of like effect. Raises ``InputError``: it is not offered."""
    offered = {name: term.weight for name, term in TERMS.items() if term.weight is not None}
    if similarity not in offered:
        raise InputError(f"--similarity {similarity}: choose among {', '.join(offered)}")
    return offered[similarity]


def each_pair(
    fixed: Tensor,
    moving: Tensor,
    masks: Sequence[Tensor],
    anatomy: Tensor | None,
    truth: Target,
    channels: Sequence[Tensor],
) -> Iterator[dict[str, Any]]:
    """One pair at a time, with its ``channels``: in a joint batch one pair's convergence would tell on another's."""
    given = {"fixed_image": fixed, "moving_image": moving, "anatomy": anatomy}
    beside = dict(zip(("fixed_mask", "moving_mask"), masks, strict=False))
    views = views_of(*(side.float() for side in channels)) if channels else []
    for i in range(len(fixed)):
        seen = {key: mask[i : i + 1].float() for key, mask in beside.items()}
        pair: dict[str, Any] = {key: x[i : i + 1].float() for key, x in given.items() if x is not None} | seen
        pair |= {key: tensor[i : i + 1] for key, tensor in truth.items()}
        further = [{key: x[i : i + 1] for key, x in view.items()} | seen for view in views]
        yield pair | ({"channels": further} if further else {})
