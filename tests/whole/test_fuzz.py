"""A slice of ``benchmarks/fuzz.py``, which takes minutes and finds more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import fuzz

KINDS = fuzz.kinds()


@pytest.mark.parametrize("name", KINDS)
def test_whatever_a_file_holds_it_is_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    kind, folder = KINDS[name], fuzz.prepare(tmp_path)
    whole = [fuzz.attempt(kind, folder / kind.file, data) for data in kind.wholes]
    assert whole == ["read"] * len(whole)
    counts, wrong = fuzz.fuzz(name, kind, folder, 0, 40)
    assert not wrong and counts["refused"] > 0


def test_a_reader_that_breaks_or_does_not_name_the_file_is_found_out(tmp_path: Path) -> None:
    def break_down(path: Path) -> None:
        raise fuzz.InputError("no name") if path.read_bytes() == b"quiet" else KeyError("x")

    kind = fuzz.Kind("a.txt", (b"loud",), (), break_down)
    assert fuzz.attempt(kind, tmp_path / "a.txt", b"loud").startswith("KeyError at test_fuzz.py:")
    assert fuzz.attempt(kind, tmp_path / "a.txt", b"quiet") == "nameless: no name"
    assert sum(fuzz.fuzz("broken", kind, tmp_path, 0, 5)[0].values()) == 5


def test_an_input_is_the_same_bytes_always() -> None:
    inputs = [fuzz.made("csv", KINDS["points"], k) for k in range(20)]
    assert inputs == [fuzz.made("csv", KINDS["points"], k) for k in range(20)] and len({*inputs}) > 10
