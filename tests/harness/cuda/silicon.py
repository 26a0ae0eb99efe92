"""The GPU of this machine, where `pytest --gpu` asks for it: kernels run there in place of the emulator."""

from __future__ import annotations

import os
import platform

import pytest

from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.table import TARGETS, Target

ASKED = "MPQ_TEST_GPU"


def ask() -> None:
    """From here on, in all processes of the run. UsageError: there is none."""
    if not nvidia.gpus():
        raise pytest.UsageError(
            "--gpu: the NVIDIA driver finds no GPU on this machine; leave it out, and kernels run on an emulator"
        )
    os.environ[ASKED] = "1"


def asked() -> bool:
    return ASKED in os.environ


def level() -> int:
    """The compute capability of the GPU that TVM's runtime takes."""
    return nvidia.levels()[0]


def compiled(source: str) -> bytes:
    """Machine code of a CUDA source."""
    return machine_code.fatbin(source, [level()])


def target() -> Target:
    """The one whose machine code the GPU runs, and nothing beside."""
    fitting = [t for t in TARGETS.values() if t.is_cuda and not t.is_cuda12 and t.arch == platform.machine()]
    fitting = [t for t in fitting if len(t.levels) == 1 and nvidia.runs(t.levels, level())]
    if not fitting:
        pytest.skip(f"no target has code for sm_{level()}")
    return max(fitting, key=lambda t: t.levels)
