"""The linker of a target: a compiler driver of this machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target

VECTOR_GRANULE = Path(__file__).with_name("vg.c")
"""The source of a function that LLVM calls where code enters streaming mode."""


def linker(target: Target) -> str:
    """The name of the compiler driver that links for the target. UserError: it is not installed."""
    own = platform.machine() == target.arch
    names = ("gcc", "cc", "clang") if own else (f"{target.arch.replace('_', '-')}-linux-gnu-gcc",)
    for name in names:
        if shutil.which(name):
            return name
    package = "gcc" if own else f"gcc-{target.arch.replace('_', '-')}-linux-gnu"
    raise UserError(f"cannot link for '{target.name}': {names[0]} is not installed; install it (apt install {package})")


def add_vector_granule(target: Target, path: Path) -> None:
    """Adds the function of `VECTOR_GRANULE` to an object file, so that it has all that it calls.

    Objects that are linked share one. UserError: there is no compiler for the target.
    """
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        compiled, joined = Path(folder, "vg.o"), Path(folder, "joined.o")
        for options in (
            ["-std=gnu11", "-O2", "-fPIC", "-c", str(VECTOR_GRANULE), "-o", str(compiled)],
            ["-r", "-nostdlib", str(path), str(compiled), "-o", str(joined)],
        ):
            subprocess.run([linker(target), *options], check=True, capture_output=True)
        shutil.move(joined, path)
