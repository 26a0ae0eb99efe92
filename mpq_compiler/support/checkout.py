"""Guards against a checkout without symbolic links, which would fail later with a puzzling error."""

from __future__ import annotations

from pathlib import Path

_LINKS = ("passes", "backends")


def require_links() -> None:
    """ImportError when git checked this package's links out as text files, as it does on Windows."""
    folder = Path(__file__).parents[1]
    for name in _LINKS:
        if (folder / name).is_file():
            raise ImportError(
                f"{folder / name} must be a link to ../{name}, and git checked it out as a text file: "
                f"run `git config core.symlinks true && git checkout -- mpq_compiler/{name}`"
            )
