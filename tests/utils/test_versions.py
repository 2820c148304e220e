"""A package that is too old is named, with the command that mends it."""

from __future__ import annotations

import pytest

from regpipe.utils import versions
from regpipe.utils.errors import InputError


def test_what_is_installed_for_the_tests_is_new_enough() -> None:
    versions.refuse_old()


def test_an_older_monai_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "1.4.0" if name == "monai" else found(name))
    with pytest.raises(InputError, match=r'monai 1.4.0 is older.*pip install --upgrade "monai>=1'):
        versions.refuse_old()


def test_a_build_of_ones_own_and_an_extra_that_is_missing_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "requires", lambda name: ["torch>=2.8", 'none-such>=3; extra == "test"', "gone>=1"])
    monkeypatch.setattr(versions, "installed", lambda name: {"torch": "2.11.0a0+git123.nv25"}.get(name))
    versions.refuse_old()
