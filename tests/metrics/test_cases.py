from __future__ import annotations

import csv
import math
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError

from regpipe.fields.algebra import Registration, integrate_both, warp
from regpipe.metrics.cases import CaseMetrics, write_csv
from regpipe.metrics.measured import measure
from regpipe.metrics.metric import columns

SPACING = (2.0, 1.0)


def output(names: list[str], *, labels: bool = True, landmarks: bool = True) -> dict:
    """What an engine hands to the metric; case and numbers follow from the names alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, "".join(names))))
    n = len(names)
    fixed, moving = torch.rand(2, n, 1, 12, 10, generator=generator)
    velocity = torch.rand(n, 2, 12, 10, generator=generator)
    u, inverse = integrate_both(velocity)
    points = torch.rand(n, 4 if landmarks else 0, 2, generator=generator) * 8
    batch = {
        "case": names,
        "fixed_image": fixed,
        "moving_image": moving,
        "fixed_label": (fixed > 0.5).int() * labels,
        "moving_label": (moving > 0.5).int() * labels,
        "fixed_landmarks": points,
        "moving_landmarks": points + 1,
    }
    done = Registration(velocity, u, inverse, warp(moving, u), warp(fixed, inverse))
    return {"pred": done._asdict(), "batch": batch}


def direct(out: dict) -> list[dict]:
    rows = []
    for i in range(len(out["batch"]["case"])):
        one = Registration.of(out["pred"], slice(i, i + 1))
        item = {key: value[i : i + 1] for key, value in out["batch"].items()}
        rows.append({"case": item["case"][0], **measure(one, item, SPACING)})
    return rows


def run(metric: CaseMetrics, outputs: list[dict], name: str = "key_metric") -> Any:
    engine = Engine(lambda _, batch: batch)
    metric.attach(engine, name)
    engine.run(outputs)
    return engine


def test_two_updates_equal_the_direct_computation():
    first, second = output(["a", "b"]), output(["c"])
    engine = run(CaseMetrics(SPACING), [first, second])
    rows = direct(first) + direct(second)
    assert engine.state.metric_details["cases"] == rows
    for name in columns():
        mean = sum(row[name] for row in rows) / 3
        assert engine.state.metrics[name] == pytest.approx(mean), name


def test_the_automatic_key_is_dice_then_minus_tre_then_ncc():
    for have, key, sign in [
        ({}, "dice", 1),
        ({"labels": False}, "tre", -1),
        ({"labels": False, "landmarks": False}, "ncc", 1),
    ]:
        found = run(CaseMetrics(SPACING), [output(["a"], **have)]).state.metrics
        assert found["key_metric"] == sign * found[key]


def test_a_named_key_is_turned_so_that_higher_is_better():
    found = run(CaseMetrics(SPACING, key="ndv_percent"), [output(["a"])]).state.metrics
    assert found["key_metric"] == -found["ndv_percent"]


def test_cases_without_landmarks_do_not_spoil_the_mean():
    outputs = [output(["a"]), output(["b"], landmarks=False)]
    found = run(CaseMetrics(SPACING), outputs).state.metrics
    assert found["tre"] == direct(outputs[0])[0]["tre"]


def test_a_second_run_starts_afresh():
    metric = CaseMetrics(SPACING)
    engine = run(metric, [output(["a"])])
    engine.run([output(["b"])])
    assert [row["case"] for row in engine.state.metric_details["cases"]] == ["b"]


def test_unknown_keys_clashing_names_and_no_cases_are_errors():
    with pytest.raises(ValueError, match="unknown metric 'dize'.*dice"):
        CaseMetrics(SPACING, key="dize")
    with pytest.raises(ValueError, match="own name"):
        CaseMetrics(SPACING).attach(Engine(lambda _, batch: batch), "tre")
    with pytest.raises(NotComputableError):
        CaseMetrics(SPACING).compute()


def test_the_csv_comes_back_as_it_went_out(tmp_path):
    rows = [
        {"case": "a, with comma", "dice": 1 / 3, "tre": math.nan},
        {"case": "b", "dice": 0.5, "tre": 2.0},
    ]
    path = tmp_path / "new" / "cases.csv"
    write_csv(path, rows[:1])
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as stream:
        back = list(csv.DictReader(stream))
    assert [row["case"] for row in back] == ["a, with comma", "b", "mean", "std"]
    assert [float(row["dice"]) for row in back] == pytest.approx(
        [1 / 3, 0.5, 5 / 12, (1 / 6) / math.sqrt(2)], rel=1e-15
    )
    assert [float(row["tre"]) for row in back] == pytest.approx([math.nan, 2.0, 2.0, math.nan], nan_ok=True)
    assert [p.name for p in path.parent.iterdir()] == ["cases.csv"]


def test_a_csv_without_cases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no cases"):
        write_csv(tmp_path / "cases.csv", [])
    assert not list(tmp_path.iterdir())
