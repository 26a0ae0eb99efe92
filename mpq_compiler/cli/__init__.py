"""``mpqc``: one file a command; `mpqc` has the parser and the exits."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
