"""A real browser for tests of pages: Chromium without a window, as Debian packages it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright


@contextmanager
def opened(file: Path, scheme: str = "light", **options: Any) -> Iterator[Page]:
    """Opens a page that must neither fail nor reach for a network. Skips where no Chromium is installed."""
    chromium = shutil.which("chromium") or pytest.skip("not installed: chromium (apt-get install chromium)")
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme, **options)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
            page.on("request", lambda asked: wrong.append(asked.url) if asked.url != file.as_uri() else None)
            page.goto(file.as_uri())
            yield page
        finally:
            browser.close()
    assert wrong == []
