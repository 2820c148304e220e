"""``regpipe`` as a user types it, in this process."""

from __future__ import annotations

import pytest

from helpers.inprocess import as_if_in_its_own_process
from regpipe.cli import main as cli


def regpipe(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of ``regpipe ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["regpipe", *(str(a) for a in arguments)])
    with as_if_in_its_own_process(), pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)
