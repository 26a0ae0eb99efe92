"""The commands of the pages as they stand, all of a page in one folder; `tests/harness/pages.py` has the marks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import pages, tiny
from tests.harness.tree import ROOT

SHELL = 'set -euo pipefail\nmpqc() { "$PYTHON" -m mpq_compiler "$@"; }\npython() { "$PYTHON" "$@"; }\n'
PAGES = [page for page in pages.pages() if any(block.is_run for block in pages.blocks(page))]


def follow(page: str, folder: Path) -> None:
    """Does what the page says in ``folder``, where path/to/model is a tiny UNet like fashion-unet; python that
    begins with the name of a file is written there."""
    (folder / "path" / "to").mkdir(parents=True)
    tiny.save("unet2d-class", folder).rename(folder / "path" / "to" / "model")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "COLUMNS": "120"}
    for block in filter(lambda block: block.is_run, pages.blocks(page)):
        text = block.commands
        if block.language == "python" and (named := re.match(r"# ([\w./]+\.py)\n", text)):
            (folder / named[1]).write_text(text, encoding="utf-8")
            continue
        command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-c", SHELL + text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}:{block.line}\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page, tmp_path):
    follow(page, tmp_path)
