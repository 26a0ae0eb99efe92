"""Kernels for CPUs: one module a family."""
