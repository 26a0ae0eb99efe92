"""Attention with products in bfloat16 or in 8 bits: `ops.attention` with those numerics, in registers or on tiles."""

from __future__ import annotations

from functools import partial

from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import primfunc
from mpq_compiler.backends.tvm.kernels.cpu.attention import tiled
from mpq_compiler.backends.tvm.kernels.cpu.isa import of_family
from mpq_compiler.backends.tvm.kernels.cpu.tile_attention import (
    TileBfloat16,
    TileBfloat16Ready,
    TileCodes,
    TileCodesReady,
    fits,
)
from mpq_compiler.backends.tvm.kernels.cpu.word_attention import (
    Bfloat16,
    Bfloat16Ready,
    Codes,
    CodesReady,
    SquareBfloat16,
    SquareCodes,
)
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready, arguments
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.numerics import BF16
from mpq_compiler.targets.table import TARGETS


def build(problem: FastAttention | Ready, isa: str = "avx512vnni", name: str = "fast_attention") -> PrimFunc:
    """The kernel. UserError: the target has none in those numerics."""
    own = of_family(isa)
    pairs = problem.numerics == BF16
    if problem.numerics not in TARGETS[own.name].numerics:
        raise UserError(f"no kernel of '{own.name}' computes attention in {problem.numerics}")
    on_tiles = fits(problem, own)
    if isinstance(problem, Ready):
        of_pairs, of_codes = (TileBfloat16Ready, TileCodesReady) if on_tiles else (Bfloat16Ready, CodesReady)
        ready = of_pairs if pairs else of_codes
        return primfunc(name, arguments(problem), lambda batch, buffers: ready(own, problem, buffers).emit(batch))
    bodies = (TileBfloat16, TileCodes) if on_tiles else (Bfloat16, Codes)
    if own.unit > 1:
        bodies = (SquareBfloat16, SquareCodes)
    return tiled(problem, arguments(problem), partial(bodies[0 if pairs else 1], own), isa, name)
