"""Writes an artifact's weights to the files that other projects load: one module a container."""

FORMATS = ("gguf", "comfy", "sdnq")
"""The containers."""
