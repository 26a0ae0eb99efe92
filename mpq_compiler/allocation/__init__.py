"""Which layer gets which bits: tables of losses, budgets, the integer program."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
