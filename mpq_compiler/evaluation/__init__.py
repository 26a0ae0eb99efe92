"""Quality of images: metrics, and what is drawn to compute them."""

from mpq_compiler import _moved

__getattr__ = _moved.forward(__name__)  # the names of the module that this room was
