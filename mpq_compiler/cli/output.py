"""Files that commands write: refused before the work begins, and written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import check_place, write_whole


def require_new(path: str | Path, overwrite: bool, *, folder: bool = False) -> None:
    """UserError where an output, a file or a folder, cannot be written, or exists and may not be replaced."""
    from mpq_compiler.artifact.bundle import MANIFEST, PIPELINE

    path = Path(path)
    check_place(path)
    if any((path.parent / name).is_file() for name in (MANIFEST, PIPELINE)):
        raise UserError(f"'{path.parent}' is an artifact, which another file would damage; name another place")
    if path.is_dir() and not folder:
        raise UserError(f"'{path}' is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"'{path}' exists; choose another name or add --overwrite")


def write_text(text: str, path: Path) -> None:
    """Write text whole, in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def write_json(document: Any, path: Path) -> None:
    """Write a JSON document whole, indented, with a newline at its end."""
    write_text(json.dumps(document, indent=1) + "\n", path)
