"""A browser for the tests that look at pages, Chromium of the system or Playwright's own; and the report in it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; without one the test is skipped, or fails where REGPIPE_REQUIRE_BROWSER=1."""
    missing = pytest.fail if os.environ.get("REGPIPE_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no Playwright: pip install playwright")
    with sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            missing("no browser: install Chromium, or run 'playwright install chromium'")
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


def executable(playwright: Any) -> str | None:
    """The path of an installed browser."""
    own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, BROWSERS)), None) or (own if Path(own).exists() else None)


class Opened:
    """The report's page, what it asked for and what it complained of."""

    def __init__(self, browser: Any, path: Path, case: str = "", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(5000)  # ms
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        if case:
            self.page.get_by_role("link", name=case, exact=True).click()
        self.loaded()

    def until(self, expression: str) -> None:
        """Waits until it is true; the page's policy forbids Playwright's own way."""
        for _ in range(100):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise TimeoutError(expression)

    def loaded(self) -> None:
        self.until("[...state.pictures.values()].every((image) => image.complete)")
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def bare(self) -> None:
        """Without what is drawn and written over the images."""
        self.page.evaluate(
            "document.querySelectorAll('.stage span').forEach((e) => { e.style.visibility = 'hidden'; })"
        )
        for box in ("label outlines", "landmarks"):
            self.page.get_by_label(box).uncheck()

    def grey(self, plane: int = 0) -> np.ndarray:
        """What is seen of a plane, (H, W)."""
        self.loaded()
        shot = self.page.locator("canvas").nth(plane).screenshot()
        return np.asarray(Picture.open(io.BytesIO(shot)).convert("L")).astype(float)

    def pixels(self, colour: tuple[int, int, int]) -> int:
        """How many pixels of the first plane are close to a colour."""
        self.loaded()
        shot = np.asarray(Picture.open(io.BytesIO(self.page.locator("canvas").first.screenshot())).convert("RGB"))
        return int((np.abs(shot.astype(int) - colour).max(axis=-1) < 40).sum())

    def slide(self, label: str, value: float) -> None:
        self.page.get_by_label(label).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }", value
        )


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        print(executable(started) or "none, so their tests are skipped")
