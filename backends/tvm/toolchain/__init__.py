"""NVIDIA's compilers, and the machine code they make."""
