"""The summary, the table and the cost of a network, against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator
from scipy.stats import norm
from torch import Tensor, nn

from regpipe.engines.evaluation import EvaluationReport, interval, summarise, table
from regpipe.engines.inferers import RegistrationInferer, metric_input, prepare_batch
from regpipe.metrics import cost
from regpipe.metrics.cases import CaseMetrics
from regpipe.metrics.metric import columns
from regpipe.networks.symmetric import SymmetricNet


def row(**values: float) -> dict[str, Any]:
    return {"case": "x", **dict.fromkeys(columns(), math.nan), **values}


def batch(name: str) -> dict[str, Any]:
    fixed, moving = torch.rand(2, 1, 1, 16, 12, generator=torch.Generator().manual_seed(ord(name)))
    points = torch.zeros(1, 0, 2)
    items = {"fixed_image": fixed, "moving_image": moving, "fixed_landmarks": points, "moving_landmarks": points}
    return {"case": [name], "fixed_label": (fixed > 0.5).int(), "moving_label": (moving > 0.5).int(), **items}


class Slow(nn.Conv2d):
    """A velocity network of 2 * 2 * 9 weights and 2 biases, that sleeps: longest over the first pair."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(2, 2, 3, padding=1)
        self.sleep = 0.5

    def forward(self, pair: Tensor) -> Tensor:
        time.sleep(self.sleep)
        self.sleep = 0.02
        return super().forward(pair)


def evaluate(folder, names: str) -> SupervisedEvaluator:
    network = Slow()
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        [batch(name) for name in names],
        network,
        inferer=RegistrationInferer(),
        prepare_batch=prepare_batch,
        key_val_metric={"key_metric": CaseMetrics((1.0, 1.0), output_transform=metric_input)},
        val_handlers=[EvaluationReport(str(folder), network, shape=(16, 12), training_seconds=7.5, split="validation")],
        decollate=False,
    )
    evaluator.run()
    return evaluator


def test_an_evaluation_leaves_a_line_per_case_a_summary_and_a_table(tmp_path, capsys) -> None:
    evaluator = evaluate(tmp_path / "new", "abc")
    with (tmp_path / "new" / "metrics.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["case"] for line in lines] == ["a", "b", "c", "mean", "std"]
    found = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert found["cases"] == 3 and found["training_seconds"] == 7.5
    assert found["parameters"] == 2 * 2 * 9 + 2
    assert found["flops"] == 2 * 16 * 12 * 2 * 2 * 9
    assert found["peak_memory_bytes"] > 50e6  # Python with torch
    for name, (mean, low, high) in found["metrics"].items():
        assert mean == pytest.approx(evaluator.state.metrics[name]) and low <= mean <= high
        assert mean == pytest.approx(float(lines[3][name]))
    assert "tre" not in found["metrics"] and "dice" in found["metrics"]  # there are no landmarks
    printed = capsys.readouterr().out
    assert table({"held out": found["metrics"]}) in printed and "3 cases" in printed


def test_the_time_per_pair_is_the_networks_and_leaves_out_the_first(tmp_path) -> None:
    evaluate(tmp_path, "abcd")
    mean, low, high = json.loads((tmp_path / "summary.json").read_text())["seconds_per_pair"]
    assert 0.02 <= low <= mean <= high < 0.25


def test_one_case_is_enough(tmp_path) -> None:
    evaluate(tmp_path, "a")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["seconds_per_pair"][0] >= 0.5
    mean, low, high = found["metrics"]["dice"]
    assert mean == low == high


def test_a_summary_has_the_mean_and_its_interval_over_the_cases_that_have_the_metric() -> None:
    scores = np.random.default_rng(0).normal(0.7, 0.1, 200)
    found = summarise([row(dice=score) for score in scores] + [row(ncc=0.5)])
    assert found.keys() == {"dice", "ncc"} and found["ncc"] == [0.5, 0.5, 0.5]
    mean, low, high = found["dice"]
    assert mean == pytest.approx(scores.mean())
    half = norm.ppf(0.975) * scores.std() / math.sqrt(200)  # of the normal approximation
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.15), pytest.approx(half, rel=0.15))
    assert found == summarise([row(dice=score) for score in scores] + [row(ncc=0.5)])


def test_the_table_has_a_line_a_name_and_a_column_a_metric_in_reading_order() -> None:
    page = table({"a": {"tre": [1.234, 1, 2], "dice": [0.5, 0.4, 0.6]}, "b": {"dice": [0.7, 0.65, 0.75]}})
    assert page.splitlines() == [
        "| | Dice | TRE mm |",
        "|---|---|---|",
        "| a | 0.500 [0.400, 0.600] | 1.23 [1.00, 2.00] |",
        "| b | 0.700 [0.650, 0.750] |  |",
    ]
    assert interval((1.25, 0.0, 2.0), 1) == "1.2 [0.0, 2.0]"
    assert {*columns()} - {*columns("table")} == {"sdlogj_l2r"}  # SDlogJ as Learn2Reg computes it is for the files


def test_parameters_count_frozen_ones_too() -> None:
    net = nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.Linear(7, 4, bias=False))
    net[0].requires_grad_(False)
    assert cost.parameters(net) == (2 * 5 * 27 + 5) + 2 * 5 + 7 * 4


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv2d, (10, 7)), (nn.Conv3d, (6, 5, 4))])
def test_the_operations_of_a_convolution_are_twice_its_products(conv, shape) -> None:
    net = nn.Sequential(conv(2, 6, 3, padding=1), nn.ReLU(), conv(6, 4, 1, bias=False))
    voxels = math.prod(shape)
    assert cost.flops(net, shape) == 2 * voxels * (2 * 6 * 3 ** len(shape) + 6 * 4)


def test_counting_operations_changes_nothing_of_the_network() -> None:
    net = SymmetricNet(2, "alexnet", freeze=1)
    for mode in (True, False):
        net.train(mode)
        before = {name: module.training for name, module in net.named_modules()}
        state = {name: value.clone() for name, value in net.state_dict().items()}
        assert cost.flops(net, (32, 32)) > 0
        assert before == {name: module.training for name, module in net.named_modules()}
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())


def test_peak_memory_is_the_systems_high_water_mark_in_bytes() -> None:
    status = Path("/proc/self/status")
    if not status.is_file() or torch.cuda.is_available():
        pytest.skip("no /proc here, or CUDA's memory is what counts")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert cost.peak_memory() == pytest.approx(1024 * int(line.split()[1]), rel=0.02)


def test_the_clock_waits_for_the_gpu_which_computes_while_python_goes_on(tmp_path, monkeypatch) -> None:
    report = EvaluationReport(str(tmp_path), Slow(), shape=(16, 12), training_seconds=0, split="all")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.1))
    for device, least, most in (("cpu", 0.0, 0.09), ("cuda", 0.1, 1.0)):
        engine: Any = SimpleNamespace(state=SimpleNamespace(device=torch.device(device)))
        report._start(engine)
        report._stop(engine)
        assert least <= report._seconds[-1] <= most
