"""Names that the shell completes. They are copies, because their own modules take seconds to import.

A test compares each copy with its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

BACKBONES = ("resnet18", "vgg16", "alexnet", "plain")
SHIPPED = (*BACKBONES[:3], "none")
NETWORKS = ("symnet",)
PHANTOMS = ("ultrasound", "mr", "synthetic")
STAGES = ("none", "centre", "rigid", "similarity", "affine")
SOURCES = ("images", "landmarks", "both")
METRICS = ("mi", "ncc")
SIMILARITIES = ("lncc", "mind", "mi", "ncc", "mse")
FORMATS = ("displacement", "itk", "ants", "fsl", "freesurfer", "l2r")
PAIRINGS = ("all", "first")
INTERPOLATIONS = ("auto", "linear", "bspline", "nearest", "label")
BIDS_PAIRINGS = ("sessions", "subjects", "modalities")


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes a name; typer's ``autocompletion``."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes the last of several names with commas between; names that are already given are not offered."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        there = before.split(",")
        return [before + comma + name for name in names if name.startswith(last) and name not in there]

    return complete
