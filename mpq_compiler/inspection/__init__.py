"""Reads what a compilation left behind: dumps, decisions, scores."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
