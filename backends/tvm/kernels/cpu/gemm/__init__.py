"""Quantized linear layers and convolutions on CPU: one integer GEMM template for all formats and targets.

Arithmetic (exact, the same bits on every target): ``A_j = sum_k (q - z_j[g]) * w`` over segment j in int32;

    y = bias or 0
    for j ascending:                                y = fma(f32(A_j), f32(act_scale[j,g] * scale[i,j]), y)
    where weights have offsets, for j ascending:    y = fma(f32(S_j), f32(act_scale[j,g] * offset[i]), y)

with ``S_j = sum_k (q - z_j[g])``; then the epilogue. Of dynamic activations the scale and the zero point are
those of the row m, the same for all segments; of more than two segments they count once for all, so that each costs one
multiply-add (with ``W_j = sum_k w``):

    t = 0; c = 0
    for j ascending:                                t = fma(f32(sum_k q * w), f32(scale[i,j]), t)
                                                    c = fma(f32(W_j), f32(scale[i,j]), c)         (once, at load)
    y = fma(act_scale[m], fma(-f32(z[m]), c, t), bias or 0)

Modules, in the order of the data (docs/kernels.md says why it is built so):

    schedule.py     chunks of rows, slices of k, and how the input is read
    gather.py       the activations of a chunk (sums.py: their sums, for weights with offsets)
    weights.py      the weights of a block of output channels
    accumulate.py   dot products of a tile of rows and a block
    tiles.py        the same on tiles of AMX (outer.py: of SME; in_tiles.py: what both have in common)
    finish.py       scales, bias, epilogue, stores
    spread.py       the tile that is finished while the next one is multiplied
    kernel.py       the loops over all of that (control.py: control flow of emitted code)
"""

from mpq_compiler.backends.tvm.kernels.cpu.gemm.kernel import arguments, build

__all__ = ["arguments", "build"]
