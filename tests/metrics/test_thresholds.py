"""Thresholds and verdicts: which way each metric counts, what may be changed, what comes first."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.places import ROOT
from regpipe.metrics.thresholds import METRICS, Threshold, judge, said, thresholds, with_gains
from regpipe.utils.errors import InputError

LIMITS = {"dice": Threshold(0.8, 0.5, ""), "tre": Threshold(2, 5, "")}


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"dice": 0.9, "tre": 1.0}, "pass"),
        ({"dice": 0.8, "tre": 2.0}, "pass"),  # at the threshold, not beyond
        ({"dice": 0.79, "tre": 1.0}, "warn"),
        ({"dice": 0.9, "tre": 2.1}, "warn"),
        ({"dice": 0.49, "tre": 1.0}, "fail"),
        ({"dice": 0.9, "tre": 5.1}, "fail"),
        ({"dice": math.nan, "tre": 1.0}, "pass"),
        ({"dice": 0.9, "tre": math.inf}, "fail"),
    ],
)
def test_a_case_is_as_bad_as_its_worst_metric(row: dict[str, float], status: str) -> None:
    assert judge(row, LIMITS).status == status


def test_only_metrics_that_have_a_value_and_a_threshold_are_judged() -> None:
    verdict = judge({"tre": math.nan, "dice": 0.7, "sdlogj": 9.0}, LIMITS)
    assert verdict.steps == {"dice": "warn"}
    assert verdict.badness == pytest.approx((1 / 3,))  # a third of the way from 0.8 to 0.5


def test_a_case_is_the_worse_the_further_its_metrics_are_beyond_their_steps() -> None:
    rows = [{"dice": 0.9, "tre": 1.0}, {"dice": 0.85, "tre": 1.0}, {"dice": 0.9, "tre": 3.0}, {"dice": 0.4, "tre": 1.0}]
    found = [judge(row, LIMITS).badness for row in rows]
    assert found == sorted(found)


def test_a_metric_with_one_step_only_warns() -> None:
    limit = {"ncc_gain": Threshold(0.0, math.nan, "")}
    assert judge({"ncc_gain": -0.5}, limit).status == "warn"
    assert judge({"ncc_gain": 0.5}, limit).status == "pass"


@pytest.mark.parametrize(
    ("row", "unknown"),
    [
        ({"folds_percent": math.nan, "sdlogj": 0.1}, {"folds_percent"}),
        ({"ndv_percent": math.nan, "sdlogj": math.nan}, {"ndv_percent", "sdlogj"}),
        ({"dice_before": 0.5, "dice": math.nan}, {"dice", "dice_gain"}),
        ({"hd95_before": 3.0, "hd95": math.nan}, {"hd95"}),
        ({"ncc_before": 0.5, "ncc": math.nan}, {"ncc_gain"}),
        ({"dice_before": math.nan, "dice": math.nan, "tre_before": math.nan, "tre": math.nan}, set()),  # no labels
    ],
)
def test_what_should_have_a_value_and_has_none_does_not_pass(row: dict[str, float], unknown: set[str]) -> None:
    verdict = judge(with_gains(row), thresholds())
    assert {name for name, step in verdict.steps.items() if step == "warn"} == unknown
    assert verdict.status == ("warn" if unknown else "pass")
    assert not any(map(math.isnan, verdict.badness))  # they sort
    off = {name: limit for name, limit in thresholds().items() if name not in unknown}
    assert judge(with_gains(row), off).status == "pass"


def test_beyond_a_single_step_further_is_worse() -> None:
    limits = {"ncc_gain": thresholds()["ncc_gain"], "tre": Threshold(math.nan, 7, "")}
    rows = [{"ncc_gain": 0.2}, {"ncc_gain": 0.1}, {"ncc_gain": -0.01}, {"ncc_gain": -0.5}, {"tre": 8.0}, {"tre": 14.0}]
    found = [judge(row, limits).badness[0] for row in rows]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert found[3:] == pytest.approx([0.5, 1 + 1 / 7, 2.0])  # in units of the step; of 1 where that is 0


def test_gains_are_after_minus_before() -> None:
    row = with_gains({"dice_before": 0.5, "dice": 0.75, "tre": 1.0})
    assert row["dice_gain"] == 0.25
    assert "ncc_gain" not in row


def test_every_default_has_a_reason_and_steps_in_order() -> None:
    for name, limit in thresholds().items():
        assert limit.why
        assert not (limit.warn < limit.fail if METRICS[name].higher else limit.warn > limit.fail)


def test_the_documentation_has_the_same_steps_and_reasons() -> None:
    page = (ROOT / "docs" / "report.md").read_text()
    for name, limit in thresholds().items():
        steps = [part for part in said(name, limit).split(", ")] + [""]
        unit = f", {METRICS[name].unit}" if METRICS[name].unit == "mm" else ""
        assert f"| `{name}`{unit} | {steps[0]} | {steps[1]} | {limit.why} |".replace("|  |", "| |") in page


def test_a_file_and_options_change_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# all as it is\n")
    assert thresholds(file) == thresholds()
    file.write_text("tre: [3, 6]\nncc_gain: off\nsdlogj: [0.6, null]\n")
    found = thresholds(file, ["dice=0.6,0.4", "hd95=off", "tre=,7"])
    assert found["sdlogj"][0] == 0.6
    assert math.isnan(found["sdlogj"].fail)
    assert found["sdlogj"].why == "set in mine.yaml"
    assert found["dice"][:2] == (0.6, 0.4)
    assert math.isnan(found["tre"].warn)  # the option comes after the file
    assert found["tre"].fail == 7
    assert not {"ncc_gain", "hd95"} & found.keys()
    assert found["folds_percent"] == thresholds()["folds_percent"]
    assert said("tre", found["tre"]) == "> 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dize: [1, 2]", "no such metric"),
        ("tre: 3", "two numbers"),
        ('tre: "36"', "two numbers"),
        ("tre: {3: 6, 6: 3}", "two numbers"),
        ("tre: [null, null]", "two numbers"),
        ("tre: [3, .inf]", "two numbers"),
        ("tre: [3, many]", "two numbers"),
        ("tre: [6, 3]", "lower is better"),
        ("dice: [0.5, 0.8]", "higher is better"),
        ("- tre", "a line per metric"),
        ("tre: [", "cannot be read"),
    ],
)
def test_a_wrong_threshold_is_said_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        thresholds(file)
    assert "mine.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_option_is_said_in_a_line() -> None:
    with pytest.raises(InputError, match="NAME=WARN,FAIL"):
        thresholds(None, ["tre"])
    with pytest.raises(InputError, match="two numbers"):
        thresholds(None, ["tre=1,2,3"])
