"""A run goes on after any stop as if there had been none, to the bit; and it says what keeps it from going on."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from regpipe.bundle.write import write_bundle
from regpipe.data.pairs import list_pairs
from regpipe.engines import run
from regpipe.utils.errors import InputError, cause

SETTINGS = {
    "holdout": 2,
    "pairs_per_epoch": 2,  # of 3: the order and the choice are drawn each epoch
    "learning_rate": 0.02,  # so that eight steps move a label by a voxel
    "validate#handlers#0#cases": 0,  # pictures take time and draw nothing
}


class Trained:
    """What a training did and what it left."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, tuple[str, ...], float]] = []  # iteration, cases, loss
        self.validations: list[tuple[int, float, float]] = []  # epoch, key metric, the best so far

    def load(self, bundle: Path) -> Trained:
        self.model = torch.load(bundle / "models" / "model.pt", weights_only=True)
        self.state = torch.load(run.saved_states(bundle / "models")[-1], weights_only=True)
        return self


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    """``begin`` and MONAI's workflow change the process; here it goes on."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    gc.collect()  # engines and their handlers hold each other, and 40 MB
    set_determinism(None)
    torch.use_deterministic_algorithms(False)


def workflow(bundle: Path, cohort: Path | None, *, overlays: Sequence[Path] = (), **settings: Any) -> ConfigWorkflow:
    """New objects, as in a new process, whose generators are not where the last ones stopped."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(time.time_ns() % 2**32)
    settings = {"bundle_root": str(bundle), **SETTINGS, **settings}
    if cohort is not None:  # else the overlays have data of their own
        settings["dataset_dir"] = str(cohort)
    file, meta = (str(bundle / "configs" / name) for name in ("train.yaml", "metadata.json"))
    flow = ConfigWorkflow(
        [file, *map(str, overlays)], meta_file=meta, logging_file=False, run_id="training", **settings
    )
    flow.initialize()
    return flow


def train(
    bundle: Path,
    data: Path | None,
    epochs: int,
    *,
    into: Trained | None = None,
    stop: Callable | None = None,
    **settings: Any,
) -> Trained:
    """Train up to an epoch with the bundle's own configuration; ``stop`` is called after each iteration."""
    flow, done = workflow(bundle, data, max_epochs=epochs, **settings), into or Trained()
    trainer, evaluator, loss = map(flow.parser.get_parsed_content, ("train#trainer", "validate#evaluator", "loss"))

    def note() -> None:
        state = trainer.state
        done.curve.append((state.iteration, tuple(state.batch["case"]), loss.terms["loss"]))

    def validated() -> None:
        state = evaluator.state
        done.validations.append((state.epoch, state.metrics["key_metric"], state.best_metric))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    evaluator.add_event_handler(Events.COMPLETED, validated)
    if stop:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    flow.run()
    return done.load(bundle)


def kill_at(iteration: int) -> Callable:
    def kill(engine: Any) -> None:
        if engine.state.iteration == iteration:
            raise MemoryError("killed")

    return kill


def equal(a: Any, b: Any) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.curve == expected.curve and found.validations == expected.validations
    assert equal(found.model, expected.model)
    for name in ("network", "optimizer", "lr_scheduler", "stopper", "random", "trainer", "averaged"):
        assert equal(found.state[name], expected.state[name]), name
    for name in ("settings", "best", "metric"):
        assert found.state["progress"][name] == expected.state["progress"][name]


