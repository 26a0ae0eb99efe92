"""Building blocks of kernels for CPUs and GPUs alike."""
