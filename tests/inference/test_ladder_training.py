"""Training that would not fit: what is taken for it, what is refused, and what of the data the prediction knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bundles import Command, train
from regpipe.bundle.write import write_bundle
from regpipe.data.load import LoadPair
from regpipe.data.pairs import list_pairs
from regpipe.engines.inferers import RegistrationInferer
from regpipe.inference import ladder, memory
from regpipe.io.images import Grid
from regpipe.io.labels import read_label
from regpipe.losses.loss import RegistrationLoss
from regpipe.metrics.measures import shared_labels
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import machine
from regpipe.utils.errors import explain


def test_training_that_does_not_fit_is_refused_with_what_helps(
    tmp_path: Path, cohort: Path, monai_bundle: Command
) -> None:
    bundle = write_bundle("plain", tmp_path / "bundle")
    with pytest.raises(Exception) as end:  # noqa: PT011  MONAI wraps it
        train(monai_bundle, bundle, cohort, "--memory_gib", 0.01)
    told = explain(end.value) or ""
    assert "32x32 needs" in told and "--amp true" in told and "--checkpointing true" in told and "--grid_shape" in told
    assert not list((bundle / "models").glob("*.pt"))


def test_training_that_fits_with_checkpointing_takes_it_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, loss = SymmetricNet(2, "alexnet"), RegistrationLoss({"lncc": 1.0})
    given = (RegistrationInferer(), network, loss, (512, 512))
    plain = memory.training(*given)
    network.checkpointing = True
    spared = memory.training(*given)
    assert spared < plain - 50 * 2**20
    network.checkpointing = False
    for room, taken in ((plain, False), ((plain + spared) // 2, True)):
        monkeypatch.setattr(machine, "room", lambda *_, room=room: room)
        assert ladder.require_memory(*given) == ["checkpointing"] * taken
        assert network.checkpointing is taken
    assert "--checkpointing true" in caplog.text


def test_a_cache_that_would_not_fit_beside_training_is_left_out_and_one_on_disk_is_not_counted(
    tmp_path: Path, cohort: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, grid = list_pairs(str(cohort)), Grid((512, 512), (0.1, 0.1))
    given = (RegistrationInferer(), SymmetricNet(2, "plain"), RegistrationLoss({"mse": 1.0}), grid.shape)
    needed, kept = 10**9, 10 * 12 * 512 * 512  # five pairs of two images
    monkeypatch.setattr(memory, "training", lambda *_, **__: needed)
    for room, told, taken in (
        (needed + kept, {}, []),
        (needed + kept - 1, {}, ["no cache"]),
        (needed + kept - 1, {"cache_dir": str(tmp_path)}, []),
        (needed + kept - 1, {"cache": False}, []),
    ):
        monkeypatch.setattr(machine, "room", lambda *_, room=room: room)
        load = LoadPair(grid, **told)
        assert ladder.require_memory(*given, load=load, cases=cases) == taken
        assert (load.cache is None) == bool(taken or "cache" in told)
    assert "--cache false" in caplog.text


def test_the_structures_that_a_loss_will_find_are_those_of_the_first_labelled_pair(cohort: Path) -> None:
    cases = list_pairs(str(cohort))
    bare = {key: value for key, value in cases[0].items() if "label" not in key}
    truth = shared_labels(*(read_label(cases[1][f"{side}_label"])[0].array for side in ("fixed", "moving")))
    assert list(ladder._labels_of_one([bare, cases[1]], None)) == truth and len(truth) > 1
    assert ladder._labels_of_one([bare], None) == ()
