"""Writes an artifact's weights to the files that other projects load: one file a container."""

FORMATS = ("gguf", "comfy")
"""The containers."""
