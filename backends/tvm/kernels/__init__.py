"""Generated kernels: the problems they solve, and their code for CPUs and GPUs."""
