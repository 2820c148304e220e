"""The terms that training can minimise, by name: ``losses.loss`` sums them.

A term's function is ``(registration, target, options) -> scalar``, listed by name in ``TERMS``; its docstring
says what zero means and in which unit it counts. What compares images is in ``losses.similarity``, what measures
fields in ``losses.regularity``.
Every term is computed in float32, outside any autocast: LNCC in half precision is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regpipe.data.pairs import SIDES, Case
from regpipe.fields.algebra import LAYERS, Layers, Registration, resize, resize_image, sample_at, warp_both
from regpipe.losses import regularity, similarity
from regpipe.losses.lncc import lncc, local_correlation
from regpipe.losses.noise import floors_of
from regpipe.losses.structures import one_hot, overlap, shared_ids, signed_distances
from regpipe.networks.encoders import Encoder
from regpipe.networks.extractor import Extractor
from regpipe.utils.errors import InputError

Target = Mapping[str, Any]  # a collated batch, see data.load; its ``channels``, where there are any: such, too
Dissimilarity = Callable[..., Tensor]  # f(a, b, *, mask) -> scalar, see losses.similarity


class Options(NamedTuple):
    """What the terms may be told."""

    window: int = 9  # LNCC, voxels
    label_ids: tuple[int, ...] = ()  # structures that label supervision sees; empty: all that the batch holds
    encoder: Encoder | Extractor | None = None  # frozen, for features
    layers: Layers = LAYERS  # what warps and integrates


FLAT = 1e-3  # variance below which a window of a clean image counts as flat: grey values are in [0, 1]

Function = Callable[[Registration, Target, Options], Tensor]  # the scalar of a term


def nothing(r: Registration) -> Tensor:
    """0 with a gradient graph: what a term is for pairs that lack what it needs."""
    return r.displacement.sum() * 0.0


def masks_of(target: Target) -> list[Tensor] | None:
    """Both images' masks (B, 1, *spatial), fixed first; None where every voxel of the batch counts."""
    given = [target.get(f"{side}_mask") for side in SIDES]
    if all(mask is None or bool((mask >= 1).all()) for mask in given):
        return None
    shown = [target[f"{side}_image"] for side in SIDES]
    return [torch.ones_like(x) if mask is None else mask.float() for mask, x in zip(given, shown, strict=True)]


@torch.no_grad()
def overlaps(r: Registration, target: Target, options: Options) -> tuple[Tensor | None, Tensor | None]:
    """Where moving on fixed, and fixed on moving, can be compared: one's mask times the other's, warped onto it."""
    masks = masks_of(target)
    if masks is None:
        return None, None
    fixed, moving = masks
    warped_moving, warped_fixed = warp_both(moving, fixed, r.displacement, r.inverse, layers=options.layers)
    return fixed * warped_moving, moving * warped_fixed


def both_ways(r: Registration, target: Target, options: Options, dissimilarity: Dissimilarity) -> Tensor:
    """Mean of a dissimilarity over moving-onto-fixed and fixed-onto-moving, where both are in sight."""
    on_fixed, on_moving = overlaps(r, target, options)
    forward = dissimilarity(r.warped_moving, target["fixed_image"], mask=on_fixed)
    return (forward + dissimilarity(r.warped_fixed, target["moving_image"], mask=on_moving)) / 2


def of_images(dissimilarity: Dissimilarity) -> Function:
    """The term of a function of two images: both ways."""
    return lambda r, target, options: both_ways(r, target, options, dissimilarity)


def of_velocity(measure: Callable[[Tensor], Tensor]) -> Function:
    """The term of a measure of fields: its mean over the velocities, one or two; the same on any grid."""

    def term(r: Registration, target: Target, options: Options) -> Tensor:
        return torch.stack([measure(v) for v in (r.back, r.velocity) if v is not None]).mean()

    return term


def of_displacements(measure: Callable[[Tensor], Tensor]) -> Function:
    """The term of a measure of fields: its mean over both directions."""
    return lambda r, target, options: torch.stack([measure(u) for u in (r.displacement, r.inverse)]).mean()


Measure = Callable[..., Tensor]  # measure(a, b, *, mask, window, floors)


