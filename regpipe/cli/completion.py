"""What the shell completes: names that commands know, read off the source: their modules take seconds to load."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regpipe.utils import settings


def names(module: str, registry: str, *, giving: str = "") -> tuple[str, ...]:
    """The keys of a dict, the items of a tuple, or a word, as ``regpipe.<module>`` assigns it.

    ``giving``: of a dict only the entries that give this argument.
    """
    room, _, file = module.partition(".")
    source = (Path(__file__).parents[1] / room / f"{file}.py").read_text(encoding="utf-8")
    start = source.index(f"\n{registry}") + 1
    statement: Any = ast.parse(source[start : source.find("\n\n", start)]).body[0]
    value = statement.value
    if isinstance(value, ast.Dict):
        entries: Any = zip(value.keys, value.values, strict=True)
        return tuple(k.value for k, v in entries if not giving or giving in [given.arg for given in v.keywords])
    found = ast.literal_eval(value)
    return (found,) if isinstance(found, str) else found


BACKBONES = names("networks.encoders", "BACKBONES")
SHIPPED = (*names("networks.encoders", "TRANSFERRED"), "none")
NETWORKS = ("symnet",)
PHANTOMS = names("phantoms.scenes", "KINDS") + names("phantoms.cohort", "SYNTHETIC")
STAGES = tuple(stage for stage in settings.STAGES if stage != "auto")
SIMILARITIES = names("losses.terms", "TERMS", giving="weight")
FORMATS = names("inference.case_files", "DENSE") + names("transforms.export", "FORMATS")
PAIRINGS = ("all", "first")
GUIDES = names("engines.refine", "GUIDES")
INTERPOLATIONS = names("transforms.resample", "INTERPOLATIONS")
BIDS_PAIRINGS = names("data.bids", "PAIRINGS")


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
