"""The linker of a target: a compiler driver of this machine."""

from __future__ import annotations

import platform
import shutil

from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target


def linker(target: Target) -> str:
    """The name of the compiler driver that links for the target. UserError: it is not installed."""
    own = platform.machine() == target.arch
    names = ("gcc", "cc", "clang") if own else (f"{target.arch.replace('_', '-')}-linux-gnu-gcc",)
    for name in names:
        if shutil.which(name):
            return name
    package = "gcc" if own else f"gcc-{target.arch.replace('_', '-')}-linux-gnu"
    raise UserError(f"cannot link for '{target.name}': {names[0]} is not installed; install it (apt install {package})")