def _each_way(
    r: Registration, target: Target, options: Options, measure: Measure
) -> list[tuple[Tensor, Tensor | None]]:
    """A measure of local correlation, and the mask that it was told: on the fixed image's grid and the moving one's."""
    masks, floors = overlaps(r, target, options), floors_of(target)
    pairs = ((r.warped_moving, target["fixed_image"]), (r.warped_fixed, target["moving_image"]))
    told = zip(pairs, masks, (floors[::-1], floors), strict=True)
    return [(measure(*pair, mask=mask, window=options.window, floors=floor), mask) for pair, mask, floor in told]


def _lncc(r: Registration, target: Target, options: Options) -> Tensor:
    """Local cross-correlation, both ways, of what stands out from each image's noise; in [0, 1]."""
    (forward, _), (back, _) = _each_way(r, target, options, lncc)
    return (forward + back) / 2


@torch.no_grad()
def explained(r: Registration, target: Target, options: Options) -> list[tuple[Tensor, Tensor | None]]:
    """Where each image (B, 1, *spatial) explains the other: their squared local correlation, on the fixed image's grid
    and on the moving one's, in [0, 1], 0 where a mask leaves them out; and the mask."""
    found = _each_way(r, target, options, local_correlation)
    return [(x if mask is None else x * mask, mask) for x, mask in found]


def _features(r: Registration, target: Target, options: Options) -> Tensor:
    """1 - cosine of the frozen encoder's features, both ways; in [0, 2]."""
    assert options.encoder is not None  # RegistrationLoss has seen to it
    encoder = options.encoder
    return both_ways(r, target, options, lambda a, b, mask: similarity.feature_similarity(a, b, encoder, mask=mask))


def _midway(r: Registration, target: Target, options: Options) -> Tensor:
    """LNCC of both images in the midway space: exp(v/2) and exp(-v/2), or exp of SYMNet's two velocities."""
    to_fixed, to_moving = (r.velocity / 2, -r.velocity / 2) if r.back is None else (r.velocity, r.back)
    halves = torch.cat([to_fixed, to_moving])
    images, masks = torch.cat([target["moving_image"], target["fixed_image"]]), masks_of(target)
    u = resize(options.layers.dvf2ddf(halves), images.shape[2:])
    warp = options.layers.warp
    moving, fixed = warp(images, u).chunk(2)
    mask = None if masks is None else torch.stack(warp(torch.cat(masks[::-1]), u.detach()).chunk(2)).prod(0)
    return lncc(moving, fixed, mask=mask, window=options.window, floors=floors_of(target)[::-1])


def _magnitude(r: Registration, target: Target, options: Options) -> Tensor:
    """SYMNet's balance: how much larger one direction's mean absolute displacement is than the other's, voxels."""
    return (r.displacement.abs().mean() - r.inverse.abs().mean()).abs()


def _dice(r: Registration, target: Target, options: Options) -> Tensor:
    """1 - soft Dice of linearly warped one-hot labels, both ways, over the labels both images of a pair hold."""
    if not all(f"{side}_label" in target for side in SIDES):
        return nothing(r)
    ids = options.label_ids or shared_ids(target["fixed_label"], target["moving_label"])
    if not ids:
        return nothing(r)
    fixed, moving = (one_hot(target[key], ids) for key in ("fixed_label", "moving_label"))
    held = (fixed.flatten(2).sum(2) > 0) & (moving.flatten(2).sum(2) > 0)
    return 1 - warped_overlap(r, fixed, moving, options)[held].mean() if held.any() else nothing(r)


def with_distances(target: Target, options: Options) -> Target:
    """The target with ``fixed_distance`` and ``moving_distance``, ``signed_distances`` of both images' structures."""
    if "fixed_distance" in target or not all(f"{side}_label" in target for side in SIDES):
        return target
    ids = options.label_ids or shared_ids(target["fixed_label"], target["moving_label"])
    return {**target, **{f"{side}_distance": signed_distances(target[f"{side}_label"], ids) for side in SIDES}}


