"""Why the registration of a case should not be trusted without looking: lines for people, each with its numbers.

Three questions: are the images like those that the model was trained on (``metrics.typical``), is the registration like
those of its validation, and is it sound by itself: more alike than before, enough in common, no folds. Without a
network only the last is asked. No line is no proof: see docs/trust.md for what goes unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from regpipe.io.images import Image
from regpipe.metrics.metric import METRICS
from regpipe.metrics.thresholds import judge
from regpipe.metrics.typical import Look, content, look

SLACK, SMALL_SAMPLE = 0.25, 5.0  # a range is widened by 0.25 + 5 / n of its width: n values do not reach its ends
LEAST = {"brightness": 0.1, "content": 0.1, "ncc": 0.05, "mi": 0.05, "covered": 0.1}  # and by this at least
FACTORS = dict.fromkeys(("spacing", "extent", "texture", "moved", "sdlogj"), 1.25)  # or this, of what is a scale
WORSE = 0.02  # share of the mutual information: interpolation alone moves it by as much
COVERED = 0.7  # share of the fixed image
SHARED = 0.1  # of what is to be known of an image; see docs/results/robustness_trust.md

_LESS_ALIKE = "the images are less alike after registration than any in validation"
PAIRS = {  # number -> kind, what is unusual, its unit
    "ncc": ("similarity", _LESS_ALIKE, "correlation"),
    "mi": ("similarity", _LESS_ALIKE, "mutual information"),
    "covered": ("overlap", "less of the fixed image is covered than in any validation pair", "share"),
    "moved": ("motion", "the displacement is larger than any in validation", "mm"),
    "sdlogj": ("volume", "volumes change more unevenly than in any validation pair", "SDlogJ"),
}

Warnings = list[str]


def warnings(
    sides: Mapping[str, Image], typical: Mapping[str, Any], numbers: Mapping[str, float], metrics: Mapping[str, float]
) -> Warnings:
    """Each as ``kind: what is unusual, and what was usual``; none where nothing is.

    Args:
        sides: the fixed and the moving image.
        typical: what ``metrics.typical.read`` knows of the model; empty: nothing.
        numbers: of the pair, see ``metrics.typical.numbers``.
        metrics: of the case, see ``metrics.measures.measure``.
    """
    found: Warnings = []
    for side, known in typical.get("images", {}).items():
        found += _of_image(f"{side} image", look(sides[side]), known)
    pairs = typical.get("pairs", {})
    found += _of_pair(numbers, pairs) if pairs else []
    return found + [*_of_itself(numbers, metrics, alone=not pairs)]


# ---------------------------------------------------------------------------------- like the training


def _of_image(name: str, seen: Look, known: Mapping[str, Any]) -> Iterator[str]:
    alike = content(seen.thumbnail, np.array(known["thumbnail"]))
    if alike < _limits("content", known)[0][0]:
        low, high = (edge[0] for edge in known["content"])
        yield (
            f"content: the {name} as a whole is unlike those of the training (correlation {alike:.2f}, there {low:.2f} "
            f"to {high:.2f}): another anatomy, modality or orientation, or a part of it"
        )
    for kind, unit in (("spacing", " mm"), ("extent", " mm"), ("brightness", ""), ("texture", "")):
        values = getattr(seen, kind)
        low, high = _limits(kind, known)
        if ((values < low) | (values > high)).any():
            there = " to ".join(_listed(edge) for edge in known[kind])
            yield f"{kind}: that of the {name} is {_listed(values)}{unit}, in the training {there}"


def _of_pair(numbers: Mapping[str, float], known: Mapping[str, Any]) -> Iterator[str]:
    for name, (kind, what, unit) in PAIRS.items():
        low, high = (edge[0] for edge in _limits(name, known))
        if numbers[name] > high if name in FACTORS else numbers[name] < low:
            there = " to ".join(f"{edge[0]:.3g}" for edge in known[name])
            yield f"{kind}: {what} ({unit} {numbers[name]:.3g}, there {there})"


def _limits(kind: str, known: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The range, widened: of what is a scale by factors, else by adding."""
    low, high = (np.array(edge, float) for edge in known[kind])
    share = SLACK + SMALL_SAMPLE / known["count"]
    if kind in FACTORS:
        low, high = (np.log(np.maximum(edge, 1e-6)) for edge in (low, high))
        width = np.maximum(share * (high - low), math.log(FACTORS[kind]))
        return np.exp(low - width), np.exp(high + width)
    width = np.maximum(share * (high - low), LEAST[kind])
    return low - width, high + width


# ---------------------------------------------------------------------------------------- by itself


def _of_itself(numbers: Mapping[str, float], metrics: Mapping[str, float], *, alone: bool) -> Iterator[str]:
    before, after = numbers["mi_before"], numbers["mi"]
    if after < (1 - WORSE) * before:
        yield f"similarity: the images are less alike than before (mutual information {after:.3g}, was {before:.3g})"
    if alone and numbers["shared"] < SHARED:
        told = f"one tells {100 * numbers['shared']:.0f} % of what is in the other"
        yield f"similarity: the images have little in common even after registration ({told})"
    if alone and numbers["covered"] < COVERED:
        yield f"overlap: the moving image covers only {100 * numbers['covered']:.0f} % of the fixed one"
    limits = {name: metric.threshold for name, metric in METRICS.items() if metric.sound and metric.threshold}
    for name, step in judge(metrics, limits).steps.items():
        if step != "pass":
            metric, than = METRICS[name], "<" if METRICS[name].higher else ">"
            value = f"{metrics[name]:.3g} {metric.unit}".strip()
            yield f"{metric.title}: {value} ({than} {limits[name].warn:g})"


def _listed(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{v:.3g}" for v in values)
