"""What TensorBoard is told once a run, read back with its own readers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)
from torch.utils.tensorboard import SummaryWriter

from regpipe.losses.terms import TERMS
from regpipe.metrics.metric import columns
from regpipe.networks.symmetric import SymmetricNet
from regpipe.report.tensorboard_pages import (
    COSTS,
    describe,
    layout,
    log_comparison,
    log_evaluation,
    log_graph,
    log_hyperparameters,
    plain,
)

CASES = [
    {"case": f"p{i}", "fixed_image": "/home/anna/f.nii", "moving_image": f"/home/anna/m{i}.nii", **extra}
    for i, extra in enumerate([{}, {"fixed_label": "a", "moving_label": "b"}, {"fixed_label": "a"}])
]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def text(board: EventAccumulator, tag: str) -> str:
    (told,) = board.Tensors(f"{tag}/text_summary")
    return told.tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("pages")
    with SummaryWriter(str(folder)) as writer:
        about = {"backbone": "vgg16", "pretrained": "/home/anna/weights.pt", "amp": False, "rate": 0.5, "a|b": "c|d"}
        describe(writer, about, CASES, CASES[1:])
    return events(folder)


def test_every_metric_and_loss_term_that_a_chart_asks_for_is_one_that_is_written() -> None:
    known = {f"validation/{name}" for name in columns()} | {f"training/{name}" for name in TERMS}
    known |= {"training/loss", "training/learning_rate"}
    asked = [tags for charts in layout().values() for _, (tags,) in charts.values()]
    assert all(any(re.match(tags, name) for name in known) for tags in asked)
    drawn = [name for name in known for tags in asked if re.match(tags, name)]
    assert len(drawn) == len(set(drawn)) and "training/log_jacobian" in drawn and "validation/sdlogj_l2r" not in drawn
    supervised = {name for name, term in TERMS.items() if term.kind == "supervision"}
    assert {name for name in TERMS if f"training/{name}" not in drawn} == supervised - {"end_point"}


def test_terms_of_ones_own_are_a_chart_and_no_others_are_in_it() -> None:
    (tags,) = layout([*TERMS, "my.term", "other"])["Training"]["terms of loss_terms"][1]
    names = ("my.term", "other", "myxterm", "lncc", "loss", "other2")
    assert [name for name in names if re.match(tags, f"training/{name}")] == ["my.term", "other"]
    assert layout(TERMS) == layout()


def test_the_charts_are_laid_out_as_the_custom_scalars_tab_reads_them(board) -> None:
    (told,) = board.Tensors(metadata.CONFIG_SUMMARY_TAG)
    told_layout = layout_pb2.Layout.FromString(told.tensor_proto.string_val[0])
    found = {category.title: [chart.title for chart in category.chart] for category in told_layout.category}
    assert found == {title: list(charts) for title, charts in layout().items()}
    assert list(told_layout.category[0].chart[0].multiline.tag) == ["validation/dice$"]


def test_the_text_tells_configuration_data_and_environment_and_no_folder(board) -> None:
    configuration, data, environment = (text(board, f"about/{n}") for n in ("configuration", "data", "environment"))
    assert "| backbone | vgg16 |" in configuration and "| amp | False |" in configuration
    assert "| pretrained | weights.pt |" in configuration and "| c/d |" in configuration
    assert "| training pairs | 3 |" in data and "| held-out pairs | 2 |" in data
    assert "| training pairs with label | 1 |" in data and "| images in training pairs | 4 |" in data
    assert "| case_1 | p1 |" in data
    assert f"| torch | {torch.__version__.partition('+')[0]}" in environment and "| python |" in environment
    assert not any("anna" in page or "/home" in page for page in (configuration, data, environment))


def test_of_a_path_only_its_end_is_told() -> None:
    assert plain("/home/anna/w.pt") == plain(Path("../anna/w.pt")) == "w.pt"
    assert plain("32x32") == "32x32" and plain(None) == "None" and plain(True) is True and plain(0.5) == 0.5


def row(board: EventAccumulator) -> dict[str, Any]:
    content = board.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    found = parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def experiment(board: EventAccumulator) -> Any:
    return parse_experiment_plugin_data(board.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content)


def asked(board: EventAccumulator) -> set[str]:
    return {metric.name.tag for metric in experiment(board).metric_infos}


def test_settings_and_results_are_a_row_with_columns_of_the_best_epoch_and_of_the_evaluation(tmp_path) -> None:
    settings = {
        "flag": True,
        "backbone": "vgg16",
        "rate": 0.5,
        "steps": 3,
        "name": "x",
        "none": None,
        "weights": "/home/anna/w.pt",
    }
    with SummaryWriter(str(tmp_path)) as writer:
        best = {"dice": 0.7, "dice_before": 0.5, "tre": math.nan, "training_seconds": 9.0}
        log_hyperparameters(writer, settings, best)
    with SummaryWriter(str(tmp_path), filename_suffix=".later") as writer:  # evaluating is another process
        log_evaluation(writer, {"dice": (0.6, 0.5, 0.7)}, dict.fromkeys(COSTS, 2.0))
    board = events(tmp_path)
    assert row(board) == {**settings, "steps": 3.0, "none": "None", "weights": "w.pt"}
    costs = {f"evaluation/{name}" for name in COSTS}
    assert asked(board) == {"evaluation/dice", "best/dice", "best/training_seconds", *costs}
    assert board.Scalars("best/dice")[-1].value == pytest.approx(0.7)
    assert experiment(board).metric_infos[0].name.tag == "evaluation/dice"
    assert [setting.name for setting in experiment(board).hparam_infos if setting.differs] == ["backbone"]
    assert board.Scalars("evaluation/dice")[-1].value == pytest.approx(0.6)
    assert set(board.Tags()["scalars"]) == asked(board)  # nothing else: each would be a chart of one point


def test_the_graph_holds_the_networks_layers_and_leaves_the_network_as_it_was(tmp_path) -> None:
    network = SymmetricNet(2, "plain")
    with SummaryWriter(str(tmp_path)) as writer:
        log_graph(writer, network, (32, 32))
    assert network.training
    names = [node.name for node in graph(tmp_path)]
    assert any("encoder" in name for name in names) and any("levels" in name for name in names)


def graph(folder: Path) -> list[Any]:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    return list(GraphDef.FromString(events(folder).Graph().SerializeToString()).node)


def test_a_comparison_is_told_once_however_often_it_is_made(tmp_path) -> None:
    for table in ("| old |", "| new |"):
        figure = Figure()
        figure.subplots().plot([1, 2])
        log_comparison(tmp_path, table, {"accuracy": figure})
    board = events(tmp_path)
    assert text(board, "comparison") == "| new |" and board.Tags()["images"] == ["comparison/accuracy"]