def _distance(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean squared difference of the structures' distance maps, both ways; in [0, 4]. It reaches where none overlap."""
    known = with_distances(target, options)
    fixed, moving = (known.get(f"{side}_distance") for side in SIDES)
    if fixed is None or moving is None or not fixed.numel():
        return nothing(r)
    warped = torch.cat(warp_both(moving, fixed, r.displacement, r.inverse, layers=options.layers))
    return (warped - torch.cat([fixed, moving])).square().mean()


def warped_overlap(r: Registration, fixed: Tensor, moving: Tensor, options: Options) -> Tensor:
    """(B, K): soft Dice of K structures (B, K, *spatial), each image's warped onto the other's, mean of both ways."""
    warped_moving, warped_fixed = warp_both(moving, fixed, r.displacement, r.inverse, layers=options.layers)
    return (overlap(fixed, warped_moving) + overlap(moving, warped_fixed)) / 2


def _anatomy(r: Registration, target: Target, options: Options) -> Tensor:
    """How far each image's structures, as the network sees them, are from its labels: half cross-entropy, half Dice.

    An image without any of ``label_ids`` is left out.
    """
    if not all(f"{side}_label" in target for side in SIDES):
        return nothing(r)
    labels = torch.cat([target["fixed_label"], target["moving_label"]])  # (2B, 1, *spatial)
    truth = one_hot(labels, options.label_ids)
    logits = resize_image(_anatomy_of(target), labels.shape[2:])
    labelled = truth.flatten(1).amax(1) > 0
    if not labelled.any():
        return logits.sum() * 0.0
    truth, logits = truth[labelled], logits[labelled]
    entropy = nn.functional.cross_entropy(logits, torch.cat([1 - truth.sum(1, keepdim=True), truth], 1))
    held = truth.flatten(2).amax(2) > 0
    return (entropy + 1 - overlap(logits.softmax(1)[:, 1:], truth)[held].mean()) / 2


def _predicted_dice(r: Registration, target: Target, options: Options) -> Tensor:
    """1 - soft Dice of the structures that the network sees in both images, both ways: it needs no label."""
    tissue = resize_image(_anatomy_of(target).detach().softmax(1)[:, 1:], r.displacement.shape[2:])
    fixed, moving = tissue.chunk(2)
    return 1 - warped_overlap(r, fixed, moving, options).mean()


def _anatomy_of(target: Target) -> Tensor:
    """The network's logits (2B, K + 1, *grid), fixed images first."""
    if "anatomy" not in target:
        raise InputError(
            "loss terms anatomy and predicted_dice need a network with structures: give anatomy a weight and label_ids"
        )
    return torch.cat(target["anatomy"].chunk(2, dim=1))


def _landmarks(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean distance of corresponding landmarks in voxels, both ways; NaN rows are missing points.

    ``landmark_weights`` (B, K), where there are any, weigh them.
    """
    if not all(f"{side}_landmarks" in target for side in SIDES):
        return nothing(r)
    ends = (target["fixed_landmarks"], target["moving_landmarks"])
    valid = ~(ends[0].isnan() | ends[1].isnan()).any(-1)
    if not valid.any():
        return nothing(r)
    weights = target["landmark_weights"][valid] if "landmark_weights" in target else 1.0
    distances = []
    for u, (start, end) in ((r.displacement, ends), (r.inverse, ends[::-1])):
        moved = start + sample_at(u, start.nan_to_num())
        apart = ((moved - end)[valid].square().sum(-1) + 1e-6).sqrt()
        distances.append((weights * apart).sum() / (weights + 0 * apart).sum().clamp(min=1e-6))
    return torch.stack(distances).mean()


def _known_field(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean squared distance to the true displacement ``target["displacement"]``, voxels^2 (phantoms)."""
    if "displacement" not in target:
        raise InputError("loss term known_field: these pairs have no displacements/ to learn from; give it no weight")
    return (r.displacement - target["displacement"]).square().sum(1).mean()


def _end_point(r: Registration, target: Target, options: Options) -> Tensor:
    """Mean distance in voxels of both displacements to the true ones, each within its image's mask.

    Both are ``displacement`` and ``inverse`` of ``phantoms.synthetic``; pairs read from files have only the first.
    """
    if "displacement" not in target:
        raise InputError("loss term end_point: these pairs have no displacements/ to learn from; give it no weight")
    errors = []
    for name, u, side in (("displacement", r.displacement, "fixed"), ("inverse", r.inverse, "moving")):
        if name in target:
            error = ((u - target[name]).square().sum(1, keepdim=True) + 1e-4).sqrt()
            errors.append(similarity.masked_mean(error, target.get(f"{side}_mask")))
    return torch.stack(errors).mean()


def _clean(r: Registration, target: Target, options: Options) -> Tensor:
    """LNCC of both scenes in one contrast and without noise, both ways, as ``phantoms.synthetic`` has them; in [0, 1].

    What the images themselves look like does not matter: a similarity of like contrasts teaches any contrast onto any.
    """
    if not all(f"{side}_clean" in target for side in SIDES):
        raise InputError("loss term clean: only pairs of configs/synthetic.yaml have clean images; give it no weight")
    fixed, moving = (target[f"{side}_clean"] for side in SIDES)
    warped = torch.cat(warp_both(moving, fixed, r.displacement, r.inverse, layers=options.layers))
    on_fixed, on_moving = overlaps(r, target, options)
    mask = None if on_fixed is None or on_moving is None else torch.cat([on_fixed, on_moving])
    return lncc(warped, torch.cat([fixed, moving]), mask=mask, window=options.window, floors=(FLAT, FLAT))


class Term(NamedTuple):
    """A term of the loss, and what else is known of it."""

    function: Function
    kind: Literal["similarity", "regularity", "supervision"]
    needs: str = ""  # what only pairs of a training have: label, landmarks, displacement, clean
    weight: float | None = None  # in refinement, of like effect; None: refinement does not offer it
    module: nn.Module | None = None  # what ``losses.modules`` made it of


TERMS: dict[str, Term] = {
    "auto": Term(_lncc, "similarity", weight=1.0),  # for which refinement lays both images in one contrast
    "lncc": Term(_lncc, "similarity", weight=1.0),
    "mind": Term(of_images(similarity.mind), "similarity", weight=10.0),  # MIND-SSC, squared differences; in [0, 1]
    "mi": Term(of_images(similarity.mi), "similarity", weight=1.0),  # minus mutual information, nats
    "ncc": Term(of_images(similarity.ncc), "similarity", weight=1.0),  # 1 - global correlation; in [0, 2]
    "mse": Term(of_images(similarity.mse), "similarity", weight=10.0),
    "features": Term(_features, "similarity", weight=3.0),
    "midway": Term(_midway, "similarity"),
    "diffusion": Term(of_velocity(regularity.diffusion), "regularity"),  # voxels per voxel, squared, as what follows
    "bending": Term(of_velocity(regularity.bending), "regularity"),  # on the velocity's grid
    "elastic": Term(of_velocity(regularity.elastic), "regularity"),  # mu = lambda = 1
    "divergence": Term(of_velocity(regularity.divergence), "regularity"),  # costs local changes of volume, no shear
    "jacobian": Term(of_displacements(regularity.jacobian), "regularity"),  # SYMNet's orientation; 0 without folds
    "log_jacobian": Term(of_displacements(regularity.log_jacobian), "regularity"),  # 0 where no volume changes
    "magnitude": Term(_magnitude, "regularity"),
    "dice": Term(_dice, "supervision", "label"),
    "distance": Term(_distance, "supervision", "label"),
    "anatomy": Term(_anatomy, "supervision", "label"),
    "predicted_dice": Term(_predicted_dice, "supervision"),
    "landmarks": Term(_landmarks, "supervision", "landmarks"),
    "known_field": Term(_known_field, "supervision", "displacement"),
    "end_point": Term(_end_point, "supervision", "displacement"),
    "clean": Term(_clean, "similarity", "clean"),
}


def needing(weights: Mapping[str, float], *what: str, terms: Mapping[str, Term] = TERMS) -> list[str]:
    """The terms with a weight that need one of these (``Term.needs``) of a pair."""
    return [name for name in sorted(weights) if weights[name] and name in terms and terms[name].needs in what]


def supervision(
    weights: Mapping[str, float], *, landmark_channels: int | None, terms: Mapping[str, Term] = TERMS
) -> dict[str, str]:
    """The terms of a loss that need labels or landmarks -> which of the two files holds them."""
    kinds = {"label": "label", "landmarks": "landmarks" if landmark_channels is None else "label"}
    return {name: kinds[terms[name].needs] for name in needing(weights, *kinds, terms=terms)}


def supervised(
    pairs: Sequence[Case],
    weights: Mapping[str, float],
    *,
    landmark_channels: int | None = None,
    terms: Mapping[str, Term] = TERMS,
) -> Tensor:
    """(N,) bool: which pairs have, of both images, what a term of the loss needs."""
    kinds = set(supervision(weights, landmark_channels=landmark_channels, terms=terms).values())
    return torch.tensor([any(all(f"{side}_{kind}" in pair for side in SIDES) for kind in kinds) for pair in pairs])
