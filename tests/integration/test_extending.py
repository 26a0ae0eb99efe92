"""docs/extending.md followed as written: its files are made, its commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import tree
from tests.harness.tree import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks below that heading, up to the next of its rank."""
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```(\w+)\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)


def follow(section: str, folder: Path, environment: dict[str, str], install: list[str]) -> list[str]:
    """Does what the section says in ``folder``; the output of each command."""
    outputs = []
    for language, block in blocks(section):
        if language == "sh":
            for line in block.replace("\\\n", "").splitlines():
                outputs.append(command(shlex.split(line), folder, environment, install))
            continue
        first, _, text = block.partition("\n")
        place = re.fullmatch(r"# ([\w./]+)(?:, behind (\S+))?", first)
        assert place, f"a block begins with the name of its file, not {first!r}"
        path = folder / place[1]
        if place[2] is None:
            assert not path.exists(), f"{path} is there already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        else:
            before = path.read_text(encoding="utf-8")
            (line,) = re.findall(rf"^{re.escape(place[2])} = .*\n", before, re.MULTILINE)
            path.write_text(before.replace(line, line + text), encoding="utf-8")
    return outputs


def command(words: list[str], folder: Path, environment: dict[str, str], install: list[str]) -> str:
    known = {
        "python": [sys.executable],
        "mpqc": [sys.executable, "-m", "mpq_compiler"],
        "pip": [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"],
        "cat": ["cat"],
    }
    words = [*known[words[0]], *words[1:], *(install if words[:2] == ["pip", "install"] else [])]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_add_a_pass(tmp_path):
    copy = tree.copy(tmp_path / "tree")
    _, tested, golden, own, described, _, changed = follow(
        "Add a pass", copy, os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "120"}, []
    )
    # 4 models, the excerpt and the golden text; "passed" alone would not show that they were selected
    assert int(re.search(r"(\d+) passed", tested)[1]) >= 6 and "1 passed" in own
    assert golden.count("+   %") == 2 * golden.count("-   %") > 10 and "aten.sigmoid" in golden
    assert "What the names of the calls contain" in described
    assert "%mid_block_resnets_0_nonlinearity_silu_sigmoid" in changed
    assert "%down_blocks_0_resnets_0_nonlinearity_silu_sigmoid" not in changed


@pytest.mark.slow
def test_a_pass_in_a_package_of_its_own(tmp_path):
    site = tmp_path / "site"
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(site)]
    path = os.pathsep.join([str(site), str(ROOT)])
    (tmp_path / "package").mkdir()
    _, described, tested = follow(
        "A pass in a package of its own", tmp_path / "package", os.environ | {"PYTHONPATH": path}, offline
    )
    assert "count-macs  (identical)" in described and "1 passed" in tested
