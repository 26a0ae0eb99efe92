"""`pytest --gpu`, on a machine whose GPU is the emulator's driver: what a real one will be asked to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("tvm")
from tests.harness.cuda import emulator, nvcc
from tests.harness.tree import ROOT


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    emulator.needs()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "--gpu", *arguments]
    environment = emulator.environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_same_tests_run_on_a_gpu(tmp_path):
    """Machine code is its compiler's, here that of the emulator; what only the emulator knows is left out."""
    home = nvcc.install(tmp_path)
    tests = ("test_gemm.py::test_the_bits_of_the_definition[wgmma-split]", "test_mutants.py::test_mistakes_are_noticed")
    done = run(*(f"tests/backends/cuda/{test}" for test in tests), CUDA_HOME=str(home), MPQ_EMULATED_SM="90")
    assert "1 passed" in done.stdout, done.stdout[-3000:]
    assert "for the emulator alone, and --gpu asks for a GPU" in done.stdout


def test_a_gpu_that_is_not_there():
    done = run("tests/backends/cuda/test_gemm.py", MPQ_EMULATED_DEVICES="0")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.count("\n") <= 2 and "the NVIDIA driver finds no GPU on this machine" in done.stderr
