"""Measures the memory that a kernel takes from its thread's pool while it runs."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule
from tvm.ir import Call
from tvm.ir.instrument import pass_instrument

PAGE = 4096
"""Bytes of a page in the pool."""


@pass_instrument
class Workspaces:
    """Counts the bytes of a kernel's workspaces while it is compiled, as if all were in use at once."""

    def __init__(self) -> None:
        self.size = 0

    def run_after_pass(self, module: IRModule, info: Any) -> None:
        """Counts the allocations in the module that TVM has lowered to calls of its runtime."""
        if info.name == "tirx.LowerTVMBuiltin":
            self.size = 0
            for function in module.functions.values():
                tvm_ffi.structural_walk(function.body, (Call, self._visit))

    def _visit(self, call: Call) -> None:
        if getattr(call.op, "name", "") == "tirx.TVMBackendAllocWorkspace":
            self.size += -(-int(call.args[2]) // PAGE) * PAGE
