"""Quantized linear layers and convolutions on integer tensor cores; arithmetic as of `cpu.gemm`.

A block of threads makes a tile of rows x output channels, in steps of 64 values of k. Activations are copied to shared
memory in chunks of 16 values, several steps ahead (`cp.async`); a row of 64 bytes has its 4 chunks swapped by its
number, so that `ldmatrix` meets no bank twice. Weights are copied as they lie (`weights.Fragments`) and read by the
lanes that need them; below 8 bits they are looked up in registers (`__byte_perm`).

A convolution is the same product with other addresses: what depends on the row alone (the pixel under the first tap) is
computed once; a chunk's tap and channel are shared by all rows of a thread. Pixels of the border are copied from where
zero points stand; rows and taps that do not exist are zero.

Sums of activations, which weights with an offset ask for, are one more product, with ones.

Where tiles are too few for a GPU, several blocks share the k axis of one: their sums of integers go to memory, and a
second grid adds them up and finishes, to the same bits.
"""

from mpq_compiler.backends.tvm.kernels.cuda.gemm.kernel import arguments, build, parameters, workspaces

__all__ = ["arguments", "build", "parameters", "workspaces"]
