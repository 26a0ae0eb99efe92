"""What several workers of a run need and one of them makes: compiled artifacts.

>>> path = once.made("tiny.mpq", lambda path: compile("unet2d", path, recipe="w8a8"))    # read only
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mpq_compiler.support import cache


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder of that name, which the first to ask has made; of this run, whatever its cache outlives.

    Others wait for it. No test may change it: copy it first.
    """
    folder = cache.folder() / "made" / os.environ["MPQ_TEST_BEGIN"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            partial = folder / "partial" / name
            partial.parent.mkdir(exist_ok=True)
            make(partial)
            partial.rename(path)
    return path
