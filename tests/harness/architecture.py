"""Draws docs/architecture.svg from the imports and writes the list of rooms: ``python -m tests.harness.architecture``.

The order of the rooms is that of the import-linter contract in pyproject.toml, a charter the first line of the room's
``__init__``, a dot an import, wherever it stands in a file.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from html import escape

from tests.harness.tree import ROOT

PACKAGE = ROOT / "mpq_compiler"
DRAWING = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->\n"

ROW, GAP, TOP, LEFT, NAMES, CHARTERS, CELL = 26, 8, 104, 12, 112, 620, 22
"""Sizes in pixels: of a room's row, between floors, above the first, of the three columns and a cell."""
INK, PALE, LINE, DEVICE, PLUGIN = "#1b1f24", "#6a737d", "#d8dee4", "#d5efe0", "#fdebc8"


@functools.cache
def contracts() -> dict[str, dict]:
    """The contracts of import-linter by their ids."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


def floors() -> list[list[str]]:
    """The rooms from the top floor down; rooms of one floor do not import each other."""
    return [floor.split(" | ") for floor in contracts()["rooms"]["layers"]]


def rooms() -> list[str]:
    """All rooms, from the top down."""
    return [room for floor in floors() for room in floor]


def charter(room: str) -> str:
    """The first line of the docstring of the room."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text, f"the room {room} has no charter"
    return text.splitlines()[0]


@functools.cache
def imports(room: str) -> set[str]:
    """The other rooms that a module of this room imports from, function bodies and TYPE_CHECKING included."""
    found: set[str] = set()
    for file in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    named = {name.split(".")[1] for name in found if name.startswith("mpq_compiler.")}
    return (named & {*rooms()}) - {room}


def page(text: str) -> str:
    """The page with the list of rooms as it should be."""
    torchless = on_devices()
    rows = ["| floor | room | charter | torch |\n", "|---|---|---|---|\n"]
    for number, floor in zip(range(len(floors()), 0, -1), floors(), strict=True):
        for room in floor:
            where = f"../{room}" if (PACKAGE / room).is_symlink() else f"../mpq_compiler/{room}"
            rows.append(f"| {number} | [`{room}`]({where}) | {charter(room)} | {'no' if room in torchless else ''} |\n")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(rows) + END + after


def on_devices() -> set[str]:
    """The rooms that run where there is no torch."""
    return {module.rpartition(".")[2] for module in contracts()["devices"]["source_modules"]}


def plugged() -> set[str]:
    """The rooms that installed packages extend by entry points."""
    declared = tomllib.loads((PACKAGE / "plugins.toml").read_text(encoding="utf-8"))
    return {group.rpartition(".")[2] for group in declared} & {*rooms()} | {"targets"}


def drawing() -> str:
    """The rooms on their floors, and at the right what each imports: all dots lie below the diagonal."""
    y, tops = TOP, {}
    for floor in floors():
        for room in floor:
            tops[room] = y
            y += ROW
        y += GAP
    matrix = LEFT + NAMES + CHARTERS
    width, height = matrix + CELL * len(tops) + 34, y + 34
    columns = {room: matrix + CELL * i + CELL // 2 for i, room in enumerate(tops)}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">\n',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n',
        _text(LEFT, 28, "The rooms of mpq_compiler", size=18, weight="bold"),
        _text(LEFT, 50, "A room imports from the floors below it, never from its own floor or from above.", PALE),
        _text(LEFT, TOP - 14, "room", PALE),
        _text(LEFT + NAMES, TOP - 14, "charter", PALE),
        _text(matrix - 8, TOP - 14, "imports from", PALE, anchor="end"),
    ]
    for room, x in columns.items():
        out.append(f'<g transform="translate({x + 4},{TOP - 8}) rotate(-60)">{_text(0, 0, room, size=11)[:-1]}</g>\n')
    for floor in floors():
        first, last = tops[floor[0]], tops[floor[-1]]
        out.append(
            f'<rect x="{LEFT - 6}" y="{first}" width="{width - 2 * LEFT - 10}" height="{last - first + ROW}" rx="5" '
            f'fill="#f6f8fa" stroke="{LINE}"/>\n'
        )
        for room in floor:
            top, middle = tops[room], tops[room] + ROW / 2
            fill = DEVICE if room in on_devices() else PLUGIN if room in plugged() else None
            if fill:
                size = f'width="{NAMES - 8}" height="{ROW - 6}"'
                out.append(f'<rect x="{LEFT - 3}" y="{top + 3}" {size} rx="4" fill="{fill}"/>\n')
            out.append(_text(LEFT + 3, middle + 4.5, room, weight="bold"))
            out.append(_text(LEFT + NAMES, middle + 4.5, charter(room).replace("`", ""), size=12))
            out.append(f'<circle cx="{columns[room]}" cy="{middle}" r="2" fill="{LINE}"/>\n')
            out += [
                f'<circle cx="{columns[other]}" cy="{middle}" r="5" fill="{INK}"><title>{room} imports {other}</title>'
                "</circle>\n"
                for other in tops
                if other in imports(room)
            ]
    y += 10
    for x, fill, said in (
        (LEFT, DEVICE, "runs on a device: no torch, no compiler"),
        (LEFT + 290, PLUGIN, "installed packages add to it (and to targets) by entry points"),
    ):
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{fill}"/>\n')
        out.append(_text(x + 20, y + 11.5, said, PALE, size=12))
    out.append(f'<circle cx="{matrix + 6}" cy="{y + 7}" r="5" fill="{INK}"/>\n')
    out.append(_text(matrix + 18, y + 11.5, "an import", PALE, size=12))
    return "".join(out) + "</svg>\n"


def _text(
    x: float, y: float, text: str, fill: str = INK, size: int = 13, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(text)}</text>\n"
    )


def main() -> None:
    """Writes both."""
    DRAWING.write_text(drawing(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
