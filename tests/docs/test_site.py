"""The site is built without a warning: links lead somewhere, every page is in the contents."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import mpq_compiler
from mpq_compiler.cli import mpqc
from mpq_compiler.pipeline import registry
from tests.harness.tree import ROOT


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed: pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-5000:]
    commands, passes = ((tmp_path / name).read_text(encoding="utf-8") for name in ("commands.html", "passes.html"))
    assert {*re.findall(r"usage: mpqc (\w+)", commands)} >= {"compile", "inspect", "sign"} and mpqc.parser()
    assert all(f">{name}" in passes for name in registry.BUILT_IN)
    assert (tmp_path / "CONTRIBUTING.html").exists() and (tmp_path / "backends" / "__init__.py").exists()
    search = (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "trajectory" in search


def test_the_page_of_python_has_every_public_name():
    named = re.findall(r"^::: mpq_compiler\.([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name.rpartition(".")[2] for name in named} - {"Options"} == {*mpq_compiler.__all__}
