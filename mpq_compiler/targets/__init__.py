"""What a machine can do: CPUs and GPUs by name, their features and their numerics."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
