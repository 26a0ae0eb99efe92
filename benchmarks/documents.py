"""Tables that stand in documents, between the marks ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown; a column without any value is left out, as `terminal.table` does."""
    kept = [i for i in range(len(headers)) if not lines or any(line[i] for line in lines)]
    whole = (headers, ["---"] * len(headers), *lines)
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in whole)


def insert(path: Path, name: str, table: str) -> None:
    """Puts a table between the marks of its name, in place of what stands there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")
