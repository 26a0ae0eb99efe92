"""What `prepare` makes of a layer has the shapes that the kernel of the layer reads, on every CPU target.

How weights lie may depend on the rows of a layer, of which `prepare` knows only what its problem says.
"""

from __future__ import annotations

import pytest

from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.targets.table import TARGETS
from tests.harness import packed

CASES = [("unet2d-17x23", "int4", ""), ("sd15", "int8", "split-shortcut,bos-split"), (packed.BUNDLED, "int3", "")]
"""Channels that are padded for tiles, few rows beside many, segments."""


@pytest.mark.parametrize("target", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_prepared_weights_lie_as_kernels_read_them(case, target):
    row, plan = TARGETS[target], lower(packed.program(*case).program, (1,))
    made = {}
    for call in plan.preparation:
        if call.kernel.template == "prepare":
            shapes = {a.name: (a.shape, a.dtype) for a in templates.arguments(call.kernel, row)[1]}
            made |= {value: shapes[name] for name, value in call.results}
    read = 0
    for call in plan.functions[0].calls:
        if call.kernel.template == "gemm":
            wanted = {a.name: (a.shape, a.dtype) for a in templates.arguments(call.kernel, row)[0]}
            for name, value in call.operands:
                if value in made:
                    assert made[value] == wanted[name], (call.node, name)
                    read += 1
    assert read > 100
