"""Calls after the second allocate nothing worth the name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler.backends.tvm.build import build
from mpq_compiler.targets import table as targets
from tests.harness import packed

ROOT = Path(__file__).parents[3]
CALLS = """
import ctypes, sys
import numpy as np
from mpq_compiler.runtime import compiled_denoiser as runtime

counter = ctypes.CDLL(sys.argv[2])
for threads in (1, 2):
    loaded = runtime.load(sys.argv[1], threads=threads)
    for batch in (1, 2):
        rng = np.random.default_rng(7)
        inputs = {v["name"]: rng.standard_normal((batch, *v["shape"][1:])).astype(np.float32)
                  if v["dtype"] == "float32" else np.full((batch,), 5, v["dtype"])
                  for v in loaded.manifest["functions"][0]["inputs"]}
        out = np.empty_like(loaded.run(inputs))
        loaded.run(inputs, out=out)
        counter.allocations_watch(1)
        for call in range(5):
            loaded.run(inputs, out=out)
        print(threads, batch, counter.allocations_seen(), counter.allocations_largest())
        counter.allocations_watch(0)
counter.allocations_watch(1)
np.empty(1 << 20)
assert counter.allocations_seen() == 1, "the counter does not count"
"""


def test_no_allocation_above_4_kib_after_the_second_call(tmp_path):
    """Counted by a library that is loaded before libc: malloc and its kin, and mmap."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which compiles the counter, is not installed")
    target = targets.resolve("native")
    if target.backend != "tvm":
        pytest.skip("no kernels for this machine")
    case = packed.program(packed.BUNDLED)
    built = build(case.program, target, (1, 2), jobs=2, cache=packed.kernel_cache())
    artifact = packed.write(tmp_path / "a.mpq", case.program, target, built)
    counter = tmp_path / "allocations.so"
    source = ROOT / "tests" / "harness" / "allocations.c"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", str(source), "-o", str(counter), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(artifact), str(counter)],
        # Python's own allocator takes whole arenas now and then.
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(counter), "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert rows == [(threads, batch, 0, 0) for threads in (1, 2) for batch in (1, 2)]
