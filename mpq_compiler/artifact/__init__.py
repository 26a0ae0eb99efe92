"""The bundle on disk: written whole, verified when read."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
