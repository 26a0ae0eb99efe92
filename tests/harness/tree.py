"""A copy of this tree to build from, so that building leaves nothing behind in the tree itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def files() -> list[str]:
    """What git tracks, or would: paths relative to the root, the two links among them as links."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]  # whoever owns the tree
    command = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted({name for name in done.stdout.split("\0") if name and (ROOT / name).exists()})


def copy(destination: Path) -> Path:
    """Copies those files to `destination`, links as links, and returns it."""
    for name in files():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return destination
