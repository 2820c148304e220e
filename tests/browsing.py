"""A browser for the tests that look at pages: Chromium of the system, or Playwright's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        print(executable(started) or "none, so their tests are skipped")
