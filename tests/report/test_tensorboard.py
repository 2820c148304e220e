"""What TensorBoard will show, read back from the event files of a real training."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from regpipe.bundle.write import write_bundle
from regpipe.engines import run
from regpipe.metrics.metric import columns
from regpipe.report import pictures, tensorboard
from regpipe.report.tensorboard import MetricLog, PictureLog, Profile, case_pictures, case_values, tag_terms
from regpipe.utils.errors import InputError

PICTURES = ("fixed", "moving", "warped", "checkerboard", "overlay", "grid", "jacobian")
EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A bundle trained for two epochs of two pairs, one of its own commands."""
    bundle = write_bundle("alexnet", tmp_path_factory.mktemp("boards") / "bundle")
    hook, path = sys.excepthook, list(sys.path)
    flow = ConfigWorkflow(
        str(bundle / "configs" / "train.yaml"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        run_id="training",
        bundle_root=str(bundle),
        dataset_dir=str(cohort),
        holdout=3,
        max_epochs=2,
        learning_rate=0.01,
        profile_steps=1,
    )
    flow.initialize()
    flow.run()
    sys.excepthook, sys.path[:] = hook, path
    return bundle


@pytest.fixture(scope="module")
def board(trained: Path) -> EventAccumulator:
    return events(trained / "eval" / "tensorboard")


def test_each_term_is_a_curve_over_iterations(board) -> None:
    terms = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"] if tag.startswith("training/")}
    assert terms.keys() == {f"training/{name}" for name in ("lncc", "diffusion", "divergence", "loss", "learning_rate")}
    assert all([point.step for point in curve] == [1, 2, 3, 4] for curve in terms.values())
    values = {tag: np.array([point.value for point in curve]) for tag, curve in terms.items()}
    weighted = values["training/lncc"] + 0.7 * values["training/diffusion"] + 0.1 * values["training/divergence"]
    assert np.allclose(values["training/loss"], weighted)  # train.yaml's weights
    assert np.allclose(values["training/learning_rate"], [0.01] * 4)  # it falls from half of the epochs on


def test_each_metric_is_a_curve_over_epochs(board) -> None:
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("validation/")}
    assert tags == {f"validation/{name}" for name in [*columns(), "key_metric"]}
    assert all([point.step for point in board.Scalars(tag)] == [1, 2] for tag in tags)
    assert board.Scalars("validation/key_metric")[1].value == board.Scalars("validation/dice")[1].value


def test_all_pictures_of_the_first_two_cases_are_there_each_epoch(board) -> None:
    assert set(board.Tags()["images"]) == {f"case_{i}/{name}" for i in (1, 2) for name in PICTURES}
    for tag in board.Tags()["images"]:
        assert [picture.step for picture in board.Images(tag)] == [1, 2]
        array = np.asarray(Image.open(io.BytesIO(board.Images(tag)[0].encoded_image_string)))
        assert min(array.shape[:2]) >= pictures.SHORTEST_SIDE and array.std() > 1
    first, second = (board.Images("case_1/warped")[i].encoded_image_string for i in (0, 1))
    assert first != second  # the network learns, the cases stay
    assert len({picture.encoded_image_string for picture in board.Images("case_1/fixed")}) == 1


def test_the_best_epochs_metrics_are_told_at_the_end(board, trained) -> None:
    saved = torch.load(run.saved_states(trained / "models")[-1], weights_only=True)["progress"]
    epoch = saved["metric"][1]
    for name in ("dice", "tre", "ncc"):
        best = board.Scalars(f"best/{name}")[-1].value
        assert best == pytest.approx(saved["best"][name])
        assert best == board.Scalars(f"validation/{name}")[epoch - 1].value
    assert board.Scalars("best/training_seconds")[-1].value > 0


def test_how_far_and_how_unevenly_the_first_cases_move_is_a_histogram_each_epoch(board) -> None:
    names = {f"case_{i}/{name}" for i in (1, 2) for name in ("displacement_mm", "log_jacobian")}
    assert set(board.Tags()["histograms"]) == names
    for name in names:
        told = board.Histograms(name)
        assert [value.step for value in told] == [1, 2] and told[0].histogram_value.num == 32 * 32
    first, second = (told.histogram_value.max for told in board.Histograms("case_1/displacement_mm"))
    assert first > 0 and second > 0 and first != second  # the network learns, the cases stay


