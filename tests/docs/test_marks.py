"""Every command of the pages is run by a test, or says why it is not."""

from __future__ import annotations

import re

from tests.harness import pages
from tests.harness.tree import ROOT

BLOCKS = {page: [*pages.blocks(page)] for page in pages.pages()}
EVERY = [block for found in BLOCKS.values() for block in found]


def where(block: pages.Block) -> str:
    return f"{block.page}:{block.line}"


def test_commands_are_in_blocks_of_their_language():
    """A block that no rule knows would be neither run nor marked."""
    assert len(EVERY) > 80
    strange = [where(b) for b in EVERY if not b.is_code and pages.COMMAND.search(b.text)]
    assert not strange, f"write sh, console or python behind the fence: {strange}"


def test_every_comment_of_that_form_is_the_mark_of_a_block():
    for page, found in BLOCKS.items():
        comments = re.findall(r"^<!-- (?:not run|run with|run by)", (ROOT / page).read_text(), re.MULTILINE)
        whole = "<!-- every block" in (ROOT / page).read_text()
        assert whole or len(comments) == sum(bool(b.kind) for b in found), f"{page}: a mark stands before no block"


def test_reasons_are_reasons():
    short = [where(b) for b in EVERY if b.kind == "not run" and len(b.note.split()) < 3]
    assert not short


def test_tests_that_marks_name_are_there_and_know_the_page():
    """Of blocks that another test runs, it names the page."""
    for block in EVERY:
        for name in re.findall(r"tests/[\w/]+\.py", block.note):
            assert (ROOT / name).exists(), f"{where(block)}: {name}"
            if block.kind == "run by":
                assert block.page.rpartition("/")[2] in (ROOT / name).read_text(), f"{where(block)}: {name}"


def test_what_marks_replace_is_there():
    replaced = [block.commands for block in EVERY if block.kind == "run with"]
    assert len(replaced) > 10 and all(replaced)
