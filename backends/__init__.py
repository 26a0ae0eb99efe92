"""What turns a packed program into something that runs: one package a kind of target, each with ``build``."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
