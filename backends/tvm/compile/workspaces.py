"""How much memory a kernel takes from the pool of a thread while it runs."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule
from tvm.ir import Call
from tvm.ir.instrument import pass_instrument

PAGE = 4096
"""Bytes of a page of the pool."""


@pass_instrument
class Workspaces:
    """Counts while a kernel is compiled: `size` bytes, as if all of its workspaces were in use at once."""

    def __init__(self) -> None:
        self.size = 0

    def run_after_pass(self, module: IRModule, info: Any) -> None:
        """Reads them off what TVM makes calls of its runtime of."""
        if info.name == "tirx.LowerTVMBuiltin":
            self.size = 0
            for function in module.functions.values():
                tvm_ffi.structural_walk(function.body, (Call, self._visit))

    def _visit(self, call: Call) -> None:
        if getattr(call.op, "name", "") == "tirx.TVMBackendAllocWorkspace":
            self.size += -(-int(call.args[2]) // PAGE) * PAGE
