"""The dashboard as a browser shows it, on logs of three made-up runs."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from helpers.browsing import chromium
from regpipe.cli import dashboard
from regpipe.report.tensorboard import MetricLog, PictureLog
from regpipe.report.tensorboard_pages import (
    COSTS,
    describe,
    log_comparison,
    log_evaluation,
    log_graph,
    log_hyperparameters,
)
from regpipe.utils.errors import InputError

BACKBONES = ("alexnet", "resnet18", "vgg16")
SECONDS = 30_000  # ms, of a loaded machine


def write_run(folder: Path, backbone: str) -> None:
    """What training and evaluating write, without either: two epochs of one case."""
    metrics = {"dice": 0.7, "hd95": 2.0, "tre": 1.0, "ncc": 0.9, "sdlogj": 0.1, "folds_percent": 0.0}
    images = {name: torch.rand(1, 1, 16, 16) for name in ("fixed_image", "moving_image")}
    pred = {"warped_moving": torch.rand(1, 1, 16, 16), "displacement": torch.rand(1, 2, 16, 16)}
    with SummaryWriter(str(folder)) as writer:
        describe(writer, {"backbone": backbone}, [], [])
        log_graph(writer, nn.Sequential(nn.Conv2d(2, 2, 3)), (8, 8))
        engine: Any = Engine(lambda _, batch: batch)
        PictureLog(writer, cases=1, spacing=(1.0, 1.0)).attach(engine)
        log = MetricLog(writer)
        for epoch in (1, 2):
            engine.run([{"label": images, "pred": pred}], max_epochs=epoch)
            log(SimpleNamespace(state=SimpleNamespace(metrics=metrics, epoch=epoch)))  # type: ignore[arg-type]
        log_hyperparameters(writer, {"backbone": backbone, "accumulate": 1}, metrics)
        log_evaluation(writer, {"dice": (0.625, 0.5, 0.7)}, dict.fromkeys(COSTS, 1.0))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    for backbone in BACKBONES:
        write_run(out / backbone / "eval" / "tensorboard", backbone)
    figure = Figure()
    figure.subplots().plot([1, 2])
    log_comparison(out / "comparison", "| the table of all |", {"accuracy": figure})
    return out


def wait_until_read(address: str) -> None:
    """The page has the tabs of what was read when it was opened: wait for what was written last."""

    def told(what: str) -> Any:
        with urllib.request.urlopen(f"{address}data/{what}") as answer:
            return json.load(answer)

    for _ in range(SECONDS // 100):
        read = [run for run, tags in told("plugin/scalars/tags").items() if "evaluation/gflop" in tags]
        if len(read) == len(BACKBONES) and "comparison" in told("plugin/images/tags"):
            return
        time.sleep(0.1)
    raise TimeoutError("the logs are not read")


@pytest.fixture(scope="module")
def page(logs: Path) -> Iterator[Any]:
    """The dashboard in a browser; ``page.problems`` is what it complained of, or asked of others."""
    with chromium() as browser:
        address = dashboard.start(logs, port=0)
        wait_until_read(address)
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.set_default_timeout(SECONDS)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        ours = (address, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(ours) else page.problems.append(r.url))
        page.goto(address)
        yield page


def show(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=re.compile(f"^{tab}$", re.IGNORECASE)).click()  # some are written small


def see(page: Any, text: str) -> None:
    """Wait until it is seen: tabs that are not in front keep theirs, hidden."""
    page.get_by_text(text).locator("visible=true").first.wait_for()


def test_each_tab_shows_what_it_should_and_no_request_leaves_the_machine(page: Any) -> None:
    show(page, "Custom Scalars")
    dice = page.locator("tf-custom-scalar-multi-line-chart-card", has_text="Dice").first
    dice.get_by_text("Matches (3)").wait_for()  # one chart, a line for each backbone
    for title in ("Similarity", "Regularity", "SDlogJ, held-out pairs"):
        see(page, title)
    show(page, "Images")
    for tag in ("case_1/checkerboard", "case_1/fixed"):
        see(page, tag)
    page.wait_for_function("""() => {
        const all = (node) => [...node.querySelectorAll('*')].flatMap(
            (e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
        return all(document).some((e) => e.tagName === 'IMG' && e.naturalWidth >= 256);
    }""")
    show(page, "Histograms")
    see(page, "case_1/displacement_mm")
    see(page, "case_1/log_jacobian")
    show(page, "Text")
    see(page, "about/environment/text_summary")
    see(page, "the table of all")
    show(page, "HParams")
    see(page, "evaluation/dice")
    for value in (*BACKBONES, "0.62500"):
        see(page, value)
    show(page, "Graphs")
    page.locator("svg text", has_text="Sequential").wait_for()
    show(page, "Time Series")
    see(page, "best/dice")
    assert page.problems == []


def test_a_port_that_is_taken_and_a_folder_without_logs_are_told(tmp_path: Path, logs: Path) -> None:
    with socket.socket() as other:
        other.bind((dashboard.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: .*give another --port"):
            dashboard.start(logs, port=port)
    with pytest.raises(InputError, match="no TensorBoard logs"):
        dashboard.start(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        dashboard.start(tmp_path / "nowhere")


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys, logs: Path) -> None:
    def pressed(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dashboard.threading.Event, "wait", pressed)
    monkeypatch.setattr(dashboard, "start", lambda folder, port: f"http://127.0.0.1:{port}/")
    dashboard.serve(logs, port=7007)
    assert capsys.readouterr().out.splitlines() == [
        *("TensorBoard on http://127.0.0.1:7007/#custom_scalars (Ctrl-C ends it)", "", "ended")
    ]


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("localhost", 200), ("a.example", 403), ("", 403), ("localhost.a.example", 403)],
)
def test_who_asks_for_another_machine_gets_no_answer(logs: Path, host: str, status: int) -> None:
    address = dashboard.start(logs, port=0)  # of a site that lets its name lead to 127.0.0.1, a browser sends that name
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc)
    connection.request("GET", "/data/runs", headers={"Host": host})
    assert connection.getresponse().status == status
    connection.close()
