"""Logs to TensorBoard what is written once a run: layout, settings, data, the table of hyperparameters, the graph."""

from __future__ import annotations

import math
import platform
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import ignite.distributed as idist
import torch
from matplotlib.figure import Figure
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from regpipe.data.pairs import Case
from regpipe.losses.terms import TERMS
from regpipe.metrics.metric import METRICS, shown_in
from regpipe.networks.weights import channels_of
from regpipe.report.tensorboard import tag_terms
from regpipe.utils.versions import versions

# The HParams tab: its columns, and the settings that it shows first. Of both TensorBoard shows five until one asks.
COSTS = ("seconds_per_pair", "parameters_millions", "gflop")
QUESTIONS = ("backbone", "freeze", "learning_rate", "pretrained", "transfer")


def layout(own: Iterable[str] = ()) -> dict[str, dict[str, list[Any]]]:
    """The Custom Scalars tab: group -> chart -> a regular expression of the tags that are drawn.

    TensorBoard draws every run that it shows into each chart, so that the backbones of a comparison stand in one.
    ``own``: the terms of a run's loss, of which those that are not built in have a chart.
    """
    charts: dict[Any, dict[str, list[Any]]] = {"accuracy": {}, "similarity": {}, "regularity": {}}
    for name in shown_in("chart"):
        metric = METRICS[name]
        of = metric.unit or ("held-out pairs" if metric.kind != "accuracy" else "")
        charts[metric.kind][f"{metric.title}, {of}" if of else metric.title] = _chart(f"validation/{name}$")
    charts["accuracy"]["error of known displacements, training pairs, voxels"] = _chart("training/end_point$")
    for kind in ("similarity", "regularity"):
        terms = "|".join(name for name, term in TERMS.items() if term.kind == kind)
        charts[kind][f"{kind} terms, training pairs"] = _chart(f"training/({terms})(_[2-9])?$")  # of channels
    groups = dict(zip(("Accuracy, held-out pairs", "Similarity", "Regularity"), charts.values(), strict=True))
    training = {"loss": _chart("training/loss$"), "learning rate": _chart("training/learning_rate$")}
    theirs = "|".join(re.escape(name) for name in own if name not in TERMS)
    if theirs:
        training["terms of loss_terms"] = _chart(f"training/({theirs})$")
    return groups | {"Training": training}


def _chart(tags: str) -> list[Any]:
    return ["Multiline", [tags]]


def best() -> list[str]:
    """The metrics of the HParams tab, those first that the comparison's figure has."""
    return [*sorted(shown_in("best"), key=lambda name: "figure" not in METRICS[name].shown), "training_seconds"]


def describe(
    writer: SummaryWriter,
    configuration: Mapping[str, Any],
    training: Sequence[Case],
    held_out: Sequence[Case],
    own: Iterable[str] = (),
) -> None:
    """The layout of the Custom Scalars tab; configuration, data and environment in the Text tab.

    Of a path only the last part is written: logs are shown to others, and folders may be named after people.

    Args:
        writer: where to.
        configuration: names and values.
        training, held_out: the pairs.
        own: see ``layout``.
    """
    writer.add_custom_scalars(layout(own))
    pages = {"configuration": configuration, "data": _data(training, held_out), "environment": _environment()}
    for name, page in pages.items():
        writer.add_text(f"about/{name}", _table({key: plain(value) for key, value in page.items()}))
    writer.flush()


def plain(value: Any) -> bool | int | float | str:
    """The value as TensorBoard takes it; of a path its last part alone."""
    if isinstance(value, bool | int | float):
        return value
    text = str(value)
    return PurePath(text).name if "/" in text or "\\" in text else text


def _data(training: Sequence[Case], held_out: Sequence[Case]) -> dict[str, Any]:
    """Counts; the cases that the pictures show are the first held-out ones."""
    found: dict[str, Any] = {}
    for name, cases in {"training": training, "held-out": held_out}.items():
        images = {case[f"{side}_image"] for case in cases for side in ("fixed", "moving")}
        found[f"{name} pairs"], found[f"images in {name} pairs"] = len(cases), len(images)
        for kind in ("label", "landmarks", "mask"):
            found[f"{name} pairs with {kind}"] = sum(
                {f"fixed_{kind}", f"moving_{kind}"} <= case.keys() for case in cases
            )
    return found | {f"case_{i}": case["case"] for i, case in enumerate(held_out[:2], 1)}


def _environment() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"system": f"{platform.system()} {platform.machine()}", "CPU threads": torch.get_num_threads()}
    machine |= {"GPU": gpu, "processes": idist.get_world_size()}
    return {**versions(), **machine}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def log_graph(writer: SummaryWriter, network: nn.Module, shape: Sequence[int], *, wanted: bool = True) -> None:
    """The network's operations on one pair of a working grid, for the Graphs tab; traced, on its own device."""
    if not wanted or idist.get_rank() > 0:
        return
    training, device = network.training, next(network.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: other shapes have other graphs
        pair = torch.zeros(1, 2 * channels_of(network), *shape, device=device)
        writer.add_graph(network.eval(), pair)
    writer.flush()
    network.train(training)


def log_hyperparameters(writer: SummaryWriter, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """The run's row in the HParams tab: settings, the best epoch's metrics as ``best/<metric>``.

    The row has room for ``log_evaluation``'s numbers.
    """
    if idist.get_rank() > 0:
        return
    tagged = tag_terms({name: metrics[name] for name in best() if math.isfinite(metrics.get(name, math.nan))}, "best")
    for name, value in tagged.items():
        writer.add_scalar(name, value)
    later = [name.replace("best/", "evaluation/") for name in tagged if name != "best/training_seconds"]
    columns = [*later, *(f"evaluation/{name}" for name in COSTS), *tagged]  # the first five are shown at once
    row = hparams({name: plain(value) for name, value in settings.items()}, dict.fromkeys(columns, 0.0))
    _ask(row[0])
    for summary in row:
        writer._get_file_writer().add_summary(summary)
    writer.flush()


def _ask(experiment: Any) -> None:
    """Mark the settings in ``QUESTIONS``, so that TensorBoard shows these, and not the first ones of the alphabet."""
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for setting in data.experiment.hparam_infos:
        setting.differs = setting.name in QUESTIONS
    plugin.content = data.SerializeToString()


def log_evaluation(writer: SummaryWriter, metrics: Mapping[str, Sequence[float]], costs: Mapping[str, float]) -> None:
    """``evaluation/<metric>``: means over the held-out pairs, and what the network costs.

    Args:
        writer: where to.
        metrics: name -> (mean, low, high).
        costs: ``COSTS`` and their values.
    """
    means = {name: metrics[name][0] for name in best() if name in metrics}
    for name, value in tag_terms({**means, **costs}, "evaluation").items():
        writer.add_scalar(name, value)
    writer.flush()


def log_comparison(folder: str | Path, table: str, figures: Mapping[str, Figure]) -> None:
    """A comparison's table in the Text tab, its figures in the Images tab."""
    for old in Path(folder).glob("events.out.tfevents.*"):
        old.unlink()  # one comparison, not all that were ever made
    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars(layout())
        writer.add_text("comparison", table)
        for name, figure in figures.items():
            writer.add_figure(f"comparison/{name}", figure)
