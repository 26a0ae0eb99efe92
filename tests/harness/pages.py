"""The code blocks of the pages, each with what is to be done with it.

A comment before a block is its mark; without one its commands are run as they stand, all of a page in one folder:

    <!-- not run: needs a GPU -->
    <!-- run with: fashion-unet -> path/to/model; 1200 -> 4 -->
    <!-- run by: tests/integration/test_extending.py -->

A page whose blocks all have the same mark says it once: ``<!-- every block not run: ... -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.harness.tree import ROOT

KINDS = ("not run", "run with", "run by")
COMMAND = re.compile(r"^(\$ )?(mpqc|python3?|pip|make|\./mpq_\w+) ", re.MULTILINE)
_MARK = re.compile(rf"<!-- (every block )?({'|'.join(KINDS)}): (.*?) -->")
_BLOCK = re.compile(r"(?:^(<!--[^\n]*-->)\n+)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    kind: str
    """One of `KINDS`, or nothing where the block is run as it stands."""
    note: str

    @property
    def is_code(self) -> bool:
        return self.language in ("sh", "console", "python")

    @property
    def is_run(self) -> bool:
        return self.is_code and self.kind in ("", "run with")

    @property
    def commands(self) -> str:
        """What is run: of a console the lines behind its prompts, with what the mark puts elsewhere."""
        lines = self.text.splitlines()
        text = "\n".join(x[2:] for x in lines if x.startswith("$ ")) if self.language == "console" else self.text
        for pair in self.note.split("; ") if self.kind == "run with" else ():
            old, _, new = pair.partition(" -> ")
            assert old in text, f"{self.page}:{self.line}: there is no '{old}' to replace"
            text = text.replace(old, new)
        return text


def pages() -> list[str]:
    """The pages of the site that are files, relative to the root."""
    beside = ("README.md", "CONTRIBUTING.md", "examples/README.md", "mpq_compiler/models/README.md", "tests/README.md")
    return [*beside, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]


def blocks(page: str) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    whole = next((m for m in _MARK.finditer(text) if m[1]), None)
    for found in _BLOCK.finditer(text):
        mark = _MARK.fullmatch(found[1] or "") or whole
        kind, note = (mark[2], mark[3]) if mark else ("", "")
        yield Block(page, text.count("\n", 0, found.start(2)) + 1, found[2], found[3], kind, note)
