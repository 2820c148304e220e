"""What the tests of two processes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from regpipe.phantoms.cohort import write_cohort


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs: three to train on and five to validate."""
    return write_cohort(tmp_path_factory.mktemp("data") / "cohort", shape=(32, 32), n_pairs=8)
