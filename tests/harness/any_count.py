"""Counts the uses of `Any` in the package, by room; the committed total may only fall.

    python -m tests.harness.any_count            # fails where there are more than tests/any_count.txt says
    python -m tests.harness.any_count --write    # commits the number that there is now
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

from tests.harness.tree import ROOT

NUMBER = ROOT / "tests" / "any_count.txt"
ROOMS = ("mpq_compiler", "passes", "backends")


def uses(source: str) -> int:
    """How often the source names `Any`, imports apart."""
    nodes = ast.walk(ast.parse(source))
    return sum(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in nodes
    )


def by_room(root: Path = ROOT) -> Counter[str]:
    """The uses of each room of the package; links are those of folders that are counted themselves."""
    found: Counter[str] = Counter()
    for folder in ROOMS:
        for path in (root / folder).rglob("*.py"):
            inside = path.relative_to(root)
            if any((root / parent).is_symlink() for parent in inside.parents):
                continue
            room = inside.parts[1] if folder == "mpq_compiler" and len(inside.parts) > 2 else folder
            found[room] += uses(path.read_text(encoding="utf-8"))
    return found


def main(arguments: list[str]) -> str | None:
    """Prints the counts; returns what is wrong, or None."""
    found = by_room()
    total, most = found.total(), int(NUMBER.read_text(encoding="utf-8")) if NUMBER.exists() else 0
    print(f"Any: {total}, of at most {most}:", ", ".join(f"{room} {n}" for room, n in found.most_common() if n))
    if arguments == ["--write"]:
        NUMBER.write_text(f"{total}\n", encoding="utf-8")
    elif total > most:
        return f"{total - most} more uses of Any than before: give them types (a TypedDict, a Protocol, a TypeVar)"
    elif total < most:
        print(f"{most - total} fewer: keep it so with `python -m tests.harness.any_count --write`")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
