"""Checkouts: their links, without which a puzzling error comes later, and where they and installations have pages."""

from __future__ import annotations

import sysconfig
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


def pages() -> Path:
    """The folder of README.md and docs/: the checkout, or where a wheel has put them (`setup.cfg`, data_files)."""
    checkout = Path(__file__).parents[2]
    installed = Path(sysconfig.get_path("data"), "share", "doc", "mpq-compiler")
    return checkout if (checkout / "setup.cfg").is_file() else installed
