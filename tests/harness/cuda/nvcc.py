"""In the place of NVIDIA's compiler: makes emulated kernels, which the driver loads as they are."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.harness.cuda import emulator


def install(folder: Path) -> Path:
    """A folder for CUDA_HOME with this compiler."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    root = Path(__file__).parents[3]
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m tests.harness.cuda.nvcc "$@"\n')
    program.chmod(0o755)
    return folder


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("emulator", emulator.version())
    else:
        output, source = Path(sys.argv[sys.argv.index("-o") + 1]), Path(sys.argv[-1])
        output.write_bytes(emulator.compiled(source.read_text()))