def test_one_step_after_the_first_is_timed_where_that_is_asked_for(board, trained) -> None:
    (text,) = board.Tensors("profile/text_summary")
    assert b"conv" in text.tensor_proto.string_val[0]
    trace = json.loads((trained / "eval" / "tensorboard" / "profile.json").read_text())
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 1


def test_a_doubling_of_area_and_a_shift_have_known_histograms() -> None:
    at = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij"))[None]
    doubled = torch.cat([at[:, :1] * 0, at[:, 1:]], 1)  # x + u(x) = (x, 2 y): det J = 2 everywhere
    assert np.allclose(case_values(doubled, (1, 1))["log_jacobian"], math.log(2))
    shift = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 12, 10)
    shown = case_values(shift, (2.0, 0.5))
    assert np.allclose(shown["displacement_mm"], math.hypot(3 * 2, 4 * 0.5)) and np.allclose(shown["log_jacobian"], 0)
    mirrored = torch.cat([at[:, :1] * 0, -2 * at[:, 1:]], 1)  # (x, -y): folds everywhere
    assert shown.keys() - case_values(mirrored, (1, 1)).keys() == {"log_jacobian"}


def test_histograms_of_large_volumes_hold_a_regular_part_of_the_voxels(monkeypatch) -> None:
    monkeypatch.setattr(tensorboard, "MOST_VALUES", 25)
    u = torch.zeros(1, 2, 10, 10)
    u[:, 0] = torch.arange(100.0).view(10, 10)
    assert case_values(u, (1, 1))["displacement_mm"].tolist() == list(range(0, 100, 4))


def test_bundles_of_before_there_were_histograms_log_their_pictures(tmp_path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        engine: Any = Engine(lambda _, batch: batch)
        PictureLog(writer, cases=1).attach(engine)
        images = {"fixed_image": torch.rand(1, 1, 16, 16), "moving_image": torch.rand(1, 1, 16, 16)}
        pred = {"warped_moving": torch.rand(1, 1, 16, 16), "displacement": torch.zeros(1, 2, 16, 16)}
        engine.run([{"label": images, "pred": pred}] * 3, max_epochs=1)
    tags = events(tmp_path).Tags()
    assert len(tags["images"]) == len(PICTURES) and tags["histograms"] == []


def test_a_profile_longer_than_the_training_ends_with_it_and_one_of_no_steps_costs_nothing(tmp_path) -> None:
    for steps, expected in ((9, True), (0, False)):
        with SummaryWriter(str(tmp_path / str(steps))) as writer:
            engine: Any = Engine(lambda _, batch: torch.ones(3) + batch)
            Profile(writer, steps=steps).attach(engine)
            engine.run([0, 1, 2], max_epochs=1)
        assert (tmp_path / str(steps) / "profile.json").is_file() == expected
        assert bool(events(tmp_path / str(steps)).Tags()["tensors"]) == expected
    with pytest.raises(InputError, match="--profile_steps -1"):
        Profile(writer, steps=-1)


def test_pictures_are_those_of_the_report_for_the_first_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed, moving, warped = torch.rand(3, 2, 1, 20, 16, generator=generator)
    u = torch.rand(2, 2, 20, 16, generator=generator)
    found = case_pictures({"fixed_image": fixed, "moving_image": moving}, {"warped_moving": warped, "displacement": u})
    expected = pictures.pictures(fixed[0, 0].numpy(), moving[0, 0].numpy(), warped[0, 0].numpy(), u[0].numpy())
    assert found.keys() == expected.keys() == set(PICTURES)
    assert all(np.array_equal(found[name], expected[name]) for name in PICTURES)


def test_metrics_that_no_case_has_are_left_out(tmp_path) -> None:
    engine: Any = Engine(lambda _, batch: batch)
    with SummaryWriter(str(tmp_path)) as writer:
        MetricLog(writer).attach(engine)
        engine.state.metrics = {"dice": 0.5, "tre": math.nan}
        engine.run([0], max_epochs=3)
    board = events(tmp_path)
    assert board.Tags()["scalars"] == ["validation/dice"]
    assert [(point.step, point.value) for point in board.Scalars("validation/dice")] == [(3, 0.5)]


def test_one_prefix_makes_one_group() -> None:
    assert tag_terms({"lncc": 1.0, "loss": 2.0}, "training") == {"training/lncc": 1.0, "training/loss": 2.0}
