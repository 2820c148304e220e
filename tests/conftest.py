"""The fixtures of all rooms: MONAI's own command line in this process, a tiny cohort, a trained bundle."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and threads that wait for each other

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fire
import hypothesis
import monai.bundle
import pytest
import torch
from monai.utils import set_determinism

from regpipe.bundle.write import write_bundle
from regpipe.io.formats import warn_once
from regpipe.phantoms.cohort import write_cohort

pytest.register_assert_rewrite("helpers")  # an assert that fails there says what it saw

from helpers.bundles import Command, train  # noqa: E402
from helpers.inprocess import as_if_in_its_own_process  # noqa: E402

if TYPE_CHECKING:
    from helpers.registered import Pair

COMMANDS = ("run", "verify_metadata", "verify_net_in_out", "ckpt_export")

# The same examples every time, and no clock: a test fails for what it finds, not for where it runs. For a deeper
# search: HYPOTHESIS_PROFILE=search python -m pytest tests/whole/test_properties.py
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def monai_bundle() -> Command:
    """``python -m monai.bundle ARGUMENTS``, parsed by its own parser, without ten seconds of imports."""

    def command(*arguments: object) -> None:
        known = {name: getattr(monai.bundle, name) for name in COMMANDS}
        with as_if_in_its_own_process():
            fire.Fire(known, command=[str(a) for a in arguments], name="monai.bundle")

    return command


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five 2D pairs of 32 x 32 pixels with labels, landmarks and true displacements."""
    return write_cohort(tmp_path_factory.mktemp("data") / "cohort", shape=(32, 32), n_pairs=5)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Path, monai_bundle: Command) -> Path:
    """A bundle trained on the cohort for two epochs. Do not write into it."""
    bundle = write_bundle("resnet18", tmp_path_factory.mktemp("trained") / "bundle")
    (bundle / "models").rmdir()  # git keeps no empty folder
    train(monai_bundle, bundle, cohort, "--holdout", 2)
    return bundle


@pytest.fixture(scope="module", params=[2, 3])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A registered pair on disk, 2-D and 3-D: ``helpers.registered.Pair``."""
    from helpers.registered import make_pair  # brings SimpleITK, which most tests do without

    return make_pair(tmp_path_factory.mktemp(f"pair{request.param}d"), request.param)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same in 2-D only."""
    from helpers.registered import make_pair

    return make_pair(tmp_path_factory.mktemp("flat"), 2)


@pytest.fixture(autouse=True)
def warned_anew() -> None:
    """A file's warning is logged once in a process; a test may get a folder of the name that another one had."""
    warn_once.cache_clear()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the processes that torchrun starts: sums over two threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``begin`` and MONAI's workflow change the process; here it goes on."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    gc.collect()  # engines and their handlers hold each other, and 40 MB
    set_determinism(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that nothing has been trained in."""
    return write_bundle("alexnet", tmp_path / "bundle")
