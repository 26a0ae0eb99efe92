"""Kernels for GPUs: the problems of `kernels/` in CUDA, for integer tensor cores.

A template writes what every thread does: grids and blocks, copies to shared memory, barriers. TVM makes CUDA C++ of it
and the wrapper that launches it, and changes nothing (`threads.primfunc`); NVIDIA's compiler makes machine code of that
when the artifact is compiled (`machine_code`). No tensor intrinsic is matched and nothing is scheduled.

Arithmetic is that of the CPU's kernels: sums of integers are exact, and every float operation rounds by itself
(`vmath.CUDA`), so what differs is the order in which floats are added up in norms, attention and float products.
"""
