"""The report of a folder: which cases are in it and in which order, hostile names, missing pieces, nothing private."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.reported import write_case
from regpipe.cli.main import app
from regpipe.metrics.thresholds import Threshold, thresholds
from regpipe.report.qc_page import _number, chart, read_cases, write_report
from regpipe.report.views import FORMAT
from regpipe.utils.errors import InputError

HOSTILE = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """What a browser would make of the page: elements, and the data of each case."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.data: list[dict[str, Any]] = []
        self._in = ("", "")
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = (tag, dict(attrs).get("type") or "")

    def handle_data(self, data: str) -> None:
        if self._in == ("script", "application/json") and data.strip():
            self.data.append(json.loads(data))
        elif self._in[0] == "a" and data.strip():
            self.cells.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases, the worst in the middle of the alphabet."""
    root = tmp_path / "registered"
    for name, dice in (("a", 0.9), ("b", 0.3), ("c", 0.7)):
        write_case(root / name, name, {"dice_before": 0.25, "dice": dice, "tre": None, "folds_percent": 0.0})
    return root


def test_cases_come_the_worst_first_and_count_by_verdict(folder: Path) -> None:
    path, cases = write_report(folder, thresholds())
    assert path == folder / "report.html"
    assert [(case.name, case.verdict.status) for case in cases] == [("b", "fail"), ("c", "warn"), ("a", "pass")]
    page = Page(path)
    assert [case["name"] for case in page.data] == ["b", "c", "a"]
    dice = page.data[0]["numbers"][0]
    assert dice == {
        "title": "Dice", "unit": "", "before": "0.2500", "value": "0.3000", "limits": "< 0.8, < 0.5", "step": "fail"
    }  # fmt: skip
    assert "TRE" not in [number["title"] for number in page.data[0]["numbers"]]


def test_a_hostile_name_is_text_and_its_pictures_are_found(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    write_case(tmp_path / name, HOSTILE, {"dice": 0.9})
    path, _ = write_report(tmp_path, thresholds())
    page = Page(path)
    assert HOSTILE in "".join(page.cells)
    assert page.data[0]["name"] == HOSTILE
    assert "alert(1)" not in re.findall(r"<script>(.*?)</script>", path.read_text(), re.DOTALL)[0]
    assert sum(tag == "script" for tag, _ in page.elements) == 2  # one case's data and the page's own
    for address in page.data[0]["pictures"].values():
        assert not set(address) & set("<>\"' ")


def test_the_page_names_no_address_and_no_path_of_the_disk(folder: Path) -> None:
    about = json.loads((folder / "a" / "transform.json").read_text())
    about["settings"] = {"model": "/home/doctor/secret/model.pt", "loss": {"lncc": 1.0}}
    (folder / "a" / "transform.json").write_text(json.dumps(about))
    text = write_report(folder, thresholds())[0].read_text()
    assert "model.pt" in text
    assert "/home" not in text
    assert str(folder.parent) not in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert "://" not in text


def test_pictures_lie_beside_or_are_copied_or_are_inside(folder: Path, tmp_path: Path) -> None:
    beside = Page(write_report(folder, thresholds())[0]).data[0]["pictures"]
    assert all((folder / address).is_file() for address in beside.values())
    out = tmp_path / "handed on"
    copied = Page(write_report(folder, thresholds(), out=out)[0]).data[0]["pictures"]
    shutil.rmtree(folder / "b")
    assert copied.keys() == beside.keys()
    assert all((out / address).is_file() for address in copied.values())
    inside = Page(write_report(folder, thresholds(), single_file=True)[0]).data[0]["pictures"]
    assert inside
    assert all(address.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for address in inside.values())


def test_a_metric_that_could_not_be_computed_is_said_in_the_table_and_beside_the_pictures(tmp_path: Path) -> None:
    write_case(tmp_path / "a", "a", {"sdlogj": None, "dice_before": None, "dice": None})
    path, (case,) = write_report(tmp_path, thresholds())
    assert case.verdict.status == "warn"
    (number,) = Page(path).data[0]["numbers"]
    assert (number["title"], number["value"], number["step"]) == ("SDlogJ", "could not be computed", "warn")
    (cell,) = re.findall(r'<td class="number warn" data-value="">(.*?)</td>', path.read_text())
    assert cell.endswith("could not be computed")


def test_small_numbers_keep_their_digits() -> None:
    shown = [_number(value) for value in (0.0, 1e-9, -2.34e-5, 1e-4, 0.12345, 12.345, 1234.5, math.nan, math.inf)]
    assert shown == ["0", "1.0e-09", "-2.3e-05", "0.0001", "0.1235", "12.35", "1234", "", "inf"]


def test_one_case_is_a_folder_too(folder: Path) -> None:
    path, (case,) = write_report(folder / "c", thresholds())
    assert path == folder / "c" / "report.html"
    pictures = Page(path).data[0]["pictures"]
    assert pictures
    assert all((folder / "c" / address).is_file() for address in pictures.values())


VIEW = {"format": FORMAT, "planes": [{"name": "x"}], "layers": {"fixed": "fixed.webp"}, "landmarks": []}
WRONG: tuple[dict[str, Any], ...] = (
    {"planes": True},
    {"planes": [1]},
    {"planes": [{}]},
    {"planes": [{"name": {}}]},
    {"layers": 1},
    {"layers": {"a": []}},
)


@pytest.mark.parametrize(
    "text", [*(json.dumps({**VIEW, **wrong}) for wrong in WRONG), "[" * 100_000], ids=lambda t: t[-40:]
)
def test_a_view_that_is_none_of_ours_is_as_none(text: str, folder: Path) -> None:
    (folder / "a" / "view" / "view.json").write_text(text)
    cases, _ = read_cases(folder, thresholds())
    assert {case.name for case in cases if case.view is None} == {"a"}
    write_report(folder, thresholds())


@pytest.mark.parametrize("value", [10**400, "much", {}, [1]])
@pytest.mark.parametrize("name", ["tre", "made_from", "dice"])
def test_a_number_that_is_none_spoils_its_own_case_at_most(name: str, value: Any, folder: Path) -> None:
    file = folder / "a" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    cases, problems = read_cases(folder, thresholds())
    assert {"b", "c"} <= {case.name for case in cases} and len(cases) + len(problems) >= 3
    write_report(folder, thresholds())


def test_what_is_unfinished_damaged_or_without_pictures_is_said_and_the_others_shown(folder: Path) -> None:
    (folder / "a" / "metrics.json").unlink()
    (folder / "b" / "metrics.json").write_text('{"dice"')
    (folder / "c" / "view" / "view.json").write_text(json.dumps({"format": FORMAT, "planes": [{}]}))  # cut off
    (folder / "notes").mkdir()
    cases, problems = read_cases(folder, thresholds())
    assert [case.name for case in cases] == ["c"]
    assert len(problems) == 2
    assert problems[0].startswith("a: unfinished")
    assert problems[1].startswith("b: its metrics.json is damaged")
    path, _ = write_report(folder, thresholds())
    assert "a: unfinished" in path.read_text()
    assert Page(path).data[0]["planes"] == []
    assert list(Page(path).data[0]["pictures"]) == ["sheet.png"]


def test_settings_that_differ_between_cases_are_said_to(folder: Path) -> None:
    about = json.loads((folder / "a" / "transform.json").read_text())
    (folder / "a" / "transform.json").write_text(json.dumps({**about, "settings": {"refine": 80}}))
    text = write_report(folder, thresholds())[0].read_text()
    assert "<dt>refine</dt><dd>differs between cases</dd>" in text


def test_cases_of_an_earlier_run_are_named(folder: Path) -> None:
    made = {"weights": "0f", "settings": {"refine": 50}}
    for name, other in (("a", {}), ("b", {}), ("c", {"settings": {"refine": 0}})):
        file = folder / name / "metrics.json"
        files = {"fixed_image": [name, 1, 2]}  # each case's own
        file.write_text(json.dumps({**json.loads(file.read_text()), "made_from": {**files, **made, **other}}))
    cases, (problem,) = read_cases(folder, thresholds())
    assert len(cases) == 3
    assert problem == "c: was registered with other weights or settings than 2 other cases; register the folder again"
    assert problem in write_report(folder, thresholds())[0].read_text()


def test_copies_of_linked_cases_have_a_folder_each(folder: Path, tmp_path: Path) -> None:
    picked = tmp_path / "picked"
    picked.mkdir()
    for run in ("first", "second"):
        write_case(tmp_path / run / "case", run, {"dice": 0.9})
        (picked / run).symlink_to(tmp_path / run / "case")
    one, two = (
        set(case["pictures"].values()) for case in Page(write_report(picked, thresholds(), out=tmp_path)[0]).data
    )
    assert one and two and not one & two


def test_a_folder_without_registrations_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished registration"):
        write_report(tmp_path, thresholds())
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "none", thresholds())


def test_a_histogram_holds_every_value_and_a_threshold_that_is_near() -> None:
    values = [0.7, 0.75, 0.8, 0.8, math.nan]
    found = chart("dice", values, Threshold(0.75, 0.2, ""))
    counts, _ = np.histogram(values[:4], 20, (0.7, 0.8))
    np.testing.assert_allclose(found["bars"], counts / counts.max(), atol=1e-4)
    assert found["n"] == 4
    assert found["median"] == pytest.approx(0.775)
    (line,) = found["lines"]  # 0.2 is far off
    assert line == {"kind": "warn", "at": pytest.approx(0.5)}


def test_a_histogram_of_one_value_shows_how_far_the_threshold_is() -> None:
    found = chart("folds_percent", [0.0] * 7, Threshold(0, 0.1, ""))
    assert (found["low"], found["high"]) == (0, 0.1)
    assert found["bars"][0] == 1
    assert [line["at"] for line in found["lines"]] == [0, 1]
    assert sum(chart("dice", [math.nan], None)["bars"]) == 0
    assert sum(chart("space", [2.0, math.nextafter(2.0, 3)], None)["bars"]) == 1  # equal but for the last digit


def test_the_command_says_where_and_how_many(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["report", str(folder), "--threshold", "dice=0.6,0.2"])
    assert run.exit_code == 0
    assert run.stdout.startswith(f"{folder / 'report.html'}: 3 cases (0 fail, 1 warn, 2 pass)")
    assert run.stdout.count("\n") == 1


def test_mean_changes_of_volume_have_their_place_and_their_interval(tmp_path: Path) -> None:
    for name, ratio in (("a", 2.0), ("b", 0.5), ("c", 1.0)):
        write_case(tmp_path / name, name, {"dice": 0.9})
        path = tmp_path / name / "metrics.json"
        row = json.loads(path.read_text())
        row["volumes"] = {"7": {"ratio": ratio, "p5": 0.1, "p95": 3.0}, "12": {"ratio": 1.5, "p5": 1.0, "p95": 2.0}}
        path.write_text(json.dumps(row))
    text = write_report(tmp_path, thresholds())[0].read_text()
    rows = [re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr><th scope=.row.>.*?</tr>", text)]
    assert rows[0][:3] == ["7", "3", "1.000"] and rows[1] == ["12", "3", "1.500", "1.500 to 1.500"]
    low, high = map(float, rows[0][3].split(" to "))
    assert 0.5 <= low < 1 < high <= 2 and low * high == pytest.approx(1, rel=0.2)  # twice and half, in logarithms
