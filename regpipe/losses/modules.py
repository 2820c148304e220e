"""Losses of other packages as terms: any ``torch.nn.Module`` that compares two tensors, or measures one field.

MONAI's ``LocalNormalizedCrossCorrelationLoss``, ``GlobalMutualInformationLoss``, ``BendingEnergyLoss``,
``DiffusionLoss`` and ``DiceLoss`` fit as they are; a bundle lists them by name in ``loss_terms``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regpipe.data.pairs import SIDES
from regpipe.fields.algebra import Registration, warp_both
from regpipe.losses.structures import one_hot, shared_ids
from regpipe.losses.terms import (
    Function,
    Options,
    Target,
    Term,
    nothing,
    of_displacements,
    of_images,
    of_velocity,
)
from regpipe.utils.errors import InputError, out_of_memory

Seen = Literal["images", "displacement", "velocity", "labels"]
OF_LABELS = ("Dice", "Tversky", "Jaccard", "Hausdorff")  # in the names of MONAI's losses of one-hot labels
FAULTS = (ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError)  # what a module says of its input


def term_of(module: nn.Module, sees: Seen | None = None) -> Term:
    """A module as a term: its scalar, both ways, in float32; it learns nothing.

    Args:
        module: called as ``module(pred, target)`` with images (B, 1, *spatial) in [0, 1] or one-hot labels
            (B, K, *spatial), as ``module(field)`` with vectors (B, D, *spatial) in voxels.
        sees: ``images`` (0 outside both masks), ``displacement``, ``velocity`` or ``labels``. None: a module of one
            argument the displacement, of two the images, and Dice and its like the labels.

    Raises:
        InputError: no module, nothing of the kind, or a call with other arguments.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"loss_terms: {type(module).__name__} is no torch.nn.Module: give _target_ a loss's class")
    sees = _guessed(module) if sees is None else sees
    if sees not in get_args(Seen):
        raise InputError(f"a loss sees one of {', '.join(get_args(Seen))}, not '{sees}'")
    call = _guarded(module.eval().requires_grad_(False))
    if sees == "labels":
        return Term(_of_labels(call), "supervision", "label", module=module)
    if sees == "images":
        shown = of_images(lambda a, b, *, mask: call(a, b) if mask is None else call(a * mask, b * mask))
        return Term(shown, "similarity", module=module)
    measured = of_displacements(call) if sees == "displacement" else of_velocity(call)
    return Term(measured, "regularity", module=module)


def terms_of(given: Mapping[str, nn.Module | Term], known: Mapping[str, Term]) -> dict[str, Term]:
    """``known`` and what is given by name, modules as ``term_of`` makes terms of them.

    Raises:
        InputError: as ``term_of``; a name that is taken.
    """
    taken = sorted(set(given) & {*known, "loss"})
    if taken:
        raise InputError(f"loss_terms: {', '.join(taken)} is a term already: give it another name")
    return {**known, **{name: term if isinstance(term, Term) else term_of(term) for name, term in given.items()}}


def in_words(term: Term) -> str:
    """What a module is, for records: its class and the plain values that it keeps."""
    kept = {k: v for k, v in sorted(vars(term.module).items()) if k != "training" and not k.startswith("_")}
    plain = ", ".join(f"{k}={v}" for k, v in kept.items() if isinstance(v, (bool, int, float, str)))
    return f"{type(term.module).__name__}({plain})"


def _guessed(module: nn.Module) -> Seen:
    if any(word in type(module).__name__ for word in OF_LABELS):
        return "labels"
    parameters = inspect.signature(module.forward).parameters.values()
    needed = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if needed not in (1, 2):
        raise InputError(
            f"loss_terms: {type(module).__name__} takes {needed} arguments, a loss (pred, target) or one field: "
            "wrap it in a torch.nn.Module that does"
        )
    return "images" if needed == 2 else "displacement"


def _guarded(module: nn.Module) -> Callable[..., Tensor]:
    """The module's scalar; what it cannot take is told in a line."""

    def call(*tensors: Tensor) -> Tensor:
        try:
            value: Any = module.to(tensors[0].device)(*(tensor.float() for tensor in tensors))
        except FAULTS as error:
            if out_of_memory(error) or type(tensors[0]).__name__ == "FakeTensor":  # a dry run's: inference.memory
                raise
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
            why = " ".join(str(error).split())[:200]
            raise InputError(f"loss {type(module).__name__} cannot take {shapes}: {why}") from error
        if not isinstance(value, Tensor):
            raise InputError(f"loss {type(module).__name__} gives {type(value).__name__}, not a tensor")
        return value.mean()

    return call


def _of_labels(call: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Linearly warped one-hot labels against those they should meet, both ways, pair by pair."""

    def term(r: Registration, target: Target, options: Options) -> Tensor:
        if not all(f"{side}_label" in target for side in SIDES):
            return nothing(r)
        found = []
        for i, (fixed, moving) in enumerate(zip(target["fixed_label"], target["moving_label"], strict=True)):
            ids = [k for k in shared_ids(fixed, moving) if not options.label_ids or k in options.label_ids]
            if ids:
                one, other = one_hot(fixed[None], ids), one_hot(moving[None], ids)
                warped = warp_both(other, one, r.displacement[i : i + 1], r.inverse[i : i + 1], layers=options.layers)
                found.append((call(warped[0], one) + call(warped[1], other)) / 2)
        return torch.stack(found).mean() if found else nothing(r)

    return term
