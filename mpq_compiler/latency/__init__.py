"""What kernels take: tables of times, and how they are measured."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
