"""The accuracy benchmark's harness, with methods that need no peer installed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.engines import SupervisedTrainer

from helpers.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import accuracy
import judging
import mutations
import networks
import peers
import sets
import speed_training
import tables

from regpipe import InputError, LoadPair, collate_pairs
from regpipe.engines.handlers import GradientClip
from regpipe.engines.inferers import RegistrationInferer, prepare_batch
from regpipe.engines.step import TrainingStep, gradient_scaler
from regpipe.fields.algebra import warp
from regpipe.io.landmarks import read_landmarks
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort


@pytest.fixture
def data(cohort: Path) -> sets.Data:
    return sets.open_data(cohort, sets.CHOICES | {"holdout": 2}, None)


@pytest.fixture(scope="module")
def bundles(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    shutil.copytree(trained, root / "resnet18")
    return root


def batch_of(data: sets.Data, i: int = 0) -> dict[str, Any]:
    return collate_pairs([LoadPair(data.grid)(data.cases[i])])


def row(method: str, case: str, **metrics: float) -> tables.Row:
    numbers = dict.fromkeys(tables.COLUMNS[3:], math.nan)
    return {"method": method, "case": case, "made_from": "x 1", **numbers, "peak_mib": 512.0, **metrics}


def test_every_mistake_can_be_put_into_the_code_and_has_its_test_file() -> None:
    for mistake in mutations.mistakes():
        found = (mutations.ROOT / "regpipe" / mistake.module).read_text().count(mistake.old)
        assert found == 1 and mistake.old != mistake.new, mistake
        assert (mutations.ROOT / "tests" / mistake.test).is_file(), mistake


# ------------------------------------------------------------------------------------------- sets of pairs


def test_the_held_out_pairs_are_those_of_the_overlays() -> None:
    assert sets.choices("hippocampus_mr")["holdout"] == 40
    assert sets.choices("prostate_mrus")["landmark_channels"] == 1
    assert sets.choices("prostate_mrus")["grid_spacing"] == [3.3, 3.3, 3.3]
    assert sets.choices("any other folder") == sets.CHOICES


def test_the_lungs_landmarks_are_turned_from_ras_to_lps(tmp_path: Path) -> None:
    names = [f"{side}{axis}_ras" for side in "bf" for axis in "xyz"]
    (tmp_path / "landmarks.csv").write_text(f"id,{','.join(names)}\n0,1,2,3,4,5,6\n")
    case = json.loads(sets.lung_datalist(tmp_path, tmp_path / "out").read_text())["validation"][0]
    points = [read_landmarks(case[f"{side}_landmarks"]).tolist() for side in ("fixed", "moving")]
    assert points == [[[-1, -2, 3]], [[-4, -5, 6]]]


# --------------------------------------------------------------------------------------------- the judging


def test_a_true_shift_scores_one_and_has_no_inverse_error_without_an_inverse() -> None:
    label = torch.zeros(1, 1, 20, 20, dtype=torch.int32)
    label[..., 5:10, 6:12], label[..., 12:16, 6:12] = 1, 1001
    moving = label.roll(3, dims=2)  # moving(x + 3) = fixed(x)
    none = torch.zeros(1, 0, 2)
    batch = {"fixed_label": label, "moving_label": moving, "fixed_landmarks": none, "moving_landmarks": none}
    batch |= {"fixed_image": (label > 0).float(), "moving_image": (moving > 0).float()}
    u = np.zeros((2, 20, 20), np.float32)
    u[0] = 3
    found = judging.judge(peers.Field(u), batch, (1.0, 1.0))
    assert found["dice"] == found["dice_subcortical"] == found["dice_cortical"] == 1
    assert found["dice_before"] < 0.5 and math.isnan(found["inverse_consistency"])
    with pytest.raises(InputError, match="not on the working grid"):
        judging.judge(peers.Field(u[:, 1:]), batch, (1.0, 1.0))


@pytest.mark.parametrize("wrong", ["turned", "flipped", "millimetres"])
def test_a_displacement_of_another_convention_is_refused(wrong: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6, generator=generator), size=(24, 24), mode="bicubic")
    u = torch.full((1, 2, 24, 24), 2.0)
    u[:, 1] = -3.0
    own = warp(image, u)[0, 0].numpy()
    batch = {"moving_image": image, "fixed_image": image}
    right = peers.Field(u[0].numpy(), None, own)
    judging.check_convention("peer", right, batch)
    changed = {"turned": u.flip(1), "flipped": -u, "millimetres": 1.5 * u}[wrong]
    with pytest.raises(InputError, match="does not give its own warped moving image"):
        judging.check_convention("peer", right._replace(displacement=changed[0].numpy()), batch)


# ------------------------------------------------------------------------------------------------- the run


def test_a_run_goes_on_where_it_stopped(
    data: sets.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = data._replace(cases=data.cases[:1])
    (done,) = accuracy.run_methods(["identity"], first, peers.Place(), tmp_path)
    assert done["dice"] == done["dice_before"] and done["folds_percent"] == 0 and done["peak_mib"] > 5
    asked: list[Any] = []

    def stand_still(method: str, pair: peers.Pair, place: peers.Place) -> tuple[peers.Field, dict[str, float]]:
        asked.append(pair)
        field, costs = peers.run(method, pair, place)
        return field, costs

    monkeypatch.setattr(accuracy, "register_apart", stand_still)
    rows = accuracy.run_methods(["identity"], data, peers.Place(), tmp_path)
    assert [r["case"] for r in rows] == [case["case"] for case in data.cases] and len(asked) == len(data.cases) - 1
    assert tables.read_cases(tmp_path / "cases.csv")[0]["dice"] == pytest.approx(done["dice"], rel=1e-5)
    with pytest.raises(InputError, match="made with other settings"):
        accuracy.run_methods(["identity"], data, peers.Place(), tmp_path, masks=True)


def test_a_method_that_fails_is_told_of_and_has_no_line(
    data: sets.Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = data._replace(cases=data.cases[:1])
    assert not accuracy.run_methods(["regpipe_vgg16"], one, peers.Place(tmp_path), tmp_path / "out")
    assert "vgg16: no trained bundle" in capsys.readouterr().err


def test_lines_of_other_weights_are_made_anew(data: sets.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = data._replace(cases=data.cases[:1])
    monkeypatch.setattr(accuracy, "register_apart", peers.run)
    for source in ("x 1", "x 2"):
        monkeypatch.setattr(accuracy, "made_from", lambda method, place, source=source: source)
        rows = accuracy.run_methods(["identity"], one, peers.Place(), tmp_path)
        assert [r["made_from"] for r in rows] == [source]


def test_the_command_writes_its_page(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "register_apart", peers.run)
    accuracy.main([str(cohort), "--methods", "identity", "--holdout", "2", "-o", str(tmp_path)])
    assert "| identity | 2 | " in (tmp_path / "accuracy.md").read_text()
    with pytest.raises(InputError, match="nothing: not one of identity"):
        accuracy.main([str(cohort), "--methods", "identity,nothing", "-o", str(tmp_path)])


# ---------------------------------------------------------------------------------------- learned networks


def test_a_trained_bundle_registers_as_its_network_does(bundles: Path, data: sets.Data) -> None:
    batch = batch_of(data)
    field, _ = peers.run("regpipe_resnet18", sets.as_pair(batch, data.grid, masks=False), peers.Place(bundles))
    state = torch.load(bundles / "resnet18" / "models" / "model.pt", weights_only=True)
    net = SymmetricNet(2, "resnet18").eval()
    net.load_state_dict(state)
    with torch.no_grad():
        found = RegistrationInferer()(torch.cat([batch["fixed_image"], batch["moving_image"]], 1), net)
    assert np.allclose(field.displacement, found["displacement"][0].numpy(), atol=1e-5)
    assert field.inverse is not None and np.allclose(field.inverse, found["inverse"][0].numpy(), atol=1e-5)


@pytest.mark.parametrize("method", ["regpipe_zero", "regpipe_resnet18_refined"])
def test_refining_brings_the_images_closer(method: str, bundles: Path, data: sets.Data) -> None:
    batch = batch_of(data)
    field, _ = peers.run(method, sets.as_pair(batch, data.grid, masks=False), peers.Place(bundles))
    found = judging.judge(field, batch, data.grid.spacing)
    assert found["ncc"] > found["ncc_before"] and found["inverse_consistency"] < 0.2


def test_a_bundle_is_not_judged_on_what_it_was_trained_on(bundles: Path, cohort: Path, data: sets.Data) -> None:
    methods = ["regpipe_resnet18"]
    accuracy.check_bundles(methods, peers.Place(bundles), data)
    every = sets.open_data(cohort, sets.CHOICES | {"holdout": 0}, None)
    with pytest.raises(InputError, match="trained on"):
        accuracy.check_bundles(methods, peers.Place(bundles), every)
    with pytest.raises(InputError, match="give --spacing"):
        coarse = data._replace(grid=data.grid._replace(spacing=(2.0, 2.0)))
        accuracy.check_bundles(methods, peers.Place(bundles), coarse)


def test_a_displacement_turned_back_from_symnets_axes_warps_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 6, 7, 8, generator=generator)
    u = torch.randn(1, 3, 6, 8, 7, generator=generator)  # L I A
    turned = networks.from_lia(warp(networks.to_lia(image), u))
    assert torch.allclose(warp(image, networks.field_from_lia(u)), turned, atol=1e-5)
    assert torch.equal(networks.from_lia(networks.to_lia(image)), image)
    corner = torch.zeros(1, 1, 3, 4, 5)
    corner[..., 2, 3, 4] = 1  # the far right, anterior, superior end
    assert networks.to_lia(corner)[..., 0, 0, 3] == 1


# ------------------------------------------------------------------------------------------------ the page


def test_differences_are_taken_on_the_pairs_that_both_methods_have() -> None:
    rows = [row("a", "1", dice=0.5), row("a", "2", dice=0.6), row("a", "3", dice=0.9)]
    rows += [row("b", "2", dice=0.7), row("b", "1", dice=0.8), row("b", "4", dice=0.1)]
    ours, theirs = tables.paired(rows, "a", "b", "dice")
    assert ours.tolist() == [0.5, 0.6] and theirs.tolist() == [0.8, 0.7]
    text = tables.page(rows, ["a", "b"], "b")
    assert "| a | Dice | 2 | -0.2000 [-0.3000, -0.1000]" in text  # mean of -0.3 and -0.1; resamples reach both ends
    assert "TRE" not in text and "0.50 | x 1" in text


def test_five_differences_of_one_sign_have_the_smallest_p_that_five_can_have() -> None:
    assert tables.signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)
    assert tables.signed_rank(np.zeros(5)) == 1


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [row("a", 'x, "y"', dice=0.25)]
    tables.write_cases(tmp_path / "cases.csv", rows)
    (found,) = tables.read_cases(tmp_path / "cases.csv")
    assert found["case"] == 'x, "y"' and found["dice"] == 0.25 and math.isnan(found["tre"])
    (tmp_path / "cases.csv").write_text("method,case\n")
    with pytest.raises(InputError, match="other columns"):
        tables.read_cases(tmp_path / "cases.csv")


# what a training step costs


def test_bytes_are_what_operators_read_and_write_and_views_move_nothing() -> None:
    a, b = torch.ones(2, 10, 10)
    with speed_training.Bytes() as moved:
        c = a + b
        c.view(100).t()
        c.add_(1)
    assert moved.total == (3 + 1) * 400  # an operand that is written in place is counted once


def test_the_parts_of_a_step_are_the_trainers_step(tmp_path: Path) -> None:
    write_cohort(tmp_path, shape=(18, 18, 18), n_pairs=1)
    loader = speed_training.loader_of(str(tmp_path), 18)
    timed, trained = (speed_training.Training(speed_training.Variant("alexnet"), loader) for _ in range(2))
    clock = timed.step()
    assert set(clock.processor) == set(speed_training.PARTS) and timed.kept() > 0
    SupervisedTrainer(
        torch.device("cpu"),
        1,
        loader,
        trained.net,
        trained.optimiser,
        trained.loss,
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        iteration_update=TrainingStep(gradient_scaler(torch.device("cpu"), amp=False)),
        train_handlers=[GradientClip(trained.net)],
        decollate=False,
    ).run()
    for ours, theirs in zip(timed.net.parameters(), trained.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_the_floor_is_operations_over_the_better_rate_and_bytes_over_the_copys() -> None:
    rate = {f"{what} {dtype}": 10.0 for what in ("matrix", "convolution") for dtype in ("float32", "bfloat16")}
    rate |= {"convolution float32": 20.0, "matrix bfloat16": 40.0, "copy": 4.0}
    row = {"gflop": 40.0, "gbyte": 8.0}
    for switch, seconds in (("", 2.0), ("amp", 1.0)):
        found = speed_training.with_floor(speed_training.Variant("x", switch), row, rate)
        assert (found["floor_flops"], found["floor_bytes"]) == (seconds, 2.0)