@pytest.fixture(scope="module")
def one_go(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> tuple[Path, Trained]:
    """Four epochs without a stop. Do not write into the folder."""
    bundle = write_bundle("alexnet", tmp_path_factory.mktemp("one_go") / "bundle")
    return bundle, train(bundle, cohort, 4)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle("alexnet", tmp_path / "bundle")


def test_the_same_seed_gives_the_same_training(bundle, cohort, one_go) -> None:
    assert_same(train(bundle, cohort, 4), one_go[1])


def test_the_training_draws_orders_learns_and_validates(one_go) -> None:
    _, done = one_go
    assert [iteration for iteration, *_ in done.curve] == list(range(1, 9))
    assert len({cases for _, cases, _ in done.curve}) == 3 and len(done.validations) == 4
    orders = {tuple(cases for _, cases, _ in done.curve[i : i + 2]) for i in range(0, 8, 2)}
    assert len(orders) > 1
    assert len({score for _, score, _ in done.validations}) > 1


@pytest.mark.parametrize("before", [1, 2])  # the rate falls after half of the epochs: after 3 of 3 it has fallen
def test_stopping_after_an_epoch_and_giving_more_changes_nothing(bundle, cohort, one_go, before) -> None:
    first = train(bundle, cohort, before)
    assert len(first.curve) == 2 * before
    assert_same(train(bundle, cohort, 4, into=first), one_go[1])
    assert [p.name for p in run.saved_states(bundle / "models")] == ["checkpoint_3.pt", "checkpoint_4.pt"]


@pytest.mark.parametrize("killed", [1, 3, 5])
def test_a_kill_within_an_epoch_changes_nothing(bundle, cohort, one_go, killed) -> None:
    with pytest.raises(RuntimeError):  # MONAI's, around ours
        train(bundle, cohort, 4, stop=kill_at(killed), into=(first := Trained()))
    whole = killed // 2
    assert [p.name for p in run.saved_states(bundle / "models")] == ["checkpoint_1.pt", "checkpoint_2.pt"][:whole]
    first.curve = first.curve[: 2 * whole]  # the broken epoch is done again
    assert_same(train(bundle, cohort, 4, into=first), one_go[1])


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(bundle, cohort, one_go, capsys) -> None:
    def interrupt(engine: Any) -> None:
        if engine.state.iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        train(bundle, cohort, 4, stop=interrupt, into=(first := Trained()))
    assert caught.value.code == 130
    assert "stopped in epoch 3: the same command goes on" in capsys.readouterr().out
    assert run.saved_states(bundle / "models")[-1].name == "checkpoint_2.pt"
    first.curve = first.curve[:4]
    assert_same(train(bundle, cohort, 4, into=first), one_go[1])


def test_a_finished_run_is_not_run_again_and_without_resume_it_begins_anew(bundle, cohort, capsys) -> None:
    first = train(bundle, cohort, 2)
    again = train(bundle, cohort, 2)
    assert again.curve == [] and equal(again.state, first.state)
    assert "all 2 epochs are done: give more --max_epochs" in capsys.readouterr().out
    anew = train(bundle, cohort, 1, resume=False)
    assert anew.curve == first.curve[:2]
    assert [p.name for p in run.saved_states(bundle / "models")] == ["checkpoint_1.pt"]


def refusal(bundle: Path, cohort: Path, epochs: int, **settings: Any) -> str:
    """The line that the user sees in the end: MONAI wraps the error."""
    with pytest.raises(RuntimeError) as caught:
        train(bundle, cohort, epochs, **settings)
    return str(cause(caught.value))


def test_other_settings_are_refused_by_name_and_nothing_is_touched(bundle, cohort) -> None:
    first, grid = train(bundle, cohort, 1), (bundle / "models" / "working_grid.json").read_bytes()
    message = refusal(
        bundle, cohort, 2, learning_rate=0.1, seed=3, lncc_window=5, key_metric="ncc", grid_shape=[48, 32]
    )
    assert "learning_rate: 0.02 -> 0.1" in message and "seed: 0 -> 3" in message and "--resume False" in message
    assert "lncc_window: 7 -> 5" in message and "key_metric: auto -> ncc" in message  # other loss, other best
    assert "backbone" not in message
    assert "grid: 32x32 -> 48x32" in message and (bundle / "models" / "working_grid.json").read_bytes() == grid
    assert equal(Trained().load(bundle).state, first.state)


def test_settings_that_an_older_version_did_not_save_keep_nobody_from_going_on(bundle, cohort) -> None:
    train(bundle, cohort, 1)
    (path,) = run.saved_states(bundle / "models")
    saved = torch.load(path, weights_only=True)
    settings = json.loads(saved["progress"]["settings"])
    del settings["seed"], saved["scaler"]
    saved["progress"]["settings"] = json.dumps(settings | {"gone": 1})
    torch.save(saved, path)
    assert len(train(bundle, cohort, 2).curve) == 2


@pytest.mark.parametrize("before", [2, 3])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    bundle, cohort, one_go, before, caplog
) -> None:
    first = train(bundle, cohort, before)
    newest = run.saved_states(bundle / "models")[-1]
    turned = bytearray(newest.read_bytes())
    turned[len(turned) // 2] ^= 1  # a bit of some weight: torch would load it
    newest.write_bytes(turned)
    first.curve, first.validations = first.curve[: 2 * before - 2], first.validations[: before - 1]
    assert_same(train(bundle, cohort, 4, into=first), one_go[1])
    assert f"{newest}: damaged; going on from checkpoint_{before - 1}.pt, the one before" in caplog.text


def test_where_no_checkpoint_is_sound_each_is_named(bundle, cohort) -> None:
    train(bundle, cohort, 2)
    for path in run.saved_states(bundle / "models"):
        path.write_bytes(path.read_bytes()[:1000])
    message = refusal(bundle, cohort, 4)
    assert "checkpoint_1.pt: damaged" in message and "checkpoint_2.pt: damaged" in message and "\n" not in message
    assert "--resume False" in message and len(train(bundle, cohort, 1, resume=False).curve) == 2


def test_early_stopping_stops_and_counts_on_after_a_resume(bundle, cohort) -> None:
    settings: dict[str, Any] = {"patience": 2, "learning_rate": 1e-9}  # nothing ever gets better
    first = train(bundle, cohort, 2, **settings)
    assert [epoch for epoch, *_ in first.validations] == [1, 2] and first.state["stopper"]["counter"] == 1
    done = train(bundle, cohort, 9, into=first, **settings)
    assert [epoch for epoch, *_ in done.validations] == [1, 2, 3]
    assert run.saved_states(bundle / "models")[-1].name == "checkpoint_3.pt"


def test_a_run_that_stopped_early_stays_stopped_until_it_is_given_more_patience(bundle, cohort, capsys) -> None:
    settings: dict[str, Any] = {"patience": 1, "learning_rate": 1e-9}
    train(bundle, cohort, 9, **settings)
    assert train(bundle, cohort, 9, **settings).curve == []
    assert "stopped: 1 validations without a better key metric; give more --patience" in capsys.readouterr().out
    assert len(train(bundle, cohort, 9, **(settings | {"patience": 2})).curve) == 2


def test_a_key_metric_that_no_case_has_ends_the_training_with_a_line(bundle, cohort, tmp_path) -> None:
    for side in ("fixed_images", "moving_images"):
        shutil.copytree(cohort / side, tmp_path / "bare" / side)
    message = refusal(bundle, tmp_path / "bare", 2, key_metric="dice")
    assert "key metric dice: no case has what it needs" in message and "choose another" in message
    assert not run.saved_states(bundle / "models")


def test_the_seconds_of_all_parts_add_up(bundle, cohort, tmp_path) -> None:
    assert np.isnan(run.training_seconds(tmp_path))
    train(bundle, cohort, 1)
    before = run.training_seconds(bundle / "models")
    train(bundle, cohort, 2)
    assert run.training_seconds(bundle / "models") > before > 0


def test_checkpoints_are_in_the_order_of_their_epochs(tmp_path) -> None:
    for epoch in (9, 100, 10):
        (tmp_path / f"checkpoint_{epoch}.pt").touch()
    assert [p.stem for p in run.saved_states(tmp_path)] == ["checkpoint_9", "checkpoint_10", "checkpoint_100"]


def test_random_states_come_back_through_a_file(tmp_path) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), [random.random(), random.gauss(0, 1)]

    run.begin(7)
    draw()
    torch.save(run.RandomState().state_dict(), tmp_path / "state.pt")
    expected = draw()
    draw()
    run.RandomState().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
    run.begin(7)
    first = draw()
    run.begin(7)
    assert draw() == first


def test_pairs_that_cannot_be_used_are_listed_before_training(cohort, tmp_path) -> None:
    cases = list_pairs(str(cohort))
    run.require(cases)
    bad = []
    for i in range(12):
        path = tmp_path / f"broken_{i}.nii.gz"
        path.write_bytes(b"not an image")
        bad.append({**cases[0], "case": f"bad_{i}", "moving_image": str(path)})
    with pytest.raises(InputError) as caught:
        run.require([*cases, *bad])
    message = str(caught.value)
    assert message.startswith(f"12 of {len(cases) + 12} pairs cannot be used:")
    assert message.count("\n") == 11 and message.endswith("\n  and 2 more")
    assert all(str(tmp_path / f"broken_{i}.nii.gz") in message for i in range(10))
    with pytest.raises(InputError, match=r"^1 of 1 pairs cannot be used:\n  .*broken_3\.nii\.gz: [^\n]*$"):
        run.require(bad[3:4])


def test_what_has_no_gradient_is_refused_in_training() -> None:
    run.refuse_detached(None, False)
    for given in ((None, True), ("a refiner", False)):
        with pytest.raises(InputError, match="no gradient"):
            run.refuse_detached(*given)
