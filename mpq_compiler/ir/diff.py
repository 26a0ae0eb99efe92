"""Compares two programs as text."""

from __future__ import annotations

import difflib
import re

# --- differences --------------------------------------------------------------------------------------------


def diff(before: str, after: str, context: int = 2) -> str:
    """The changed lines between two texts, with ``context`` lines around; empty where nothing changed.

    Columns that only moved do not count as changes.
    """

    def plain(line: str) -> str:
        return re.sub(r"\s+", " ", line)

    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, [plain(s) for s in old], [plain(s) for s in new], autojunk=False)
    lines: list[str] = []
    seen = 0
    for group in matcher.get_grouped_opcodes(context):
        skipped = group[0][1] - seen
        if skipped > 0:
            lines.append(f"@@ {skipped} lines the same @@")
        for tag, i, j, k, m in group:
            if tag == "equal":
                lines += [f"  {line}" for line in new[k:m]]
            else:
                lines += [f"- {line}" for line in old[i:j]] + [f"+ {line}" for line in new[k:m]]
        seen = group[-1][2]
    if lines and len(old) > seen:
        lines.append(f"@@ {len(old) - seen} lines the same @@")
    return "\n".join(lines) + "\n" if lines else ""
