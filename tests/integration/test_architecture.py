"""docs/architecture.md and its drawing: in step with the imports, the charters and the files."""

from __future__ import annotations

import re

import pytest

from tests.harness import architecture
from tests.harness.tree import ROOT

TEXT = architecture.PAGE.read_text(encoding="utf-8")
STALE = "run `python -m tests.harness.architecture`"
ADR = ROOT / "docs" / "adr"


def test_the_list_of_rooms_is_in_step():
    assert architecture.page(TEXT) == TEXT, STALE


def test_the_drawing_is_in_step():
    assert architecture.DRAWING.read_text(encoding="utf-8") == architecture.drawing(), STALE


def test_imports_go_down():
    """What import-linter holds in `make lint`, on the imports that are drawn."""
    order = {room: number for number, floor in enumerate(architecture.floors()) for room in floor}
    up = [(a, b) for a in order for b in architecture.imports(a) if order[b] <= order[a]]
    assert not up


def test_every_room_has_a_floor():
    folders = {path.parent.name for path in architecture.PACKAGE.glob("*/__init__.py")}
    assert folders == {*architecture.rooms()}


KINDS = (
    *("pass", "weight format", "backend", "CPU feature", "metric"),
    *("scheduler", "input kind", "command", "budget", "JSON field"),
)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_newcomer_finds_the_files(kind):
    """The row of the change names files and folders that are there."""
    (row,) = re.findall(rf"^\| an? {kind} \|.*$", TEXT, re.MULTILINE)
    paths = [p for p in re.findall(r"`([\w./-]+)`", row) if "/" in p and "<" not in p]
    assert paths
    assert not [p for p in paths if not (ROOT / p).exists()]


def test_names_in_the_rows_are_there():
    for file, name in (
        ("mpq_compiler/targets/table.py", "_NATIVE"),
        ("mpq_compiler/evaluation/metrics.py", "def compare_images"),
        ("mpq_compiler/sampling/schedulers.py", "_SOLVERS"),
        ("mpq_compiler/frontend/input_specs.py", "_KNOWN"),
        ("mpq_compiler/frontend/input_specs.py", "def specs_of"),
        ("mpq_compiler/frontend/input_specs.py", "def random_values"),
        ("mpq_compiler/targets/table.py", "_ATTRIBUTES"),
        ("mpq_compiler/cli/mpqc.py", "REQUIREMENTS"),
        ("mpq_compiler/cli/options.py", "def add_budgets"),
        ("mpq_compiler/cli/allocate.py", "def problem_of"),
        ("mpq_compiler/driver/lower.py", "def _check_budget"),
        ("tests/harness/tiny.py", "ALL_FAMILIES"),
        ("tests/ir/test_printer.py", "UNCHANGED"),
        ("tests/sampling/test_schedulers.py", "CONFIGS"),
    ):
        assert name.removeprefix("def ") in TEXT and name in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Links between pages, and to files of the tree."""
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    assert not [t for t in targets if t and not ((ROOT / page).parent / t).exists()]


def test_decisions_are_numbered_and_say_why():
    files = sorted(path for path in ADR.glob("*.md") if path.name != "README.md")
    assert [int(path.name[:4]) for path in files] == list(range(1, len(files) + 1))
    index = (ADR / "README.md").read_text(encoding="utf-8")
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"^## (\w+)", text, re.MULTILINE) == ["Context", "Decision", "Consequences"], path.name
        assert f"({path.name})" in index, path.name


def test_the_changelog_and_the_guides_are_linked():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples"):
        assert f"({page})" in readme and (ROOT / page).exists()
