"""The programs whose instructions the model of ARM cores counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import arm_static
from mpq_compiler.backends.tvm.plan.calls import Kernel, record
from mpq_compiler.targets.table import TARGETS
from tests.harness import qemu


@pytest.mark.skipif(qemu.missing() is not None, reason=str(qemu.missing()))
def test_a_program_of_a_kernel_links_and_runs(tmp_path: Path) -> None:
    fields = {"height": 4, "width": 1, "channels": 32, "outputs": 32, "rank": 3, **arm_static.FORMATS["w8"]}
    target = TARGETS["aarch64-dotprod"]
    path = arm_static.program(Kernel("gemm", record("problem.QuantMatmul", **fields)), target, tmp_path)
    ran = arm_static.executions(path, tmp_path, target)
    assert sum(each.count * each.executions for each in ran) > 1000
