"""Runs an artifact without torch: on this CPU, a GPU, or a device over the network."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
