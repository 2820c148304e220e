"""The report in a browser: controls and keys do what they say, nothing leaves the page, everybody can read it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.browsing import Opened, chromium
from helpers.reported import write_case
from regpipe.metrics.thresholds import thresholds
from regpipe.report.qc_page import write_report

WORST = "<script>alert(1)<script>"  # as a folder's name, which has no slash
CASES = {"flat": (0.9, 2), "volume": (0.7, 3), WORST: (0.3, 2)}

# Each text's contrast with what is behind it, the worst first; what has no ground of its own shows its parent's.
CONTRAST = """() => {
  const rgb = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n.slice(0, 3), n[3] ?? 1]; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  const ground = (e) => {
    const [colour, alpha] = rgb(getComputedStyle(e).backgroundColor);
    return alpha === 1 ? colour : ground(e.parentElement);
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest(".stage, .hidden, script, noscript")) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)[0]), light(ground(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
}"""

# Controls without a name, pictures without a description, headings that skip a level, ids given twice.
NAMELESS = """() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const named = (e) => (e.labels?.length ? e.labels[0] : e).textContent.trim() || e.getAttribute("aria-label") || e.alt;
  const nameless = all("input, button, canvas, img, svg, fieldset, [tabindex='0']").filter((e) => !named(e));
  const levels = all("h1, h2, h3").map((h) => Number(h.tagName[1]));
  const ids = all("[id]").map((e) => e.id);
  return [
    ...nameless.map((e) => e.outerHTML),
    ...all("fieldset").filter((e) => !e.querySelector("legend").textContent.trim()).map((e) => e.outerHTML),
    ...levels.filter((level, i) => level > (levels[i - 1] ?? 0) + 1),
    ...ids.filter((id, i) => ids.indexOf(id) !== i),
  ];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "registered #1"
    for name, (dice, dim) in CASES.items():
        metrics = {"dice_before": 0.25, "dice": dice, "tre": dice, "folds_percent": 0.0}
        write_case(root / name, name, metrics, dim=dim)
    write_report(root, thresholds())
    return root


@pytest.fixture
def opened(browser: Any, folder: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    page = Opened(browser, folder / "report.html", request.param)
    yield page
    assert page.complaints == []
    page.context.close()


flat = pytest.mark.parametrize("opened", ["flat"], indirect=True)
volume = pytest.mark.parametrize("opened", ["volume"], indirect=True)
worst = pytest.mark.parametrize("opened", [""], indirect=True)


def middle(grey: np.ndarray) -> np.ndarray:
    """The row through the disc."""
    return grey[grey.shape[0] // 2]


@worst
def test_the_worst_case_is_shown_and_only_its_pictures_are_asked_for(opened: Opened, folder: Path) -> None:
    assert opened.page.locator("#case-name").inner_text() == WORST
    assert opened.page.locator("#cases tbody tr").count() == 3
    asked = [url for url in opened.asked if not url.startswith("data:")]
    assert len(asked) > 1
    assert all(url.startswith(f"{folder.as_uri()}/") for url in asked)
    assert not [url for url in asked if "/flat/" in url or "/volume/" in url]


@flat
def test_the_divider_shows_fixed_to_its_left_and_warped_to_its_right(opened: Opened) -> None:
    opened.bare()
    n = len(middle(opened.grey()))
    inside = slice(int(0.4 * n), int(0.45 * n)), slice(int(0.55 * n), int(0.6 * n))
    for divider, left, right in ((100, "bright", "bright"), (0, "dark", "dark"), (50, "bright", "dark")):
        opened.slide("Divider", divider)
        row = middle(opened.grey())
        found = ["bright" if row[part].mean() > 128 else "dark" for part in inside]
        assert found == [left, right]
    opened.page.get_by_label("before", exact=True).check()
    assert middle(opened.grey())[inside[1]].std() < 2  # the image before is flat
    box = opened.page.locator("canvas").bounding_box()
    opened.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 50)
    opened.page.mouse.up()
    assert abs(float(opened.page.get_by_label("Divider").input_value()) - 25) <= 1


@flat
def test_the_checkerboard_has_as_many_squares_as_asked_for(opened: Opened) -> None:
    opened.bare()
    opened.page.get_by_label("checkerboard").check()
    for squares in (4, 8):
        opened.slide("Squares across", squares)
        grey = opened.grey()
        edge = grey.shape[1] / squares
        inner = np.abs(np.diff(grey[int(0.48 * len(grey))])) > 60  # jumps along a row through the disc
        at = np.flatnonzero(inner)
        within = [k * edge for k in range(1, squares) if abs(k / squares - 0.5) < 0.2]
        assert all(np.abs(at - place).min() <= 3 for place in within)


@flat
def test_flicker_changes_by_itself_only_while_it_plays(opened: Opened) -> None:
    opened.bare()
    opened.page.get_by_label("flicker").check()
    opened.slide("Seconds each", 0.2)
    label = opened.page.locator(".stage .one")
    opened.until("document.querySelector('.stage .one').textContent === 'moving, after'")
    opened.until("document.querySelector('.stage .one').textContent === 'fixed'")
    button = opened.page.locator("#play")
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Pause", "true")
    button.click()
    shown = label.inner_text()
    opened.page.wait_for_timeout(500)
    assert label.inner_text() == shown


@volume
def test_sliders_and_keys_scroll_each_plane(opened: Opened) -> None:
    opened.bare()
    opened.slide("Divider", 100)
    slider = opened.page.get_by_label("axial slice")
    assert opened.page.locator("canvas").count() == 3
    opened.slide("axial slice", 0)
    assert middle(opened.grey(0))[10:-10].max() < 128  # below the ball
    opened.slide("axial slice", 8)
    assert middle(opened.grey(0))[10:-10].max() > 200
    canvas = opened.page.locator("canvas").first
    canvas.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "ArrowLeft"):
        canvas.press(key)
    assert slider.input_value() == "9"
    assert opened.page.get_by_label("Divider").input_value() == "98"
    assert "slice 10 of 16" in canvas.get_attribute("aria-label")
    assert opened.page.get_by_label("coronal slice").input_value() == "10"  # stays where it was
    opened.page.mouse.move(*centre(canvas))
    opened.page.mouse.wheel(0, -100)
    opened.until("document.querySelector('#planes input').value === '10'")


def centre(element: Any) -> tuple[float, float]:
    box = element.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@volume
def test_one_plane_is_shown_larger_and_all_have_one_scale(opened: Opened) -> None:
    sizes = [box.bounding_box() for box in opened.page.locator("canvas").all()]
    assert sizes[0]["width"] / 24 == pytest.approx(sizes[2]["width"] / 20, rel=0.01)  # mm
    opened.page.get_by_label("axial", exact=True).check()
    shown = [box for box in opened.page.locator("canvas").all() if box.is_visible()]
    assert len(shown) == 1
    assert shown[0].bounding_box()["width"] > 1.2 * sizes[0]["width"]


@flat
def test_outlines_landmarks_grid_and_volume_change_have_their_colours(opened: Opened) -> None:
    orange, blue, gold = (230, 159, 0), (86, 180, 233), (255, 215, 0)
    page = opened.page
    assert opened.pixels(orange) > 100
    assert opened.pixels(blue) > 100
    page.get_by_label("landmarks").uncheck()
    outlines = opened.pixels(orange)
    page.get_by_label("label outlines").uncheck()
    assert opened.pixels(orange) == opened.pixels(blue) == 0
    page.get_by_label("landmarks").check()
    assert 0 < opened.pixels(orange) < outlines
    page.get_by_label("deformed grid").check()
    assert opened.pixels(gold) > 1000
    assert not page.get_by_label("label outlines").is_visible()
    page.get_by_label("volume change").check()
    assert opened.pixels((230, 25, 25)) > 1000  # det J is 0 and less at one side
    assert page.locator("[data-legend=jacobian]").is_visible()


@worst
def test_the_table_sorts_filters_and_steps(opened: Opened) -> None:
    page = opened.page
    names = page.locator("#cases tbody tr:not([hidden]) a")
    assert names.all_inner_texts() == [WORST, "volume", "flat"]
    head = page.locator("#cases th").filter(has=page.get_by_role("button", name="Dice", exact=True))
    head.get_by_role("button").press("Enter")
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert names.all_inner_texts() == ["flat", "volume", WORST]
    page.locator("#previous").click()
    assert page.locator("#case-name").inner_text() == "volume"
    page.locator("input[name=status][value=warn]").check()
    assert names.all_inner_texts() == ["volume"]
    assert page.locator("#shown").inner_text() == "1 of 3 cases"
    page.locator("input[name=status][value='']").check()
    page.get_by_label("Name contains").fill("FLA")
    assert names.all_inner_texts() == ["flat"]


@volume
def test_the_skip_link_leads_to_the_pictures_of_the_case_that_is_shown(opened: Opened) -> None:
    opened.page.locator(".skip").focus()
    opened.page.keyboard.press("Enter")
    opened.until("location.hash === '#viewer'")
    opened.page.wait_for_timeout(100)
    assert opened.page.locator("#case-name").inner_text() == "volume"
    opened.page.go_back()
    opened.until("location.hash.startsWith('#case-')")
    assert opened.page.locator("#case-name").inner_text() == "volume"


@volume
def test_paper_has_the_case_and_no_controls(opened: Opened) -> None:
    controls = ("form", ".steps", "#planes input", ".skip")
    assert all(opened.page.locator(what).first.is_visible() for what in controls)
    opened.page.emulate_media(media="print")
    assert not any(each.is_visible() for what in controls for each in opened.page.locator(what).all())
    assert opened.page.locator("#cases").is_visible() and opened.page.locator("canvas").first.is_visible()


def test_a_thousand_cases_open_at_once_with_the_pictures_of_one(browser: Any, tmp_path: Path) -> None:
    write_case(tmp_path / "one", "one", {"dice": 0.9, "folds_percent": 0.0})
    for i in range(1, 1000):
        (tmp_path / f"case_{i:04d}").symlink_to(tmp_path / "one")
    path, _ = write_report(tmp_path, thresholds())
    began = time.monotonic()
    opened = Opened(browser, path)
    seconds = time.monotonic() - began
    assert opened.page.locator("#cases tbody tr").count() == 1000
    assert len({url.split("/view/")[0] for url in opened.asked if "/view/" in url}) == 1
    assert seconds < 10  # 1 s of an idle core
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_everything_has_a_name(browser: Any, folder: Path, scheme: str) -> None:
    opened = Opened(browser, folder / "report.html", "volume", color_scheme=scheme)
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(ground[0]) < 60) == (scheme == "dark")
    for details in opened.page.locator("details").all():
        details.evaluate("(e) => { e.open = true; }")
    worst_texts = opened.page.evaluate(CONTRAST)
    assert worst_texts[0][0] >= 4.5, worst_texts
    assert opened.page.evaluate(NAMELESS) == []
    opened.context.close()


def test_a_missing_picture_is_said(browser: Any, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "flat" / "view" / "image_warped.webp").unlink()
    opened = Opened(browser, copy / "report.html", "flat")
    opened.page.get_by_text("A picture is missing: image_warped.webp").wait_for()
    opened.context.close()


def test_a_page_in_a_single_file_needs_no_other(browser: Any, folder: Path, tmp_path: Path) -> None:
    page, _ = write_report(folder, thresholds(), out=tmp_path / "mail", single_file=True)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    opened = Opened(browser, page, "flat")
    opened.bare()
    opened.slide("Divider", 100)
    assert opened.grey().max() > 200
    assert [url for url in opened.asked if not url.startswith("data:")] == [page.as_uri()]
    assert opened.complaints == []
    opened.context.close()
