"""A real browser for tests of pages: Chromium without a window, as Debian packages it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the browser. Skips where none is installed."""
    program = shutil.which("chromium") or pytest.skip("not installed: chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(file: Path, scheme: str = "light") -> Iterator[Page]:
    """Opens a page that must neither fail nor reach for a network."""
    wrong: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url.split("#")[0] != file.as_uri() else None)
        page.goto(file.as_uri())
        yield page
    assert wrong == []
