"""What TensorBoard will show, read back from the event files of a real training."""

from __future__ import annotations

import io
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
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from torch.utils.tensorboard import SummaryWriter

from regpipe import report, runs
from regpipe.boards import MetricLog, case_pictures, log_hyperparameters, tag_terms
from regpipe.bundles import write_bundle
from regpipe.metrics import HIGHER_IS_BETTER

PICTURES = ("fixed", "moving", "warped", "checkerboard", "overlay", "grid", "jacobian")
EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=EVERYTHING).Reload()


def hyperparameters(read: EventAccumulator) -> dict[str, Any]:
    content = read.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    found = parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


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
    assert terms.keys() == {f"training/{name}" for name in ("lncc", "diffusion", "divergence", "loss")}
    assert all([point.step for point in curve] == [1, 2, 3, 4] for curve in terms.values())
    values = {tag: np.array([point.value for point in curve]) for tag, curve in terms.items()}
    weighted = values["training/lncc"] + 0.7 * values["training/diffusion"] + 0.1 * values["training/divergence"]
    assert np.allclose(values["training/loss"], weighted)  # train.yaml's weights


def test_each_metric_is_a_curve_over_epochs(board) -> None:
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("validation/")}
    assert tags == {f"validation/{name}" for name in [*HIGHER_IS_BETTER, "key_metric"]}
    assert all([point.step for point in board.Scalars(tag)] == [1, 2] for tag in tags)
    assert board.Scalars("validation/key_metric")[1].value == board.Scalars("validation/dice")[1].value


def test_all_pictures_of_the_first_two_cases_are_there_each_epoch(board) -> None:
    assert set(board.Tags()["images"]) == {f"case_{i}/{name}" for i in (1, 2) for name in PICTURES}
    for tag in board.Tags()["images"]:
        assert [picture.step for picture in board.Images(tag)] == [1, 2]
        array = np.asarray(Image.open(io.BytesIO(board.Images(tag)[0].encoded_image_string)))
        assert min(array.shape[:2]) >= report.SHORTEST_SIDE and array.std() > 1
    first, second = (board.Images("case_1/warped")[i].encoded_image_string for i in (0, 1))
    assert first != second  # the network learns, the cases stay
    assert len({picture.encoded_image_string for picture in board.Images("case_1/fixed")}) == 1


def test_settings_and_the_best_epochs_metrics_are_a_row_of_hparams(board, trained) -> None:
    found = hyperparameters(board)
    assert found["backbone"] == "alexnet" and found["learning_rate"] == 0.01 and found["grid"] == "32x32"
    saved = torch.load(runs.saved_states(trained / "models")[-1], weights_only=True)["progress"]
    epoch = saved["metric"][1]
    for name in ("dice", "tre", "ncc"):
        best = board.Scalars(f"best/{name}")[-1].value
        assert best == pytest.approx(saved["best"][name])
        assert best == board.Scalars(f"validation/{name}")[epoch - 1].value
    assert board.Scalars("best/training_seconds")[-1].value > 0


def test_pictures_are_those_of_the_report_for_the_first_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed, moving, warped = torch.rand(3, 2, 1, 20, 16, generator=generator)
    u = torch.rand(2, 2, 20, 16, generator=generator)
    found = case_pictures({"fixed_image": fixed, "moving_image": moving}, {"warped_moving": warped, "displacement": u})
    expected = report.pictures(fixed[0, 0].numpy(), moving[0, 0].numpy(), warped[0, 0].numpy(), u[0].numpy())
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


def test_hyperparameters_of_any_type_and_without_metrics_can_be_logged(tmp_path) -> None:
    settings = {"flag": True, "rate": 0.5, "steps": 3, "name": "x", "none": None, "shape": (2, 3)}
    with SummaryWriter(str(tmp_path)) as writer:
        log_hyperparameters(writer, settings, {"dice": math.nan})
    board = events(tmp_path)
    assert hyperparameters(board) == {**settings, "steps": 3.0, "none": "None", "shape": "(2, 3)"}
    assert board.Tags()["scalars"] == []


def test_one_prefix_makes_one_group() -> None:
    assert tag_terms({"lncc": 1.0, "loss": 2.0}, "training") == {"training/lncc": 1.0, "training/loss": 2.0}
