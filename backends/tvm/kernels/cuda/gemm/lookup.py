"""Weights looked up in registers: four codes at once, as the nibbles of a selector."""

from __future__ import annotations

from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath


def byte_perm(low: Any, high: Any, selector: Any) -> Expr:
    """The word whose byte i is the one of `high:low` that nibble i of the selector numbers (CUDA's __byte_perm)."""
    return T.call_pure_extern("uint32", "__byte_perm", low, high, selector)


def looked_up(table: list[Any], selector: Any) -> Any:
    """The bytes of a table of 4, 8 or 16 entries that 4 nibbles select."""
    if len(table) == 1:
        return byte_perm(table[0], T.uint32(0), selector)
    if len(table) == 2:
        return byte_perm(table[0], table[1], selector)
    chosen = vmath.keep(selector)
    within = vmath.keep(chosen & T.uint32(0x7777))
    low, high = byte_perm(table[0], table[1], within), byte_perm(table[2], table[3], within)
    half = chosen >> T.uint32(1) & T.uint32(0x4444)  # of each byte, as what selects it from the one or the other
    return byte_perm(low, high, half | T.uint32(0x3210))
