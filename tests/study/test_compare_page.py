"""The page of a comparison: a table of known numbers, all of it made again from the CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.compared import RESULTS, result
from regpipe.cli import main as cli
from regpipe.study.compare_page import COSTS, comparison_table, drawings, read_csv, write_csv, write_page
from regpipe.utils.errors import InputError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_csv(tmp_path, RESULTS)
    return tmp_path


def test_the_table_leaves_out_what_no_backbone_has_and_blanks_what_one_has_not() -> None:
    page = comparison_table({"a": result(0.7), "b": result(0.8, tre=[1.234, 1.0, 1.5])})
    head, rule, a, b = page.splitlines()
    assert head.count("|") == rule.count("|") == a.count("|") == b.count("|")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, a, b)]
    assert cells[0] == ["", "Dice", "TRE mm", "folds %", *COSTS]
    costs = ["0.500 [0.500, 0.500]", "12.3", "5.6", "1.00", "1.5"]
    assert cells[1] == ["a", "0.700 [0.600, 0.800]", "", "0.0000 [0.0000, 0.0000]", *costs]
    assert cells[2][1:3] == ["0.800 [0.700, 0.900]", "1.23 [1.00, 1.50]"]


def test_what_the_csv_holds_is_what_was_measured(out: Path) -> None:
    assert (out / "comparison.csv").read_text().splitlines()[:3] == [
        *("backbone,metric,mean,low,high", "resnet18,dice_before,0.5,0.4,0.6", "resnet18,dice,0.7,0.6,0.8")
    ]
    found = read_csv(out)
    for name, expected in RESULTS.items():
        assert found[name]["metrics"] == {k: pytest.approx(v) for k, v in expected["metrics"].items()}
        assert found[name]["seconds_per_pair"] == expected["seconds_per_pair"]
        assert (found[name]["parameters"], found[name]["flops"]) == (12_340_000, 5.6e9)
    assert found["resnet18"]["training_seconds"] == 90 and math.isnan(found["alexnet"]["training_seconds"])


def test_the_page_is_made_again_from_the_csv_alone_byte_for_byte(out: Path, tmp_path: Path) -> None:
    page = write_page(out)
    names = ["comparison.md", *(f"comparison_{n}.{s}" for n in ("accuracy", "cost") for s in ("svg", "png"))]
    first = {name: (out / name).read_bytes() for name in names}
    for name in names:
        (out / name).unlink()
    assert CliRunner().invoke(cli.app, ["figures", str(out)]).exit_code == 0
    assert {name: (out / name).read_bytes() for name in names} == first
    text = first["comparison.md"].decode()
    assert text.startswith(page) and all(f"]({name})" in text for name in names if name.endswith("svg"))


def test_the_figures_show_the_numbers_with_their_units(out: Path) -> None:
    figures: dict[str, Any] = dict(drawings(out))
    dice, tre = figures["accuracy"].axes  # folds are in the table
    assert (dice.get_xlabel(), tre.get_xlabel()) == ("Dice", "TRE mm")
    means = [float(line.get_xdata()[0]) for line in dice.lines if line.get_marker() in ("o", "^")]
    assert means == pytest.approx([0.7, 0.8])
    assert [float(line.get_xdata()[0]) for line in dice.lines if line.get_linestyle() == ":"] == [0.5]
    assert not [line for line in tre.lines if line.get_linestyle() == ":"]  # none was known before
    bars = [segment for c in dice.containers for segment in c.lines[2][0].get_segments()]
    assert [list(bar[:, 0]) for bar in bars] == [pytest.approx([0.6, 0.8]), pytest.approx([0.7, 0.9])]
    labels = [axes.get_xlabel() for axes in figures["cost"].axes]
    assert labels == ["parameters, millions", "GFLOP a pair", "seconds a pair"]
    seconds = figures["cost"].axes[2]
    shown = [(float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in seconds.containers]
    assert shown == [(0.25, 0.7), (0.5, 0.8)]


LINES = "backbone,metric,mean,low,high\n{0},dice,0.5,0.4,0.6\n{0},seconds_per_pair,1,1,1\n" + "".join(
    f"{{0}},{cost},1,,\n" for cost in ("parameters", "flops", "peak_memory_bytes", "training_seconds")
)


def test_the_lines_of_the_next_test_are_sound_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "comparison.csv").write_text(LINES.format("vgg16"))
    assert "vgg16" in write_page(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "backbone,metric,mean\n",
        "backbone,metric,mean,low,high\nvgg16,dice,x,0,1\n",
        LINES.format("<img src=x onerror=alert(1)>"),
        LINES.format("[a](javascript:alert(1))"),
        LINES.format("$x^{$"),
    ],
)
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.csv").write_text(text)
    with pytest.raises(InputError, match="comparison.csv: not as regpipe compare writes it"):
        write_page(tmp_path)


def test_a_backbone_that_is_none_of_ours_is_named_with_those_that_are(out: Path) -> None:
    (out / "comparison.csv").write_text((out / "comparison.csv").read_text().replace("alexnet", "mynet"))
    with pytest.raises(InputError, match=r"comparison\.csv: .*'mynet'.* resnet18, vgg16, alexnet"):
        write_page(out)


def test_a_cost_that_is_not_known_is_not_drawn_and_the_others_are(tmp_path: Path) -> None:
    unknown = {"seconds_per_pair": [math.nan] * 3}
    write_csv(tmp_path, {name: {**of, **unknown} for name, of in RESULTS.items()})
    results = read_csv(tmp_path)
    write_csv(tmp_path, {**results, "alexnet": {**results["alexnet"], "flops": None}})
    assert "| nan |" in write_page(tmp_path).splitlines()[-1] and (tmp_path / "comparison_cost.svg").is_file()
    figure: Any = drawings(tmp_path)["cost"]
    drawn = [np.isfinite([c.lines[0].get_xdata()[0] for c in axes.containers]).tolist() for axes in figure.axes]
    assert drawn == [[True, True], [True, False], [False, False]]  # parameters, GFLOP, seconds
    assert figure.axes[1].get_xlim() == pytest.approx((0, 1.08 * 5.6))


def test_a_folder_without_results_is_told_what_writes_them(tmp_path: Path) -> None:
    failed = CliRunner().invoke(cli.app, ["figures", str(tmp_path)])
    assert isinstance(failed.exception, InputError) and "regpipe study" in str(failed.exception)
