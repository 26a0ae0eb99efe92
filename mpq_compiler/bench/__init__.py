"""Artifacts timed against baselines, side by side in one run."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
