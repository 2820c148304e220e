"""A run goes on after any stop as if there had been none, to the bit; and it says what keeps it from going on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.training import Trained, assert_same, equal, kill_at, refusal, train
from regpipe.bundle.write import write_bundle
from regpipe.data.pairs import list_pairs
from regpipe.engines import checkpoints, run
from regpipe.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture(scope="module")
def one_go(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> tuple[Path, Trained]:
    """Four epochs without a stop. Do not write into the folder."""
    bundle = write_bundle("alexnet", tmp_path_factory.mktemp("one_go") / "bundle")
    return bundle, train(bundle, cohort, 4)


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
    torch.save(checkpoints.RandomState().state_dict(), tmp_path / "state.pt")
    expected = draw()
    draw()
    checkpoints.RandomState().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
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


def test_what_has_no_gradient_is_refused_in_training(bundle, cohort) -> None:
    assert "no gradient" in refusal(bundle, cohort, 1, repair=True)
