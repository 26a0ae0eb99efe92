"""NVIDIA's compilers, and the machine code that they generate."""
