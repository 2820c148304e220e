"""Several images of one grid for each side of a pair: T1 and T2, CT and PET, red, green and blue.

The first is ``fixed_image`` and ``moving_image`` of a case, as ever; ``fixed_image_2``, ``moving_image_2`` ... are
those beside it. A datalist has a list of files in place of one; of a file of several values each is ``file#0``, ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from regpipe.data.members import report
from regpipe.io.formats import locate
from regpipe.io.images import count_of
from regpipe.utils.errors import InputError

KEY = re.compile(r"(fixed|moving)_image_([2-9])")
MOST = 9
ALL = "all"


def keys(case: Mapping[str, Any], side: str) -> list[str]:
    """Those of a case that name the images beside a side's first one, in their order."""
    return sorted(key for key in case if KEY.fullmatch(key) and key.startswith(f"{side}_"))


def images(case: Mapping[str, str], side: str) -> list[str]:
    """All images of a side, the first one first."""
    return [case[key] for key in (f"{side}_image", *keys(case, side))]


def flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A case with a key of its own for each image of a list.

    Raises:
        InputError: as many images of the fixed as of the moving side are wanted, one to ``MOST``.
    """
    found = dict(entry)
    for key in ("fixed_image", "moving_image"):
        if isinstance(found.get(key), list):
            files = found.pop(key)
            if not 1 <= len(files) <= MOST:
                raise InputError(f"{key}: a list of {len(files)} images; give 1 to {MOST}")
            found = {key: files[0], **found, **{f"{key}_{i}": file for i, file in enumerate(files[1:], start=2)}}
    fixed, moving = (1 + len(keys(found, side)) for side in ("fixed", "moving"))
    if fixed != moving:
        raise InputError(f"{str(found.get('moving_image'))[-300:]}: {moving} channels, the fixed image has {fixed}")
    return found


def count(cases: Iterable[Mapping[str, str]]) -> int:
    """How many images each side of every case has. Raises ``InputError``: not all have as many."""
    found = [(1 + len(keys(case, "fixed")), case["moving_image"]) for case in cases]
    (few, file), (most, other) = min(found), max(found)
    if few != most:
        told = f"{file}: {few} channels, {other} has {most}"
        raise InputError(f"{told}; a network takes as many of each pair: give as many, or leave one of them out")
    return most


def worded(which: str | int | Sequence[int]) -> str:
    """``which`` of ``spread`` as a text: MONAI's command line makes numbers of it."""
    return which if isinstance(which, str) else ",".join(map(str, which if isinstance(which, Sequence) else [which]))


def spread(
    cases: Iterable[Mapping[str, str]], which: str | int | Sequence[int], *, problems: dict[str, str] | None = None
) -> list[dict[str, str]]:
    """Cases whose files hold several values at each place, as ones of so many channels.

    Args:
        which: ``all``, or some, counted from 0: ``0,2``. A datalist's own list of images is all of them already.
        problems: see ``data.pairs.list_pairs``.

    Raises:
        InputError: a file that cannot be read; no such value; it is one of many already.
    """
    found, numbers, many = [], numbers_of(worded(which)), functools.cache(count_of)
    for case in cases:
        try:
            found.append(_spread(case, numbers, many))
        except InputError as problem:
            report(problems, case["case"], str(problem))
    return found


def _spread(case: Mapping[str, str], wanted: list[int], count_in: Callable[[str], int]) -> dict[str, str]:
    told: dict[str, Any] = dict(case)
    if keys(case, "fixed"):
        if wanted:
            raise InputError(f"{case['fixed_image']}: is one of several channels already; give --channels all")
        return told
    for key in ("fixed_image", "moving_image"):
        if locate(case[key])[1] is not None:
            raise InputError(f"{case[key]}: is one of several channels already; leave out --channels")
        many = count_in(case[key])
        if many == 1:
            raise InputError(f"{case[key]}: holds one value at each place; leave out --channels")
        numbers = wanted or range(min(many, MOST))
        beyond = next((i for i in numbers if i >= many), None)
        if beyond is not None:
            raise InputError(f"{case[key]}: has no channel {beyond}; its {many} are counted from 0")
        told[key] = [f"{case[key]}#{i}" for i in numbers]
    return flat(told)


def numbers_of(which: str) -> list[int]:
    """``0,2`` as numbers, ``all`` as none; raises ``InputError`` for anything else."""
    words = [word.strip() for word in which.split(",")]
    if which != ALL and not (all(word.isdecimal() for word in words) and len(words) <= MOST):
        raise InputError(f"--channels {which}: give all, or which, counted from 0: 0,2")
    return [] if which == ALL else [int(word) for word in words]
