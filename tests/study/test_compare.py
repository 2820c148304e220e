"""The comparison of backbones: bundles' own commands, one table, nothing run twice."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from helpers.bundles import Command
from helpers.places import QUICK
from regpipe.bundle.run import bundle_in
from regpipe.cli import main as cli
from regpipe.metrics.metric import columns, heading
from regpipe.provenance.verify import verify
from regpipe.study.compare import best_of, compare
from regpipe.study.compare_page import COSTS
from regpipe.utils.errors import InputError


def result(dice: float, *, seconds: float = 0.5, **metrics: list[float]) -> dict[str, Any]:
    known = {"dice": [dice, dice - 0.1, dice + 0.1], "folds_percent": [0.0, 0.0, 0.0], **metrics}
    costs = {"parameters": 12_340_000, "flops": 5.6e9, "peak_memory_bytes": 2**30, "training_seconds": 90.0}
    return {"metrics": known, "seconds_per_pair": [seconds, seconds, seconds], **costs}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, monai_bundle: Command) -> list[list[str]]:
    """The commands that ``compare`` gives; they run in this process, to spare the tests ten seconds each."""
    given: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        given.append(command)
        start = command.index("monai.bundle") + 1
        try:
            monai_bundle(*command[start:])
        except Exception as error:
            print(error)
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("regpipe.study.compare.subprocess.run", run)
    return given


def test_two_backbones_are_trained_evaluated_and_tabled_once(
    tmp_path: Path, cohort: Path, commands: list[list[str]]
) -> None:
    asked: dict[str, Any] = {
        "backbones": ["resnet18", "alexnet"],
        "overlays": [str(QUICK)],
        "settings": {"dataset_dir": str(cohort), "max_epochs": 1, "pairs_per_epoch": 2},
    }
    page = compare(tmp_path, **asked)
    runs = [
        (command[command.index("run") + 1], Path(command[command.index("--bundle_root") + 1]).name)
        for command in commands
    ]
    assert runs == [(what, name) for name in ("resnet18", "alexnet") for what in ("training", "evaluating")]
    head, _, *lines = page.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["resnet18", "alexnet"]
    for title in [*map(heading, columns("table")), *COSTS]:
        assert f"| {title} |" in head  # the phantoms have labels and landmarks: nothing is missing
    assert all(line.count("|") == head.count("|") for line in lines)
    assert (tmp_path / "comparison.md").read_text().startswith(page + "\n\n![")
    assert {path.name for path in tmp_path.glob("comparison_*.*")} == {
        f"comparison_{name}.{suffix}" for name in ("accuracy", "cost") for suffix in ("svg", "png")
    }
    board = EventAccumulator(str(tmp_path / "comparison")).Reload()
    assert set(board.Tags()["images"]) == {"comparison/accuracy", "comparison/cost"}
    run = EventAccumulator(str(tmp_path / "alexnet" / "eval" / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open(newline="")))
    for name in ("resnet18", "alexnet"):
        summary = json.loads((tmp_path / name / "eval" / "summary.json").read_text())
        dice = next(row for row in rows if (row["backbone"], row["metric"]) == (name, "dice"))
        assert [float(dice[k]) for k in ("mean", "low", "high")] == pytest.approx(summary["metrics"]["dice"], rel=1e-5)
    assert run.Scalars("evaluation/dice")[-1].value == pytest.approx(summary["metrics"]["dice"][0])
    assert run.Scalars("evaluation/gflop")[-1].value == pytest.approx(summary["flops"] / 1e9)
    assert (bundle_in(tmp_path) / "models" / "model.pt").is_file()
    commands.clear()
    assert compare(tmp_path, **asked) == page and not commands
    held_to_its_manifest(tmp_path, cohort)


def held_to_its_manifest(out: Path, data: Path) -> None:
    """A comparison passes as it is, after its page was made again, and not with a changed byte in any part."""
    assert verify(out, data=data).problems == {} and verify(out).results == 5  # two trained, two evaluated, one table
    told = json.loads((out / "manifest.json").read_text())
    assert told["settings"]["backbones"] == ["resnet18", "alexnet"] and "dataset_dir" not in told["settings"]
    for name in ("comparison.csv", "comparison.md", "comparison_cost.svg", "best", "alexnet/eval/metrics.csv"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole + b" ")
        assert [str(out / name)] == list(verify(out).problems)
        (out / name).write_bytes(whole)
    (out / "comparison.md").write_text("of another version")
    assert CliRunner().invoke(cli.app, ["figures", str(out)]).exit_code == 0
    assert verify(out).problems == {}
    (out / "manifest.json").unlink()
    (problem,) = verify(out).problems.values()
    assert "manifest.json: missing; it has not ended" in problem


def test_transferred_weights_are_the_trainings_setting_and_not_the_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        given.append(command)
        summary = tmp_path / "alexnet" / "eval" / "summary.json"
        summary.parent.mkdir(exist_ok=True)
        summary.write_text(json.dumps(result(0.8)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("regpipe.study.compare.subprocess.run", run)
    compare(tmp_path, backbones=["alexnet"], settings={"pretrained": "x.pth", "freeze": 1, "seed": 3})
    training, evaluating = given
    assert training[training.index("--pretrained") + 1] == "x.pth" and "--freeze" in training
    assert "--pretrained" not in evaluating and "--freeze" not in evaluating and "--seed" in evaluating
    compare(tmp_path, backbones=["alexnet"], settings={"seed": 4})
    assert len(given) == 4  # another question is another run


def test_a_run_that_fails_is_named_and_not_taken_for_done(
    tmp_path: Path, cohort: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="alexnet: training failed, see above"):
            compare(tmp_path, backbones=["alexnet"], settings={"dataset_dir": str(cohort), "learning_rate": -1})
    assert len(commands) == 2 and not (tmp_path / "comparison.md").exists()


def test_mistakes_are_told_before_hours_of_training(tmp_path: Path, commands: list[list[str]]) -> None:
    with pytest.raises(InputError, match="'resnet19'.*resnet18"):
        compare(tmp_path, backbones=["alexnet", "resnet19"])
    with pytest.raises(InputError, match="max_epoch.*train.yaml"):
        compare(tmp_path, backbones=["alexnet"], settings={"max_epoch": 3})
    with pytest.raises(InputError, match="nowhere: no such folder"):
        compare(tmp_path, backbones=["alexnet"], settings={"dataset_dir": str(tmp_path / "nowhere")})
    assert not commands


def test_the_best_has_the_highest_dice_else_the_lowest_distance() -> None:
    assert best_of({"a": result(0.7), "b": result(0.8), "c": result(0.6)}) == "b"
    far, near = ({"metrics": {"tre": [mm, 0, 9], "ncc": [mm, 0, 9]}} for mm in (3.0, 1.0))
    assert best_of({"far": far, "near": near}) == "near"
