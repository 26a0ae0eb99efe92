"""What kernels compute, as data that code for CPUs and GPUs shares."""
